"""Several runs side by side: their results, the settings that differ, their curves over each other."""

from collections.abc import Mapping
from dataclasses import asdict

from async_rlhf.curves import EVALUATION_CURVES, Curve
from async_rlhf.dashboard.folder import RunFolder
from async_rlhf.dashboard.reading import count, fields, number, text
from async_rlhf.dashboard.samples import shown
from async_rlhf.dashboard.settings import differing
from async_rlhf.dashboard.table import Table, thinned
from async_rlhf.dashboard.views import SMOOTHED, STEADY_CURVES, View, entry, evaluated
from async_rlhf.report_curves import running_mean, smoothing_window

MAX_COMPARED = 8
"""Runs: colours can be told apart for no more."""
MAX_POINTS = 300
MAX_SETTINGS = 200
NAMES = ("reward", "kl", "entropy", "staleness", "throughput", "idle", "depth", "loss", "length", "ess")
"""Curves that are laid over each other, of each its first line."""


def compare(runs: Mapping[str, RunFolder]) -> View:
    """Everything that the page shows of several runs.

    Args:
        runs: name in addresses -> run, read anew.
    """
    measured = {name: _measured(run) for name, run in runs.items()}
    changed = differing({name: run.settings for name, run in runs.items()})
    return {
        "runs": [{"name": name, **entry(run), "results": _results(run)} for name, run in runs.items()],
        "settings": {key: {name: _plain(of) for name, of in values.items()} for key, values in [*changed.items()][:MAX_SETTINGS]},
        "training": _overlaid([curve for curve in STEADY_CURVES if curve.name in NAMES], {name: run.table for name, run in runs.items()}),
        "evaluations": _overlaid(EVALUATION_CURVES, measured),
    }


def _results(run: RunFolder) -> View:
    """What a run came to, means over all of it where it says so."""
    summary, table = run.summary, run.table
    rows = max(1, len(table))
    return {
        "exit": shown(text(summary.get("exit"), run.phase)),
        "evaluation": evaluated(run),
        "reward": table.tail_mean("reward/mean", smoothing_window(len(table))),
        "kl": table.last("rollout/kl_k1_nats"),
        "staleness_max": number(run.state.get("staleness_max")),
        "updates": count(run.state.get("version")),
        "train_s": table.last("time_s") or number(summary.get("train_wall_s")),
        "generator_tokens_per_s": table.tail_mean("generate/tokens_per_s", rows),
        "learner_tokens_per_s": table.tail_mean("train/tokens_per_s", rows),
        "generator_idle": table.tail_mean("generate/idle_share", rows),
        "learner_idle": table.tail_mean("train/idle_share", rows),
        "restarts": sum(count(num) for num in fields(run.state.get("restarts")).values()),
    }


def _measured(run: RunFolder) -> Table:
    table = Table()
    table.extend(run.evaluations)
    return table


def _overlaid(defined: "list[Curve] | tuple[Curve, ...]", tables: Mapping[str, Table]) -> View:
    """Definitions of the curves that any run has, each cut to its first line, and run -> columns."""
    keys = {name: set(table.keys) for name, table in tables.items()}
    curves = [curve for curve in defined if any(curve.lines[0].key in of for of in keys.values())]
    columns: dict[str, dict[str, list[float | None]]] = {}
    for name, table in tables.items():
        lines = [curve.lines[0] for curve in curves]
        columns[name] = table.thinned({line.key: line.peaks for line in lines}, MAX_POINTS)
        for curve in curves:
            if curve.smoothed and curve.lines[0].key in columns[name]:
                mean = running_mean(table.column(curve.lines[0].key), smoothing_window(len(table)))
                columns[name][curve.lines[0].key + SMOOTHED] = thinned(mean, max_points=MAX_POINTS)
    return {"curves": [{**asdict(curve), "lines": [asdict(curve.lines[0])]} for curve in curves], "columns": columns}


def _plain(value: object) -> str | None:
    """A setting as text; None where the run has no such setting."""
    return None if value is None else shown(str(value).lower() if isinstance(value, bool) else str(value))
