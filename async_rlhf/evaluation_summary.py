"""The evaluations of a run in summary.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from async_rlhf.evaluation_log import read_evaluations


def summarize_evaluations(folder: Path, *, separate_reward: bool) -> dict[str, object]:
    """The block `evaluation` (`start`, `latest` between the updates, and `final`), and its last word as plain numbers.

    Args:
        separate_reward: the run trains a reward that is not the task's metric, so that the metric is the gold standard.
    """
    rows = read_evaluations(folder)
    named = {"latest" if row["stage"] == "between" else row["stage"]: row for row in rows}
    start, last = named.get("start"), rows[-1] if rows else None
    return {
        "gold_start": start["evaluate/score"] if separate_reward and start else None,
        "gold_end": last["evaluate/score"] if separate_reward and last and last is not start else None,
        "kl_nats": last.get("evaluate/kl_nats") if last else None,
        "winrate": last.get("evaluate/winrate") if last else None,
        "evaluation": {name: _block(row) for name, row in named.items()},
    }


def _block(row: Mapping[str, Any]) -> dict[str, Any]:
    """Of one evaluation: what was measured, under short names; an interval is [low, high]."""
    block: dict[str, Any] = {"versions": [row["version_min"], row["version_max"]], "prompts": row["prompts"]}
    for key, value in row.items():
        stage, _, name = key.partition("/")
        if stage == "evaluate" and not name.endswith(("_low", "_high")):
            block[name] = value
            if f"{key}_low" in row:
                block[f"{name}_interval"] = [row[f"{key}_low"], row[f"{key}_high"]]
    return block | {name: row[name] for name in ("opponent", "problem") if row[name]}
