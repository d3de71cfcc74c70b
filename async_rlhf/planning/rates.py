"""How fast each stage of a run is: read off its metrics, or given in a YAML file."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml

from async_rlhf.config import Config
from async_rlhf.errors import ConfigError
from async_rlhf.planning.lengths import Lengths
from async_rlhf.stage_times import SETTLED_VERSION, Row, settled

MIN_UPDATES = 8
"""Settled updates that a measurement takes."""
MIN_VARIATION = 0.05
"""Standard deviation of the groups per call over their mean, below which their effect cannot be told."""
STEP = ("generate/step_fixed_s", "generate/step_completion_s", "generate/step_prompt_s")
NEEDED = ("generate/idle_share", "train/tokens_per_s", "weights/export_s", "weights/install_s", *STEP)
SHARED = ("generate/work_s", "generate/cpu_s", "score/cpu_s", "train/cpu_s", "queue/cpu_s", "time/driver_cpu_s")
"""Processor seconds: what a measurement takes besides where processes shared cores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Seconds of the pipeline's work. A fixed one is needed whatever the size of the work; the others grow with it."""

    engine_step_s: float
    """One step of an engine, besides what each completion adds."""
    engine_completion_s: float
    """What each completion in the batch adds to a step: 1 / this is the engine's top rate, tokens per second."""
    engine_prompt_s: float = 0.0
    """What each completion that joins adds to its first step besides: its prompt is read."""
    engine_beside_s: float = 0.0
    """What the generator's process does for each completion beside the engine's steps, which take turns with it."""
    score_call_s: float = 0.0
    score_token_s: float = 0.0
    """Per token of a sequence, prompt included."""
    reward_call_s: float = 0.0
    """A reward actor's, as score_call_s; before the scorer's."""
    reward_token_s: float = 0.0
    take_s: float = 0.0
    """From a batch's decision until the ranks begin."""
    step_fixed_s: float = 0.0
    """Of train_step, besides what follows."""
    prepare_token_s: float = 0.0
    """Once per batch, per token of a sequence, on one rank."""
    train_token_s: float = 0.0
    """Forward and backward, per token of a sequence and pass, on one rank."""
    optimizer_s: float = 0.0
    """Per optimizer step."""
    allreduce_s: float = 0.0
    """Per optimizer step, times 2 (ranks - 1) / ranks: the gradient's bytes over the slowest link."""
    export_s: float = 0.0
    """Snapshot of the policy and its way to the broadcaster."""
    book_s: float = 0.0
    """Between the push of an update and the learner's next question; without checkpoints and restarts."""
    transfer_s: float = 0.0
    """From a version's publication until a generator has it, checked."""
    load_s: float = 0.0
    """In which the generator does not sample: the weights are replaced. The canary's step, and running completions, come on top."""
    call_s: float = 0.002
    """A call from actor to actor, by way of the driver: how long nobody works for it."""
    call_work_s: float = 0.0
    """Of a core, for the same call: in the driver, the queue and Ray."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            positive = item.name in ("engine_completion_s",)
            if not (math.isfinite(value) and (value > 0 if positive else value >= 0)):
                raise ConfigError(f"{item.name} must be a number of seconds {'> 0' if positive else '>= 0'}, got {value!r}")

    def scaled(self, factor: float) -> "Rates":
        """All of them, times `factor`."""
        return dataclasses.replace(self, **{item.name: factor * getattr(self, item.name) for item in dataclasses.fields(self)})

    def train_step_s(self, num_tokens: float, *, ranks: int, epochs: int, minibatches: int) -> float:
        """One train_step over `num_tokens` tokens of sequences."""
        steps = epochs * minibatches
        shared = (self.prepare_token_s + self.train_token_s * epochs) * num_tokens / ranks
        return self.step_fixed_s + shared + steps * (self.optimizer_s + self.allreduce_s * 2 * (ranks - 1) / ranks)


def read_rates(file: Path) -> Rates:
    """From a YAML file: a mapping of the names above to seconds.

    Raises:
        ConfigError: it is none.
    """
    try:
        tree: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"the rates {file} cannot be read: {error}") from None
    names = {item.name: item.default is dataclasses.MISSING for item in dataclasses.fields(Rates)}
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} must hold a mapping of rates, for instance engine_completion_s: 4.0e-4; known: {', '.join(names)}")
    given = {str(name): value for name, value in cast(dict[Any, Any], tree).items()}
    unknown, missing = sorted(set(given) - set(names)), sorted(name for name, needed in names.items() if needed and name not in given)
    if unknown or missing:
        what = f"unknown {', '.join(unknown)}" if unknown else f"no {', '.join(missing)}"
        raise ConfigError(f"{file}: {what}; known: {', '.join(names)}")
    try:
        return Rates(**{name: float(value) for name, value in given.items()})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{file}: {error}") from None


def measured_rates(rows: Sequence[Row], config: Config, lengths: Lengths, *, shared_cores: bool = False) -> Rates:
    """What a run's rows say of its stages.

    Args:
        rows: of metrics.jsonl.
        lengths: of the completions of the same run.
        shared_cores: its processes waited for cores; the rates are what they would need with cores of their own: their processor time.
    Raises:
        ConfigError: fewer than MIN_UPDATES settled updates, or rows without the keys that this takes.
    """
    keys = (*SHARED, *(["reward/cpu_s"] if config.reward.count else [])) if shared_cores else ()
    spans = _spans(rows, keys)
    update_s = float(np.mean([seconds for seconds, _ in spans]))

    def mean(key: str) -> float:
        return float(np.mean([row.get(key, 0.0) for _, row in spans]))

    group_tokens = config.completions_per_prompt * lengths.mean_sequence_tokens
    tokens = float(np.mean([row["train/tokens_per_s"] * row["train/step_s"] for _, row in spans])) / config.algorithm.epochs_per_batch
    epochs, steps = config.algorithm.epochs_per_batch, config.algorithm.epochs_per_batch * config.algorithm.minibatches_per_batch
    step_s, ranks = mean("train/step_s"), config.learner.num_ranks
    sampling, learning = 1.0, 1.0  # how much of their time these two had a core
    if shared_cores:
        sampling = _share(sum(row["generate/work_s"] for _, row in spans), sum(_busy_s(*span, config) for span in spans))
        learning = _share(mean("train/cpu_s"), (step_s + mean("weights/gather_s")) * ranks)
    engine, beside_s = _engine(spans, config, sampling, shared_cores=shared_cores)
    prepare_s, optimizer_s = learning * mean("train/prepare_s"), learning * mean("train/optimizer_s")
    passes_s = learning * mean("train/forward_backward_s") or max(0.0, learning * step_s - prepare_s - optimizer_s)
    call_s, token_s = _raters(spans, "score", config.scorer.count, group_tokens, shared_cores=shared_cores)
    reward_call_s, reward_token_s = _raters(spans, "reward", config.reward.count, group_tokens, shared_cores=shared_cores)
    take_s, export_s = mean("train/take_s"), mean("weights/export_s")
    return Rates(
        engine_step_s=engine[0],
        engine_completion_s=engine[1],
        engine_prompt_s=engine[2],
        engine_beside_s=beside_s,
        score_call_s=call_s,
        score_token_s=token_s,
        reward_call_s=reward_call_s,
        reward_token_s=reward_token_s,
        take_s=learning * take_s,
        step_fixed_s=max(0.0, learning * step_s - prepare_s - passes_s - optimizer_s),
        prepare_token_s=prepare_s * ranks / tokens,
        train_token_s=passes_s * ranks / (epochs * tokens),
        optimizer_s=optimizer_s / steps,
        export_s=learning * export_s,
        book_s=learning * max(0.0, update_s - mean("queue/wait_s") - take_s - step_s - export_s),
        transfer_s=sampling * mean("weights/transfer_s"),
        load_s=sampling * mean("weights/pause_s"),
    )


def num_trained(config: Config, *, tied: bool = False) -> int:
    """Completions of a group that the algorithm trains on."""
    size, name = config.completions_per_prompt, config.algorithm.name
    return 0 if tied and name == "dpo" else min(size, {"dpo": 2, "bok": 1}.get(name, size))


def measured_update_s(rows: Sequence[Row]) -> float:
    """Mean seconds of a settled update."""
    return float(np.mean([seconds for seconds, _ in _spans(rows)]))


def measured_calls_work_s(rows: Sequence[Row]) -> float:
    """Processor seconds that driver and queue spend on an update: on the calls between the actors."""
    return float(np.mean([row["queue/cpu_s"] + row["time/driver_cpu_s"] for _, row in _spans(rows, SHARED)]))


def _spans(rows: Sequence[Row], keys: Sequence[str] = ()) -> list[tuple[float, Row]]:
    """Seconds and row of each settled update that holds what a measurement takes, `keys` among it.

    Raises:
        ConfigError: they are fewer than MIN_UPDATES.
    """
    needed = (*NEEDED, *keys)
    # The last update is not like the others: no ticket goes out any more.
    spans = [span for span in settled(rows[:-1]) if all(math.isfinite(span[1].get(key, math.nan)) for key in needed)]
    if len(spans) < MIN_UPDATES:
        raise ConfigError(
            f"the run has {len(spans)} whole updates after its first {SETTLED_VERSION} and before its last one with {', '.join(needed)}; a "
            f"measurement takes {MIN_UPDATES}; train longer, or anew if its rows lack one of these, or give rates (--rates)"
        )
    return spans


def _share(part: float, whole: float) -> float:
    """In (0, 1]."""
    return min(1.0, max(part, 1e-9) / max(whole, 1e-9))


def _busy_s(seconds: float, row: Row, config: Config) -> float:
    """All engines' seconds in steps, of an update."""
    return seconds * (row.get("generate/generators", 0.0) or config.generator.count) * (1 - row["generate/idle_share"])


