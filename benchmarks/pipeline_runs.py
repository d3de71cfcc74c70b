"""Runs of the whole pipeline, for benchmarks: what its settled updates took, and which process spent how many seconds of CPU on them."""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from harness import CHECKOUT

KINDS = {
    "ray::Generator": "generator",
    "ray::LearnerRank": "learner",
    "ray::Scorer": "scorer",
    "ray::ReplayQueue": "queue",
    "ray::WeightBroadcaster": "broadcaster, state",
    "ray::TrainingStateStore": "broadcaster, state",
}
"""How a process's command line begins -> what it is; beside the driver everything else is Ray's: raylet, GCS, agents, log monitor."""
QUIET = ["checkpoint.every_updates=0", "checkpoint.every_minutes=0", "evaluation.num_prompts=2"]
"""Nothing but updates between the first ticket and the last one."""
LOGS = ("metrics.jsonl", "evaluations.jsonl")
LOOK_S = 0.05
LIMIT_S = 900.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Of the settled updates of one run."""

    cpu_s: dict[str, float]
    """Kind of process -> seconds of CPU per update."""
    rows: Sequence[dict[str, Any]]
    """Of the updates, in order; the first one is that before them."""
    all_rows: Sequence[dict[str, Any]]
    """Of the whole run."""
    evaluations: Sequence[dict[str, Any]]
    """In order; the first one is of the start."""

    @property
    def update_s(self) -> float:
        """Mean seconds of one update."""
        return (self.rows[-1]["time_s"] - self.rows[0]["time_s"]) / (len(self.rows) - 1)

    def blocks_s(self, count: int) -> list[float]:
        """The same of each of `count` blocks of updates, one after another."""
        edges = [round(index * (len(self.rows) - 1) / count) for index in range(count + 1)]
        return [(self.rows[end]["time_s"] - self.rows[begin]["time_s"]) / (end - begin) for begin, end in itertools.pairwise(edges)]

    def mean(self, key: str) -> float:
        """Of one number of the rows; NaN where none has it."""
        values = [row[key] for row in self.rows[1:] if key in row]
        return statistics.fmean(values) if values else float("nan")


def run_pipeline(settings: Sequence[str], *, updates: int, skip: int, tail: int) -> Measured:
    """Train, and measure from the end of update `skip` to that of update `updates` - `tail`.

    Args:
        tail: beside the last max_staleness updates no ticket goes out, so they say nothing; at least max_staleness + 1.
    Raises:
        SystemExit: the run failed.
    """
    with tempfile.TemporaryDirectory() as temporary, tempfile.TemporaryFile("w+") as output:
        folder = Path(temporary) / "run"
        line = [sys.executable, "-m", "async_rlhf", "train", "conf/quickstart.yaml", *QUIET, *settings]
        process = subprocess.Popen(
            [*line, f"updates={updates}", f"run.dir={folder}"],
            cwd=CHECKOUT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        )
        try:
            before = _cpu_at(process, folder, skip)
            after = _cpu_at(process, folder, updates - tail)
            process.wait(LIMIT_S)
        finally:
            process.terminate()  # of no effect on one that has ended; else it ends its Ray first
            process.wait(LIMIT_S)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(line)} failed:\n{output.read()[-3000:]}")
        rows, evaluations = ([json.loads(text) for text in (folder / name).read_text().splitlines()] for name in LOGS)
    counted = [row for row in rows if skip <= row["version"] <= updates - tail]
    cpu_s = {kind: (spent - before.get(kind, 0.0)) / (len(counted) - 1) for kind, spent in after.items()}
    return Measured(cpu_s=cpu_s, rows=counted, all_rows=rows, evaluations=evaluations)


def _cpu_at(process: "subprocess.Popen[Any]", folder: Path, version: int) -> Mapping[str, float]:
    """Seconds of CPU by kind of process, as soon as that version is there."""
    file, ends = folder / "metrics.jsonl", time.monotonic() + LIMIT_S
    while not file.is_file() or file.read_text().count("\n") < version:
        if process.poll() is not None or time.monotonic() > ends:
            return {}
        time.sleep(LOOK_S)
    spent: defaultdict[str, float] = defaultdict(float)
    own = psutil.Process(process.pid)
    for each in (own, *own.children(recursive=True)):
        try:
            times, line = each.cpu_times(), " ".join(each.cmdline())
        except psutil.Error:
            continue
        kind = "driver" if each == own else next((kind for begin, kind in KINDS.items() if line.startswith(begin)), "ray")
        spent[kind] += times.user + times.system
    return spent
