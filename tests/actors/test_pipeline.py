"""The two loops of training around fakes: who is called in which order, how they end, and what happens when anybody dies."""

import asyncio
import gc
import weakref
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actors.pipeline
from actors.crew import Crew, UpdateRecord
from actors.engine_loop import EngineUsage
from actors.generator import Collected
from actors.generator_pool import GeneratorPool
from actors.launch import ActorSpec
from actors.pipeline import train
from actors.remote import RemoteActor, resolve, within
from actors.replay_queue import Booked, Fact, HolderGone, Installed, NextBatch, ReplayQueue, ScoringFailed, WithScorer
from actors.roster import Roster
from actors.supervision import Member, Supervisor, guarded
from actors.transport import ByReference
from actors.weight_broadcaster import Offer, WeightBroadcaster
from async_rlhf.config import Config, load_config
from async_rlhf.errors import (
    ActorLostError,
    DeadlineError,
    EngineError,
    LearnerLostError,
    ObjectLostError,
    RestartLimitError,
    RewardError,
    RewardLostError,
    WeightsError,
)
from async_rlhf.metrics import summarize
from async_rlhf.rewards import Rating
from async_rlhf.tasks.start import build_tokenizer
from async_rlhf.tickets import QueueCounters
from async_rlhf.types import Batch, InstallReport, Rollout, RolloutGroup, ScoredGroup, StepReport, Ticket, WeightsManifest
from tests.support.local_actors import LocalCluster, LocalHandle, local_actor, local_kill, lost_reference
from tests.support.samples import make_rollout, make_scored, make_ticket

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("local_kill")]
__all__ = ["local_kill"]
A, B = "generator-0.0.0", "generator-1.0.0"
USAGE = EngineUsage(busy_s=1.0, num_tokens=10, num_completions=2)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 50))


def make_config(*overrides: str) -> Config:
    base = ["updates=3", "batch_groups=2", "learner.warmup_steps=0", "generator.max_inflight=8", "queue.ties=keep"]
    quick = ["supervision.ping_s=0.02", "supervision.silence_s=0.2", "supervision.backoff_s=0.01", "supervision.max_backoff_s=0.02"]
    quick.append("supervision.max_restarts=1000")
    return load_config(overrides=[*base, *quick, *overrides]).config


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors.pipeline, "POLL_S", 0.02)


class Snapshot:
    """Stands for a WeightsVersion."""

    def __init__(self, version: int) -> None:
        self.version, self.gather_s = version, 0.0
        self.manifest = WeightsManifest(version=version, tensors=(), canary_ids=(1, 2), canary_logprobs=(-0.5 * version,))


class FakeGenerator:
    """Finishes what it was given, `burst` groups per collect; nothing at all when it is stuck."""

    capacity = 4
    """Groups."""

    def __init__(self, name: str = A, *, burst: int = 1, stuck: bool = False) -> None:
        self.name, self.burst, self.stuck = name, burst, stuck
        self.version = -1
        self.inflight: list[Ticket] = []
        self.most_inflight = 0
        self.sampled_by: dict[int, int] = {}

    async def submit(self, tickets: Sequence[Ticket], wait_s: float = 0.0) -> int:
        assert self.version >= 0, "a ticket before the first install"
        self.inflight += tickets
        self.sampled_by.update({ticket.ticket_id: self.version for ticket in tickets})
        self.most_inflight = max(self.most_inflight, len(self.inflight))
        if len(self.inflight) >= self.capacity:
            await asyncio.sleep(wait_s / 10)
        return max(0, self.capacity - len(self.inflight))

    async def collect(self, gather_s: float, wait_s: float) -> tuple[Collected, list[RolloutGroup]]:
        await asyncio.sleep(0.005)
        done = [] if self.stuck else self.inflight[: self.burst]
        self.inflight = self.inflight[len(done) :]
        groups = [RolloutGroup(ticket=ticket, rollouts=self.rollouts(ticket)) for ticket in done]
        return Collected(tickets=tuple(done), num_inflight=len(self.inflight), usage=USAGE), groups

    async def install(self, weights: Snapshot) -> InstallReport:
        await asyncio.sleep(0.01)
        self.version = weights.version
        return InstallReport(version=weights.version, install_s=0.0, pause_s=0.0, canary_error=0.0)

    def rollouts(self, ticket: Ticket) -> tuple[Rollout, ...]:
        rng = np.random.default_rng(ticket.ticket_id)
        return tuple(make_rollout(rng, version=self.sampled_by[ticket.ticket_id]) for _ in range(2))


class FakeScorer:
    """Fails with `error` when one of the groups is of a ticket in `bad`, or, without any, always."""

    def __init__(self, error: Exception | None = None, *, pause_s: float = 0.0, bad: Sequence[int] = ()) -> None:
        self.error, self.pause_s, self.bad = error, pause_s, set(bad)
        self.calls: list[list[int]] = []
        self.ratings: list[Rating | None] = []

    async def score(
        self, groups: Sequence[RolloutGroup], only: int | None = None, rating: Rating | None = None
    ) -> tuple[int, list[ScoredGroup]]:
        groups = groups if only is None else groups[only : only + 1]
        ids = [group.ticket.ticket_id for group in groups]
        self.calls.append(ids)
        self.ratings.append(rating)
        await asyncio.sleep(self.pause_s)
        if self.error is not None and (not self.bad or self.bad & set(ids)):
            raise self.error
        scored = [
            ScoredGroup(
                group=group,
                scores=np.float32([1.0, 0.0]),
                reference_logprobs=tuple(rollout.behavior_logprobs for rollout in group.rollouts),
                completions=("a", "b"),
            )
            for group in groups
        ]
        return len(scored), scored


class FakeReward:
    """Rates each completion by its ticket; fails as FakeScorer does, and says with whom it was busy at once."""

    def __init__(self, error: Exception | None = None, *, pause_s: float = 0.0, bad: Sequence[int] = ()) -> None:
        self.error, self.pause_s, self.bad = error, pause_s, set(bad)
        self.calls: list[list[int]] = []
        self.busy = False

    async def rate(self, groups: Sequence[RolloutGroup], only: int | None = None) -> tuple[int, Rating]:
        groups = groups if only is None else groups[only : only + 1]
        ids = [group.ticket.ticket_id for group in groups]
        self.calls.append(ids)
        self.busy = True
        await asyncio.sleep(self.pause_s)
        self.busy = False
        if self.error is not None and (not self.bad or self.bad & set(ids)):
            raise self.error
        return len(ids), Rating(scores=np.repeat(np.float32(ids), 2))


