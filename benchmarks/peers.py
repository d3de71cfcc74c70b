"""Completions per second, and time to the same accuracy, against TRL 1.16: RLOO, GRPO and (experimental) online DPO.

    python benchmarks/peers.py [--quick] [--json FILE] [--cases rloo:10m:long,rloo:accuracy] [--tune]

Both sides get the same model folder (random weights, 1M, 10M or 50M parameters), prompts, reward, loss, optimizer, float32, batch
(64 completions per update; K = 4, for online DPO 2) and both cores. The model's head decides the lengths, so that no sampling setting
is needed: `long` ends each token with probability 1/32, limit 192; `fixed` never, limit 32. The learning rate is too small to change them.
Counted are trained completions per second over whole updates in steady state: without start-up, the first updates (WARM_UP) and, on our
side, the last ones, beside which nothing is sampled any more. Rounds alternate: ours, TRL's, TRL's, ours.

TRL runs in a virtual environment of its own (made here, once, in the cache folder) with the setting that was fastest here: --tune tries
those of TUNED and prints their rates. Ours runs `async-rlhf train` as it is, max_staleness 2 (1 in the time to accuracy), ties kept as
TRL keeps them.

Time to accuracy: the arithmetic task from the same supervised start (0.8M parameters) with RLOO, 256 completions per update, until the
greedy held-out accuracy is TARGET, looked at every EVERY updates. TRL's clock stands still meanwhile; ours samples its evaluations
beside training, and goes on.
"""

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import CHECKOUT, Goal, Spread, command_line, console, finish, in_turn, ratios, show
from peers_runs import train_ours, train_trl, trl_python, trl_versions
from peers_setup import ALGORITHMS, LENGTHS, SIZES, make_model, make_problems, make_prompts, make_start

COMPLETIONS = 64
MAX_STALENESS = 2
WARM_UP = {"ours": 4, "trl": 2}
"""Updates at the beginning that do not count: ours fills its queue first."""
TARGET, EVERY = 0.55, 10
ACCURACY_UPDATES, ACCURACY_COMPLETIONS = 150, 256
UPDATES = {("1m", "ours"): 40, ("10m", "ours"): 13, ("50m", "ours"): 12, ("1m", "trl"): 14, ("10m", "trl"): 6, ("50m", "trl"): 5}
BEST = {"processes": 2, "threads": 1, "microbatch": 32, "steps_per_generation": 1, "continuous": False, "bf16": False}
"""TRL's setting, as --tune finds it."""
TUNED: dict[str, Mapping[str, Any]] = {
    "2 processes, batch in 1 pass": {},
    "2 processes, batch in 4 passes": {"microbatch": 8, "steps_per_generation": 4},
    "2 processes, sampled in 2 parts": {"microbatch": 16},
    "2 processes, sampled in 4 parts": {"microbatch": 8},
    "1 process, 2 threads, 1 pass": {"processes": 1, "threads": 2, "microbatch": 64},
    "1 process, 2 threads, 4 passes": {"processes": 1, "threads": 2, "microbatch": 16, "steps_per_generation": 4},
    "1 process, 1 thread, 4 passes": {"processes": 1, "microbatch": 16, "steps_per_generation": 4},
    "2 processes, continuous batching": {"continuous": True},
    "2 processes, bf16 autocast": {"bf16": True},
}
GOALS = [Goal(metric=f"speedup_{name}", at_least=1.5) for name in ("rloo", "grpo", "online_dpo")]


Measured = dict[str, list[float]]
"""What each round gave: of `ours` and `trl` the rate or the time, of `ours_tokens` and `trl_tokens` the mean length."""


@dataclass(frozen=True, slots=True)
class Sides:
    """One run of each side, as something to measure."""

    ours: Callable[[], float]
    trl: Callable[[], float]
    lengths: Measured
    """Filled by the runs."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is compared: an algorithm at a size and kind of lengths; or, with neither, its time to an accuracy."""

    algorithm: str
    size: str = ""
    lengths: str = ""

    @classmethod
    def of(cls, text: str) -> "Case":
        """From rloo:10m:long, or rloo:accuracy.

        Raises:
            ValueError: it is neither.
        """
        match text.split(":"):
            case [algorithm, size, lengths] if algorithm in ALGORITHMS and size in SIZES and lengths in LENGTHS:
                return cls(algorithm, size, lengths)
            case ["rloo", "accuracy"]:
                return cls("rloo")
        known = (", ".join(names) for names in (ALGORITHMS, SIZES, LENGTHS))
        raise ValueError(f"a case is ALGORITHM:SIZE:LENGTHS ({'; '.join(known)}) or rloo:accuracy, got {text!r}")

    @property
    def metric(self) -> str:
        """The goal's cases carry the algorithm's name alone."""
        name = ALGORITHMS[self.algorithm].metric
        if not self.size:
            return f"time_to_accuracy_speedup_{name}"
        return f"speedup_{name}" if (self.size, self.lengths) == ("10m", "long") else f"speedup_{name}_{self.size}_{self.lengths}"


