"""A generator's continuous batching, step by step.

Every completion in the batch gets one token per step, and a step of n of them takes a + b n seconds; for m that join with it, c m more.
"""

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
    """An engine of the model. Completions leave when their length is reached; a group is finished when all of its have left.

    Whatever comes - completions, pauses - comes between two steps.
    """

    def __init__(self, env: simpy.Environment, rates: Rates, cores: Cores, on_finished: Callable[[Ticket], None]) -> None:
        self._env = env
        self._cores = cores
        self._rates = rates
        self._on_finished = on_finished
        self._joining: list[tuple[Ticket, list[float]]] = []
        self._ends: list[tuple[float, int]] = []
        """(number of steps after which a completion ends, its ticket's id): a heap."""
        self._groups: dict[int, tuple[Ticket, int]] = {}
        """Ticket id -> ticket, completions still running."""
        self._num_steps = 0.0
        self._pauses: deque[tuple[float, simpy.Event]] = deque()
        self._busy_s = 0.0
        self._stepping_since: float | None = None
        self.num_tokens = 0.0
        self._wanted = env.event()
        """Something came that has to be looked at before the next step."""
        env.process(self._run())

    @property
    def busy_s(self) -> float:
        """Seconds in steps, up to now."""
        return self._busy_s + (self._env.now - self._stepping_since if self._stepping_since is not None else 0.0)

    def add(self, ticket: Ticket, lengths: "list[float]") -> None:
        """Sample a group: its completions join the batch with the next step after wake()."""
        self._joining.append((ticket, lengths))
        self.num_tokens += sum(lengths)

    def wake(self) -> None:
        """To be called after one or more add()."""
        if not self._wanted.triggered:
            self._wanted.succeed()

    def install(self, seconds: float) -> simpy.Event:
        """Load weights for so long, from the end of this step on, and try the canary; the event comes when that is over."""
        over = self._env.event()
        self._pauses.append((seconds, over))
        self.wake()
        return over

    def _run(self) -> Steps:
        while True:
            if not (self._ends or self._joining or self._pauses):
                yield self._wanted
            self._wanted = self._env.event()
            if self._pauses:
                yield from self._install()
                continue
            num_joined = self._join()
            self._stepping_since = self._env.now
            yield from self._step(num_joined)
            self._busy_s, self._stepping_since = self.busy_s, None
            self._finish()

    def _install(self) -> Steps:
        """The load; then one step, the canary's: all that are running are read anew under the new weights, and get a token, too."""
        seconds, over = self._pauses.popleft()
        rates, num = self._rates, len(self._ends) + 1
        yield from self._cores.work(seconds + rates.engine_step_s + (rates.engine_completion_s + rates.engine_prompt_s) * num)
        self._num_steps += 1.0
        self._finish()
        over.succeed()

    def _join(self) -> int:
        joining, self._joining = self._joining, []
        for ticket, lengths in joining:
            self._groups[ticket.ticket_id] = ticket, len(lengths)
            for tokens in lengths:
                heapq.heappush(self._ends, (self._num_steps + tokens, ticket.ticket_id))
        return sum(len(lengths) for _, lengths in joining)

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
        self._num_steps += num

    def _finish(self) -> None:
        while self._ends and self._ends[0][0] <= self._num_steps + 1e-9:
            ticket_id = heapq.heappop(self._ends)[1]
            ticket, left = self._groups[ticket_id]
            if left > 1:
                self._groups[ticket_id] = ticket, left - 1
            else:
                del self._groups[ticket_id]
                self._on_finished(ticket)