class FakeQueue:
    """Hands out `num_tickets`, then says that no more are needed; has every batch at once. It forgets nothing when it dies."""

    def __init__(self, num_tickets: int = 0, num_batches: int = 100) -> None:
        self.left, self.num_batches = num_tickets, num_batches
        self.issued = 0
        self.wanted: list[int] = []
        self.facts: list[Fact] = []
        self.put_ids: list[int] = []
        self.requests: dict[tuple[str, int], list[Ticket]] = {}
        self.lost: list[Ticket] = []

    async def tickets(self, holder: str, installed: int, request: int, max_tickets: int, wait_s: float) -> list[Ticket] | None:
        if (holder, request) not in self.requests:
            self.wanted.append(max_tickets)
            again = [make_ticket(old.ticket_id, holder=holder, attempt=old.attempt + 1) for old in self.lost[:max_tickets]]
            self.lost = self.lost[len(again) :]
            count = min(max_tickets - len(again), self.left)
            if not again and not count:
                await asyncio.sleep(wait_s)
                return None if self.done else []
            self.left -= count
            self.issued += count
            fresh = [make_ticket(index, holder=holder) for index in range(self.issued - count, self.issued)]
            self.requests[holder, request] = again + fresh
        return self.requests[holder, request]

    @property
    def done(self) -> bool:
        return not self.left and len(set(self.put_ids)) + len(self.of(ScoringFailed)) == self.issued

    def of(self, kind: type[Any]) -> list[Any]:
        return [fact for fact in self.facts if isinstance(fact, kind)]

    async def note(self, fact: Fact) -> None:
        self.facts.append(fact)
        if isinstance(fact, HolderGone):
            held = [ticket for (holder, _), tickets in self.requests.items() if holder == fact.holder for ticket in tickets]
            safe = {ticket.ticket_id for scoring in self.of(WithScorer) for ticket in scoring.tickets}
            self.lost += [ticket for ticket in held if ticket.ticket_id not in safe]

    async def put(self, groups: Sequence[ScoredGroup]) -> None:
        with_scorer = {ticket.ticket_id for fact in self.of(WithScorer) for ticket in fact.tickets}
        for scored in groups:
            assert scored.group.ticket.ticket_id in with_scorer
            self.put_ids.append(scored.group.ticket.ticket_id)

    async def next_batch(self, update: int, wait_s: float) -> NextBatch:
        if update >= self.num_batches:
            await asyncio.sleep(wait_s)
            return NextBatch(summary=None, closed=self.num_batches > 0, counters=counters())
        groups = tuple(make_scored(make_ticket(2 * update + index)) for index in range(2))
        return NextBatch(summary=summarize(Batch(update=update, groups=groups), []), closed=False, counters=counters())

    async def take(self, update: int, rank: int) -> tuple[int, str]:
        return update, f"shard {update}.{rank}"

    async def trained(self, update: int, digest: int, canary_logprobs: tuple[float, ...]) -> Booked:
        assert canary_logprobs == (-0.5 * (update + 1),)
        return Booked(counters=counters(trained=2 * (update + 1)), replay_error_nats=0.0)


def counters(**changes: int) -> QueueCounters:
    zero = {"issued": 5, "leased": 3, "lost": 0, "scoring": 1, "waiting": 1, "taken": 0, "trained": 0, "reissued": 0}
    return QueueCounters(**(zero | changes), voided={}, dropped={}, refused={})


class FakeLearner:
    """One rank; what it trains, it has."""

    def __init__(self, events: list[str], pause_s: float = 0.0) -> None:
        self.events, self.pause_s = events, pause_s
        self.version = 0
        self.rank = LocalHandle("learner-0.0.0", lambda: self)
        self.ranks = [actors.pipeline.RemoteActor(self.rank, "learner-0.0.0")]
        self.error: Exception | None = None
        self.lost: Exception | None = None

    async def train_step(self, update: int, shards: Sequence[Any]) -> Sequence[StepReport]:
        self.events.append(f"train {update} begins with {[await shard for shard in shards]}")
        await asyncio.sleep(self.pause_s)
        if self.error is not None:
            raise self.error
        self.version = update + 1
        self.events.append(f"train {update} ends")
        return [StepReport(version=update + 1, optimizer_steps=update + 1, num_tokens=10, train_s=0.1, metrics={})]

    async def snapshot(self, version: int) -> list[Snapshot]:
        assert version == self.version, "a version is what the learner has trained, not what is asked for"
        return [Snapshot(version)]


class Sending(ByReference):
    """Stands for a transport from the learner; writes down whom it may forget."""

    by_sender = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.forgotten: list[str] = []

    def forget(self, generator: RemoteActor, ranks: Sequence[RemoteActor]) -> None:
        self.forgotten.append(generator.name)


Make = Callable[[str], Any]
"""What plays a part, for an incarnation's name."""


def part_of(name: str) -> str:
    """`generator-0.0.1` -> `generator-0`."""
    return name.partition(".")[0]


class Stage:
    """A crew of fakes (the broadcaster is the true one) under a true supervisor; every call is written down."""

    def __init__(
        self,
        queue: Any = None,
        generator: Make = FakeGenerator,
        scorers: Sequence[Any] = (),
        *overrides: str,
        num_generators: int = 1,
        broadcaster: Any = WeightBroadcaster,
        rewards: Sequence[Any] = (),
    ) -> None:
        self.events: list[str] = []
        self.incidents: list[dict[str, Any]] = []
        self.config = make_config(*overrides)
        self.fate: Callable[[LocalHandle, str, tuple[Any, ...], bool], None] = lambda handle, method, args, through: None
        """Told of each call before it runs and when it is through; may end the handle's actor."""
        self.cluster = LocalCluster(self._on_call)
        self.supervisor = Supervisor(self.cluster, self.config, 0, self.incidents.append)  # type: ignore[arg-type]
        self.queue = queue or FakeQueue()
        self.learner = FakeLearner(self.events)
        self.scorers = list(scorers) or [FakeScorer()]
        make_queue: Make = self.queue if callable(self.queue) else lambda name: self.queue
        self._generators: dict[int, Member] = {}
        self._make_generator = generator
        self.crew = Crew(
            transport=ByReference(self.config),
            supervisor=self.supervisor,
            roster=Roster([self.generator(index) for index in range(num_generators)]),
            scorers=[self._member(f"scorer-{index}", lambda name, scorer=scorer: scorer) for index, scorer in enumerate(self.scorers)],
            queue=self._member("queue", make_queue),
            learner=self.learner,
            broadcaster=self._member("broadcaster", lambda name: broadcaster(20.0)),
            rewards=[self._member(f"reward-{index}", lambda name, reward=reward: reward) for index, reward in enumerate(rewards)],
        )
        self.pool = GeneratorPool(self.crew, self.config, self.cluster, self.generator)

    def generator(self, index: int) -> Member:
        """The generator of that number; always the same one."""
        if index not in self._generators:
            self._generators[index] = self._member(f"generator-{index}", self._make_generator)
        return self._generators[index]

    @property
    def members(self) -> list[Member]:
        return [*self.crew.generators, *self.crew.scorers, *self.crew.rewards, self.crew.queue, self.crew.broadcaster]

    def playing(self, name: str) -> LocalHandle:
        """Who plays the part now."""
        return next(member.actor.handle for member in self.members if member.name == name)

    def played(self, name: str) -> list[Any]:
        """Everybody who played the part, in order."""
        return [handle.target for actor, handle in self.cluster.handles.items() if part_of(actor) == name]

    async def begin(self) -> "Stage":
        """Everybody is there, and version 0 is on offer."""
        for member in self.members:
            member.cast(await self.supervisor.begin(member.next_spec()))
        await self.crew.publish(0, self.config)
        self.crew.begun.set()
        self.events.clear()
        return self

    async def until(self, done: Callable[[], bool]) -> None:
        """Let the produce loops run until `done`."""

        async def wait() -> None:
            while not done():
                await asyncio.sleep(0.002)

        await guarded(wait(), *self.others())

    async def train(self, on_update: Callable[[UpdateRecord], Any] | None = None, version: int = 0) -> int:
        """The train loop, with the produce loops beside it."""

        async def ignore(_: UpdateRecord) -> None: ...

        return await guarded(train(self.crew, self.config, version, on_update or ignore), *self.others())

    def others(self) -> list[Coroutine[Any, Any, None]]:
        keepers = [member.keep() for member in (*self.crew.scorers, *self.crew.rewards, self.crew.queue, self.crew.broadcaster)]
        return [self.pool.work(), *keepers]

    def _member(self, name: str, make: Make) -> Member:
        return Member(self.supervisor, name, lambda actor: ActorSpec(name=actor, place=name, cls=make, args=(actor,)))  # type: ignore[arg-type]

    def _on_call(self, handle: LocalHandle, method: str, args: tuple[Any, ...], through: bool) -> None:
        if not through:
            self.events.append(f"{part_of(handle.name)}.{method}")
        self.fate(handle, method, args, through)


