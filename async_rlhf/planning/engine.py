"""A generator's continuous batching, step by step.

Every completion in the batch gets one token per step, and a step of n of them takes a + b n seconds; for m that join with it, c m more.
The batch has a number of seats. Who finds none free waits, in order; a seat is free when its completion has ended, however long its
siblings go on, so groups may join in parts.
"""

import heapq
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import simpy

from async_rlhf.planning.cores import Cores
from async_rlhf.planning.rates import Rates
from async_rlhf.types import Ticket

Steps = Generator[Any, Any, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A group all of whose completions have ended."""

    ticket: Ticket
    version: int
    """Of the weights under which the first of them joined the batch."""


@dataclass(slots=True)
class _Group:
    ticket: Ticket
    num_left: int
    """Completions that have not ended."""
    version: int = -1
    """-1: all of them wait for a seat."""


class ModelEngine:
    """An engine of the model. Completions leave when their length is reached; a group is finished when all of its have left.

    Whatever comes - completions, pauses - comes between two steps.
    """

    def __init__(
        self, env: simpy.Environment, rates: Rates, cores: Cores, num_seats: int, on_left: Callable[[Sequence[Finished]], None]
    ) -> None:
        """
        Args:
            on_left: called whenever completions have ended, with the groups that are finished by that, possibly none.
        """
        self._env = env
        self._cores = cores
        self._rates = rates
        self._num_seats = num_seats
        self._on_left = on_left
        self._waiting: deque[tuple[float, _Group]] = deque()
        """(length, its group) of those without a seat."""
        self._ends: list[tuple[float, int, _Group]] = []
        """(number of steps after which a completion ends, its number, its group): a heap of those in the batch."""
        self._num_joined = 0
        self._num_steps = 0.0
        self._pauses: deque[tuple[float, int, bool, simpy.Event]] = deque()
        self._version = 0
        self._busy_s = 0.0
        self._stepping_since: float | None = None
        self.num_tokens = 0.0
        """Sampled."""
        self._wanted = env.event()
        """Something came that has to be looked at before the next step."""
        env.process(self._run())

    @property
    def busy_s(self) -> float:
        """Seconds in steps, up to now."""
        return self._busy_s + (self._env.now - self._stepping_since if self._stepping_since is not None else 0.0)

    @property
    def num_completions(self) -> int:
        """In the batch, and waiting for a seat."""
        return len(self._ends) + len(self._waiting)

    def add(self, ticket: Ticket, lengths: Sequence[float]) -> None:
        """Sample a group: its completions join the batch, as far as there are seats, with the next step after wake()."""
        group = _Group(ticket, len(lengths))
        self._waiting.extend((tokens, group) for tokens in lengths)

    def wake(self) -> None:
        """To be called after one or more add()."""
        if not self._wanted.triggered:
            self._wanted.succeed()

    def install(self, seconds: float, version: int, *, reread: bool = True) -> simpy.Event:
        """Load weights for so long, from the end of this step on, and try the canary; the event comes when that is over.

        Args:
            reread: what all that are running have so far, in the canary's step.
        """
        over = self._env.event()
        self._pauses.append((seconds, version, reread, over))
        self.wake()
        return over

    def _run(self) -> Steps:
        while True:
            if not (self._ends or self._waiting or self._pauses):
                yield self._wanted
            self._wanted = self._env.event()
            if self._pauses:
                yield from self._install()
                continue
            num_joined = self._join()
            self._stepping_since = self._env.now
            yield from self._step(num_joined)
            self._busy_s, self._stepping_since = self.busy_s, None
            yield from self._cores.work(self._rates.engine_beside_s * num_joined)

    def _install(self) -> Steps:
        """The load; then one step, the canary's, in which all that are running get a token, too."""
        seconds, self._version, reread, over = self._pauses.popleft()
        rates, num = self._rates, len(self._ends) + 1
        step_s = rates.engine_step_s + rates.engine_completion_s * num + rates.engine_prompt_s * (num if reread else 1)
        yield from self._cores.work(seconds + step_s)
        self._advance(1.0)
        over.succeed()

    def _join(self) -> int:
        """Who waits takes the free seats; how many did."""
        num = min(len(self._waiting), self._num_seats - len(self._ends))
        for _ in range(num):
            tokens, group = self._waiting.popleft()
            group.version = self._version if group.version < 0 else group.version
            heapq.heappush(self._ends, (self._num_steps + tokens, self._num_joined, group))
            self._num_joined += 1
        return num

    def _step(self, num_joined: int) -> Steps:
        """The step in which some join; or, where none do, as many as come before the next completion ends, or something else comes."""
        step_s = self._rates.engine_step_s + self._rates.engine_completion_s * len(self._ends)
        num = self._ends[0][0] - self._num_steps
        if num_joined:
            num = min(num, 1.0)
            yield from self._cores.work(num * step_s + self._rates.engine_prompt_s * num_joined)
        else:
            left_s = yield from self._cores.work(num * step_s, until=self._wanted)
            if left_s:
                yield from self._cores.work(left_s % step_s)
                num -= left_s // step_s
        self._advance(num)

    def _advance(self, num_steps: float) -> None:
        """All in the batch got so many tokens; those that have their last one leave."""
        self._num_steps += num_steps
        self.num_tokens += num_steps * len(self._ends)
        num_before, finished = len(self._ends), list[Finished]()
        while self._ends and self._ends[0][0] <= self._num_steps + 1e-9:
            group = heapq.heappop(self._ends)[2]
            group.num_left -= 1
            if not group.num_left:
                finished.append(Finished(ticket=group.ticket, version=group.version))
        if len(self._ends) < num_before:
            self._on_left(finished)
