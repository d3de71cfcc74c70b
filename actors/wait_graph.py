"""Who in this process waits for whom, since when, and who gave a last sign of life when: what to print when a wait went on too long."""

import asyncio
import time
from collections.abc import Generator
from contextlib import contextmanager


class WaitGraph:
    """The waits of one process."""

    def __init__(self) -> None:
        self._waits: dict[int, tuple[str, str, float]] = {}
        self._signs: dict[str, float] = {}
        self._count = 0
        self.at_failure = ""
        """The graph when the run's first failure was seen."""

    @contextmanager
    def waiting(self, edge: str) -> Generator[None]:
        """As long as the block lasts, this task waits for `edge` (actor.method)."""
        self._count += 1
        number, task = self._count, asyncio.current_task()
        self._waits[number] = (task.get_name() if task else "main", edge, time.monotonic())
        try:
            yield
        finally:
            del self._waits[number]

    def heard_from(self, actor: str) -> None:
        """`actor` answered."""
        self._signs[actor] = time.monotonic()

    def forget(self, actor: str) -> None:
        """`actor` is gone."""
        self._signs.pop(actor, None)

    def render(self) -> str:
        """The waits, longest first, and the last signs of life, oldest first."""
        now = time.monotonic()
        waits = sorted(self._waits.values(), key=lambda wait: wait[2])
        lines = [f"  {waiter} waits for {edge}, since {now - since:.1f} s" for waiter, edge, since in waits]
        signs = sorted(self._signs.items(), key=lambda sign: sign[1])
        lines += [f"  last sign of life of {actor}: {now - seen:.1f} s ago" for actor, seen in signs]
        return "\n".join(["who waits for whom:", *lines])


WAITS = WaitGraph()
"""Of this process."""
