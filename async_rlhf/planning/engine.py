"""A generator's continuous batching: every completion in the batch gets one token per step, and a step of n takes a + b n seconds."""

import heapq
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

import simpy

from async_rlhf.planning.cores import Cores
from async_rlhf.planning.rates import Rates
from async_rlhf.types import Ticket

Steps = Generator[Any, Any, None]


class ModelEngine:
    """An engine of the model. Completions leave when their length is reached; a group is finished when all of its have left."""

    def __init__(
        self,
        env: simpy.Environment,
        rates: Rates,
        cores: Cores,
        on_finished: Callable[[Ticket], None],
        on_freed: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            on_finished: called with each finished group's ticket; on_freed: whenever completions have left.
        """
        self._env = env
        self._on_freed = on_freed
        self._cores = cores
        self._at_work = False
        cores.listen(self.count, self.wake)
        self._rates = rates
        self._on_finished = on_finished
        self._ends: list[tuple[float, int]] = []
        """(step at which a completion ends, its ticket's id): a heap."""
        self._groups: dict[int, tuple[Ticket, int]] = {}
        """Ticket id -> ticket, completions still running."""
        self._steps_done = 0.0
        self._counted_s = env.now
        self._pauses: deque[tuple[float, simpy.Event]] = deque()
        self.busy_s = 0.0
        self.alone_s = 0.0
        """What the same work takes on a core of its own."""
        self.num_tokens = 0.0
        self._asleep = True
        """Waiting for the next completion to end, or for work; not in a pause."""
        self._woken = False
        self._process = env.process(self._run())

    def add(self, ticket: Ticket, lengths: "list[float]") -> None:
        """Sample a group: its completions join the batch before the next step."""
        self._count()
        self._groups[ticket.ticket_id] = ticket, len(lengths)
        for tokens in lengths:
            heapq.heappush(self._ends, (self._steps_done + tokens, ticket.ticket_id))
        self.num_tokens += sum(lengths)

    @property
    def num_running(self) -> int:
        """Completions in the batch."""
        return len(self._ends)

    def wake(self) -> None:
        """To be called after one or more add()."""
        if self._asleep and not self._woken and self._env.active_process is not self._process:
            self._woken = True
            self._process.interrupt()

    def pause(self, seconds: float) -> simpy.Event:
        """Do not sample for so long; the event comes when that is over."""
        self._count()
        over = self._env.event()
        self._pauses.append((seconds, over))
        self.wake()
        return over

    def count(self) -> None:
        """Bring the counters up to now."""
        self._count()

    @property
    def _step_s(self) -> float:
        return (self._rates.engine_step_s + self._rates.engine_completion_s * len(self._ends)) / self._cores.speed

    def _count(self) -> None:
        passed_s, self._counted_s = self._env.now - self._counted_s, self._env.now
        if self._at_work and passed_s > 0:
            self.busy_s += passed_s
            self.alone_s += passed_s * self._cores.speed
            self._steps_done += passed_s / self._step_s

    def _look(self) -> None:
        """Take a core, or give it back."""
        at_work = bool(self._ends) and not self._pauses
        if at_work != self._at_work:
            self._count()
            self._at_work = at_work
            self._cores.change(1 if at_work else -1)

    def _run(self) -> Steps:
        while True:
            self._look()
            if self._pauses:
                self._asleep = False
                seconds, over = self._pauses[0]
                yield from self._cores.work(seconds)
                self._counted_s, self._asleep = self._env.now, True
                self._pauses.popleft()
                over.succeed()
                continue
            wait_s = max(0.0, self._ends[0][0] - self._steps_done) * self._step_s if self._ends else float("inf")
            try:
                yield self._env.timeout(wait_s) if wait_s < float("inf") else self._env.event()
            except simpy.Interrupt:
                self._woken = False
                self._count()
                continue
            self._count()
            self._finish()

    def _finish(self) -> None:
        self._steps_done = max(self._steps_done, self._ends[0][0])
        while self._ends and self._ends[0][0] <= self._steps_done + 1e-9:
            ticket_id = heapq.heappop(self._ends)[1]
            ticket, left = self._groups[ticket_id]
            if left > 1:
                self._groups[ticket_id] = ticket, left - 1
            else:
                del self._groups[ticket_id]
                self._on_finished(ticket)
        self._on_freed()