# The produce loop.


def test_produce_brings_every_ticket_through_a_scorer_into_the_queue():
    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=7)).begin()

        await stage.until(lambda: stage.queue.done)

        assert sorted(stage.queue.put_ids) == list(range(7))
        assert stage.crew.usage == {A: USAGE}
        assert stage.queue.of(Installed) == [Installed(holder=A, version=0)] and stage.crew.installs[A].version == 0
        assert stage.incidents == []

    run(story())


def test_groups_are_marked_as_scoring_before_they_are_scored_and_scored_before_they_are_put():
    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=1)).begin()

        await stage.until(lambda: stage.queue.done)

        order = [event for event in stage.events if event in ("queue.note", "scorer-0.score", "queue.put", "generator-0.install")]
        assert order == ["generator-0.install", "queue.note", "queue.note", "scorer-0.score", "queue.put"]
        assert [type(fact) for fact in stage.queue.facts] == [Installed, WithScorer]

    run(story())


def test_no_ticket_is_asked_for_before_the_first_install_and_none_before_the_run_begins():
    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=3)).begin()
        stage.crew.begun.clear()

        await stage.until(lambda: A in stage.crew.installs)
        assert stage.queue.wanted == []
        stage.crew.begun.set()
        await stage.until(lambda: stage.queue.done)

        assert stage.events.index("generator-0.install") < stage.events.index("queue.tickets")

    run(story())


def test_produce_without_any_ticket_never_collects_and_asks_once():
    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=0)).begin()
        ends = asyncio.get_running_loop().time() + 0.3

        await stage.until(lambda: asyncio.get_running_loop().time() > ends)

        assert "generator-0.collect" not in stage.events and stage.events.count("queue.tickets") == 1

    run(story())


def test_every_request_for_tickets_has_a_number_of_its_own_in_order():
    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=20)).begin()

        await stage.until(lambda: stage.queue.done)

        numbers = [number for holder, number in stage.queue.requests]
        assert numbers == sorted(set(numbers)) and len(numbers) > 3

    run(story())


@pytest.mark.parametrize(
    ("overrides", "capacity"),
    [((), 4), (("deterministic=true", "max_staleness=0", "queue.order=ticket"), 2)],
    ids=["what it says itself", "deterministic: one batch"],
)
def test_a_generator_never_holds_more_groups_than_it_has_room_for(overrides: tuple[str, ...], capacity: int):
    async def story() -> None:
        stage = await Stage(FakeQueue(20), FakeGenerator, (), *overrides).begin()

        await stage.until(lambda: stage.queue.done)

        (generator,) = stage.played("generator-0")
        assert generator.most_inflight == capacity
        assert max(stage.queue.wanted) == capacity and min(stage.queue.wanted) >= 1

    run(story())


def test_groups_go_to_whichever_scorer_is_free():
    """The first is busy with one group while the others score all the rest."""

    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=9), scorers=[FakeScorer(pause_s=20.0), FakeScorer(), FakeScorer()]).begin()

        await stage.until(lambda: len(stage.queue.put_ids) == 8)

        busy, *free = (scorer.calls for scorer in stage.scorers)
        assert len(busy) == 1 and len(free[0]) + len(free[1]) == 8 and min(map(len, free)) >= 3

    run(story())


def test_a_scorer_scores_one_call_at_a_time():
    class Counting(FakeScorer):
        now = most = 0

        async def score(self, groups: Sequence[RolloutGroup], only: int | None = None) -> tuple[int, list[ScoredGroup]]:
            self.now += 1
            self.most = max(self.most, self.now)
            answer = await super().score(groups, only)
            self.now -= 1
            return answer

    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=8), scorers=[Counting(pause_s=0.02)]).begin()

        await stage.until(lambda: stage.queue.done)

        assert stage.scorers[0].most == 1

    run(story())


def test_a_slow_scorer_does_not_stop_the_generator():
    """All groups are collected while the first still waits for its score."""

    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=6), scorers=[FakeScorer(pause_s=20.0)]).begin()

        await stage.until(lambda: len(stage.queue.of(WithScorer)) == 6)

        assert stage.queue.put_ids == [] and stage.scorers[0].calls == [[0]]

    run(story())


def test_a_generator_that_waits_for_tickets_is_not_silent():
    """The queue has nothing for far longer than generate_s; then one more ticket comes."""

    class PausingQueue(FakeQueue):
        async def tickets(self, holder: str, installed: int, request: int, max_tickets: int, wait_s: float) -> list[Ticket] | None:
            if self.issued == 1 and len(self.wanted) < 25:
                self.wanted.append(max_tickets)
                await asyncio.sleep(wait_s)
                return []
            return await super().tickets(holder, installed, request, 1, wait_s)

    async def story() -> None:
        stage = await Stage(PausingQueue(num_tickets=2), FakeGenerator, (), "timeouts.generate_s=0.1").begin()

        await stage.until(lambda: stage.queue.done)

        assert sorted(stage.queue.put_ids) == [0, 1] and stage.incidents == []

    run(story())


