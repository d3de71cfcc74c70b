"""What the page asks for, as JSON: a run now, its curves, the list of runs. Absent values are None; texts show what would hide itself."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np

from async_rlhf.curves import CURVES, EVALUATION_CURVES, PART_NAME, Curve, Line, part_curves
from async_rlhf.dashboard.flow import flow
from async_rlhf.dashboard.folder import RunFolder
from async_rlhf.dashboard.reading import Fields, count, fields, number, text
from async_rlhf.dashboard.samples import held_out, sampled, shown
from async_rlhf.dashboard.settings import setting
from async_rlhf.dashboard.table import VERSION, Table, thinned
from async_rlhf.dashboard.verdicts import verdict
from async_rlhf.metrics import PART
from async_rlhf.progress import eta_s
from async_rlhf.report_curves import running_mean, smoothing_window

View = dict[str, object]

MAX_INCIDENTS_SHOWN = 20
MAX_NAMES = 64
"""Actors, and reasons of drops."""
STEADIED = ("kl", "throughput", "idle", "depth", "wait")
"""Curves that jump from update to update: they get a running mean on the page."""
STEADY_CURVES = tuple(replace(curve, smoothed=curve.smoothed or curve.name in STEADIED) for curve in CURVES)
SMOOTHED = ":smoothed"
"""Ends the key of a column that holds another one's running mean."""


def entry(run: RunFolder) -> View:
    """One line of the list of runs; reads no metrics."""
    state = run.state
    return {
        "title": shown(run.folder.name),
        "algorithm": algorithm(run),
        "phase": shown(run.phase),
        "live": run.live,
        "version": count(state.get("version")),
        "num_updates": count(state.get("num_updates")),
        "reward_mean": number(state.get("reward_mean")),
        "started_at": run.started_at,
        "seen_s_ago": run.seen_s_ago,
    }


def overview(run: RunFolder) -> View:
    """A run as it stands now."""
    state, summary, table = run.state, run.summary, run.table
    return {
        **entry(run),
        "folder": shown(str(run.folder)),
        "elapsed_s": table.last("time_s") or number(state.get("elapsed_s")),
        "eta_s": _eta_s(run),
        **verdict(run),
        "error": shown(text(summary.get("error"))),
        "max_staleness": number(run.settings.get("max_staleness")),
        "numbers": {name: number(state.get(name)) for name in _NUMBERS},
        "row": {key: table.last(key) for key in _ROW},
        "flow": flow(table, run.settings, state),
        "actors": actors(run),
        "incidents": [_incident(each) for each in run.incidents[: -MAX_INCIDENTS_SHOWN - 1 : -1]],
        "drops": _counts(summary.get("dropped") if summary else state.get("dropped")),
        "drops_known": bool(summary) or "dropped" in state,
        "failed_prompts": len(fields(summary.get("failed_prompts"))),
        "skipped_rows": _counts(summary.get("skipped_rows")),
        "evaluation": evaluated(run),
        "stamps": {"curves": f"{table.changes}/{len(run.evaluations)}", "samples": run.samples_stamp},
    }


_NUMBERS = (
    "optimizer_steps",
    "prompts",
    "completions",
    "tokens",
    "reward_mean",
    "best_reward_mean",
    "staleness_max",
    "checkpoint",
    "session",
    "seed",
    "updated_at",
)
_ROW = ("rollout/kl_k1_nats", "policy/entropy_nats", "rollout/length_tokens", "queue/staleness_mean", "queue/staleness_max", "train/loss")


def curves(run: RunFolder) -> View:
    """The curves of a run: what they are, and their points, column by column."""
    measured = Table()
    measured.extend(run.evaluations)
    defined = (*STEADY_CURVES, *_part_curves(run.table))
    return {
        "bound": number(run.settings.get("max_staleness")),
        "training": _drawn(defined, run.table),
        "evaluations": _drawn(EVALUATION_CURVES, measured),
        "window": smoothing_window(len(run.table)),
        "rows": len(run.table),
    }


def samples(run: RunFolder) -> View:
    """Completions to look at."""
    return {"held_out": held_out(run.samples), "sampled": sampled(run.newest_groups)}


def algorithm(run: RunFolder) -> str:
    """Its name; empty where the config does not say."""
    return shown(str(run.settings.get("algorithm.name", "")))[:40]


def evaluated(run: RunFolder) -> View:
    """The held-out score at the start and now, each with its 95 % interval."""
    found: list[View] = []
    for row in (run.evaluations[:1] + run.evaluations[-1:]) if len(run.evaluations) > 1 else run.evaluations:
        low, high = (number(row.get(f"evaluate/score_{end}")) for end in ("low", "high"))
        found.append({"version": number(row.get("version")), "score": number(row.get("evaluate/score")), "low": low, "high": high})
    metric = run.summary.get("metric")
    return {"metric": shown(text(metric, "score"))[:40], "points": found}


