"""The replay queue: waiting and waking around a ReplayBuffer.

One event loop, so no locks: each method runs to its first await alone. Every wait has a deadline of its own on this side:
a caller that died, or gave up, swallows nothing.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from actors.waiting import changed_before
from async_rlhf.config import Config
from async_rlhf.metrics import BatchSummary, summarize
from async_rlhf.prompts import PromptStream, load_encode
from async_rlhf.replay import ReplayBuffer
from async_rlhf.scores import ScoreMoments, shape_scores
from async_rlhf.sharding import shard_batch
from async_rlhf.staleness import StalenessRule
from async_rlhf.tasks import load_task
from async_rlhf.tickets import PutOutcome, QueueCounters, ReplaySettings
from async_rlhf.types import Batch, ScoredGroup, Ticket

Shard = tuple[tuple[ScoredGroup, ...], ...]
"""One rank's share of a batch: its groups, by minibatch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NextBatch:
    """The answer to a learner that asks for its next batch."""

    summary: BatchSummary | None
    """None: not yet, or never."""
    closed: bool
    """No further batch will ever come."""
    counters: QueueCounters


class ReplayQueue:
    """The queue between producers and learner. All methods are coroutines of one event loop."""

    def __init__(self, config: Config, model_folder: str) -> None:
        """
        Args:
            model_folder: its tokenizer encodes the prompts.
        """
        self._buffer = make_buffer(config, model_folder)
        self._num_ranks = config.learner.num_ranks
        self._num_minibatches = config.algorithm.minibatches_per_batch
        self._reward = config.reward
        self._moments = ScoreMoments()
        self._changed = asyncio.Condition()
        self._installed: dict[str, int] = {}
        self._shards: tuple[Shard, ...] = ()
        self._summary: BatchSummary | None = None
        self._scores: list[np.ndarray] = []
        """Of every group that came in since the last decision."""

    async def tickets(self, holder: str, max_tickets: int, wait_s: float) -> list[Ticket] | None:
        """Leases for a generator, by the version that it last reported as installed.

        Waits up to `wait_s` for at least one; then []. None: no ticket will ever be needed again.
        """
        ends = time.monotonic() + wait_s
        async with self._changed:
            while True:
                if self._buffer.finished:
                    return None
                granted = self._buffer.grant(holder, self._installed[holder], max_tickets, time.monotonic())
                if granted or not await changed_before(self._changed, ends):
                    return granted

    async def installed(self, holder: str, version: int) -> None:
        """`holder` samples from `version` from now on."""
        async with self._changed:
            self._installed[holder] = max(version, self._installed.get(holder, 0))
            self._changed.notify_all()

    async def scoring(self, tickets: Sequence[Ticket]) -> None:
        """These groups left their generator."""
        self._buffer.mark_scoring(tickets, time.monotonic())

    async def put(self, groups: Sequence[ScoredGroup]) -> list[PutOutcome]:
        """Take finished groups in; never waits for room."""
        outcomes = [self._buffer.put(scored) for scored in groups]
        # Replaced ties too: the trained batch alone would hide how many prompts are solved, or hopeless.
        fresh = (PutOutcome.KEPT, PutOutcome.TIED)
        self._scores += [scored.scores for scored, outcome in zip(groups, outcomes, strict=True) if outcome in fresh]
        async with self._changed:
            self._changed.notify_all()
        return outcomes

    async def next_batch(self, update: int, wait_s: float) -> NextBatch:
        """Decide batch `update` as soon as the rules allow; without a summary after `wait_s`. The same call again gives the same."""
        ends = time.monotonic() + wait_s
        async with self._changed:
            while True:
                if self._summary is not None and self._summary.update == update:
                    return NextBatch(summary=self._summary, closed=False, counters=self._buffer.counters)
                assert update == self._buffer.decided, f"batch {update} was asked for, but {self._buffer.decided} is next"
                batch = self._buffer.decide()
                if batch is not None:
                    self._retain(batch)
                    self._changed.notify_all()
                    continue
                if self._buffer.finished or not await changed_before(self._changed, ends):
                    return NextBatch(summary=None, closed=self._buffer.finished, counters=self._buffer.counters)

    async def take(self, update: int, rank: int) -> Shard:
        """Rank `rank`'s shard of the batch that next_batch decided; the same again when asked again."""
        assert self._summary is not None and self._summary.update == update, f"batch {update} is not the decided one"
        return self._shards[rank]

    async def trained(self, update: int) -> QueueCounters:
        """The learner finished `update`."""
        self._buffer.mark_trained(update)
        return self._buffer.counters

    def _retain(self, batch: Batch) -> None:
        shaped, self._moments = shape_scores(batch, self._moments, self._reward)
        self._summary, self._scores = replace(summarize(batch, self._scores), moments=self._moments), []
        self._shards = shard_batch(shaped, num_ranks=self._num_ranks, num_minibatches=self._num_minibatches)


def make_buffer(config: Config, model_folder: str) -> ReplayBuffer:
    """The buffer of a run: its staleness rule, its prompts and its settings."""
    queue = config.queue
    prompts = PromptStream(load_task(config.task), load_encode(Path(model_folder)), seed=config.seed, max_epochs=queue.max_epochs)
    settings = ReplaySettings(
        num_updates=config.updates,
        order=queue.order,
        max_replacements_per_batch=config.max_replacements_per_batch,
        max_attempts=queue.max_attempts,
        max_failed_share=queue.max_failed_share,
        lease_s=queue.lease_s,
        last_batch=queue.last_batch,
        batch_multiple=config.learner.num_ranks * config.algorithm.minibatches_per_batch,
        whole_rounds=config.deterministic,
        seed=config.seed,
    )
    return ReplayBuffer(StalenessRule(batch_groups=config.batch_groups, max_staleness=config.max_staleness), prompts, settings)
