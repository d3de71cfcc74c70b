"""Cores that all processes of one machine share: with more processes at work than cores, each goes on at its share of the speed."""

from collections.abc import Callable, Generator
from typing import Any

import simpy

Steps = Generator[Any, Any, None]


class Cores:
    """Processor sharing. One process needs one core; infinitely many cores slow nobody down."""

    def __init__(self, env: simpy.Environment, num: float) -> None:
        self._env = env
        self._num = num
        self._active = 0.0
        self._changed = env.event()
        self._listeners: list[tuple[Callable[[], None], Callable[[], None]]] = []

    @property
    def speed(self) -> float:
        """Of each process that is at work, 1 where it has a core to itself."""
        return min(1.0, self._num / self._active) if self._active else 1.0

    def listen(self, before: Callable[[], None], after: Callable[[], None]) -> None:
        """Call both whenever the speed changes: `before` while it is still the old one."""
        self._listeners.append((before, after))

    def change(self, by: float) -> None:
        """So many processes more, or fewer, are at work from now on."""
        old, new = self.speed, min(1.0, self._num / (self._active + by)) if self._active + by else 1.0
        if old == new:
            self._active += by
            return
        for before, _ in self._listeners:
            before()
        self._active += by
        event, self._changed = self._changed, self._env.event()
        event.succeed()
        for _, after in self._listeners:
            after()

    def work(self, seconds: float, num: float = 1.0) -> Steps:
        """So many processes work for what would be `seconds` alone."""
        self.change(num)
        while seconds > 1e-12:
            speed, began = self.speed, self._env.now
            yield self._env.timeout(seconds / speed) | self._changed
            seconds -= (self._env.now - began) * speed
        self.change(-num)
