"""The verdict on a run: while it goes on, and from its folder."""

import json
import os
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

from async_rlhf.config import Config, load_config
from async_rlhf.errors import ConfigError
from async_rlhf.recorder import rows_of_config
from async_rlhf.stage_times import WINDOW, Row
from async_rlhf.state import LIVE_PHASES, read_state
from async_rlhf.verdict import Verdict, verdict_of


class RunningVerdict:
    """The verdict on a run that goes on, from its newest rows."""

    def __init__(self, config: Config, num_cores: int | None) -> None:
        """
        Args:
            num_cores: see verdict_of.
        """
        self._config = config
        self._num_cores = num_cores
        self._rows: deque[Row] = deque(maxlen=WINDOW + 1)

    def clear(self) -> None:
        """Updates will be trained again: what comes next does not follow what was there."""
        self._rows.clear()

    def add(self, row: Row) -> Verdict:
        """The verdict after one more update; a row that does not follow the last one begins anew."""
        if self._rows and row["version"] != self._rows[-1]["version"] + 1:
            self._rows.clear()
        self._rows.append(row)
        return verdict_of(list(self._rows), self._config, self._num_cores)


def own_cores(config: Config) -> int | None:
    """Cores of this machine, if a run started here now would have them alone: no GPU, and no cluster to join."""
    parts = (config.generator, config.learner, config.scorer, config.reward)
    return None if os.environ.get("RAY_ADDRESS") or any(part.num_gpus for part in parts) else os.cpu_count()


def verdict_of_folder(folder: Path) -> Verdict | None:
    """The verdict on a run from its folder, wherever it ran; None where its config is not one that this version reads.

    The text of a run that ended is its driver's, which knew the machine.
    """
    try:
        config = load_config([folder / "config.yaml"]).config
    except ConfigError:
        return None
    found = verdict_of(rows_of_config(folder), config)
    said = last_word(folder, "verdict")
    return replace(found, text=said) if said else found


def last_word(folder: Path, about: Literal["verdict", "error"]) -> str:
    """What the driver said at its end; empty: it goes on, was killed, or had nothing to say."""
    try:
        summary: Any = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        ended = read_state(folder).phase not in LIVE_PHASES
    except (OSError, ValueError, ConfigError):
        return ""
    said = cast(dict[str, Any], summary).get(about) if ended and isinstance(summary, dict) else None
    return said if isinstance(said, str) else ""
