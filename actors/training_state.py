"""The TrainingState actor: the single writer of where the run stands."""

from pathlib import Path
from typing import Any

import ray

from async_rlhf.state import TrainingState, write_atomically


class TrainingStateStore:
    """Keeps the latest state in Ray's object store, and its durable twin in the run folder."""

    def __init__(self, run_folder: str) -> None:
        self._file = Path(run_folder) / "state.json"
        self._latest: Any = None

    def record(self, state: TrainingState) -> None:
        """Make `state` the latest."""
        self._latest = ray.put(state)
        write_atomically(self._file, state.to_json())

    def latest(self) -> list[Any]:
        """[reference of the latest state], or []. In a list, because a bare reference would arrive as its value's copy."""
        return [] if self._latest is None else [self._latest]
