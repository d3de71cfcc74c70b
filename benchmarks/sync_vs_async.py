"""Synchronous against asynchronous training: the same code, model, task and two cores; only what waits for what differs.

    python benchmarks/sync_vs_async.py [--quick] [--only staleness_1] [--json FILE]

S1        max_staleness 0: generator and learner take turns, each on its core, while the other one is idle
S2        max_staleness 0, and each phase over all cores: two generators, then two learner ranks (the compute-matched baseline)
staleness 1 and 4: one generator and one learner rank, overlapping

RLOO on sums of two numbers below 100, from the same supervised start, two passes over a batch, so that sampling and training take about as
long. `throughput_s1` and `throughput_s2` are seconds of an update of the baseline over those of staleness 1, settled updates alone
(`_staleness_4`: of 4). Without --quick each variant also trains until held-out greedy accuracy TARGET, and `speedup_s1` and `speedup_s2`
are the baseline's time to it over that of staleness 1; `time_to_accuracy_*` is the seconds from the first ticket to the interpolated update
at which TARGET is reached, live evaluations (the same ones for all) included. Time saved and throughput
gained are two numbers: 38 % less time is 62 % more throughput.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from harness import Goal, Spread, command_line, finish, show
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
TARGET = 0.65
"""Held-out accuracy; the start has about 0.4."""
UPDATES, QUICK_UPDATES = 90, 18
EVALUATIONS = ["evaluation.every_updates=10", "evaluation.num_prompts=250", "evaluation.max_inflight=64"]
SCORE = "evaluate/score"
SKIPPED = 5
BLOCKS = 3


def time_to(target: float, run: Measured) -> float:
    """Seconds from the first ticket until the accuracy is reached, on a line between two evaluations; NaN: it never was."""
    versions = [0.0, *(row["version"] for row in run.all_rows)]
    seconds = [0.0, *(row["time_s"] for row in run.all_rows)]
    points = [((row["version_min"] + row["version_max"]) / 2, row[SCORE]) for row in run.evaluations]
    for (before, low), (after, high) in itertools.pairwise(points):
        if low < target <= high:
            return float(np.interp(before + (after - before) * (target - low) / (high - low), versions, seconds))
    return float("nan")


def measure(name: str, quick: bool) -> Measured:
    """One run of a variant."""
    updates = QUICK_UPDATES if quick else UPDATES
    settings = [*COMMON, *VARIANTS[name], *([] if quick else EVALUATIONS)]
    return run_pipeline(settings, updates=updates, skip=SKIPPED, tail=5)


def main() -> None:
    """Run, print the tables, and write the numbers where asked."""
    parser = command_line(__doc__, "throughput alone, few updates")
    parser.add_argument("--only", choices=tuple(VARIANTS), help="one variant: its seconds, without ratios")
    arguments = parser.parse_args()
    runs = {name: measure(name, arguments.quick) for name in ([arguments.only] if arguments.only else VARIANTS)}
    metrics: dict[str, float] = {}
    rows: list[Sequence[object]] = []
    reached = {name: time_to(TARGET, run) for name, run in runs.items()}
    for name, run in runs.items():
        blocks = run.blocks_s(BLOCKS)
        metrics[f"update_s_{name}"] = run.update_s
        if np.isfinite(reached[name]):
            metrics[f"time_to_accuracy_s_{name}"] = reached[name]
        gain = runs["S1"].update_s / run.update_s if "S1" in runs else float("nan")
        idle = f"{run.mean('generate/idle_share'):.0%}/{run.mean('train/idle_share'):.0%}"
        staleness, step_s = run.mean("queue/staleness_mean"), run.mean("train/step_s")
        spread = Spread(run.update_s, min(blocks), max(blocks))
        saved = f"{1 - 1 / gain:+.0%}"
        rows.append((name, spread, gain, saved, idle, step_s, staleness, reached[name], max(row[SCORE] for row in run.evaluations)))
    columns = ("variant", "update s", "throughput / S1", "time saved", "idle g/l", "step s", "staleness", f"s to {TARGET}", "best")
    show("The same work, synchronous and asynchronous", columns, rows)
    for baseline in ("S1", "S2"):
        for name, suffix in ASYNCHRONOUS.items() if baseline in runs else ():
            if name in runs:
                metrics[f"throughput_{baseline.lower()}{suffix}"] = runs[baseline].update_s / runs[name].update_s
                to_accuracy = reached[baseline] / reached[name]
                if np.isfinite(to_accuracy):
                    metrics[f"speedup_{baseline.lower()}{suffix}"] = to_accuracy
    finish(arguments, metrics, [] if arguments.only else [Goal(metric="speedup_s1", at_least=1.6)])


if __name__ == "__main__":
    main()
