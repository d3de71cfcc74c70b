"""The replay queue: waiting and waking around a ReplayBuffer and its history.

One event loop: each method runs to its first await alone, and the one lock is held while another thread syncs the journal. Every wait
has a deadline of its own on this side: a caller that died, or gave up, swallows nothing. Whatever a call changed is in the journal before
its caller learns of it, so the queue may die at any moment: the next one goes on where it stopped, and every call may simply be made again.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.durability import Durability
from actors.waiting import changed_before
from async_rlhf.config import Config
from async_rlhf.errors import JournalLockedError, RunError
from async_rlhf.history import History
from async_rlhf.journal import Journal, Mark
from async_rlhf.ledger import Ledger
from async_rlhf.metrics import BatchSummary
from async_rlhf.parcel import Parcel
from async_rlhf.prompts import make_stream
from async_rlhf.replay import ReplayBuffer
from async_rlhf.rollouts import export_segment
from async_rlhf.sharding import shard_batch
from async_rlhf.staleness import StalenessRule
from async_rlhf.tickets import PutOutcome, QueueCounters, ReplaySettings
from async_rlhf.types import ScoredGroup, Ticket

LOCK_WAIT_S = 15.0
"""A frozen queue on another node lives for some seconds after it was killed."""

Shard = tuple[Parcel, ...]
"""One rank's share of a batch: its groups, by minibatch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NextBatch:
    """The answer to a learner that asks for its next batch."""

    summary: BatchSummary | None
    """None: not yet, or never."""
    closed: bool
    """No further batch will ever come."""
    counters: QueueCounters