# Generators that die.


def test_a_generator_that_dies_over_its_groups_is_replaced_and_another_one_takes_them_over():
    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=6)).begin()
        collects: list[str] = []

        def die_at_the_third_collect(handle: LocalHandle, method: str, args: tuple[Any, ...], through: bool) -> None:
            if method == "collect" and not through:
                collects.append(handle.name)
                if len(collects) == 3:
                    handle.die()

        stage.fate = die_at_the_third_collect
        await stage.until(lambda: stage.queue.done)

        assert sorted(stage.queue.put_ids) == list(range(6))
        assert stage.queue.of(HolderGone) == [HolderGone(holder=A)]
        assert stage.cluster.started[-1] == "generator-0.0.1" and set(stage.crew.usage) == {A, "generator-0.0.1"}
        assert list(stage.crew.installs) == ["generator-0.0.1"], "the dead one has nothing installed"
        assert [(entry["event"], entry["name"]) for entry in stage.incidents] == [("lost", "generator-0"), ("back", "generator-0")]
        assert "the actor died" in stage.incidents[0]["cause"]

    run(story())


def test_groups_that_are_with_the_scorer_outlive_their_generator():
    """It dies with four groups at the scorer; each is put, none goes out again."""

    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=4), lambda name: FakeGenerator(name, burst=4), [FakeScorer(pause_s=0.3)]).begin()

        def die_when_scoring_begins(handle: LocalHandle, method: str, args: tuple[Any, ...], through: bool) -> None:
            if method == "score" and not through:
                stage.playing("generator-0").die()

        stage.fate = die_when_scoring_begins
        await stage.until(lambda: stage.queue.done and len(stage.incidents) == 2)

        assert stage.queue.put_ids == [0, 1, 2, 3] and stage.queue.lost == []

    run(story())


def test_the_queue_learns_that_a_holder_is_gone_before_its_successor_asks():
    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=3)).begin()
        stage.fate = lambda handle, method, args, through: handle.die() if (handle.name, method) == (A, "collect") else None

        await stage.until(lambda: stage.queue.done)

        gone = stage.queue.facts.index(HolderGone(holder=A))
        assert Installed(holder="generator-0.0.1", version=0) in stage.queue.facts[gone:]
        assert [ticket.attempt for ticket in stage.queue.requests["generator-0.0.1", 1]] == [1, 1, 1]

    run(story())


@pytest.mark.parametrize("method", ["install", "submit", "collect"])
def test_a_generator_may_die_in_any_of_its_calls(method: str):
    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=5)).begin()
        stage.fate = lambda handle, called, args, through: handle.die() if (handle.name, called) == (A, method) else None

        await stage.until(lambda: stage.queue.done)

        assert sorted(stage.queue.put_ids) == list(range(5)) and len(stage.incidents) == 2

    run(story())


def test_an_idle_generator_that_dies_is_noticed_and_replaced():
    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=0)).begin()
        await stage.until(lambda: A in stage.crew.installs)
        stage.playing("generator-0").die()

        await stage.until(lambda: "generator-0.0.1" in stage.crew.installs)

        assert A not in stage.crew.installs

    run(story())


def test_a_generator_whose_answer_is_gone_with_its_node_is_replaced():
    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=5)).begin()

        def lose(handle: LocalHandle, method: str, args: tuple[Any, ...], through: bool) -> None:
            if (handle.name, method, through) == (A, "collect", True):
                raise ObjectLostError("the node of the summary died")

        stage.fate = lose
        await stage.until(lambda: stage.queue.done)

        assert sorted(stage.queue.put_ids) == list(range(5))
        assert [(entry["event"], entry["name"]) for entry in stage.incidents] == [("lost", "generator-0"), ("back", "generator-0")]

    run(story())


def test_the_transport_may_forget_a_generator_that_died_idle_and_one_that_left():
    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=0), num_generators=2).begin()
        stage.crew.transport = transport = Sending(stage.config)

        async def change() -> None:
            while {A, B} - set(stage.crew.installs):
                await asyncio.sleep(0.002)
            assert transport.forgotten == []
            stage.playing("generator-0").die()
            while "generator-0.0.1" not in stage.crew.installs:
                await asyncio.sleep(0.002)
            await stage.pool.scale(1, lambda line: None)

        await guarded(change(), *stage.others())

        assert transport.forgotten == [A, B]

    run(story())


def test_nobody_here_holds_an_installed_version_while_its_generator_waits_for_the_next():
    class References(list[Any]):
        pass

    offered: list[weakref.ref[References]] = []
    held: list[int] = []

    class Watched(WeightBroadcaster):
        async def newer_than(self, version: int, wait_s: float) -> Offer | None:
            gc.collect()
            held.append(sum(references() is not None for references in offered))
            offer = await super().newer_than(version, wait_s)
            if offer is None:
                return None
            references = References(offer.buckets)
            offered.append(weakref.ref(references))
            return Offer(version=offer.version, buckets=references)

    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=0), broadcaster=Watched).begin()

        await stage.until(lambda: len(held) >= 4)

        assert len(offered) == 1 and held[:4] == [0, 0, 0, 0]

    run(story())


def test_a_frozen_generator_is_killed_and_replaced():
    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=5)).begin()
        frozen: list[LocalHandle] = []

        def freeze(handle: LocalHandle, method: str, args: tuple[Any, ...], through: bool) -> None:
            if (handle.name, method, through) == (A, "collect", False):
                frozen.append(handle)
                handle.freeze()

        stage.fate = freeze
        await stage.until(lambda: stage.queue.done)

        assert sorted(stage.queue.put_ids) == list(range(5)) and not frozen[0].alive
        assert stage.incidents[0]["cause"] == f"{A} gave no sign of life for 0.2 s (supervision.silence_s) and was killed"

    run(story())


def test_a_generator_that_finishes_nothing_is_named_and_replaced():
    """Alive, it answers every collect, but with nothing."""

    async def story() -> None:
        make: Make = lambda name: FakeGenerator(name, stuck=name == A)  # noqa: E731
        stage = await Stage(FakeQueue(num_tickets=3), make, (), "timeouts.generate_s=0.15").begin()

        await stage.until(lambda: stage.queue.done)

        cause = stage.incidents[0]["cause"]
        assert cause.startswith(f"{A} has 3 groups in flight and finished none for 0.15 s (timeouts.generate_s)")
        assert not stage.cluster.handles[A].alive and sorted(stage.queue.put_ids) == [0, 1, 2]

    run(story())


