"""The model of the pipeline against real runs: what `async-rlhf plan` predicts from one run, and what other runs then do.

    python benchmarks/plan.py [--updates 40] [--quick] [--json FILE] [--keep FOLDER]

Rates are measured in two runs, the quickstart synchronous and asynchronous (their mean), lengths and ties in the first of them. From these
alone the others are predicted, which differ in the bound, in passes over a batch, in completions per prompt, in the batch: one is
generation-bound, one balanced, one training-bound. Then any single run takes the place of the two: how much does it matter what is
measured? Real vLLM, DeepSpeed and Ray, which share the machine's cores: so do they in the model. The policy is held still (a learning rate
of next to nothing): what learning does to lengths and ties is no matter of throughput. Other work on the machine moves what is measured:
use a quiet one.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from harness import CHECKOUT, Goal, command_line, finish, show

from async_rlhf.config import Config, load_config
from async_rlhf.planning.lengths import measured_lengths
from async_rlhf.planning.model import calibrated_rates, predict
from async_rlhf.planning.prediction import Prediction
from async_rlhf.planning.rates import averaged
from async_rlhf.recorder import read_rows
from async_rlhf.stage_times import SETTLED_VERSION, Row
from async_rlhf.verdict import Bottleneck, verdict_of

STILL = ["learner.learning_rate=1e-12", "checkpoint.every_updates=0", "evaluation.num_prompts=20"]
RUNS = {
    "synchronous": ["max_staleness=0"],
    "asynchronous": ["max_staleness=1"],
    "generation-bound": ["max_staleness=2", "batch_groups=96"],
    "balanced": ["algorithm.epochs_per_batch=3", "completions_per_prompt=6"],
    "training-bound": ["algorithm.epochs_per_batch=8", "max_staleness=2"],
}
MEASURED = ("synchronous", "asynchronous")
MAX_ERROR = 0.10
MIN_DIFFERENCE = 0.10
"""Between the idle shares of two stages, where one is said to hold the other up."""
QUICK_UPDATES = 16
GOALS = [Goal(metric=f"error_{name.replace('-', '_')}", at_least=-MAX_ERROR, at_most=MAX_ERROR) for name in RUNS if name not in MEASURED]
COLUMNS = (
    "run",
    "predicted s",
    "measured s",
    "error",
    "idle g/l: predicted",
    "measured",
    "staleness: predicted",
    "measured",
    "is",
)


@dataclass(frozen=True)
class Run:
    """A run that is over."""

    config: Config
    folder: Path

    @cached_property
    def rows(self) -> Sequence[Row]:
        """Of metrics.jsonl."""
        return read_rows(self.folder)

    @cached_property
    def was(self) -> Mapping[str, float]:
        """What an update of it took."""
        return measured(self.rows)


def predictions(runs: Mapping[str, Run], sources: Sequence[str], cores: int) -> dict[str, Prediction]:
    """Of all runs, by the rates of some of them and the lengths of the first of these."""
    measured_runs = [runs[source] for source in sources]
    lengths = [measured_lengths(run.folder, run.config) for run in measured_runs]
    rates = [calibrated_rates(run.rows, run.config, of_run, cores) for run, of_run in zip(measured_runs, lengths, strict=True)]
    return {name: predict(run.config, averaged(rates), lengths[0], num_cores=cores) for name, run in runs.items()}


def train(folder: Path, updates: int, settings: list[str]) -> Config:
    """One run, where `folder` does not hold it yet; its config."""
    if not (folder / "metrics.jsonl").is_file() or len(read_rows(folder)) < updates:
        line = [sys.executable, "-m", "async_rlhf", "train", "conf/quickstart.yaml", f"run.dir={folder}", f"updates={updates}"]
        done = subprocess.run([*line, *STILL, *settings], cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(line)} failed:\n{done.stdout[-3000:]}")
    return load_config([folder / "config.yaml"]).config


def measured(rows: Sequence[Row]) -> dict[str, float]:
    """What the settled updates of a run took; the last one is left out, as no ticket goes out beside it."""
    rows = [row for row in rows if row["version"] > SETTLED_VERSION][:-1]
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


def line_of(name: str, found: Prediction, was: Mapping[str, float], bottleneck: Bottleneck) -> tuple[object, ...]:
    """Of the table."""
    error = f"{found.update_s / was['update_s'] - 1:+.1%}"
    idle = f"{found.generator_idle:.0%}/{found.learner_idle:.0%}", f"{was['generator_idle']:.0%}/{was['learner_idle']:.0%}"
    seconds = f"{found.update_s:.3f}", f"{was['update_s']:.3f}"
    kind = str(bottleneck) if is_as_named(name, bottleneck, was) else f"{bottleneck}: NOT {name}"
    return name, *seconds, error, *idle, f"{found.staleness_mean:.2f}", f"{was['staleness']:.2f}", kind


def main() -> None:
    """Run, predict, print one table, and write the numbers where asked."""
    parser = command_line(__doc__, f"{QUICK_UPDATES} updates of two runs")
    parser.add_argument("--updates", type=int, default=40, help="of each run")
    parser.add_argument(
        "--keep", type=Path, help="folder for the runs, which are taken from there if they are there; default: a temporary one"
    )
    arguments = parser.parse_args()
    metrics: dict[str, float] = {}
    lines: list[tuple[object, ...]] = []
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as temporary:
        folder, updates = (arguments.keep or Path(temporary)).resolve(), QUICK_UPDATES if arguments.quick else arguments.updates
        names = MEASURED if arguments.quick else tuple(RUNS)
        runs = {name: Run(train(folder / name, updates, RUNS[name]), folder / name) for name in names}
        predicted = {" and ".join(sources): predictions(runs, sources, cores) for sources in (MEASURED, *((name,) for name in names))}
    for name, found in next(iter(predicted.values())).items():
        was, bottleneck = runs[name].was, verdict_of(runs[name].rows, runs[name].config).bottleneck
        lines.append(line_of(name, found, was, bottleneck))
        values = {"predicted_s": found.update_s, "measured_s": was["update_s"], "error": found.update_s / was["update_s"] - 1}
        metrics |= {f"{key}_{name.replace('-', '_')}": value for key, value in values.items()}
        metrics[f"as_named_{name.replace('-', '_')}"] = float(is_as_named(name, bottleneck, was))
    show(f"predicted from the first two runs, {updates} updates each, {cores} cores shared", COLUMNS, lines)
    errors = {
        source: [f"{found.update_s / runs[name].was['update_s'] - 1:+.1%}" for name, found in of_source.items()]
        for source, of_source in predicted.items()
    }
    show("error, by what was measured", ("measured", *names), [(source, *of_source) for source, of_source in errors.items()])
    finish(arguments, metrics, GOALS)


if __name__ == "__main__":
    main()
