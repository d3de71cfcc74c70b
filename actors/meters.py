"""How much of its time each part of the crew works, or waits: meters that only go up, read at each update."""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What a meter says, since it began."""

    busy_s: float = 0.0
    """Seconds of work of all workers together, that of unfinished calls included."""
    num_calls: int = 0
    """Finished calls."""
    calls_s: float = 0.0
    """Seconds of these."""
    num_groups: int = 0
    """Groups that went through."""


class Meter:
    """Of one kind of work, by any number of workers at once."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._since = clock()
        self._num_working = 0
        self._total = Reading()

    @contextmanager
    def working(self, *, counted: bool = True) -> Generator[None]:
        """One worker works inside.

        Args:
            counted: among the calls whose mean duration is the latency.
        """
        began = self._advance()
        self._num_working += 1
        try:
            yield
        finally:
            ended = self._advance()
            self._num_working -= 1
            if counted:
                self._add(num_calls=1, calls_s=ended - began)

    def through(self, num_groups: int) -> None:
        """Groups came out of this work."""
        self._add(num_groups=num_groups)

    @property
    def reading(self) -> Reading:
        """Up to now."""
        self._advance()
        return self._total

    def _advance(self) -> float:
        now = self._clock()
        self._add(busy_s=self._num_working * (now - self._since))
        self._since = now
        return now

    def _add(self, *, busy_s: float = 0.0, num_calls: int = 0, calls_s: float = 0.0, num_groups: int = 0) -> None:
        before = self._total
        self._total = Reading(
            busy_s=before.busy_s + busy_s,
            num_calls=before.num_calls + num_calls,
            calls_s=before.calls_s + calls_s,
            num_groups=before.num_groups + num_groups,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Readings:
    """Those of a run, at one moment."""

    generate: Reading = field(default_factory=Reading)
    """Groups alone: the engines measure their own time."""
    tickets: Reading = field(default_factory=Reading)
    """Generators with room for more that wait for tickets."""
    score: Reading = field(default_factory=Reading)
    reward: Reading = field(default_factory=Reading)


@dataclass(frozen=True, kw_only=True, slots=True)
class Meters:
    """Those of a run; see Readings."""

    train: Meter = field(default_factory=Meter)
    """The learner, as one worker."""
    generate: Meter = field(default_factory=Meter)
    tickets: Meter = field(default_factory=Meter)
    score: Meter = field(default_factory=Meter)
    reward: Meter = field(default_factory=Meter)

    @property
    def readings(self) -> Readings:
        """Up to now."""
        return Readings(generate=self.generate.reading, tickets=self.tickets.reading, score=self.score.reading, reward=self.reward.reading)