@pytest.mark.parametrize("error", [EngineError("out of memory"), WeightsError("the canary does not sing"), ValueError("a bug")])
def test_a_generator_with_an_error_of_its_own_is_not_used_again(error: Exception):
    class Failing(FakeGenerator):
        async def install(self, weights: Snapshot) -> InstallReport:
            if self.name == A:
                raise error
            return await super().install(weights)

    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=2), Failing).begin()

        await stage.until(lambda: stage.queue.done)

        assert str(error) in stage.incidents[0]["cause"] and not stage.cluster.handles[A].alive
        assert {holder for holder, _ in stage.queue.requests} == {"generator-0.0.1"}

    run(story())


def test_one_generators_death_does_not_stop_the_other():
    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=30), num_generators=2).begin()
        stage.fate = lambda handle, method, args, through: handle.die() if part_of(handle.name) == "generator-0" else None

        await stage.until(lambda: len(stage.queue.put_ids) == 25)

        assert len(stage.played("generator-0")) > 2 and len(stage.played("generator-1")) == 1

    run(story())


def test_known_mistake_10_a_generator_that_keeps_failing_ends_the_run_with_its_last_error_and_nobody_waits_on():
    class Failing(FakeGenerator):
        async def collect(self, gather_s: float, wait_s: float) -> tuple[Collected, list[RolloutGroup]]:
            raise EngineError(f"{self.name} is out of memory")

    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=1), Failing, (), "supervision.max_restarts=2").begin()

        with pytest.raises(RestartLimitError) as caught:
            await stage.until(lambda: False)

        assert str(caught.value) == (
            "generator-0 failed 3 times within 600 s, allowed are 2 restarts (supervision.max_restarts); the last cause: "
            "generator-0.0.2 is out of memory"
        )
        assert isinstance(caught.value.__cause__, EngineError) and stage.queue.put_ids == []

    run(story())


# Scorers that fail, die or never answer.


def scored_apart(stage: Stage) -> list[list[int]]:
    return [ids for scorer in stage.scorers for ids in scorer.calls]


@pytest.mark.parametrize("error", [RewardError("judge is offline"), ValueError("cannot parse '7'")])
def test_known_mistake_10_groups_that_cannot_be_scored_are_reported_each_with_its_reason(error: Exception):
    """Four groups in one call, one of them bad: the call fails, each is scored alone, one alone is reported."""

    async def story() -> None:
        scorer = FakeScorer(error, bad=[2])
        stage = await Stage(FakeQueue(num_tickets=4), lambda name: FakeGenerator(name, burst=4), [scorer]).begin()

        await stage.until(lambda: stage.queue.done)

        assert scorer.calls == [[0, 1, 2, 3], [0], [1], [2], [3]]
        assert stage.queue.put_ids == [0, 1, 3]
        (failed,) = stage.queue.of(ScoringFailed)
        assert [ticket.ticket_id for ticket in failed.tickets] == [2] and str(error) in failed.reason
        assert stage.incidents == [], "a reward function's error is no death"

    run(story())


def test_a_scorer_that_dies_over_a_group_costs_only_that_group():
    """The bad group kills whoever scores it; the others are scored by whoever is there, and put."""

    async def story() -> None:
        scorers = [FakeScorer(), FakeScorer()]
        stage = await Stage(FakeQueue(num_tickets=4), lambda name: FakeGenerator(name, burst=4), scorers).begin()

        def die_over_ticket_2(handle: LocalHandle, method: str, args: tuple[Any, ...], through: bool) -> None:
            if method == "score" and not through:
                groups, only = args
                if 2 in [group.ticket.ticket_id for group in (groups if only is None else groups[only : only + 1])]:
                    handle.die()

        stage.fate = die_over_ticket_2
        await stage.until(lambda: stage.queue.done)

        assert sorted(stage.queue.put_ids) == [0, 1, 3]
        (failed,) = stage.queue.of(ScoringFailed)
        assert [ticket.ticket_id for ticket in failed.tickets] == [2] and failed.reason.startswith("the scorer died: ")
        lost = [entry["name"] for entry in stage.incidents if entry["event"] == "lost"]
        assert len(lost) == 2 and len(stage.played("scorer-0")) + len(stage.played("scorer-1")) == 4

    run(story())


def test_a_scorer_that_dies_by_chance_costs_nothing():
    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=6), scorers=[FakeScorer(pause_s=0.02)]).begin()
        stage.fate = lambda handle, method, args, through: handle.die() if (handle.name, method) == ("scorer-0.0.0", "score") else None

        await stage.until(lambda: stage.queue.done)

        assert sorted(stage.queue.put_ids) == list(range(6)) and stage.queue.of(ScoringFailed) == []

    run(story())


def test_a_scorer_that_never_answers_is_replaced_after_score_s_and_its_group_is_reported():
    class Silent(FakeScorer):
        async def score(
            self, groups: Sequence[RolloutGroup], only: int | None = None, rating: Rating | None = None
        ) -> tuple[int, list[ScoredGroup]]:
            if any(group.ticket.ticket_id == 1 for group in groups if only is None or group is groups[only]):
                await asyncio.sleep(20)
            return await super().score(groups, only)

    async def story() -> None:
        stage = await Stage(FakeQueue(3), lambda name: FakeGenerator(name, burst=3), [Silent()], "timeouts.score_s=0.1").begin()

        await stage.until(lambda: stage.queue.done)

        assert sorted(stage.queue.put_ids) == [0, 2]
        (failed,) = stage.queue.of(ScoringFailed)
        assert [ticket.ticket_id for ticket in failed.tickets] == [1] and failed.reason == "no score within 0.1 s"
        assert [entry["name"] for entry in stage.incidents if entry["event"] == "lost"] == ["scorer-0"] * 2

    run(story())


# Reward actors.


def test_what_a_reward_actor_rates_goes_to_the_scorer_with_its_groups():
    async def story() -> None:
        reward = FakeReward()
        stage = await Stage(FakeQueue(num_tickets=6), rewards=[reward]).begin()

        await stage.until(lambda: stage.queue.done)

        scorer = stage.scorers[0]
        assert sorted(stage.queue.put_ids) == list(range(6))
        for ids, rating in zip(scorer.calls, scorer.ratings, strict=True):
            assert rating is not None and rating.scores.tolist() == np.repeat(ids, 2).tolist()

    run(story())


def test_without_reward_actors_the_scorer_is_given_no_rating():
    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=2)).begin()

        await stage.until(lambda: stage.queue.done)

        assert set(stage.scorers[0].ratings) == {None}

    run(story())


def test_a_slow_reward_actor_holds_up_no_scorer():
    class Watching(FakeScorer):
        async def score(
            self, groups: Sequence[RolloutGroup], only: int | None = None, rating: Rating | None = None
        ) -> tuple[int, list[ScoredGroup]]:
            scored = await super().score(groups, only, rating)
            overlaps.append(reward.busy)
            return scored

    reward, overlaps = FakeReward(pause_s=0.03), list[bool]()

    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=6), FakeGenerator, [Watching(pause_s=0.01)], rewards=[reward]).begin()

        await stage.until(lambda: stage.queue.done)

        assert any(overlaps), "while one group is scored, the next one is rated"

    run(story())