def rate(rows: Sequence[Mapping[str, float]], completions: int, *, first: int, last: int = 0) -> float:
    """Completions per second from the end of update `first` to the end of the last but `last`.

    Raises:
        ValueError: fewer than two updates are left.
    """
    kept = [row["time_s"] for row in rows[first - 1 : len(rows) - last]]
    if len(kept) < 3:
        raise ValueError(f"a rate needs two updates after the first {first} and before the last {last}, got {len(rows)} in all")
    return completions * (len(kept) - 1) / (kept[-1] - kept[0])


def time_to(target: float, times_s: Mapping[int, float], looks: Sequence[tuple[int, float]]) -> float:
    """Seconds of training until the first look at or above the target.

    Args:
        times_s: of each version. looks: version and accuracy, in order.
    Raises:
        ValueError: it was never reached.
    """
    for version, accuracy in looks:
        if accuracy >= target:
            return times_s[version]
    raise ValueError(f"accuracy {target} was not reached: the highest of {len(looks)} looks is {max((a for _, a in looks), default=0.0)}")


def speed_words(case: Case, folder: Path, updates: int) -> list[str]:
    """Our run of a case."""
    group = ALGORITHMS[case.algorithm].group
    size, lengths = SIZES[case.size], LENGTHS[case.lengths]
    return [
        "task=dataset",
        f"algorithm={case.algorithm}",
        f"model.path={make_model(folder, case.size, case.lengths)}",
        f"prompts.sources.words.path={make_prompts(folder)}",
        "prompts.held_out=8",
        f"reward.function={CHECKOUT}/benchmarks/peers_trl.py:score",
        f"updates={updates}",
        f"batch_groups={COMPLETIONS // group}",
        f"completions_per_prompt={group}",
        f"max_staleness={MAX_STALENESS}",
        f"generator.max_new_tokens={lengths.limit}",
        "generator.max_model_len=256",
        "generator.max_inflight=128",
        f"generator.kv_cache_mib={size.kv_cache_mib}",
        "learner.learning_rate=1e-7",
        "learner.warmup_steps=1",
    ]


def speed_settings(case: Case, folder: Path, updates: int) -> dict[str, Any]:
    """TRL's run of a case."""
    return {
        **BEST,
        "algorithm": case.algorithm,
        "model": str(make_model(folder, case.size, case.lengths)),
        "prompts": str(make_prompts(folder)),
        "reward": "score",
        "updates": updates,
        "completions": COMPLETIONS,
        "group": ALGORITHMS[case.algorithm].group,
        "max_new_tokens": LENGTHS[case.lengths].limit,
        "learning_rate": 1e-7,
        "warmup_steps": 1,
        "seed": 0,
    }


def speed(case: Case, folder: Path, python: Path, seed: int) -> Sides:
    """Completions per second of one run of each side; further: the mean lengths trained."""
    seeds = {"ours": itertools.count(seed), "trl": itertools.count(seed)}
    lengths: dict[str, list[float]] = {"ours": [], "trl": []}

    def ours() -> float:
        rows, _ = train_ours([*speed_words(case, folder, UPDATES[case.size, "ours"]), f"seed={next(seeds['ours'])}"])
        lengths["ours"].append(statistics.mean(row["rollout/length_tokens"] for row in rows))
        return rate(rows, COMPLETIONS, first=WARM_UP["ours"], last=MAX_STALENESS + 1)

    def trl() -> float:
        rows = train_trl(python, {**speed_settings(case, folder, UPDATES[case.size, "trl"]), "seed": next(seeds["trl"])})
        lengths["trl"].append(statistics.mean(row["length_tokens"] for row in rows))
        return rate(rows, COMPLETIONS, first=WARM_UP["trl"])

    return Sides(ours, trl, lengths)


