"""Synchronous against asynchronous training: the same code, model, task and two cores; only what waits for what differs.

    python benchmarks/sync_vs_async.py [--quick] [--only staleness_1] [--json FILE]

S1        max_staleness 0: generator and learner take turns, each on its core, while the other one is idle
S2        max_staleness 0, and each phase over all cores: two generators, then two learner ranks (the compute-matched baseline)
staleness 1 and 4: one generator and one learner rank, overlapping

RLOO on sums of two numbers below 100, from the same supervised start, two passes over a batch. Without --quick each variant trains with
SEEDS seeds, in turn. `throughput_s1` and `throughput_s2` are seconds of an update of the baseline over those of staleness 1, settled
updates alone (`_staleness_4`: of 4), seed by seed. `speedup_s1` and `speedup_s2` are the baseline's time to held-out greedy accuracy TARGET
over that of staleness 1, medians over the seeds of both: the seconds from the first ticket to the interpolated update at which a run's
accuracies, made monotone by isotonic regression, reach TARGET, live evaluations (the same ones for all) included.
Time saved and throughput gained are two numbers: 38 % less time is 62 % more throughput.
"""

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
from harness import Goal, Spread, command_line, console, finish, in_turn, ratios, show
from pipeline_runs import Measured, run_pipeline

COMMON = [
    "algorithm=rloo",
    "algorithm.epochs_per_batch=2",
    "learner.learning_rate=4e-4",
    "completions_per_prompt=4",
    "batch_groups=64",
]
ALL_INFLIGHT, HALF_INFLIGHT = "generator.max_inflight=256", "generator.max_inflight=128"
"""A whole batch; half of one, so that each of two generators gets half of the tickets."""
VARIANTS: Mapping[str, Sequence[str]] = {
    "S1": ["max_staleness=0", ALL_INFLIGHT],
    "S2": ["max_staleness=0", HALF_INFLIGHT, "generator.count=2", "learner.num_ranks=2"],
    "staleness_1": ["max_staleness=1", ALL_INFLIGHT],
    "staleness_4": ["max_staleness=4", ALL_INFLIGHT],
}
ASYNCHRONOUS = {"staleness_1": "", "staleness_4": "_staleness_4"}
"""Variant -> what its metrics end in."""
TARGET = 0.75
"""Held-out accuracy; the start has about 0.4."""
UPDATES, QUICK_UPDATES = 60, 18
SEEDS = 3
EVALUATIONS = ["evaluation.every_updates=5", "evaluation.num_prompts=500", "evaluation.max_inflight=64"]
SCORE = "evaluate/score"
SKIPPED = 5


def isotonic(values: Sequence[float]) -> list[float]:
    """The non-decreasing values that are nearest in squares (pool adjacent violators): one lucky evaluation is no accuracy."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pool, size = value, 1
        while pools and pools[-1][0] > pool:
            mean, count = pools.pop()
            pool, size = (pool * size + mean * count) / (size + count), size + count
        pools.append((pool, size))
    return [mean for mean, count in pools for _ in range(count)]


def reached(target: float, run: Measured) -> tuple[float, float]:
    """Updates, and seconds from the first ticket, until the accuracy is reached, on a line between two evaluations; NaN: it never was."""
    versions = [0.0, *(row["version"] for row in run.all_rows)]
    seconds = [0.0, *(row["time_s"] for row in run.all_rows)]
    at = [(row["version_min"] + row["version_max"]) / 2 for row in run.evaluations]
    points = zip(at, isotonic([row[SCORE] for row in run.evaluations]), strict=True)
    for (before, low), (after, high) in itertools.pairwise(points):
        if low < target <= high:
            update = before + (after - before) * (target - low) / (high - low)
            return update, float(np.interp(update, versions, seconds))
    return float("nan"), float("nan")


def seed_after_seed(name: str, quick: bool) -> Iterator[Measured]:
    """Runs of a variant."""
    updates = QUICK_UPDATES if quick else UPDATES
    for seed in itertools.count():
        settings = [*COMMON, *VARIANTS[name], f"seed={seed}", *([] if quick else EVALUATIONS)]
        run = run_pipeline(settings, updates=updates, skip=SKIPPED, tail=5)
        console(f"{name}, seed {seed}: {run.update_s:.3f} s; {TARGET} after {reached(TARGET, run)} updates and seconds")
        yield run


def row_of(name: str, runs: Mapping[str, Sequence[Measured]]) -> tuple[tuple[object, ...], dict[str, float]]:
    """The variant's line, and its numbers."""
    own = runs[name]

    def mean(key: str) -> float:
        return statistics.fmean(run.mean(key) for run in own)

    updates, seconds = (Spread.of(values) for values in zip(*(reached(TARGET, run) for run in own), strict=True))
    gain = ratios([run.update_s for run in runs["S1"]], [run.update_s for run in own]) if "S1" in runs else "-"
    idle = f"{mean('generate/idle_share'):.0%}/{mean('train/idle_share'):.0%}"
    best = Spread.of([max(row[SCORE] for row in run.evaluations) for run in own])
    update_s = Spread.of([run.update_s for run in own])
    row = (name, update_s, gain, idle, mean("train/step_s"), mean("queue/staleness_mean"), updates, seconds, best)
    found = {
        f"update_s_{name}": update_s.median,
        f"time_to_accuracy_s_{name}": seconds.median,
        f"updates_to_accuracy_{name}": updates.median,
    }
    return row, {key: value for key, value in found.items() if np.isfinite(value)}


def main() -> None:
    """Run, print the tables, and write the numbers where asked."""
    parser = command_line(__doc__, "throughput alone, few updates, one seed")
    parser.add_argument("--only", choices=tuple(VARIANTS), help="one variant: its seconds, without ratios")
    arguments = parser.parse_args()
    names = [arguments.only] if arguments.only else list(VARIANTS)
    runs = in_turn({name: partial(next, seed_after_seed(name, arguments.quick)) for name in names}, 1 if arguments.quick else SEEDS)
    metrics: dict[str, float] = {}
    rows: list[Sequence[object]] = []
    for name in runs:
        row, found = row_of(name, runs)
        rows.append(row)
        metrics |= found
    columns = ("variant", "update s", "throughput / S1", "idle g/l", "step s", "staleness", f"updates to {TARGET}", "seconds to it", "best")
    show("The same work, synchronous and asynchronous", columns, rows, "medians over the seeds, and their extremes")
    for baseline in ("S1", "S2"):
        for name, suffix in ASYNCHRONOUS.items() if baseline in runs and not arguments.only else ():
            throughput = ratios([run.update_s for run in runs[baseline]], [run.update_s for run in runs[name]])
            metrics[f"throughput_{baseline.lower()}{suffix}"] = throughput.median
            times = [metrics.get(f"time_to_accuracy_s_{each}") for each in (baseline, name)]
            if times[0] and times[1]:
                metrics[f"speedup_{baseline.lower()}{suffix}"] = times[0] / times[1]
    finish(arguments, metrics, [] if arguments.only else [Goal(metric="speedup_s1", at_least=1.6)])


if __name__ == "__main__":
    main()
