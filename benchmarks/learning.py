"""Does every algorithm learn, asynchronously, on real generators and learners?

    python benchmarks/learning.py [--seeds 3] [--algorithms dpo,ppo,...] [--quick] [--json FILE]

One `train` per algorithm and seed: sums of two numbers below 100, max_staleness 1, a supervised start of its own for each seed
(kept in the cache). Prints one line per run and one table at the end. About 3 minutes per run on two cores.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
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
QUICK_UPDATES = 15


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
            print(f"{algorithm}, seed {seed}, failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}", flush=True)
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
    """Run, print one table, and write the numbers where asked. Exit 1: an algorithm missed its target (not looked at with --quick)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs per algorithm (default 3)")
    parser.add_argument("--algorithms", default=",".join(SETTINGS), help="comma-separated; default: all")
    parser.add_argument("--quick", action="store_true", help=f"one seed and {QUICK_UPDATES} updates each: does it run?")
    parser.add_argument("--json", type=Path, help="where to write {'metrics': {...}}")
    arguments = parser.parse_args()
    names = arguments.algorithms.split(",")
    unknown = set(names) - set(SETTINGS)
    if unknown or arguments.seeds < 1:
        parser.error(f"--algorithms takes {', '.join(SETTINGS)}, got {', '.join(sorted(unknown))}" if unknown else "--seeds must be >= 1")
    extra = [f"updates={QUICK_UPDATES}"] if arguments.quick else []
    results: dict[str, list[Result]] = {name: [] for name in names}
    failed: list[str] = []
    # Seed by seed, so that a benchmark cut short has seen every algorithm; what is measured is written at once.
    for seed in range(1 if arguments.quick else arguments.seeds):
        for name in names:
            result = train(name, seed, extra)
            if result is None:
                failed.append(f"{name} with seed {seed}")
                continue
            results[name].append(result)
            print(f"{name}, seed {seed}: {result.start_accuracy:.3f} -> {result.final_accuracy:.3f} in {result.wall_s:.0f} s", flush=True)
            if arguments.json:
                metrics = {known: numbers(of_name) for known, of_name in results.items() if of_name}
                arguments.json.write_text(json.dumps({"metrics": metrics}, indent=2) + "\n")
    missed = report({name: of_name for name, of_name in results.items() if of_name})
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
    if missed and not arguments.quick:
        raise SystemExit(f"below the target, or longer than {LIMIT_S:.0f} s: {', '.join(missed)}")


def report(results: dict[str, list[Result]]) -> list[str]:
    """Print the table; returns the algorithms of which a seed missed the target or the time."""
    print(f"\n{'algorithm':<11}{'start':>7}{'final':>7}{'lowest':>8}{'target':>8}{'KL nats':>9}{'staleness':>11}{'wall s, longest':>17}")
    missed: list[str] = []
    for name, runs in results.items():
        target, of_name = TARGETS.get(name, 0.75), numbers(runs)
        if of_name["final_accuracy_min"] < target or of_name["wall_s_max"] > LIMIT_S:
            missed.append(name)
        print(
            f"{name:<11}{of_name['start_accuracy']:>7.3f}{of_name['final_accuracy']:>7.3f}{of_name['final_accuracy_min']:>8.3f}"
            f"{target:>8.2f}{of_name['kl_nats']:>9.2f}{of_name['staleness_max']:>11.0f}{of_name['wall_s_max']:>17.0f}"
        )
    return missed


def numbers(runs: list[Result]) -> dict[str, float]:
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
