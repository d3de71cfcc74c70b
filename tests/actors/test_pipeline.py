"""The two loops of training around fakes: who is called in which order, how they end, and how they fail."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actors.pipeline
from actors.engine_loop import EngineUsage
from actors.generator import Collected
from actors.pipeline import Crew, UpdateRecord, produce, train
from actors.remote import resolve, within
from actors.replay_queue import NextBatch, ReplayQueue
from actors.weight_broadcaster import WeightBroadcaster
from async_rlhf.config import Config, load_config
from async_rlhf.errors import DeadlineError, EngineError, RewardError
from async_rlhf.metrics import summarize
from async_rlhf.tasks.start import build_tokenizer
from async_rlhf.tickets import QueueCounters
from async_rlhf.types import Batch, InstallReport, Rollout, RolloutGroup, ScoredGroup, StepReport, Ticket
from tests.support.local_actors import LocalActor
from tests.support.samples import make_rollout, make_scored, make_ticket

pytestmark = pytest.mark.timeout(60)
A, B = "generator-0.0", "generator-1.0"
USAGE = EngineUsage(busy_s=1.0, num_tokens=10, num_completions=2)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 30))


def make_config(*overrides: str) -> Config:
    base = ["updates=3", "batch_groups=2", "learner.warmup_steps=0", "generator.max_inflight=8", "queue.ties=keep"]
    return load_config(overrides=[*base, *overrides]).config


@pytest.fixture
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors.pipeline, "POLL_S", 0.02)


def leaf(error: BaseException) -> BaseException:
    """The one error inside nested groups."""
    while isinstance(error, BaseExceptionGroup):
        assert len(error.exceptions) == 1, error.exceptions
        error = error.exceptions[0]
    return error


class FakeGenerator:
    """Finishes what it was given, one group per collect; nothing at all when it is stuck."""

    def __init__(self, version: int = 0, *, stuck: bool = False) -> None:
        self.version, self.stuck = version, stuck
        self.inflight: list[Ticket] = []
        self.most_inflight = 0
        self.sampled_by: dict[int, int] = {}

    async def submit(self, tickets: Sequence[Ticket]) -> None:
        self.inflight += tickets
        self.sampled_by.update({ticket.ticket_id: self.version for ticket in tickets})
        self.most_inflight = max(self.most_inflight, len(self.inflight))

    async def collect(self, all_inflight: bool, wait_s: float) -> tuple[Collected, list[RolloutGroup]]:
        await asyncio.sleep(0.005)
        done = [] if self.stuck else self.inflight[:1]
        self.inflight = self.inflight[len(done) :]
        groups = [RolloutGroup(ticket=ticket, rollouts=self.rollouts(ticket)) for ticket in done]
        return Collected(tickets=tuple(done), num_inflight=len(self.inflight), usage=USAGE), groups

    async def install(self, version: int) -> InstallReport:
        await asyncio.sleep(0.01)
        self.version = version
        return InstallReport(version=version, install_s=0.0, pause_s=0.0, canary_error=0.0)

    def rollouts(self, ticket: Ticket) -> tuple[Rollout, ...]:
        rng = np.random.default_rng(ticket.ticket_id)
        return tuple(make_rollout(rng, version=self.sampled_by[ticket.ticket_id]) for _ in range(2))


class FakeScorer:
    def __init__(self, error: Exception | None = None, pause_s: float = 0.0) -> None:
        self.error, self.pause_s = error, pause_s
        self.num_calls = 0

    async def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        self.num_calls += 1
        await asyncio.sleep(self.pause_s)
        if self.error is not None:
            raise self.error
        return [
            ScoredGroup(
                group=group,
                scores=np.float32([1.0, 0.0]),
                reference_logprobs=tuple(rollout.behavior_logprobs for rollout in group.rollouts),
                completions=("a", "b"),
            )
            for group in groups
        ]


class FakeQueue:
    """Hands out `num_tickets`, then says that no more are needed; has every batch at once."""

    def __init__(self, num_tickets: int = 0, num_batches: int = 100) -> None:
        self.left, self.num_batches = num_tickets, num_batches
        self.issued = 0
        self.wanted: list[int] = []
        self.scoring_ids: list[int] = []
        self.put_ids: list[int] = []

    async def tickets(self, holder: str, max_tickets: int, wait_s: float) -> list[Ticket] | None:
        self.wanted.append(max_tickets)
        if not self.left:
            return None
        count = min(max_tickets, self.left)
        self.left -= count
        self.issued += count
        return [make_ticket(index, holder=holder) for index in range(self.issued - count, self.issued)]

    async def scoring(self, tickets: Sequence[Ticket]) -> None:
        self.scoring_ids += [ticket.ticket_id for ticket in tickets]

    async def put(self, groups: Sequence[ScoredGroup]) -> None:
        for scored in groups:
            assert scored.group.ticket.ticket_id in self.scoring_ids
            self.put_ids.append(scored.group.ticket.ticket_id)

    async def next_batch(self, update: int, wait_s: float) -> NextBatch:
        if update >= self.num_batches:
            await asyncio.sleep(0.005)
            return NextBatch(summary=None, closed=self.num_batches > 0, counters=counters())
        groups = tuple(make_scored(make_ticket(2 * update + index)) for index in range(2))
        return NextBatch(summary=summarize(Batch(update=update, groups=groups), []), closed=False, counters=counters())

    async def take(self, update: int, rank: int) -> str:
        return f"shard {update}.{rank}"

    async def trained(self, update: int) -> QueueCounters:
        return counters(trained=2 * (update + 1))


def counters(**changes: int) -> QueueCounters:
    zero = {"issued": 5, "leased": 3, "lost": 0, "scoring": 1, "waiting": 1, "taken": 0, "trained": 0, "reissued": 0}
    return QueueCounters(**(zero | changes), voided={}, dropped={}, refused={})


class FakeLearner:
    def __init__(self, events: list[str], pause_s: float = 0.0) -> None:
        self.events, self.pause_s = events, pause_s
        self.version = 0

    async def train_step(self, update: int, shards: Sequence[Any]) -> Sequence[StepReport]:
        self.events.append(f"train {update} begins with {[await shard for shard in shards]}")
        await asyncio.sleep(self.pause_s)
        self.version = update + 1
        self.events.append(f"train {update} ends")
        return [StepReport(version=update + 1, optimizer_steps=update + 1, num_tokens=10, train_s=0.1, metrics={})]

    async def snapshot(self, version: int) -> int:
        assert version == self.version, "a version is what the learner has trained, not what is asked for"
        return version


class FakeBroadcaster:
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    async def publish(self, version: int) -> float:
        return 0.25

    async def reports(self) -> dict[str, InstallReport]:
        if self.error is not None:
            raise self.error
        return {}


class Stage:
    """A crew of fakes behind local actors; every call is written down."""

    def __init__(
        self,
        queue: Any = None,
        generator: Any = None,
        scorers: Sequence[Any] = (),
        broadcaster: Any = None,
    ) -> None:
        self.events: list[str] = []
        self.queue = queue or FakeQueue()
        self.generator = generator or FakeGenerator()
        self.scorers = list(scorers) or [FakeScorer()]
        self.usage: dict[str, EngineUsage] = {}

        def note(name: str, method: str, args: tuple[Any, ...]) -> None:
            self.events.append(f"{name}.{method}")

        self.crew = Crew(
            generators={A: LocalActor(A, self.generator, note)},  # type: ignore[dict-item]
            scorers=[LocalActor(f"scorer-{index}", scorer, note) for index, scorer in enumerate(self.scorers)],  # type: ignore[misc]
            queue=LocalActor("queue", self.queue, note),  # type: ignore[arg-type]
            learner=FakeLearner(self.events),
            broadcaster=LocalActor("broadcaster", broadcaster or FakeBroadcaster(), note),  # type: ignore[arg-type]
        )

    async def produce(self, *overrides: str) -> None:
        await produce(A, self.crew, make_config(*overrides), self.usage)


async def ignore(_: UpdateRecord) -> None: ...


# The produce loop.


def test_produce_brings_every_ticket_through_a_scorer_into_the_queue_and_ends():
    async def story() -> None:
        stage = Stage(FakeQueue(num_tickets=7))

        await stage.produce()

        assert sorted(stage.queue.put_ids) == list(range(7))
        assert stage.usage == {A: USAGE}

    run(story())


def test_groups_are_marked_as_scoring_before_they_are_scored_and_scored_before_they_are_put():
    async def story() -> None:
        stage = Stage(FakeQueue(num_tickets=1))

        await stage.produce()

        order = [event for event in stage.events if event in ("queue.scoring", "scorer-0.score", "queue.put")]
        assert order == ["queue.scoring", "scorer-0.score", "queue.put"]

    run(story())


def test_produce_ends_only_when_the_last_group_is_put():
    async def story() -> None:
        stage = Stage(FakeQueue(num_tickets=2), scorers=[FakeScorer(pause_s=0.2)])

        await stage.produce()

        assert sorted(stage.queue.put_ids) == [0, 1]

    run(story())


def test_produce_without_any_ticket_ends_without_a_collect():
    async def story() -> None:
        stage = Stage(FakeQueue(num_tickets=0))

        await stage.produce()

        assert stage.events == ["queue.tickets"]

    run(story())


@pytest.mark.parametrize(
    ("overrides", "capacity"),
    [((), 4), (("deterministic=true", "max_staleness=0", "queue.order=ticket"), 2)],
    ids=["max_inflight 8 over K 2", "deterministic: one batch"],
)
def test_a_generator_never_holds_more_groups_than_it_has_room_for(overrides: tuple[str, ...], capacity: int):
    async def story() -> None:
        stage = Stage(FakeQueue(num_tickets=20))

        await stage.produce(*overrides)

        assert stage.generator.most_inflight == capacity
        assert max(stage.queue.wanted) == capacity and min(stage.queue.wanted) >= 1

    run(story())


def test_scorers_take_turns():
    async def story() -> None:
        stage = Stage(FakeQueue(num_tickets=9), scorers=[FakeScorer(), FakeScorer(), FakeScorer()])

        await stage.produce()

        assert [scorer.num_calls for scorer in stage.scorers] == [3, 3, 3]

    run(story())


def test_a_slow_scorer_does_not_stop_the_generator():
    """All groups are collected while the first still waits for its score."""

    async def story() -> None:
        stage = Stage(FakeQueue(num_tickets=6), scorers=[FakeScorer(pause_s=0.3)])

        await stage.produce()

        first_put = stage.events.index("queue.put")
        assert stage.events[:first_put].count("queue.scoring") == 6

    run(story())


def test_a_generator_that_stays_silent_is_named(quick_polls: None):
    async def story() -> None:
        stage = Stage(FakeQueue(num_tickets=3), FakeGenerator(stuck=True))

        with pytest.raises(ExceptionGroup) as caught:
            await stage.produce("timeouts.generate_s=0.15")

        error = leaf(caught.value)
        assert isinstance(error, DeadlineError)
        assert str(error).startswith(f"{A} has 3 groups in flight and finished none for 0.15 s (timeouts.generate_s)")

    run(story())


def test_a_generator_that_waits_for_tickets_is_not_silent(quick_polls: None):
    """The queue has nothing for far longer than generate_s; then one more ticket comes."""

    class PausingQueue(FakeQueue):
        async def tickets(self, holder: str, max_tickets: int, wait_s: float) -> list[Ticket] | None:
            if self.issued == 1 and len(self.wanted) < 25:
                self.wanted.append(max_tickets)
                await asyncio.sleep(wait_s)
                return []
            return await super().tickets(holder, 1, wait_s)

    async def story() -> None:
        stage = Stage(PausingQueue(num_tickets=2))

        await stage.produce("timeouts.generate_s=0.1")

        assert sorted(stage.queue.put_ids) == [0, 1]

    run(story())


@pytest.mark.parametrize("where", ["scorer", "generator"])
def test_known_mistake_10_an_actors_error_ends_the_loop_as_it_is_and_nobody_waits_on(where: str):
    class FailingGenerator(FakeGenerator):
        async def collect(self, all_inflight: bool, wait_s: float) -> tuple[Collected, list[RolloutGroup]]:
            raise EngineError("out of memory")

    async def story() -> None:
        if where == "scorer":
            stage = Stage(FakeQueue(num_tickets=1), scorers=[FakeScorer(RewardError("judge is offline"))])
        else:
            stage = Stage(FakeQueue(num_tickets=1), FailingGenerator())

        with pytest.raises(ExceptionGroup) as caught:
            await stage.produce()

        error = leaf(caught.value)
        assert type(error) is (RewardError if where == "scorer" else EngineError)
        assert str(error) == ("judge is offline" if where == "scorer" else "out of memory")
        assert stage.queue.put_ids == []

    run(story())


# The train loop.


def test_each_update_takes_trains_tells_the_queue_and_then_publishes():
    async def story() -> None:
        stage = Stage()
        records: list[UpdateRecord] = []

        async def on_update(record: UpdateRecord) -> None:
            stage.events.append(f"update {record.summary.update} booked")
            records.append(record)

        made = await train(stage.crew, make_config("learner.num_ranks=2"), {A: USAGE}, on_update)

        assert made == 3
        for update in range(3):
            assert stage.events[8 * update : 8 * update + 8] == [
                "queue.next_batch",
                "queue.take",
                "queue.take",
                f"train {update} begins with ['shard {update}.0', 'shard {update}.1']",
                f"train {update} ends",
                "queue.trained",
                "broadcaster.publish",
                f"update {update} booked",
            ]
        assert [record.counters.trained for record in records] == [2, 4, 6]
        assert [record.reports[0].version for record in records] == [1, 2, 3]
        assert records[0].export_s == 0.25 and records[0].usage == {A: USAGE}

    run(story())


def test_train_ends_early_when_no_batch_will_ever_come():
    async def story() -> None:
        stage = Stage(FakeQueue(num_batches=1))

        assert await train(stage.crew, make_config(), {}, ignore) == 1
        assert stage.events.count("broadcaster.publish") == 1

    run(story())


def test_a_learner_that_waits_too_long_for_a_batch_says_where_the_groups_are():
    async def story() -> None:
        stage = Stage(FakeQueue(num_batches=0))

        with pytest.raises(DeadlineError, match=r"waited 0\.1 s for batch 0 .* leased: 3, scoring: 1, waiting: 1 of 2"):
            await train(stage.crew, make_config("timeouts.batch_s=0.1"), {}, ignore)

    run(story())


def test_a_failed_install_ends_a_waiting_learner_at_once():
    async def story() -> None:
        stage = Stage(FakeQueue(num_batches=0), broadcaster=FakeBroadcaster(EngineError("install failed")))

        with pytest.raises(EngineError, match="install failed"):
            await train(stage.crew, make_config(), {}, ignore)

    run(story())


# Both, around the real queue and the real broadcaster.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("eta", [0, 1, 3])
@pytest.mark.parametrize("num_generators", [1, 2])
def test_a_whole_run_trains_every_update_within_the_bound_and_every_loop_ends(
    eta: int, num_generators: int, folder: Path, quick_polls: None
):
    async def story() -> None:
        config = make_config(f"max_staleness={eta}", "updates=8")
        generators = {name: FakeGenerator() for name in (A, B)[:num_generators]}
        actors_of = {name: LocalActor(name, generator) for name, generator in generators.items()}
        queue = LocalActor("queue", ReplayQueue(config, str(folder)))
        learner = FakeLearner([], pause_s=0.02)
        broadcaster = WeightBroadcaster([LocalActor("learner-0", learner)], actors_of, queue, 20.0)  # type: ignore[arg-type, list-item]
        crew = Crew(
            generators=actors_of,  # type: ignore[arg-type]
            scorers=[LocalActor("scorer-0", FakeScorer())],  # type: ignore[list-item]
            queue=queue,  # type: ignore[arg-type]
            learner=learner,
            broadcaster=LocalActor("broadcaster", broadcaster),  # type: ignore[arg-type]
        )
        usage: dict[str, EngineUsage] = {}
        records: list[UpdateRecord] = []

        async def on_update(record: UpdateRecord) -> None:
            records.append(record)

        await broadcaster.publish(0)
        assert await broadcaster.wait_installed(0, 5.0)
        producers = [produce(name, crew, config, usage) for name in generators]
        made, *_ = await asyncio.gather(train(crew, config, usage, on_update), *producers)

        assert made == 8
        assert [record.summary.update for record in records] == list(range(8))
        assert max(record.summary.staleness_max for record in records) <= eta
        trained = [ticket_id for record in records for ticket_id in record.summary.ticket_ids]
        assert len(trained) == len(set(trained)) == 16
        assert all(record.counters.balanced for record in records)
        if eta:
            assert max(record.summary.staleness_max for record in records) >= 1, "a run that never overlaps tests nothing"

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
