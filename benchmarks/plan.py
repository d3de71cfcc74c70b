"""The model of the pipeline against real runs: what `async-rlhf plan` predicts from one run, and what other runs then do.

    python benchmarks/plan.py [--updates 60] [--quick] [--json FILE] [--keep FOLDER]

Rates, lengths and ties are measured in one run (the quickstart, max_staleness 1, one pass). From these alone the others are predicted,
which differ in the bound, in passes over a batch, in completions per prompt, in the batch: one of them is generation-bound, one balanced,
one training-bound, one synchronous. Real vLLM, DeepSpeed and Ray, which share the
machine's cores: so do they in the model. Other work on the machine moves the rates between the runs: use a
quiet one. Exit 1: an update took more than 10 % more or less than predicted, or a run was not of the kind that its name says (neither is
looked at with --quick).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from async_rlhf.config import Config, load_config
from async_rlhf.planning.lengths import measured_lengths
from async_rlhf.planning.model import calibrated_rates, predict
from async_rlhf.planning.rates import as_mapping
from async_rlhf.recorder import read_rows
from async_rlhf.stage_times import SETTLED_VERSION
from async_rlhf.verdict import Bottleneck, verdict_of

CHECKOUT = Path(__file__).resolve().parents[1]
MEASURED = ["max_staleness=1"]
PREDICTED = {
    "generation-bound": ["max_staleness=2", "batch_groups=96"],
    "balanced": ["algorithm.epochs_per_batch=2", "completions_per_prompt=6"],
    "training-bound": ["algorithm.epochs_per_batch=6", "max_staleness=2"],
    "synchronous": ["max_staleness=0"],
}
MAX_ERROR = 0.10
MIN_DIFFERENCE = 0.10
"""Between the idle shares of two stages, where one is said to hold the other up."""
QUICK_UPDATES = 16


def train(folder: Path, updates: int, settings: list[str]) -> Config:
    """One run; its config."""
    fixed = [f"run.dir={folder}", f"updates={updates}", "checkpoint.every_updates=0", "evaluation.num_prompts=20"]
    line = [sys.executable, "-m", "async_rlhf", "train", "conf/quickstart.yaml", *fixed, *settings]
    done = subprocess.run(line, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(line)} failed:\n{done.stdout[-3000:]}")
    return load_config([folder / "config.yaml"]).config


def measured(folder: Path) -> dict[str, float]:
    """What the settled updates of a run took; the last one is left out, as no ticket goes out beside it."""
    rows = [row for row in read_rows(folder) if row["version"] > SETTLED_VERSION][:-1]
    shares = {name: float(np.mean([row[key] for row in rows[1:]])) for name, key in SHARES.items()}
    return {"update_s": (rows[-1]["time_s"] - rows[0]["time_s"]) / (len(rows) - 1), **shares}


def is_as_named(name: str, bottleneck: Bottleneck, was: Mapping[str, float]) -> bool:
    """Whether a run was what its name says: by its verdict, or by the idle shares of generators and learner."""
    more = was["learner_idle"] - was["generator_idle"]
    return {
        "generation-bound": bottleneck is Bottleneck.GENERATION or more >= MIN_DIFFERENCE,
        "training-bound": bottleneck is Bottleneck.TRAINING or more <= -MIN_DIFFERENCE,
        "balanced": bottleneck is Bottleneck.BALANCED or abs(more) < MIN_DIFFERENCE,
    }.get(name, True)


SHARES = {"generator_idle": "generate/idle_share", "learner_idle": "train/idle_share", "staleness": "queue/staleness_mean"}


def main() -> None:
    """Run, predict, print one table, and write the numbers where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=60, help="of each run")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_UPDATES} updates of two runs: does it work?")
    parser.add_argument("--json", type=Path, help="where to write {'metrics': {...}}")
    parser.add_argument("--keep", type=Path, help="folder for the runs; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, updates = (arguments.keep or Path(temporary)).resolve(), QUICK_UPDATES if arguments.quick else arguments.updates
        first = train(folder / "measured", updates, MEASURED)
        lengths = measured_lengths(folder / "measured", first)
        cores = os.cpu_count() or 1
        rates = calibrated_rates(read_rows(folder / "measured"), first, lengths, cores)
        cases = dict(list(PREDICTED.items())[-1:]) if arguments.quick else PREDICTED
        results: dict[str, dict[str, float]] = {}
        misnamed: list[str] = []
        print(f"{'run':<18}{'s per update: predicted':>24}{'measured':>10}{'error':>8}   idle, staleness: predicted, measured")
        for name, settings in {"(measured)": MEASURED, **cases}.items():
            config = first if settings == MEASURED else train(folder / name, updates, settings)
            was = measured(folder / ("measured" if settings == MEASURED else name))
            found = predict(config, rates, lengths, num_cores=cores)
            error = found.update_s / was["update_s"] - 1
            bottleneck = verdict_of(read_rows(folder / ("measured" if settings == MEASURED else name)), config).bottleneck
            misnamed += [] if is_as_named(name, bottleneck, was) else [name]
            results[name] = {"predicted_s": found.update_s, "measured_s": was["update_s"], "error": error}
            print(
                f"{name:<18}{found.update_s:>24.3f}{was['update_s']:>10.3f}{error:>8.1%}   "
                f"{found.generator_idle:.0%}/{found.learner_idle:.0%} {found.staleness_mean:.2f}, "
                f"{was['generator_idle']:.0%}/{was['learner_idle']:.0%} {was['staleness']:.2f}   "
                f"{bottleneck}{', FAILED: not ' + name if name in misnamed else ''}",
                flush=True,
            )
        if arguments.json:
            metrics = {f"{name}_{key}": value for name, numbers in results.items() for key, value in numbers.items()}
            arguments.json.write_text(json.dumps({"metrics": metrics, "rates": dict(as_mapping(rates))}, indent=2) + "\n")
        missed = [name for name, numbers in results.items() if name != "(measured)" and abs(numbers["error"]) > MAX_ERROR]
        failures = [f"more than {MAX_ERROR:.0%} off: {', '.join(missed)}"] if missed else []
        failures += [f"not what their names say: {', '.join(misnamed)}"] if misnamed else []
        if failures and not arguments.quick:
            raise SystemExit("; ".join(failures))


if __name__ == "__main__":
    main()
