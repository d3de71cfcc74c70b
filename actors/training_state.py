"""The TrainingState actor: the single writer of where the run stands."""

from pathlib import Path
from typing import Any

import ray

from async_rlhf.state import STATE_ACTOR_FILE, STATE_FILE, TrainingState, read_state, write_atomically


class TrainingStateStore:
    """Keeps the latest state in Ray's object store, and its durable twin in the run folder."""

    def __init__(self, run_folder: str, name: str) -> None:
        """Begin with the durable state, where there is one.

        Args:
            name: of this actor, for those who look for it: each incarnation has its own, since Ray may not have let go of the last.
        """
        self._file = Path(run_folder) / STATE_FILE
        self._latest: Any = ray.put(read_state(Path(run_folder))) if self._file.is_file() else None
        write_atomically(Path(run_folder) / STATE_ACTOR_FILE, name)

    def record(self, state: TrainingState) -> None:
        """Make `state` the latest."""
        self._latest = ray.put(state)
        write_atomically(self._file, state.to_json())

    def latest(self) -> list[Any]:
        """[reference of the latest state], or []. In a list, because a bare reference would arrive as its value's copy."""
        return [] if self._latest is None else [self._latest]
