"""The verdict on a run: while it goes on, and from its folder."""

import os
from collections import deque
from pathlib import Path

from async_rlhf.config import Config, load_config
from async_rlhf.errors import ConfigError
from async_rlhf.recorder import read_rows
from async_rlhf.stage_times import WINDOW, Row
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
    """The verdict on a run from its folder, wherever it ran; None where its config is not one that this version reads."""
    try:
        return verdict_of(read_rows(folder), load_config([folder / "config.yaml"]).config)
    except ConfigError:
        return None
