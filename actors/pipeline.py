"""The two loops of asynchronous training, and nothing else.

     queue.tickets        generator            scorer               queue.put / decide      learner ranks        broadcaster
     Prompt -- ticket --> Rollout (K) -------> ScoredGroup -------> ReplayQueue ----------> Batch -------------> WeightsVersion --+
        ^   admitted only if it can be trained within max_staleness                                                              |
        +------------------- generators install the new version, verify it, and may then take more tickets <---------------------+

| loop    | takes                     | gives                          | waits for                     | unblocked by             |
|---------|---------------------------|--------------------------------|-------------------------------|--------------------------|
| produce | tickets from the queue    | scored groups to the queue     | tickets, room in the engine   | installs, decisions,     |
|         |                           |                                |                               | finished completions     |
| train   | batches from the queue    | versions to the broadcaster    | B groups that may be a batch  | produce's puts           |

Groups and batches travel as object references: they go from process to process and never through this one.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.engine_loop import EngineUsage
from actors.generator import Collected
from actors.remote import RemoteActor, resolve
from actors.replay_queue import NextBatch
from async_rlhf.config import Config
from async_rlhf.errors import DeadlineError
from async_rlhf.metrics import BatchSummary
from async_rlhf.protocols import LearnerClient
from async_rlhf.tickets import QueueCounters
from async_rlhf.types import StepReport

POLL_S = 5.0
"""How long an actor waits on its side before it answers `nothing yet`: a sign of life at least this often."""


@dataclass(frozen=True, kw_only=True)
class Crew:
    """Who takes part in a run."""

    generators: Mapping[str, RemoteActor]
    """By incarnation."""
    scorers: Sequence[RemoteActor]
    queue: RemoteActor
    learner: LearnerClient
    broadcaster: RemoteActor
    idle_scorers: "asyncio.Queue[RemoteActor]" = field(default_factory=asyncio.Queue)
    """Those of `scorers` that have nothing to do: each scores one call at a time, whichever is free."""

    def __post_init__(self) -> None:
        for scorer in self.scorers:
            self.idle_scorers.put_nowait(scorer)


@dataclass(frozen=True, kw_only=True)
class UpdateRecord:
    """Everything that is known about one finished update."""

    summary: BatchSummary
    reports: Sequence[StepReport]
    """One per rank."""
    counters: QueueCounters
    wait_s: float
    """The learner's wait for the batch."""
    export_s: float
    usage: Mapping[str, EngineUsage]
    """Per generator, cumulative."""

    @property
    def train_s(self) -> float:
        """Seconds inside train_step, slowest rank."""
        return max(report.train_s for report in self.reports)


@dataclass
class _Flow:
    """What the feeding and the draining half of one produce loop share."""

    inflight: int = 0
    closed: bool = False
    last_sign_s: float = field(default_factory=time.monotonic)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def change(self, by: int, *, closed: bool = False) -> None:
        async with self.changed:
            self.inflight += by
            self.closed = self.closed or closed
            self.last_sign_s = time.monotonic()
            self.changed.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with self.changed:
            await self.changed.wait_for(condition)


async def produce(name: str, crew: Crew, config: Config, usage: dict[str, EngineUsage]) -> None:
    """One generator's loop: keep it full of tickets, and pass its finished groups through a scorer into the queue.

    Ends when the queue needs no more tickets and nothing is in flight. Takes: tickets. Gives: scored groups. Waits for: tickets,
    which installs and decisions bring; room in the engine, which finished completions bring.
    """
    flow = _Flow()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_feed(name, crew, config, flow))
        tasks.create_task(_drain(name, crew, config, flow, usage))


