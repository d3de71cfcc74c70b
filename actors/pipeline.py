"""The two loops of asynchronous training, and nothing else.

     queue.tickets        generator            scorer               queue.put / decide      learner ranks        broadcaster
     Prompt -- ticket --> Rollout (K) -------> ScoredGroup -------> ReplayQueue ----------> Batch -------------> WeightsVersion --+
        ^   admitted only if it can be trained within max_staleness                                                              |
        +------------------- generators install the new version, verify it, and may then take more tickets <---------------------+

| loop    | takes                     | gives                          | waits for                     | unblocked by             |
|---------|---------------------------|--------------------------------|-------------------------------|--------------------------|
| produce | tickets from the queue,   | scored groups to the queue,    | tickets, room in the engine,  | installs, decisions,     |
|         | versions to install       | rated by reward actors if any  | idle scorers (and rewards)    | finished completions     |
| train   | batches from the queue    | versions to the broadcaster    | B groups that may be a batch  | produce's puts           |

| who dies         | who notices         | what happens                                                                                 |
|------------------|---------------------|----------------------------------------------------------------------------------------------|
| generator        | its produce loop    | its leases go out again; a new one installs the newest version before its first ticket (see  |
|                  |                     | generator_pool.py, also for those that join and leave)                                       |
| scorer, reward   | the call that waits | the groups go to another one, one by one if the call held several                            |
| queue, state,    | the call that waits | a new one goes on from the journal, from state.json, or empty; the call is made again        |
| broadcaster      |                     |                                                                                              |
| learner rank     | the train loop, or  | LearnerLostError: the group starts again from a checkpoint, and trains the same batches again |
|                  | whoever watches it  |                                                                                              |

Groups and batches travel as object references: they go from process to process and never through this one.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from actors.crew import Crew, UpdateRecord
from actors.generator import Collected
from actors.remote import RemoteActor, resolve
from actors.replay_queue import HolderGone, Installed, NextBatch
from actors.roster import Phase, Seat
from actors.scoring import score
from actors.supervision import BROKEN, guarded
from actors.waiting import unless
from actors.weight_broadcaster import Offer
from async_rlhf.config import Config
from async_rlhf.errors import ActorLostError, DeadlineError, ObjectLostError
from async_rlhf.metrics import BatchSummary
from async_rlhf.traffic import gather_s
from async_rlhf.types import Ticket

POLL_S = 5.0
"""How long an actor waits on its side before it answers `nothing yet`: a sign of life at least this often."""


@dataclass
class _Flow:
    """What the parts of one produce loop share, as long as one generator lives."""

    inflight: int = 0
    """Groups that it has been given, or is about to be, and that have not come back."""
    asking: bool = False
    """A request for tickets is under way."""
    installed: int = -1
    closed: bool = False
    """No further ticket is needed, or wanted."""
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def change(self, by: int = 0, *, installed: int = -1, closed: bool = False) -> None:
        async with self.changed:
            self.inflight += by
            self.installed = max(installed, self.installed)
            self.closed = self.closed or closed
            self.changed.notify_all()

    async def until(self, ready: Callable[[], bool]) -> None:
        async with self.changed:
            await self.changed.wait_for(ready)


async def produce(seat: Seat, crew: Crew, config: Config, scoring: asyncio.TaskGroup) -> None:
    """Keep a generator at work until it shall leave; see the tables above. Then it finishes what it has, within timeouts.leave_s.

    What it holds at its end, however that comes, goes out again.

    Args:
        scoring: takes what scores the groups, and outlives the generator that sampled them.
    Raises:
        One of BROKEN: it died, froze or failed.
    """
    actor, flow = seat.member.actor, _Flow()

    def is_installed() -> None:
        crew.roster.turn(seat, Phase.AT_WORK)

    feed, drain = _feed(actor, crew, config, flow), _drain(actor, crew, config, flow, scoring)
    work = guarded(_leave(seat.leaving, config, flow), feed, drain)
    try:
        await guarded(work, _refresh(actor, crew, config, flow, is_installed), crew.supervisor.watch(actor))
    except BROKEN:
        await _let_go(actor, crew, config)
        raise
    await _let_go(actor, crew, config)


async def train(crew: Crew, config: Config, version: int, on_update: Callable[[UpdateRecord], Awaitable[None]]) -> int:
    """From `version` on: wait for each update's batch, train it, publish the version; returns the version that was reached.

    Ends early when the prompts run out, or when the crew is stopping.
    Args:
        on_update: called with each finished update; awaited before the next.
    Raises:
        LearnerLostError: a rank died or froze. DeadlineError: no batch came in time.
    """
    while version < config.updates:
        started = time.perf_counter()
        summary = await _next_batch(version, crew, config)
        if summary is None:
            break
        await crew.gate.decide(version)
        taken = time.perf_counter()
        limit = config.timeouts.call_s
        shards = [await crew.queue.fetch("take", version, rank, timeout_s=limit) for rank in range(config.learner.num_ranks)]
        with crew.meters.train.working():
            reports = await crew.learner.train_step(version, shards)
        trained = time.perf_counter()
        published = await crew.publish(version + 1, config)
        booked = await crew.queue.call("trained", version, published.digest, published.canary_logprobs, timeout_s=limit)
        crew.counters = booked.counters
        await on_update(
            UpdateRecord(
                summary=summary,
                reports=reports,
                booked=booked,
                wait_s=taken - started,
                published=published,
                usage=dict(crew.usage),
                installs=dict(crew.installs),
                health=crew.roster.health(crew.installs),
                take_s=max(0.0, trained - taken - max(report.train_s for report in reports)),
                readings=crew.meters.readings,
                processor=crew.processor_seconds,
                generator_s=crew.roster.generator_s,  # last: it is divided by the time until the record is booked
            )
        )
        crew.update_s = time.perf_counter() - started
        version += 1
    return version


async def _next_batch(update: int, crew: Crew, config: Config) -> BatchSummary | None:
    """The batch's summary, or None when no further batch will come, or none is wanted; see train() for the errors."""
    waited_s = 0.0
    while not crew.stopping.is_set():
        crew.check_sender()
        if crew.must_publish:
            await crew.publish(update, config)
        asked = time.monotonic()
        call = crew.queue.call("next_batch", update, POLL_S, timeout_s=POLL_S + config.timeouts.call_s)
        answer: NextBatch | None = await unless(crew.stopping, call)
        if answer is None:
            return None
        crew.counters = answer.counters
        if answer.summary is not None or answer.closed:
            return answer.summary
        if crew.roster.members or not [*crew.roster]:  # while all are lost or on their way the generator pool's deadlines count
            waited_s += time.monotonic() - asked
        if waited_s >= config.timeouts.batch_s:
            groups = answer.counters
            raise DeadlineError(
                f"the learner waited {config.timeouts.batch_s:g} s for batch {update} (timeouts.batch_s); groups leased: "
                f"{groups.leased}, scoring: {groups.scoring}, waiting: {groups.waiting} of {config.batch_groups}; the generators are "
                "too slow, or stuck, or a live source brought no rows"
            )
    return None


