"""Who stands around, or in the place of, a replay queue in a benchmark: what makes groups, what takes them, and a queue without rules."""

import asyncio
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from ray.cloudpickle import register_pickle_by_value

from async_rlhf.parcel import Parcel
from async_rlhf.types import FinishReason, Prompt, Rollout, RolloutGroup, ScoredGroup, Ticket, VersionSpan

K, TOKENS = 4, 256
WORDS = "word " * 200
"""What 256 tokens decode to, about."""
MAX_STALENESS = 2

register_pickle_by_value(sys.modules[__name__])  # this folder is on no path of the actors


def make_rollouts(seed: int) -> tuple[tuple[Rollout, ...], tuple[np.ndarray, ...]]:
    """K completions and their reference log-probabilities."""
    rng = np.random.default_rng(seed)
    rollouts = tuple(
        Rollout(
            completion_ids=rng.integers(0, 30_000, TOKENS, dtype=np.int32),
            behavior_logprobs=-rng.random(TOKENS, dtype=np.float32),
            version_spans=(VersionSpan(version=0, start=0, end=TOKENS),),
            finish_reason=FinishReason.STOP,
        )
        for _ in range(K)
    )
    return rollouts, tuple(-rng.random(TOKENS, dtype=np.float32) for _ in range(K))


class Source:
    """In place of generators and a scorer: scored groups of any tickets, made beforehand."""

    def __init__(self) -> None:
        self._made = [make_rollouts(seed) for seed in range(64)]
        self._scores = np.linspace(0.0, 1.0, K, dtype=np.float32)

    def score(self, tickets: Sequence[Ticket]) -> tuple[int, Parcel]:
        """As Scorer.score."""
        return len(tickets), Parcel([self.group(ticket) for ticket in tickets])

    def group(self, ticket: Ticket) -> ScoredGroup:
        """Sampled by the version that the ticket was granted for."""
        rollouts, references = self._made[ticket.ticket_id % len(self._made)]
        span = VersionSpan(version=max(0, ticket.deadline - MAX_STALENESS), start=0, end=TOKENS)
        return ScoredGroup(
            group=RolloutGroup(ticket=ticket, rollouts=tuple(replace(rollout, version_spans=(span,)) for rollout in rollouts)),
            scores=self._scores,
            reference_logprobs=references,
            completions=(WORDS,) * K,
        )


def ticket_of(ticket_id: int, holder: str) -> Ticket:
    """One that nobody issued."""
    prompt = Prompt(prompt_id="p", text="12+34=", token_ids=np.zeros(6, dtype=np.int32))
    return Ticket(ticket_id=ticket_id, prompt=prompt, epoch=0, seed=0, deadline=MAX_STALENESS, attempt=0, holder=holder)


class Sink:
    """In place of a learner rank."""

    def train_step(self, minibatches: Sequence[Sequence[ScoredGroup]]) -> int:
        """Look at every group; returns the tokens."""
        return sum(scored.group.num_tokens for groups in minibatches for scored in groups)


class Shelf:
    """The queue's calls without a queue: first come, first served, nothing is written."""

    def __init__(self, batch_groups: int, ranks: int, updates: int, max_live: int) -> None:
        self._size, self._ranks, self._left, self._max_live = batch_groups, ranks, batch_groups * updates, max_live
        self._groups: deque[ScoredGroup] = deque()
        self._live, self._issued, self._batch = 0, 0, ()
        self._changed = asyncio.Condition()

    async def tickets(self, holder: str, installed: int, request: int, max_tickets: int, wait_s: float) -> list[Ticket] | None:
        """Like the queue's."""
        if self._left <= 0:
            return None
        async with self._changed:
            await self._changed.wait_for(lambda: self._live < self._max_live)
        number = min(max_tickets, self._max_live - self._live, self._left)
        self._live, self._left, self._issued = self._live + number, self._left - number, self._issued + number
        return [ticket_of(self._issued - index, holder) for index in range(number)]

    async def note(self, fact: object) -> None:
        """Like the queue's."""

    async def put(self, groups: Sequence[ScoredGroup]) -> list[str]:
        """Like the queue's."""
        self._groups.extend(groups)
        async with self._changed:
            self._changed.notify_all()
        return ["kept"] * len(groups)

    async def next_batch(self, update: int, wait_s: float) -> None:
        """Like the queue's."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._groups) >= self._size)
            self._batch = [self._groups.popleft() for _ in range(self._size)]
            self._live -= self._size
            self._changed.notify_all()

    async def take(self, update: int, rank: int) -> tuple[int, Any]:
        """Like the queue's."""
        return update, (Parcel(self._batch[rank :: self._ranks]),)

    async def trained(self, update: int, digest: int, canary_logprobs: tuple[float, ...]) -> None:
        """Like the queue's."""

    async def checkpoint(self) -> None:
        """Like the queue's."""