def test_a_completion_that_cannot_be_rated_costs_its_own_group_alone():
    async def story() -> None:
        reward = FakeReward(RewardError("the judge gave no grade"), bad=[1])
        stage = await Stage(FakeQueue(3), lambda name: FakeGenerator(name, burst=3), rewards=[reward]).begin()

        await stage.until(lambda: stage.queue.done)

        assert sorted(stage.queue.put_ids) == [0, 2] and reward.calls == [[0, 1, 2], [0], [1], [2]]
        (failed,) = stage.queue.of(ScoringFailed)
        assert [ticket.ticket_id for ticket in failed.tickets] == [1] and failed.reason == "the judge gave no grade"

    run(story())


def test_a_reward_actor_that_dies_by_chance_costs_nothing():
    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=6), rewards=[FakeReward(pause_s=0.02)]).begin()
        stage.fate = lambda handle, method, args, through: handle.die() if (handle.name, method) == ("reward-0.0.0", "rate") else None

        await stage.until(lambda: stage.queue.done)

        assert sorted(stage.queue.put_ids) == list(range(6)) and stage.queue.of(ScoringFailed) == []
        assert [entry["name"] for entry in stage.incidents if entry["event"] == "lost"] == ["reward-0"]

    run(story())


def test_a_reward_service_that_is_lost_ends_the_run_by_name_and_no_group_is_blamed():
    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=6), rewards=[FakeReward(RewardLostError("http://judge cannot be reached"))]).begin()

        with pytest.raises(RewardLostError, match="http://judge cannot be reached"):
            await stage.until(lambda: False)

        assert stage.queue.of(ScoringFailed) == []

    run(story())


def test_a_scorer_that_keeps_dying_ends_the_run_with_the_last_cause_alone():
    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=9), FakeGenerator, (), "supervision.max_restarts=1").begin()
        stage.fate = lambda handle, method, args, through: handle.die() if method == "score" else None

        with pytest.raises(RestartLimitError, match=r"scorer-0 failed 2 times within 600 s, allowed are 1 restarts .*the actor died"):
            await stage.until(lambda: False)

    run(story())


def test_groups_whose_generator_took_them_along_are_reported_as_failed_and_cost_no_scorer():
    """The object is lost with its node; their leases go out again."""

    class Losing(FakeGenerator):
        async def collect(self, gather_s: float, wait_s: float) -> tuple[Collected, Any]:
            collected, groups = await super().collect(gather_s, wait_s)
            return collected, groups

    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=2), Losing).begin()
        scores = 0
        plain_start = actors.pipeline.RemoteActor.start

        def start(self: Any, method: str, *args: Any, num_returns: int = 1, group: str = "") -> Any:
            nonlocal scores
            if method == "score" and (scores := scores + 1) <= 2:
                args = (lost_reference(), *args[1:])
            return plain_start(self, method, *args, num_returns=num_returns)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(actors.pipeline.RemoteActor, "start", start)
            await stage.until(lambda: stage.queue.done)

        (failed,) = stage.queue.of(ScoringFailed)
        assert len(failed.tickets) == 1 and stage.incidents == []
        assert len(stage.queue.put_ids) == 1

    run(story())


# The train loop.


def test_each_update_takes_trains_publishes_tells_the_queue_and_is_then_booked():
    async def story() -> None:
        stage = await Stage(None, FakeGenerator, (), "learner.num_ranks=2", num_generators=0).begin()
        records: list[UpdateRecord] = []
        stage.crew.usage[A] = USAGE

        async def on_update(record: UpdateRecord) -> None:
            stage.events.append(f"update {record.summary.update} booked")
            records.append(record)

        made = await stage.train(on_update)

        assert made == 3
        for update in range(3):
            assert stage.events[8 * update : 8 * update + 8] == [
                "queue.next_batch",
                "queue.take",
                "queue.take",
                f"train {update} begins with ['shard {update}.0', 'shard {update}.1']",
                f"train {update} ends",
                "broadcaster.publish",
                "queue.trained",
                f"update {update} booked",
            ]
        assert [record.counters.trained for record in records] == [2, 4, 6]
        assert [record.reports[0].version for record in records] == [1, 2, 3]
        assert [record.published.version for record in records] == [1, 2, 3]
        assert records[0].usage == {A: USAGE} and records[0].train_s == 0.1 and records[0].booked.replay_error_nats == 0.0

    run(story())


def test_train_goes_on_from_the_version_that_it_is_given():
    async def story() -> None:
        stage = await Stage(num_generators=0).begin()
        stage.learner.version = 2

        assert await stage.train(version=2) == 3

        assert [event for event in stage.events if event.startswith("train")] == ["train 2 begins with ['shard 2.0']", "train 2 ends"]

    run(story())


def test_train_ends_early_when_no_batch_will_ever_come():
    async def story() -> None:
        stage = await Stage(FakeQueue(num_batches=1), num_generators=0).begin()

        assert await stage.train() == 1
        assert stage.events.count("broadcaster.publish") == 1

    run(story())


def test_a_learner_that_waits_too_long_for_a_batch_says_where_the_groups_are():
    async def story() -> None:
        stage = await Stage(FakeQueue(num_batches=0), FakeGenerator, (), "timeouts.batch_s=0.1", num_generators=0).begin()

        with pytest.raises(DeadlineError, match=r"waited 0\.1 s for batch 0 .* leased: 3, scoring: 1, waiting: 1 of 2"):
            await stage.train()

    run(story())


def test_stopping_ends_a_waiting_learner_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(actors.pipeline, "POLL_S", 20.0)

    async def story() -> None:
        stage = await Stage(FakeQueue(num_batches=0), num_generators=0).begin()
        training = asyncio.create_task(stage.train())
        await asyncio.sleep(0.1)
        assert not training.done()

        stage.crew.stopping.set()

        assert await asyncio.wait_for(training, 2) == 0

    run(story())


def test_stopping_in_the_middle_of_an_update_ends_after_it():
    async def story() -> None:
        stage = await Stage(num_generators=0).begin()
        stage.learner.pause_s = 0.1
        training = asyncio.create_task(stage.train())
        while not any(event.startswith("train 0 begins") for event in stage.events):
            await asyncio.sleep(0.002)

        stage.crew.stopping.set()

        assert await asyncio.wait_for(training, 20) == 1
        assert stage.events[-1] == "queue.trained"

    run(story())


def test_a_learner_that_loses_a_rank_leaves_the_loop_and_nothing_is_booked_or_published():
    async def story() -> None:
        stage = await Stage(num_generators=0).begin()
        stage.learner.error = LearnerLostError("rank 1 is gone")

        with pytest.raises(LearnerLostError, match="rank 1 is gone"):
            await stage.train()

        assert "broadcaster.publish" not in stage.events and "queue.trained" not in stage.events

    run(story())