async def _let_go(actor: RemoteActor, crew: Crew, config: Config) -> None:
    """Nobody counts on this generator any more."""
    crew.installs.pop(actor.name, None)
    crew.transport.forget(actor, crew.learner.ranks)
    await crew.note(HolderGone(holder=actor.name), config)


async def _leave(leaving: asyncio.Event, config: Config, flow: _Flow) -> None:
    """Wait until the generator shall leave, let it take no further ticket, and wait until it has finished those that it has."""
    await leaving.wait()
    await flow.change(closed=True)
    with suppress(TimeoutError):
        async with asyncio.timeout(config.timeouts.leave_s):
            await flow.until(lambda: not flow.asking and flow.inflight == 0)


async def _feed(actor: RemoteActor, crew: Crew, config: Config, flow: _Flow) -> None:
    """Give the generator tickets whenever it has room; for ever."""
    await crew.begun.wait()
    request = room = 0
    while True:
        await flow.until(lambda: flow.installed >= 0 and not flow.closed)
        room = room or await _submit([], actor, config, flow)
        if not room or flow.closed:
            continue
        request, flow.asking = request + 1, True
        with crew.meters.tickets.working():
            tickets: list[Ticket] | None = await crew.queue.call(
                "tickets", actor.name, flow.installed, request, room, POLL_S, timeout_s=POLL_S + config.timeouts.call_s
            )
        flow.asking = False
        await flow.change(len(tickets or ()), closed=tickets is None)
        room = await _submit(tickets, actor, config, flow) if tickets else 0


