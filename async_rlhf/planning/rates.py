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
HALF_RATE_COMPLETIONS = 8.0
"""Completions at which an engine reaches half of its top rate, where a run's concurrency varied too little to tell."""
MIN_VARIATION = 0.05
"""Standard deviation of the concurrency over its mean, below which its effect cannot be told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Seconds of the pipeline's work. A fixed one is needed whatever the size of the work; the others grow with it."""

    engine_step_s: float
    """One step of an engine, besides what each completion adds."""
    engine_completion_s: float
    """What each completion in the batch adds to a step: 1 / this is the engine's top rate, tokens per second."""
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
    pause_s: float = 0.0
    """In which the generator does not sample: loading and canary."""
    call_s: float = 0.002
    """A call from actor to actor."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            positive = item.name in ("engine_completion_s",)
            if not (math.isfinite(value) and (value > 0 if positive else value >= 0)):
                raise ConfigError(f"{item.name} must be a number of seconds {'> 0' if positive else '>= 0'}, got {value!r}")

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


def measured_rates(rows: Sequence[Row], config: Config, lengths: Lengths) -> Rates:
    """What a run's rows say of its stages.

    Args:
        rows: of metrics.jsonl.
        lengths: of the completions of the same run.
    Raises:
        ConfigError: fewer than MIN_UPDATES settled updates, or rows without the keys that this takes.
    """
    spans = _spans(rows)
    if len(spans) < MIN_UPDATES:
        raise ConfigError(
            f"the run has {len(spans)} whole updates after its first {SETTLED_VERSION} and before its last one, a measurement takes "
            f"{MIN_UPDATES}; train longer, or give rates (--rates)"
        )
    update_s = float(np.mean([seconds for seconds, _ in spans]))

    def mean(key: str) -> float:
        return float(np.mean([row.get(key, 0.0) for _, row in spans]))

    tokens = config.batch_groups * config.completions_per_prompt * lengths.mean_sequence_tokens
    epochs, steps = config.algorithm.epochs_per_batch, config.algorithm.epochs_per_batch * config.algorithm.minibatches_per_batch
    step_s, ranks = mean("train/step_s"), config.learner.num_ranks
    prepare_s, optimizer_s = mean("train/prepare_s"), mean("train/optimizer_s")
    passes_s = mean("train/forward_backward_s") or max(0.0, step_s - prepare_s - optimizer_s)
    fixed, per_completion = _engine(spans, config)
    group_tokens = config.completions_per_prompt * lengths.mean_sequence_tokens
    call_s, token_s = _raters(spans, "score", config.scorer.count, group_tokens)
    reward_call_s, reward_token_s = _raters(spans, "reward", config.reward.count, group_tokens)
    take_s, export_s = mean("train/take_s"), mean("weights/export_s")
    pause_s = min(mean("weights/pause_s") + mean("weights/canary_s") or mean("weights/install_s"), mean("weights/install_s"))
    return Rates(
        engine_step_s=fixed,
        engine_completion_s=per_completion,
        score_call_s=call_s,
        score_token_s=token_s,
        reward_call_s=reward_call_s,
        reward_token_s=reward_token_s,
        take_s=take_s,
        step_fixed_s=max(0.0, step_s - prepare_s - passes_s - optimizer_s),
        prepare_token_s=prepare_s * ranks / tokens,
        train_token_s=passes_s * ranks / (epochs * tokens),
        optimizer_s=optimizer_s / steps,
        export_s=export_s,
        book_s=max(0.0, update_s - mean("queue/wait_s") - take_s - step_s - export_s),
        transfer_s=mean("weights/transfer_s") + max(0.0, mean("weights/install_s") - pause_s),
        pause_s=pause_s,
    )


def measured_update_s(rows: Sequence[Row]) -> float:
    """Mean seconds of a settled update."""
    spans = _spans(rows)
    return sum(seconds for seconds, _ in spans) / max(1, len(spans))


def _spans(rows: Sequence[Row]) -> list[tuple[float, Row]]:
    """Seconds and row of each settled update that holds what a measurement takes."""
    needed = ("generate/tokens_per_s", "weights/export_s", "weights/install_s")
    # The last update is not like the others: no ticket goes out any more.
    return [span for span in settled(rows[:-1]) if all(math.isfinite(span[1].get(key, math.nan)) for key in needed)]


def _line(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> tuple[float, float] | None:
    """Fixed part and slope of the line through the points (least squares); None: they are too few, too near, or show none."""
    if len(x) < MIN_UPDATES or float(x.std()) < MIN_VARIATION * float(x.mean()):
        return None
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    fixed = float(y.mean()) - slope * float(x.mean())
    return (fixed, slope) if slope > 0 and fixed >= 0 else None


def _engine(spans: Sequence[tuple[float, Row]], config: Config) -> tuple[float, float]:
    """Seconds of an engine's step: fixed, and per completion in its batch. A line through what each update showed."""
    concurrency: list[float] = []
    step_s: list[float] = []
    for seconds, row in spans:
        count = row.get("generate/generators", 0.0) or config.generator.count
        busy_s, tokens = seconds * count * (1 - row["generate/idle_share"]), row["generate/tokens_per_s"] * seconds
        if busy_s <= 0 or tokens <= 0:
            continue
        admitted = (config.max_staleness + 1) * config.batch_groups * config.completions_per_prompt / count
        running = row.get("generate/running_requests", min(config.generator.max_inflight, admitted) * count * busy_s / (seconds * count))
        completions = max(1.0, running * seconds / busy_s)
        concurrency.append(completions)
        step_s.append(busy_s * completions / tokens)
    if not concurrency:
        raise ConfigError("the run's rows show no sampling (generate/tokens_per_s, generate/idle_share); give rates (--rates)")
    x, y = np.array(concurrency), np.array(step_s)
    line = _line(x, y)
    if line is not None:
        return line
    per_completion = float(y.mean()) / (HALF_RATE_COMPLETIONS + float(x.mean()))
    return HALF_RATE_COMPLETIONS * per_completion, per_completion


def _raters(spans: Sequence[tuple[float, Row]], pool: str, count: int, group_tokens: float) -> tuple[float, float]:
    """Seconds of a call of a scorer, or reward actor: fixed, and per token. Where calls were not counted, all of it grows with the tokens.

    Args:
        pool: `score` or `reward`, as the keys begin; every group goes through both.
        count: of members.
    """
    idle, latency = f"{pool}/idle_share", f"{pool}/latency_s"
    rows = [(seconds, row) for seconds, row in spans if idle in row and row.get("score/groups_per_s", 0.0) > 0]
    if not rows or not count:
        return 0.0, 0.0
    busy_s = sum(seconds * count * (1 - row[idle]) for seconds, row in rows)
    groups = sum(seconds * row["score/groups_per_s"] for seconds, row in rows)
    timed = [row for _, row in rows if row.get(latency, 0.0) > 0]
    calls = np.array([count * (1 - row[idle]) / row[latency] for row in timed])
    groups_per_call = np.array([row["score/groups_per_s"] for row in timed]) / np.maximum(calls, 1e-9)
    line = _line(groups_per_call, np.array([row[latency] for row in timed]))
    return (line[0], line[1] / group_tokens) if line is not None else (0.0, busy_s / (groups * group_tokens))


def as_mapping(rates: Rates) -> Mapping[str, float]:
    """For JSON, and for a file that read_rates takes."""
    return dataclasses.asdict(rates)
