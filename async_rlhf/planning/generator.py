"""A generator of the model: what `actors/generator.py` does around its engine."""

from collections.abc import Generator, Sequence
from typing import Any

import simpy

from async_rlhf import traffic
from async_rlhf.config import Config
from async_rlhf.planning.cores import Cores
from async_rlhf.planning.engine import Finished, ModelEngine
from async_rlhf.planning.rates import Rates
from async_rlhf.planning.signals import Signal
from async_rlhf.types import Ticket


class ModelGenerator:
    """Takes groups, tells when it has room for more, and hands them out as they finish, several at once."""

    def __init__(self, env: simpy.Environment, config: Config, rates: Rates, cores: Cores) -> None:
        self._env = env
        self._config = config
        self._num_groups = 0
        """Submitted, not finished."""
        self._finished: list[Finished] = []
        self._first_finished_s = 0.0
        self._left, self._done = Signal(env), Signal(env)
        self.engine = ModelEngine(env, rates, cores, config.generator.max_inflight, self._on_left)

    def submit(self, groups: Sequence[tuple[Ticket, Sequence[float]]]) -> None:
        """Sample these: tickets, and how long their completions will be."""
        for ticket, lengths in groups:
            self.engine.add(ticket, lengths)
        self._num_groups += len(groups)
        self.engine.wake()

    def room(self) -> Generator[Any, Any, int]:
        """Groups that it may have more, as soon as there are any."""
        while not (num := traffic.room(self._config, self.engine.num_completions)):
            yield self._left.wait()
        return num

    def collect(self, gather_s: float) -> Generator[Any, Any, list[Finished]]:
        """Finished groups in ticket order, as soon as none is left in flight, or `gather_s` after the first of them finished."""
        while not self._finished:
            yield self._done.wait()
        ends_s = self._first_finished_s + gather_s
        while self._num_groups and self._env.now < ends_s:
            yield self._done.wait() | self._env.timeout(ends_s - self._env.now)
        groups, self._finished = sorted(self._finished, key=lambda group: group.ticket.ticket_id), []
        return groups

    def _on_left(self, finished: Sequence[Finished]) -> None:
        self._left.notify()
        if finished:
            self._first_finished_s = self._first_finished_s if self._finished else self._env.now
            self._finished.extend(finished)
            self._num_groups -= len(finished)
            self._done.notify()