def accuracy(case: Case, folder: Path, python: Path, seed: int) -> Sides:
    """Seconds of training to the target of one run of each side; each round has a seed of its own, the first one `seed`."""
    start, problems = make_start(), make_problems(folder)
    seeds = {"ours": itertools.count(seed), "trl": itertools.count(seed)}
    settings = {**BEST, **problems, "algorithm": case.algorithm, "model": str(start), "reward": "exact", "max_new_tokens": 8, "group": 4}
    settings |= {"updates": ACCURACY_UPDATES, "completions": ACCURACY_COMPLETIONS, "microbatch": ACCURACY_COMPLETIONS // BEST["processes"]}
    settings |= {"learning_rate": 6e-4, "warmup_steps": 20, "evaluate_every": EVERY, "target": TARGET}

    def ours() -> float:
        words = ["conf/quickstart.yaml", f"algorithm={case.algorithm}", f"updates={ACCURACY_UPDATES}", "learner.learning_rate=6e-4"]
        words += [f"model.path={start}", f"evaluation.every_updates={EVERY}", "evaluation.max_inflight=64", f"seed={next(seeds['ours'])}"]
        rows, looks = train_ours(words)
        times_s = {0: 0.0, **{row["version"]: row["time_s"] for row in rows}}
        # Sampled while training goes on: the newest version that had a part in it counts.
        return time_to(TARGET, times_s, [(look["version_max"], look["evaluate/score"]) for look in looks])

    def trl() -> float:
        rows = train_trl(python, {**settings, "seed": next(seeds["trl"])})
        looks = [(row["update"], row["accuracy"]) for row in rows if "accuracy" in row]
        return time_to(TARGET, {row["update"]: row["time_s"] for row in rows}, looks)

    return Sides(ours, trl, {})


def measure(case: Case, python: Path, rounds: int, known: Measured) -> Measured:
    """What was known of a case, and further rounds of it."""
    num_known = len(known.get("ours", ()))
    with tempfile.TemporaryDirectory() as folder:
        make = speed if case.size else accuracy
        sides = make(case, Path(folder), python, num_known)
        measures = {"ours": sides.ours, "trl": sides.trl}
        if num_known % 2:
            measures = dict(reversed(measures.items()))
        found = in_turn(measures, rounds) | {f"{side}_tokens": tokens for side, tokens in sides.lengths.items()}
    return {name: [*known.get(name, ()), *values] for name, values in found.items()}


def summary(case: Case, found: Measured) -> tuple[dict[str, float], tuple[object, ...]]:
    """The metrics of a case and its row in the table."""
    ratio = ratios(found["ours"], found["trl"]) if case.size else ratios(found["trl"], found["ours"])
    ours, trl = Spread.of(found["ours"]), Spread.of(found["trl"])
    tokens = " / ".join(f"{statistics.mean(found[name]):.1f}" for name in ("ours_tokens", "trl_tokens") if name in found)
    row = (case.metric, "completions/s" if case.size else f"s to {TARGET}", ours, trl, ratio, tokens)
    return {case.metric: ratio.median, f"{case.metric}_ours": ours.median, f"{case.metric}_trl": trl.median}, row


def tune(case: Case, python: Path) -> None:
    """TRL's rate with each of TUNED."""
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, changed in TUNED.items():
            found = train_trl(python, {**speed_settings(case, Path(folder), 4), **changed})
            rows.append((name, rate(found, COMPLETIONS, first=1)))
            console(f"{name}: {rows[-1][1]:.3g}")
    show(f"TRL, {case.algorithm}, {case.size}, {case.lengths}", ("setting", "completions/s"), rows)


def main() -> None:
    """Measure the cases, print one table, and write the numbers where asked."""
    full = [f"{name}:10m:long" for name in ALGORITHMS] + ["rloo:accuracy", "rloo:10m:fixed"]
    full += ["rloo:1m:long", "rloo:1m:fixed", "rloo:50m:fixed"]
    parser = command_line(__doc__, "RLOO at 10M long-tailed and at 1M fixed, one round")
    parser.add_argument("--cases", default="", help=f"comma-separated, also rloo:50m:long; default: {', '.join(full)}")
    parser.add_argument("--rounds", type=int, default=1, help="of each case (default 1); rounds that FILE of --json holds already are kept")
    parser.add_argument("--tune", action="store_true", help="TRL's rate with several of its settings, for each case; no comparison")
    arguments = parser.parse_args()
    names = arguments.cases.split(",") if arguments.cases else ["rloo:10m:long", "rloo:1m:fixed"] if arguments.quick else full
    try:
        cases = {name: Case.of(name) for name in names}
    except ValueError as error:
        parser.error(str(error))
    if arguments.rounds < 1:
        parser.error(f"--rounds must be >= 1, got {arguments.rounds}")
    python = trl_python()
    if arguments.tune:
        for case in cases.values():
            tune(case, python)
        return
    known = json.loads(arguments.json.read_text()).get("rounds", {}) if arguments.json and arguments.json.is_file() else {}
    failed: list[str] = []
    for name, case in cases.items():
        try:
            known[name] = measure(case, python, 1 if arguments.quick else arguments.rounds, known.get(name, {}))
        except (ValueError, RuntimeError, subprocess.TimeoutExpired) as error:  # the other cases' figures are worth their time
            console(f"{name}: {error}")
            failed.append(name)
            continue
        console("  ".join(map(str, summary(case, known[name])[1])))
        if arguments.json:
            # At once: a long benchmark may be cut short.
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps({"rounds": known}))
    summaries = [summary(Case.of(name), known[name]) for name in known]
    show("async-rlhf against TRL", ("case", "unit", "ours", "TRL", "speedup", "tokens"), [row for _, row in summaries])
    console(trl_versions(python))
    finish(arguments, {metric: value for metrics, _ in summaries for metric, value in metrics.items()}, GOALS)
    if arguments.json:
        arguments.json.write_text(json.dumps({**json.loads(arguments.json.read_text()), "rounds": known}, indent=2) + "\n")
    if failed:
        sys.exit(f"not measured, for the reasons above: {', '.join(failed)}")


if __name__ == "__main__":
    main()
