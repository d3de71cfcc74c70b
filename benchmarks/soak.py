"""Two thousand updates of a tiny model: does the memory of any process grow, do files, does an update take longer?

    python benchmarks/soak.py [--quick] [--updates N] [--json FILE] [--plot FILE.svg] [--keep FOLDER]

One real run (vLLM, DeepSpeed, Ray; the quickstart's policy, small batches, a checkpoint every 100 updates, an evaluation every 500) is
looked at every second. Memory is what a process does not share with others (RSS without file pages and shared memory); the object store
is the raylet's shared memory. A process is flat when from the middle of the run on it grows by less than 1 % of its memory per 1,000
updates, or by less than the noise: the 95 % interval of the slope through the medians of BLOCKS equal parts holds 0. `update_time_drift`
is the median update of the last quarter over that of the second. `file_growth` is what all files but checkpoints gained between half and
90 % of the updates over what they gained between 10 % and half: 1 is in proportion, as rows per update must be.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path

import numpy as np
import psutil
from harness import CHECKOUT, Goal, command_line, finish, show

from async_rlhf.planning.plot import draw_lines
from async_rlhf.recorder import read_rows

UPDATES, QUICK_UPDATES = 2000, 300
SETTINGS = (
    *("batch_groups=4", "completions_per_prompt=2", "generator.max_new_tokens=4", "learner.learning_rate=1e-5", "queue.ties=keep"),
    *("checkpoint.every_updates=100", "evaluation.every_updates=500", "evaluation.num_prompts=20"),
)
BOUNDED = "checkpoints"
"""The last two are kept: not there at first, and then always as large."""
LOOK_S = 1.0
BLOCKS, T_95 = 10, 2.306
"""Points of a line, and Student's t for 95 % with two degrees of freedom fewer."""
FLAT_SHARE = 0.01
"""Of a process's memory, per 1,000 updates."""
STARTING = ("IDLE", "default_worker", "setup_worker")
"""What Ray calls a worker's process before an actor lives in it."""
MIB = 1 << 20


@dataclass
class Watch:
    """What was seen of a run, look by look: at which update, and how many bytes of what."""

    process: psutil.Process
    folder: Path
    updates: list[float] = field(default_factory=list)
    memory: dict[str, list[float]] = field(default_factory=dict)
    files: dict[str, list[float]] = field(default_factory=dict)
    titles: dict[int, str] = field(default_factory=dict)

    def look(self) -> None:
        """Add one look; processes that end meanwhile are left out of it."""
        rows = (self.folder / "metrics.jsonl").read_bytes().count(b"\n") if (self.folder / "metrics.jsonl").is_file() else 0
        found = dict(self._processes())
        files = {name: float(size) for name, size in sizes(self.folder).items()} | {"Ray's session": float(self._session_bytes())}
        self.updates.append(rows)
        for seen, series in ((found, self.memory), (files, self.files)):
            for name in {*seen, *series}:
                values = series.setdefault(name, [math.nan] * (len(self.updates) - 1))
                values.append(seen.get(name, math.nan))

    def _processes(self) -> Mapping[str, float]:
        found: dict[str, float] = {}
        for process in [self.process, *self.process.children(recursive=True)]:
            with suppress(psutil.Error):
                name, memory = self._name(process), process.memory_info()
                found[name] = memory.rss - memory.shared
                if name == "raylet":
                    found["object store"] = memory.shared
        return found

    def _name(self, process: psutil.Process) -> str:
        """By its actor as soon as it has one; numbered where there are several."""
        known = self.titles.get(process.pid, "")
        if not known or known.startswith(STARTING):
            title = title_of(process, self.process.pid)
            others = {name for pid, name in self.titles.items() if pid != process.pid}
            known = next(name for name in chain([title], (f"{title} #{number}" for number in count(2))) if name not in others)
            self.titles[process.pid] = known
        return known

    def _session_bytes(self) -> int:
        owners = Path(tempfile.gettempdir()).glob("arlhf-*/owner")
        return sum(sum(sizes(file.parent).values()) for file in owners if file.read_text() == str(self.process.pid))


def title_of(process: psutil.Process, driver: int) -> str:
    """`ray::Scorer.score` is the scorer's, whatever it does now; Ray's own by the name of their program."""
    if process.pid == driver:
        return "driver"
    words = process.cmdline()
    first = words[0] if words else process.name()
    if first.startswith("ray::"):
        return first.removeprefix("ray::").partition(".")[0]
    script = next((Path(word).stem for word in words[1:] if word.endswith(".py")), "")
    return script or Path(first).name


def sizes(folder: Path) -> dict[str, int]:
    """Bytes by top-level entry; files that vanish meanwhile count nothing."""
    found: Counter[str] = Counter()
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                file = Path(root) / name
                found[file.relative_to(folder).parts[0]] += file.lstat().st_size
    return dict(found)