def test_a_learner_that_dies_while_it_waits_for_a_batch_starts_again_where_the_weights_come_from_it():
    """Nobody gets a version any more, so no batch would ever come."""

    async def story() -> None:
        stage = await Stage(FakeQueue(num_batches=0), FakeGenerator, (), "timeouts.batch_s=1", num_generators=0).begin()
        stage.crew.transport = Sending(stage.config)
        training = asyncio.create_task(stage.train())
        while "queue.next_batch" not in stage.events:
            await asyncio.sleep(0.002)

        stage.learner.lost = LearnerLostError("learner-0 is gone")

        with pytest.raises(LearnerLostError, match="learner-0 is gone"):
            await training

    run(story())


def test_a_learner_that_dies_while_it_waits_for_a_batch_may_start_again_with_it_where_the_weights_are_elsewhere():
    async def story() -> None:
        stage = await Stage(FakeQueue(num_batches=0), num_generators=0).begin()
        stage.learner.lost = LearnerLostError("learner-0 is gone")
        training = asyncio.create_task(stage.train())

        while stage.events.count("queue.next_batch") < 3:
            await asyncio.sleep(0.002)

        stage.crew.stopping.set()
        assert await training == 0

    run(story())


def test_a_learner_that_dies_over_its_snapshot_leaves_the_loop_and_the_broadcaster_lives_on():
    async def story() -> None:
        stage = await Stage(num_generators=0).begin()
        stage.learner.pause_s = 0.05
        asyncio.get_running_loop().call_later(0.02, stage.learner.rank.die)

        with pytest.raises(LearnerLostError, match=r"weights version 1 could not be pulled: learner-0\.0\.0\.snapshot: the actor died"):
            await stage.train()

        assert stage.incidents == [] and "queue.trained" not in stage.events

    run(story())


def test_the_same_batch_is_trained_again_by_the_learner_after_it():
    """It fell back from update 2 to version 1; the queue gives batches 1 and 2 once more."""

    async def story() -> None:
        stage = await Stage(num_generators=0).begin()
        seen: list[int] = []

        async def on_update(record: UpdateRecord) -> None:
            seen.append(record.summary.update)
            if seen == [0, 1]:
                stage.learner.error = LearnerLostError("gone")

        with pytest.raises(LearnerLostError):
            await stage.train(on_update)
        stage.learner.error, stage.learner.version = None, 1

        assert await stage.train(on_update, version=1) == 3
        assert seen == [0, 1, 1, 2]

    run(story())


# Queue and broadcaster that die.


@pytest.mark.parametrize("method", ["next_batch", "take", "trained"])
@pytest.mark.parametrize("through", [False, True], ids=["before", "after"])
def test_a_call_that_the_queue_died_over_is_made_again(method: str, through: bool):
    async def story() -> None:
        stage = await Stage(num_generators=0).begin()
        seen: list[int] = []

        def die_once(handle: LocalHandle, called: str, args: tuple[Any, ...], done: bool) -> None:
            if (called, done, args[:1], handle.name) == (method, through, (1,), "queue.0.0"):
                handle.die()

        async def on_update(record: UpdateRecord) -> None:
            seen.append(record.summary.update)

        stage.fate = die_once
        assert await stage.train(on_update) == 3

        assert seen == [0, 1, 2] and stage.events.count(f"queue.{method}") == 4
        assert [entry["name"] for entry in stage.incidents] == ["queue", "queue"]

    run(story())


def test_a_broadcaster_that_dies_is_given_the_learners_version_again_while_the_learner_waits():
    """A generator that starts meanwhile gets its first weights from it."""

    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=1, num_batches=0)).begin()
        stage.crew.stopping.clear()
        training = asyncio.create_task(stage.train())
        while not stage.queue.put_ids:
            await asyncio.sleep(0.01)
        stage.playing("broadcaster").die()
        stage.playing("generator-0").die()

        while "generator-0.0.1" not in stage.crew.installs:
            await asyncio.sleep(0.01)

        assert stage.crew.published == (0, stage.crew.broadcaster.actor)
        assert stage.events.count("broadcaster.publish") == 1
        stage.crew.stopping.set()
        assert await training == 0

    run(story())


def test_a_broadcaster_that_dies_over_a_publish_is_asked_again():
    async def story() -> None:
        stage = await Stage(num_generators=0).begin()

        def die_once(handle: LocalHandle, method: str, args: tuple[Any, ...], through: bool) -> None:
            if (handle.name, method, args[0]) == ("broadcaster.0.0", "publish", 2):
                handle.die()

        stage.fate = die_once

        assert await stage.train() == 3
        assert stage.events.count("broadcaster.publish") == 4

    run(story())


def test_weights_that_died_with_their_broadcaster_are_pulled_anew():
    """Its offers cannot be installed: it is replaced, and the next one is given the learner's version."""

    class Hollow(WeightBroadcaster):
        made = 0

        def __init__(self, timeout_s: float) -> None:
            super().__init__(timeout_s)
            Hollow.made += 1
            self.hollow = Hollow.made == 1

        async def newer_than(self, version: int, wait_s: float) -> Offer | None:
            offer = await super().newer_than(version, wait_s)
            return Offer(version=offer.version, buckets=[lost_reference()]) if offer is not None and self.hollow else offer

    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=1, num_batches=0), broadcaster=Hollow).begin()
        training = asyncio.create_task(stage.train())

        while not stage.queue.put_ids:
            await asyncio.sleep(0.01)

        assert [entry["name"] for entry in stage.incidents] == ["broadcaster", "broadcaster"]
        stage.crew.stopping.set()
        await training

    run(story())


# Both, around the real queue and the real broadcaster.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(path)
    return path


class MortalQueue(ReplayQueue):
    """Dies as its process would: the lock goes, and so does what was under way."""

    def died(self) -> None:
        self._journal.close()


def real(folder: Path, run_folder: Path, *overrides: str, num_generators: int = 1) -> Stage:
    """A stage around the true queue."""
    config = make_config(*overrides)
    make: Make = lambda name: MortalQueue(config, str(folder), str(run_folder), 0)  # noqa: E731
    stage = Stage(make, FakeGenerator, (), *overrides, num_generators=num_generators)
    stage.learner.pause_s = 0.02
    return stage


def check_run(stage: Stage, records: Sequence[UpdateRecord], updates: int, eta: int) -> None:
    """Every update once, in order, within the bound; no group twice; the books in balance."""
    assert [record.summary.update for record in records] == list(range(updates))
    assert max(record.summary.staleness_max for record in records) <= eta
    trained = [ticket_id for record in records for ticket_id in record.summary.ticket_ids]
    assert len(trained) == len(set(trained)) == 2 * updates
    assert all(record.counters.balanced for record in records)
    assert records[-1].counters.trained == 2 * updates and records[-1].counters.voided == {}
    dealt = [event for event in stage.events if event.startswith("train") and "begins" in event]
    assert len(dealt) == updates