async def train(crew: Crew, config: Config, usage: Mapping[str, EngineUsage], on_update: Callable[[UpdateRecord], Awaitable[None]]) -> int:
    """The learner's loop: take a batch, train it, publish the new version. Returns the number of updates made.

    Takes: batches. Gives: versions. Waits for: B finished groups that may be a batch, which produce brings.
    """
    for update in range(config.updates):
        started = time.perf_counter()
        summary = await _next_batch(update, crew, config)
        if summary is None:
            return update
        taken = time.perf_counter()
        shards = [crew.queue.start("take", update, rank) for rank in range(config.learner.num_ranks)]
        reports = await crew.learner.train_step(update, shards)
        counters: QueueCounters = await crew.queue.call("trained", update, timeout_s=config.timeouts.call_s)
        export_s: float = await crew.broadcaster.call("publish", update + 1, timeout_s=config.timeouts.weights_s + config.timeouts.call_s)
        record = UpdateRecord(
            summary=summary,
            reports=reports,
            counters=counters,
            wait_s=taken - started,
            export_s=export_s,
            usage=dict(usage),
        )
        await on_update(record)
    return config.updates


async def _next_batch(update: int, crew: Crew, config: Config) -> BatchSummary | None:
    """The batch's summary, or None when no further batch will come."""
    ends = time.monotonic() + config.timeouts.batch_s
    while True:
        answer: NextBatch = await crew.queue.call("next_batch", update, POLL_S, timeout_s=POLL_S + config.timeouts.call_s)
        if answer.summary is not None or answer.closed:
            return answer.summary
        # A failed install starves the queue; say so now, not at the deadline.
        await crew.broadcaster.call("reports", timeout_s=config.timeouts.call_s)
        if time.monotonic() > ends:
            groups = answer.counters
            raise DeadlineError(
                f"the learner waited {config.timeouts.batch_s:g} s for batch {update} (timeouts.batch_s); groups leased: "
                f"{groups.leased}, scoring: {groups.scoring}, waiting: {groups.waiting} of {config.batch_groups}; the generators are "
                "too slow, or stuck"
            )


async def _feed(name: str, crew: Crew, config: Config, flow: _Flow) -> None:
    capacity = config.batch_groups if config.deterministic else config.groups_inflight
    while True:
        await flow.until(lambda: flow.inflight < capacity)
        wanted = capacity - flow.inflight
        tickets = await crew.queue.call("tickets", name, wanted, POLL_S, timeout_s=POLL_S + config.timeouts.call_s)
        if tickets is None:
            await flow.change(0, closed=True)
            return
        if tickets:
            await crew.generators[name].call("submit", tickets, timeout_s=config.timeouts.call_s)
            await flow.change(len(tickets))


async def _drain(name: str, crew: Crew, config: Config, flow: _Flow, usage: dict[str, EngineUsage]) -> None:
    async with asyncio.TaskGroup() as scoring:
        while True:
            await flow.until(lambda: flow.inflight > 0 or flow.closed)
            if flow.inflight == 0:
                return
            summary_ref, groups_ref = crew.generators[name].start("collect", config.deterministic, POLL_S, num_returns=2)
            collected: Collected = await resolve(summary_ref, edge=f"{name}.collect", timeout_s=POLL_S + config.timeouts.call_s)
            usage[name] = collected.usage
            if collected.tickets:
                scoring.create_task(_score(collected, groups_ref, crew, config))
                await flow.change(-len(collected.tickets))
            elif time.monotonic() - flow.last_sign_s > config.timeouts.generate_s:
                raise DeadlineError(
                    f"{name} has {flow.inflight} groups in flight and finished none for {config.timeouts.generate_s:g} s "
                    "(timeouts.generate_s); it is stuck, or a completion takes longer than that"
                )


async def _score(collected: Collected, groups_ref: Any, crew: Crew, config: Config) -> None:
    await crew.queue.call("scoring", collected.tickets, timeout_s=config.timeouts.call_s)
    scorer = await crew.idle_scorers.get()
    try:
        # The queue gets the scorer's answer, or its error, straight from the scorer.
        put = crew.queue.start("put", scorer.start("score", groups_ref))
        await resolve(put, edge=f"{scorer.name}.score", timeout_s=config.timeouts.score_s)
    finally:
        crew.idle_scorers.put_nowait(scorer)