def actors(run: RunFolder) -> list[View]:
    """Who plays in the run: what each last did, how often it was started again, and whether it is there."""
    does = {_part(name): shown(text(what))[:200] for name, what in fields(run.state.get("actors")).items()}
    restarts = {name: count(num) for name, num in fields(run.state.get("restarts")).items()}
    expected = [
        *(f"generator-{index}" for index in range(min(MAX_NAMES, int(setting(run.settings, "generator.count", 0)))) if not does),
        *sorted(does, key=_natural),
        *(f"scorer-{index}" for index in range(min(MAX_NAMES, int(setting(run.settings, "scorer.count", 0))))),
        *(f"reward-{index}" for index in range(min(MAX_NAMES, int(setting(run.settings, "reward.count", 0))))),
        *(("replay_queue", "learner", "weight_broadcaster", "training_state") if run.settings else ()),
    ]
    down = _down(run.incidents)
    names = list(dict.fromkeys([*expected, *sorted(restarts), *sorted(run.lost_counts)]))[: 4 * MAX_NAMES]
    return [
        {
            "name": shown(name)[:100],
            "does": does.get(name, ""),
            "restarts": max(restarts.get(name, 0), run.lost_counts.get(name, 0)),
            "health": "ended" if not run.live else "down" if name in down else "up",
        }
        for name in names
    ]


def _down(incidents: Sequence[Fields]) -> set[str]:
    """Who was lost and is not back."""
    down: set[str] = set()
    for each in incidents:
        name = text(each.get("name"))
        (down.add if each.get("event") in ("lost", "no_room", "rests") else down.discard)(name)
    return down


def _part(incarnation: str) -> str:
    """`generator-0.1.2`, the third to play generator-0 for the second driver -> `generator-0`."""
    return incarnation.partition(".")[0]


def _natural(name: str) -> tuple[str, int, str]:
    stem, _, index = name.rpartition("-")
    return (stem, int(index), "") if index.isascii() and index.isdigit() and len(index) < 10 else (name, 0, name)


def _incident(found: Fields) -> View:
    return {
        "event": shown(text(found.get("event")))[:40],
        "name": shown(text(found.get("name")))[:100],
        "time": number(found.get("time")),
        "cause": shown(text(found.get("cause"))),
        "after_s": number(found.get("after_s")),
    }


def _counts(found: object) -> Mapping[str, int]:
    """Reason -> count; what a reason goes on with after a colon may differ each time, and is put together."""
    counts: dict[str, int] = {}
    for reason, num in fields(found).items():
        name = shown(reason.partition(":")[0].replace("_", " "))[:80]
        if count(num) and (name in counts or len(counts) < MAX_NAMES):
            counts[name] = counts.get(name, 0) + count(num)
    return counts


def _eta_s(run: RunFolder) -> float | None:
    """Seconds to the last update; None where the run is over, or has not begun."""
    version, time_s = run.table.last(VERSION), run.table.last("time_s")
    num_updates = count(run.state.get("num_updates"))
    if not run.live or not version or version < 0 or time_s is None or num_updates < version:
        return None
    return eta_s({VERSION: version, "time_s": time_s}, num_updates)


def _part_curves(table: Table) -> tuple[Curve, ...]:
    """Of each part of the reward."""
    keys = [key for key in table.keys if key.startswith(PART) and PART_NAME.fullmatch(key.removeprefix(PART))]
    return part_curves([{key: float(np.nanmax(np.abs(table.column(key))))} for key in keys])


def _drawn(defined: Sequence[Curve], table: Table) -> View:
    """Definitions of the curves that have a value, and the columns that they need."""
    known = set(table.keys)
    shown_curves = [curve for curve in defined if any(line.key in known for line in curve.lines)]
    wanted: dict[str, bool] = {}
    for line in (line for curve in shown_curves for line in curve.lines):
        wanted[line.key] = line.peaks
        if line.banded:
            wanted |= {f"{line.key}_low": False, f"{line.key}_high": False}
    columns = table.thinned(wanted)
    for line in (line for curve in shown_curves if curve.smoothed for line in curve.lines):
        columns[line.key + SMOOTHED] = thinned(running_mean(table.column(line.key), smoothing_window(len(table))))
    return {"curves": [_definition(curve, known) for curve in shown_curves], "columns": columns}


def _definition(curve: Curve, known: set[str]) -> View:
    lines: list[Line] = [line for line in curve.lines if line.key in known]
    return {**asdict(curve), "lines": [asdict(line) for line in lines]}