@dataclass(frozen=True, kw_only=True, slots=True)
class Booked:
    """The answer to a learner that finished an update."""

    counters: QueueCounters
    replay_error_nats: float
    """How far the weights are from those that the same update led to before; 0 the first time. See ReplayBuffer.mark_trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Installed:
    """A generator samples from `version` from now on."""

    holder: str
    version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WithScorer:
    """These groups are sampled, and safe from their generator's death."""

    tickets: tuple[Ticket, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class HolderGone:
    """A generator died: its leases may go out again."""

    holder: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringFailed:
    """Nobody could score these groups."""

    tickets: tuple[Ticket, ...]
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Undone:
    """The learner goes on from `version` and will not train later batches as they were; see lineage.annul."""

    version: int
    newest_faithful: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """The oldest checkpoint that is kept is of `version`."""

    version: int


Fact = Installed | WithScorer | HolderGone | ScoringFailed | Undone | Kept


class ReplayQueue:
    """The queue between producers and learner. All methods are coroutines of one event loop, and may be called again."""

    def __init__(self, config: Config, model_folder: str, run_folder: str, session: int) -> None:
        """
        Args:
            model_folder: its tokenizer encodes the prompts, which the config names.
            run_folder: holds the journal; what it says is where the queue begins.
            session: counts the drivers of this run; a new one revokes the leases of the one before.
        """
        self._run_folder = Path(run_folder)
        self._journal = _open(self._run_folder / "journal")
        identity = {"batch_groups": config.batch_groups, "max_staleness": config.max_staleness}
        self._history = History(self._journal, config.reward, identity, session)
        self._buffer = make_buffer(config, model_folder, self._history.ledger)
        self._num_ranks = config.learner.num_ranks
        self._num_minibatches = config.algorithm.minibatches_per_batch
        self._lease_s = config.queue.lease_s
        self._poll_s = config.prompts.poll_s if any(source.live for source in config.prompts.sources.values()) else float("inf")
        """New prompts may come with nobody to notify whoever waits for a ticket."""
        self._changed = asyncio.Condition()
        self._installed: dict[str, int] = {}
        self._revoked: set[str] = set()
        """Holders that are gone, or about to be: they sample from an undone history."""
        self._shards: tuple[int, tuple[Shard, ...]] = (-1, ())
        self._durability = Durability(self._history, self._journal, config.queue.sync_s)
        for slot in self._history.ledger.slots.values():  # leases of before this queue's restart live on, on this clock
            slot.lease_ends_s = time.monotonic() + config.queue.lease_s

    async def tickets(self, holder: str, installed: int, request: int, max_tickets: int, wait_s: float) -> list[Ticket] | None:
        """Leases for a generator that samples from version `installed` or a newer one.

        Waits up to `wait_s` for at least one; then []. None: no ticket will ever be needed again.
        The same `request` number again gives the same tickets.
        """
        ends = time.monotonic() + wait_s
        self._durability.keep_going()
        async with self._changed:
            self._install(holder, installed)
            while True:
                if self._buffer.finished:
                    return None
                granted = self._grant(holder, request, max_tickets)
                if granted:
                    return granted
                looks_again = time.monotonic() + self._poll_s
                if not await changed_before(self._changed, min(ends, looks_again)) and time.monotonic() >= ends:
                    return granted

    async def note(self, fact: Fact) -> QueueCounters:
        """Take a fact in that may change what is granted or decided; returns where all groups are now."""
        if isinstance(fact, Kept):
            await self._forget(fact.version)
            return self._buffer.counters
        async with self._changed:
            match fact:
                case Installed():
                    self._install(fact.holder, fact.version)
                case WithScorer():
                    self._buffer.mark_scoring(fact.tickets, time.monotonic())
                case HolderGone():
                    self._revoked.add(fact.holder)  # the queue may still hold its last request
                    self._buffer.lose_holder(fact.holder)
                case ScoringFailed():
                    self._buffer.fail(fact.tickets, fact.reason)
                case Undone():
                    self._revoked |= self._installed.keys()
                    async with self._durability.still:
                        self._history.annul(fact.version, fact.newest_faithful)
                        self._durability.undo(fact.version)
                        self._shards = (-1, ())  # no earlier: a rank may take the old batch while this waits
            self._history.flush()
            self._changed.notify_all()
        return self._buffer.counters

    async def put(self, groups: Sequence[ScoredGroup]) -> list[PutOutcome]:
        """Take scored groups in; never waits for room."""
        outcomes = [self._buffer.put(scored) for scored in groups]
        self._history.flush()
        async with self._changed:
            self._changed.notify_all()
        return outcomes

    async def next_batch(self, update: int, wait_s: float) -> NextBatch:
        """Decide batch `update` as soon as the rules allow; without a summary after `wait_s`. The same call again gives the same."""
        ends = time.monotonic() + wait_s
        async with self._changed:
            while True:
                summary = self._history.summary(update)
                if summary is not None:
                    break
                if update != self._buffer.decided:
                    raise RunError(f"batch {update} was asked for, but {self._buffer.decided} is next and it is no longer kept")
                decided = self._buffer.decide()
                self._history.flush()
                if decided is not None:
                    self._changed.notify_all()
                    continue
                if self._buffer.finished or not await changed_before(self._changed, ends):
                    return NextBatch(summary=None, closed=self._buffer.finished, counters=self._buffer.counters)
        await self._durability.decision(update)  # before any rank gets its shard
        return NextBatch(summary=summary, closed=False, counters=self._buffer.counters)

    async def take(self, update: int, rank: int) -> tuple[int, Shard]:
        """(update, rank `rank`'s shard of this decided batch); the same again when asked again."""
        await self._durability.decision(update)
        if self._shards[0] != update:
            if self._history.summary(update) is None:
                raise RunError(f"a shard of batch {update} was asked for, but that batch is not decided, or no longer kept")
            batch = self._history.batch(update)
            shards = shard_batch(batch, num_ranks=self._num_ranks, num_minibatches=self._num_minibatches)
            self._shards = update, tuple(tuple(map(Parcel, shard)) for shard in shards)
        return update, self._shards[1][rank]

    async def trained(self, update: int, digest: int, canary_logprobs: tuple[float, ...]) -> Booked:
        """The learner finished `update`; see ReplayBuffer.mark_trained."""
        error_nats = self._buffer.mark_trained(update, digest, canary_logprobs)
        self._history.flush()
        return Booked(counters=self._buffer.counters, replay_error_nats=error_nats)

    async def checkpoint(self) -> Mark:
        """Begin a segment; returns how far the history goes, all of it on the disk."""
        return await self._durability.segment()

    def _grant(self, holder: str, request: int, max_tickets: int) -> list[Ticket]:
        installed = self._installed[holder]
        if holder in self._revoked or (self._history.ledger.lineage and installed > self._buffer.decided):
            return []
        granted = self._buffer.grant(holder, installed, max_tickets, time.monotonic(), request)
        self._history.flush()
        return granted

    def _install(self, holder: str, version: int) -> None:
        self._installed[holder] = max(version, self._installed.get(holder, 0))

    async def _forget(self, version: int) -> None:
        """Turn segments that no checkpoint needs into the rollouts dataset."""
        for segment in self._history.forget_before(version):
            await asyncio.to_thread(export_segment, self._run_folder, segment)
            await self._durability.drop(segment)


def _open(folder: Path) -> Journal:
    """The journal, as soon as a queue that was just killed lets go of it."""
    ends = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            return Journal(folder)
        except JournalLockedError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.2)


def make_buffer(config: Config, model_folder: str, ledger: Ledger) -> ReplayBuffer:
    """The buffer of a run, standing where its ledger stands."""
    queue = config.queue
    prompts = make_stream(config, Path(model_folder), ledger.cursor)
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
    return ReplayBuffer(StalenessRule(batch_groups=config.batch_groups, max_staleness=config.max_staleness), prompts, settings, ledger)