def _engine(
    spans: Sequence[tuple[float, Row]], config: Config, sampling: float, *, shared_cores: bool
) -> tuple[tuple[float, float, float], float]:
    """Seconds of an engine's step: fixed, per completion, per one that joins; and what its process does beside, per completion."""
    known = [row for _, row in spans if row["generate/step_fixed_s"] + row["generate/step_completion_s"] > 0]
    if not known:
        raise ConfigError("the run's rows show no sampling (generate/step_fixed_s, generate/step_completion_s); give rates (--rates)")
    fixed, completion, prompt = (float(np.median([row[key] for row in known])) for key in STEP)
    beside_s = 0.0
    if shared_cores:
        completions = sum(seconds * row["generate/groups_per_s"] for seconds, row in spans) * config.completions_per_prompt
        installs_s = sampling * sum(row["weights/pause_s"] + row["weights/canary_s"] for _, row in spans)
        beside_s = max(0.0, sum(row["generate/cpu_s"] - row["generate/work_s"] for _, row in spans) - installs_s) / max(1.0, completions)
    return (fixed, max(completion, 1e-9), prompt), beside_s


def _line(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> tuple[float, float] | None:
    """Fixed part and slope of the line through the points (least squares); None: they are too few, too near, or show none."""
    if len(x) < MIN_UPDATES or float(x.std()) < MIN_VARIATION * float(x.mean()):
        return None
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    fixed = float(y.mean()) - slope * float(x.mean())
    return (fixed, slope) if slope > 0 and fixed >= 0 else None


def _raters(spans: Sequence[tuple[float, Row]], pool: str, count: int, group_tokens: float, *, shared_cores: bool) -> tuple[float, float]:
    """Seconds of a call of a scorer, or reward actor: fixed, and per token. Where calls were not counted, all of it grows with the tokens.

    Args:
        pool: `score` or `reward`, as the keys begin; every group goes through both.
        count: of members.
    """
    idle, latency = f"{pool}/idle_share", f"{pool}/latency_s"
    rows = [(seconds, row) for seconds, row in spans if idle in row and row.get("score/groups_per_s", 0.0) > 0]
    if not rows or not count:
        return 0.0, 0.0

    def at_work_s(seconds: float, row: Row) -> float:
        return row[f"{pool}/cpu_s"] if shared_cores else seconds * count * (1 - row[idle])

    groups = sum(seconds * row["score/groups_per_s"] for seconds, row in rows)
    timed = [(seconds, row, seconds * count * (1 - row[idle]) / row[latency]) for seconds, row in rows if row.get(latency, 0.0) > 0]
    groups_per_call = np.array([seconds * row["score/groups_per_s"] / max(calls, 1e-9) for seconds, row, calls in timed])
    line = _line(groups_per_call, np.array([at_work_s(seconds, row) / max(calls, 1e-9) for seconds, row, calls in timed]))
    if line is not None:
        return line[0], line[1] / group_tokens
    return 0.0, sum(at_work_s(*span) for span in rows) / (groups * group_tokens)


def averaged(rates: Sequence[Rates]) -> Rates:
    """The mean of each rate."""
    names = [item.name for item in dataclasses.fields(Rates)]
    return Rates(**{name: float(np.mean([getattr(each, name) for each in rates])) for name in names})


def as_mapping(rates: Rates) -> Mapping[str, float]:
    """For JSON, and for a file that read_rates takes."""
    return dataclasses.asdict(rates)