def soak(folder: Path, updates: int) -> Watch:
    """The run, watched to its end."""
    line = [sys.executable, "-m", "async_rlhf", "train", "conf/quickstart.yaml", f"run.dir={folder}", f"updates={updates}", *SETTINGS]
    with (folder.parent / "log").open("w") as log:
        process = subprocess.Popen(line, cwd=CHECKOUT, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        watch = Watch(psutil.Process(process.pid), folder)
        try:
            while process.poll() is None:
                with suppress(psutil.Error, FileNotFoundError):
                    watch.look()
                time.sleep(LOOK_S)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(60)
    if process.returncode:
        raise SystemExit(f"the run failed:\n{(folder.parent / 'log').read_text()[-3000:]}")
    return watch


@dataclass(frozen=True)
class Slope:
    """Growth per 1,000 updates, from the middle of the run on, with the half width of its 95 % interval, and the level."""

    per_1000: float
    error: float
    level: float

    @property
    def flat(self) -> bool:
        """Within the noise, or small."""
        return self.per_1000 <= max(self.error, FLAT_SHARE * self.level)


def slope_of(updates: Sequence[float], values: Sequence[float], since: float, until: float) -> Slope | None:
    """A line through the medians of BLOCKS equal parts; medians, because memory goes up and down in steps. None: too little was seen."""
    x, y = np.array(updates), np.array(values)
    kept = (x >= since) & (x < until) & np.isfinite(y)
    x, y = x[kept], y[kept]
    parts = [part for part in np.array_split(np.arange(len(x)), BLOCKS) if len(part)]
    if len(parts) < BLOCKS or np.ptp(x) < 0.8 * (until - since):
        return None
    x, y = (np.array([float(np.median(values[part])) for part in parts]) for values in (x, y))
    slope, start = np.polyfit(x, y, 1)
    error = math.sqrt(float(np.sum((y - start - slope * x) ** 2)) / (BLOCKS - 2) / float(np.sum((x - x.mean()) ** 2)))
    return Slope(1000 * float(slope), 1000 * error * T_95, float(np.median(y)))


def drift(times: Sequence[float]) -> float:
    """The median of the last quarter over that of the second."""
    second, last = np.array_split(np.asarray(times), 4)[1::2]
    return float(np.median(last) / np.median(second))


def report(watch: Watch, updates: int) -> dict[str, float]:
    """The tables, and the metrics."""
    found = {name: slope for name, series in watch.memory.items() if (slope := slope_of(watch.updates, series, updates / 2, updates))}
    rows = [
        (name, *(f"{value / MIB:.2f}" for value in (slope.level, slope.per_1000, slope.error)), "flat" if slope.flat else "GROWS")
        for name, slope in sorted(found.items(), key=lambda entry: -entry[1].level)
    ]
    show(f"Memory, MiB, updates {updates // 2} to {updates}", ("process", "median", "slope per 1,000 updates", "+-", ""), rows)
    metrics = {f"rss_slope_mib_per_1000_{name.replace(' ', '_')}": slope.per_1000 / MIB for name, slope in found.items()}
    at = [int(np.searchsorted(watch.updates, share * updates)) for share in (0.1, 0.5, 0.9)]
    growths = {name: [series[index] for index in at] for name, series in watch.files.items()}
    growths = {name: seen for name, seen in growths.items() if max(0.0, *seen) > MIB / 10}
    rows = [
        (name, *(f"{value / MIB:.2f}" for value in seen), f"{(seen[2] - seen[1]) / (seen[1] - seen[0]):.2f}" if seen[1] > seen[0] else "-")
        for name, seen in sorted(growths.items(), key=lambda entry: -np.nan_to_num(entry[1][2]))
    ]
    columns = ("", "after 10 %", "50 %", "90 % of the updates", "second part / first")
    show("Files, MiB", columns, rows, "1: in proportion to the updates")
    totals = np.nansum(np.array([seen for name, seen in growths.items() if name != BOUNDED]), axis=0)
    metrics["file_mib_per_1000"] = 1000 * (totals[2] - totals[1]) / (0.4 * updates) / MIB
    metrics["file_growth"] = float((totals[2] - totals[1]) / (totals[1] - totals[0]))
    times = [row["time/update_s"] for row in read_rows(watch.folder)]
    metrics |= {"update_time_drift": drift(times), "update_s": float(np.median(times))}
    metrics["growing_processes"] = float(sum(not slope.flat for slope in found.values()))
    return metrics


def plot(watch: Watch) -> str:
    """Memory of every process over the updates."""
    every = max(1, len(watch.updates) // 40)
    lines = {
        name: [(update, value / MIB) for update, value in list(zip(watch.updates, series, strict=True))[::every] if math.isfinite(value)]
        for name, series in watch.memory.items()
        if np.isfinite(series).mean() > 0.5
    }
    return draw_lines(lines, "updates", "MiB not shared with others")


def main() -> None:
    """Run, print two tables, write the numbers and the figure where asked."""
    parser = command_line(__doc__, f"{QUICK_UPDATES} updates")
    parser.add_argument("--updates", type=int, default=UPDATES)
    parser.add_argument("--plot", type=Path, help="where to draw the memory over the updates")
    parser.add_argument("--keep", type=Path, help="folder for the run; default: a temporary one")
    arguments = parser.parse_args()
    updates = QUICK_UPDATES if arguments.quick else arguments.updates
    with tempfile.TemporaryDirectory() as temporary:
        watch = soak((arguments.keep or Path(temporary)).resolve() / "run", updates)
        metrics = report(watch, updates)
        if arguments.keep:
            seen = {"updates": watch.updates, "memory": watch.memory, "files": watch.files}
            (arguments.keep / "seen.json").write_text(json.dumps(seen))
    if arguments.plot:
        arguments.plot.write_text(plot(watch), encoding="utf-8")
    goals = (
        Goal(metric="growing_processes", at_most=0),
        Goal(metric="update_time_drift", at_least=0.9, at_most=1.1),
        Goal(metric="file_growth", at_most=1.1),
    )
    finish(arguments, metrics, goals)


if __name__ == "__main__":
    main()
