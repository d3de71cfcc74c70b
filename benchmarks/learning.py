"""Does every algorithm learn, asynchronously, on real generators and learners?

    python benchmarks/learning.py [--seeds 3] [--algorithms dpo,ppo,...] [--quick] [--json FILE]

One `train` per algorithm and seed: sums of two numbers below 100, max_staleness 1, a supervised start of its own for each seed
(kept in the cache). Prints one line per run and one table at the end. About 3 minutes per run on two cores. Exit 1: a run failed.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import CHECKOUT, Goal, command_line, console, finish, show

SETTINGS = {
    "dpo": ["updates=320"],
    "ppo": ["updates=200", "learner.learning_rate=6e-4"],
    "rloo": ["updates=200", "learner.learning_rate=6e-4"],
    # Groups of 8: half as many, so that an update sees as many completions as those of the others.
    "grpo": ["updates=300", "learner.learning_rate=6e-4", "batch_groups=32"],
    "bok": ["updates=160"],
    "listwise": ["updates=360"],
}
"""What differs from conf/quickstart.yaml with algorithm=NAME."""
TARGETS = {"bok": 0.65}
"""Held-out accuracy to reach; 0.75 where nothing else is said."""
LIMIT_S = 360.0
"""Longest wall time of a run."""
QUICK_UPDATES = 5
QUICK = [f"updates={QUICK_UPDATES}", "evaluation.num_prompts=100"]
"""Mostly the start and the end of a run."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run."""

    start_accuracy: float
    final_accuracy: float
    wall_s: float
    staleness_max: int
    kl_nats: float
    """KL(policy || reference) per completion in the last tenth of the updates, k1 estimate."""


def train(algorithm: str, seed: int, extra: list[str]) -> Result | None:
    """One run of the command line; None: it failed, and its last words are printed."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = ["train", "conf/quickstart.yaml", f"algorithm={algorithm}", *SETTINGS[algorithm], "max_staleness=1"]
        words += [f"seed={seed}", f"sft.seed={seed}", f"run.dir={run}", *extra]
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "async_rlhf", *words], cwd=CHECKOUT, capture_output=True, text=True, timeout=5 * LIMIT_S
        )
        wall_s = time.monotonic() - started
        if done.returncode:
            console(f"{algorithm}, seed {seed}, failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
            return None
        summary = json.loads((run / "summary.json").read_text())
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = rows[-max(1, len(rows) // 10) :]
    return Result(
        start_accuracy=summary["start_accuracy"],
        final_accuracy=summary["final_accuracy"],
        wall_s=wall_s,
        staleness_max=summary["staleness_max"],
        kl_nats=statistics.mean(row["rollout/kl_k1_nats"] for row in last),
    )


def main() -> None:
    """Run, print one table, and write the numbers where asked."""
    parser = command_line(__doc__, quick=f"one seed and {QUICK_UPDATES} updates each: does it run?")
    parser.add_argument("--seeds", type=int, default=3, help="runs per algorithm (default 3)")
    parser.add_argument("--algorithms", default=",".join(SETTINGS), help="comma-separated; default: all")
    arguments = parser.parse_args()
    names = arguments.algorithms.split(",")
    unknown = set(names) - set(SETTINGS)
    if unknown or arguments.seeds < 1:
        parser.error(f"--algorithms takes {', '.join(SETTINGS)}, got {', '.join(sorted(unknown))}" if unknown else "--seeds must be >= 1")
    extra = QUICK if arguments.quick else []
    results: dict[str, list[Result]] = {name: [] for name in names}
    failed: list[str] = []
    # Seed by seed, so that a benchmark cut short has seen every algorithm.
    for seed in range(1 if arguments.quick else arguments.seeds):
        for name in names:
            result = train(name, seed, extra)
            if result is None:
                failed.append(f"{name} with seed {seed}")
                continue
            results[name].append(result)
            console(f"{name}, seed {seed}: {result.start_accuracy:.3f} -> {result.final_accuracy:.3f} in {result.wall_s:.0f} s")
    found = {name: numbers(runs) for name, runs in results.items() if runs}
    columns = ("start_accuracy", "final_accuracy", "final_accuracy_min", "kl_nats", "staleness_max", "wall_s_max")
    show("What each algorithm learns", ("algorithm", *columns), [[name, *map(of_name.get, columns)] for name, of_name in found.items()])
    metrics = {f"{metric}_{name}": value for name, of_name in found.items() for metric, value in of_name.items()}
    finish(arguments, metrics, [] if arguments.quick else goals(names))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def goals(names: Sequence[str]) -> list[Goal]:
    """Of every seed."""
    accuracies = [Goal(metric=f"final_accuracy_min_{name}", at_least=TARGETS.get(name, 0.75)) for name in names]
    return [*accuracies, *(Goal(metric=f"wall_s_max_{name}", at_most=LIMIT_S) for name in names)]


def numbers(runs: Sequence[Result]) -> dict[str, float]:
    """Means over the seeds, and the extremes."""
    return {
        "start_accuracy": statistics.mean(run.start_accuracy for run in runs),
        "final_accuracy": statistics.mean(run.final_accuracy for run in runs),
        "final_accuracy_min": min(run.final_accuracy for run in runs),
        "kl_nats": statistics.mean(run.kl_nats for run in runs),
        "staleness_max": max(run.staleness_max for run in runs),
        "wall_s_max": max(run.wall_s for run in runs),
        "seeds": len(runs),
    }


if __name__ == "__main__":
    main()