async def _submit(tickets: Sequence[Ticket], actor: RemoteActor, config: Config, flow: _Flow) -> int:
    """Returns how many groups more the generator may have, once that is one; 0: none for a while. Deterministic runs go batch by batch."""
    if not config.deterministic:
        return await actor.call("submit", tickets, POLL_S, timeout_s=POLL_S + config.timeouts.call_s)
    if tickets:
        await actor.call("submit", tickets, timeout_s=config.timeouts.call_s)
    await flow.until(lambda: flow.inflight < config.batch_groups)
    return config.batch_groups - flow.inflight


async def _drain(actor: RemoteActor, crew: Crew, config: Config, flow: _Flow, scoring: asyncio.TaskGroup) -> None:
    """Take finished groups from the generator and have them scored; for ever."""
    silent_s = 0.0
    while True:
        await flow.until(lambda: flow.inflight > 0)
        asked = time.monotonic()
        summary_ref, groups_ref = actor.start("collect", gather_s(config, crew.update_s), POLL_S, num_returns=2)
        edge = f"{actor.name}.collect"
        try:
            collected: Collected = await resolve(summary_ref, edge=edge, timeout_s=POLL_S + config.timeouts.call_s)
        except ObjectLostError as error:  # a large one stays on its node, and is gone with it
            raise ActorLostError(str(error)) from error
        crew.usage[actor.name] = collected.usage
        if collected.tickets:
            crew.meters.generate.through(len(collected.tickets))
            scoring.create_task(score(collected.tickets, groups_ref, crew, config), name=f"scoring for {actor.name}")
            await flow.change(-len(collected.tickets))
            silent_s = 0.0
            continue
        silent_s += min(POLL_S, time.monotonic() - asked)
        if silent_s >= config.timeouts.generate_s:
            raise DeadlineError(
                f"{actor.name} has {flow.inflight} groups in flight and finished none for {config.timeouts.generate_s:g} s "
                "(timeouts.generate_s); it is stuck, or a completion takes longer than that"
            )


async def _refresh(actor: RemoteActor, crew: Crew, config: Config, flow: _Flow, is_installed: Callable[[], None]) -> None:
    """Install the newest version on the generator, again and again."""
    while True:
        await _install_next(actor, crew, config, flow, is_installed)


async def _install_next(actor: RemoteActor, crew: Crew, config: Config, flow: _Flow, is_installed: Callable[[], None]) -> None:
    """One version, or none if there is none for now. The references end with this call: while it waits for the next, nobody holds it."""
    broadcaster = crew.broadcaster.actor
    offer: Offer | None = await crew.broadcaster.call("newer_than", flow.installed, POLL_S, timeout_s=POLL_S + config.timeouts.call_s)
    if offer is None:
        return
    await crew.gate.passed(offer.version)
    asked = time.perf_counter()
    try:
        report = await crew.transport.deliver(actor, offer, crew.learner.ranks)
    except ObjectLostError as error:  # the broadcaster died, or the node that held the weights: the next one pulls them anew
        await crew.broadcaster.replace(broadcaster, error)
        return
    if report is None:
        return
    await crew.note(Installed(holder=actor.name, version=report.version), config)
    await flow.change(installed=report.version)
    is_installed()
    async with crew.installed:
        crew.installs[actor.name] = replace(report, transfer_s=max(0.0, time.perf_counter() - asked - report.install_s))
        crew.installed.notify_all()