@pytest.mark.parametrize("eta", [0, 1, 3])
@pytest.mark.parametrize("num_generators", [1, 2])
def test_a_whole_run_trains_every_update_within_the_bound(eta: int, num_generators: int, folder: Path, tmp_path: Path):
    async def story() -> None:
        stage = await real(folder, tmp_path, f"max_staleness={eta}", "updates=8", num_generators=num_generators).begin()
        records: list[UpdateRecord] = []

        async def on_update(record: UpdateRecord) -> None:
            records.append(record)

        assert await stage.train(on_update) == 8

        check_run(stage, records, 8, eta)
        assert stage.incidents == [] and all(record.counters.refused == {} for record in records)
        if eta:
            assert max(record.summary.staleness_max for record in records) >= 1, "a run that never overlaps tests nothing"

    run(story())


@pytest.mark.parametrize("method", ["tickets", "note", "put", "next_batch", "take", "trained"])
@pytest.mark.parametrize("through", [False, True], ids=["before", "after"])
def test_the_queue_may_die_at_any_of_its_calls(through: bool, method: str, folder: Path, tmp_path: Path):
    """Each run of two updates loses it at another call, before the call took effect or after, until a run has fewer calls."""

    async def story() -> None:
        num_deaths = 0
        while True:
            stage = await real(folder, tmp_path / str(num_deaths), "max_staleness=1", "updates=2").begin()
            records: list[UpdateRecord] = []
            calls = 0

            def die_at_its_number(handle: LocalHandle, called: str, args: tuple[Any, ...], done: bool, last: int = num_deaths) -> None:
                nonlocal calls
                if part_of(handle.name) == "queue" and (called, done) == (method, through):
                    calls += 1
                    if calls == last + 1:
                        handle.die()

            async def on_update(record: UpdateRecord, records: list[UpdateRecord] = records) -> None:
                records.append(record)

            stage.fate = die_at_its_number
            assert await stage.train(on_update) == 2
            check_run(stage, records, 2, 1)
            stage.playing("queue").die()
            if calls <= num_deaths:
                break
            num_deaths += 1
        assert num_deaths >= 2

    run(story())


def test_a_prompt_that_kills_every_scorer_is_voided_before_the_scorers_restarts_run_out(folder: Path, tmp_path: Path):
    """By the defaults of queue.max_attempts and supervision.max_restarts, with one scorer."""

    async def story() -> None:
        allowed = load_config().config.supervision.max_restarts
        stage = await real(folder, tmp_path, "max_staleness=1", f"supervision.max_restarts={allowed}").begin()
        records: list[UpdateRecord] = []

        def die_over_ticket_1(handle: LocalHandle, method: str, args: tuple[Any, ...], through: bool) -> None:
            if method == "score" and not through:
                groups, only = args
                if 1 in [group.ticket.ticket_id for group in (groups if only is None else groups[only : only + 1])]:
                    handle.die()

        async def on_update(record: UpdateRecord) -> None:
            records.append(record)

        stage.fate = die_over_ticket_1
        assert await stage.train(on_update) == 3

        assert records[-1].counters.voided == {"failed": 1}
        (reason,) = records[-1].counters.failed_prompts.values()
        assert reason.startswith("the scorer died: ")

    run(story())


@pytest.mark.parametrize("seed", range(6))
def test_anybody_may_die_or_freeze_at_any_time(seed: int, folder: Path, tmp_path: Path):
    """Two generators, two scorers' places, queue and broadcaster: one in 40 calls ends whoever was called, or silences it."""

    async def story() -> None:
        rng = np.random.default_rng(seed)
        stage = await real(folder, tmp_path, "updates=6", "max_staleness=2", "queue.max_attempts=100", num_generators=2).begin()
        records: list[UpdateRecord] = []

        def strike(handle: LocalHandle, method: str, args: tuple[Any, ...], through: bool) -> None:
            chance = rng.random()
            if chance < 1 / 40:
                handle.die()
            elif chance < 1 / 36 and not isinstance(handle.target, ReplayQueue):  # a frozen object here would keep its journal
                handle.freeze()

        async def on_update(record: UpdateRecord) -> None:
            records.append(record)

        stage.fate = strike
        assert await stage.train(on_update) == 6

        check_run(stage, records, 6, 2)
        assert len(stage.incidents) >= 4, "a run that loses nobody tests nothing"

    run(story())


# Calls with deadlines.


@pytest.mark.parametrize("make", [asyncio.ensure_future, lambda coroutine: coroutine], ids=["future", "coroutine"])
def test_resolve_awaits_anything_that_can_be_awaited(make: Callable[[Any], Any]):
    async def answer() -> int:
        await asyncio.sleep(0)
        return 42

    async def story() -> None:
        assert await resolve(make(answer()), edge="x.y", timeout_s=5) == 42

    run(story())


def test_no_answer_in_time_is_an_error_that_names_the_edge():
    async def story() -> None:
        with pytest.raises(DeadlineError, match=r"waited 0\.05 s for scorer-0\.score without an answer"):
            await resolve(asyncio.sleep(20), edge="scorer-0.score", timeout_s=0.05)

    run(story())


@pytest.mark.parametrize("error", [TimeoutError("the judge did not answer"), DeadlineError("inner edge")])
def test_a_timeout_of_the_work_itself_is_not_taken_for_ours(error: Exception):
    """Ray re-raises a task's TimeoutError as one, too."""

    async def fail() -> None:
        raise error

    async def story() -> None:
        with pytest.raises(type(error)) as caught:
            await within(fail(), edge="x.y", timeout_s=20)
        assert caught.value is error

    run(story())


def test_cancelling_a_call_is_not_a_deadline():
    async def story() -> None:
        call = asyncio.create_task(within(asyncio.sleep(20), edge="x.y", timeout_s=20))
        await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    run(story())


def test_a_call_to_an_actor_that_is_dead_or_dies_meanwhile_says_so():
    class Slow:
        async def work(self) -> None:
            await asyncio.sleep(20)

    async def story() -> None:
        actor = local_actor("scorer-0.0.0", Slow())
        call = asyncio.create_task(actor.call("work", timeout_s=20))
        await asyncio.sleep(0.01)
        actor.handle.die()

        for attempt in (call, actor.call("work", timeout_s=20), actor.fetch("work", timeout_s=20)):
            with pytest.raises(ActorLostError, match=r"scorer-0\.0\.0\.work: the actor died"):
                await attempt
        with pytest.raises(ActorLostError, match=r"scorer-0\.0\.0: a sign of life: the actor died"):
            await actor.ping(20)

    run(story())
