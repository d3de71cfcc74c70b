"""Cores that all processes of one machine share: with more processes at work than cores, each goes on at its share of the speed.

Taking turns costs: what a process finds in the core's caches is another's. SWITCHING is what makes an asynchronous and a synchronous run
of one machine agree on how long their work takes (docs/scaling.md).
"""

import math
from collections.abc import Generator
from typing import Any

import simpy

SWITCHING = 0.2
"""Core time lost, per unit of work, while more processes are at work than there are cores."""

Work = Generator[Any, Any, float]


class Cores:
    """Processor sharing. One process needs one core; infinitely many cores slow nobody down."""

    def __init__(self, env: simpy.Environment, num: float) -> None:
        self._env = env
        self._num = num
        self._active = 0.0
        self._changed = env.event()
        self._spent_s = self._worked_s = 0.0

    @property
    def speed(self) -> float:
        """Of each process that is at work, 1 where it has a core to itself."""
        return 1.0 if self._active <= self._num else self._num / self._active / (1 + SWITCHING)

    @property
    def stretch(self) -> float:
        """Core time spent / work done, so far: 1 where nobody took turns."""
        return self._spent_s / self._worked_s if self._worked_s else 1.0

    @property
    def _nothing_s(self) -> float:
        """So little time that the clock, by now, might not move by it."""
        return max(1e-12, 4 * math.ulp(self._env.now))

    def work(self, seconds: float, num: float = 1.0, until: simpy.Event | None = None) -> Work:
        """So many processes work for what would be `seconds` alone.

        Args:
            until: ends the work early.
        Returns:
            What is left of the seconds then; 0 where all were worked.
        """
        self._change(num)
        while seconds > self._nothing_s and not (until is not None and until.processed):
            speed, began = self.speed, self._env.now
            worked = self._env.timeout(seconds / speed)
            others = [event for event in (self._changed if self._num < math.inf else None, until) if event is not None]
            yield self._env.any_of([worked, *others]) if others else worked
            worked_s = (self._env.now - began) * speed
            self._worked_s += num * worked_s
            self._spent_s += num * worked_s * (1.0 if speed == 1.0 else 1 + SWITCHING)
            seconds = max(0.0, seconds - worked_s)
        self._change(-num)
        return seconds if seconds > self._nothing_s else 0.0

    def _change(self, by: float) -> None:
        before = self.speed
        self._active += by
        if abs(self._active) < 1e-9:  # parts of processes do not add up to nothing
            self._active = 0.0
        if self.speed != before:
            event, self._changed = self._changed, self._env.event()
            event.succeed()
