"""Where the seconds of an update go."""

import time

import torch


class Stopwatch:
    """Adds up laps by name. A lap waits for the GPU, where there is one: once or twice per optimizer step, which costs nothing."""

    def __init__(self) -> None:
        self._laps: dict[str, float] = {}
        self._since = time.perf_counter()

    def start(self) -> None:
        """Forget all laps."""
        self._laps = {}
        self._since = time.perf_counter()

    def lap(self, name: str) -> None:
        """The time since the last lap, or the start, belongs to `name`."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._since
        self._since = now

    @property
    def laps(self) -> dict[str, float]:
        """Name -> seconds since the start."""
        return dict(self._laps)
