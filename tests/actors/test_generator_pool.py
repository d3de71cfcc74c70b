"""Generators that join, leave, are lost and come back, around fakes: no sample is lost, none is used twice, and the others go on."""

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

import actors.generator_pool
import actors.pipeline
from actors.generator import Collected
from actors.generator_pool import ROOM_S
from actors.launch import ActorSpec
from actors.replay_queue import HolderGone, WithScorer
from actors.roster import Phase, Roster
from async_rlhf.errors import EngineError, NoRoomError, RestartLimitError, RunError
from async_rlhf.types import InstallReport
from tests.actors.test_pipeline import A, B, FakeGenerator, FakeQueue, Make, Snapshot, Stage, part_of
from tests.support.local_actors import LocalHandle, local_kill

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("local_kill")]
__all__ = ["local_kill"]
C = "generator-2.0.0"


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 30))


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors.pipeline, "POLL_S", 0.02)


async def scaled(stage: Stage, *counts: int, when: Callable[[], bool] | None = None, then: Callable[[], bool] = lambda: True) -> list[str]:
    """Scale to each count in turn while the produce loops run, then wait until `then`; returns what was said.

    Args:
        when: what the first change waits for; None: somebody is at work.
    """
    lines: list[str] = []
    done = asyncio.Event()

    async def scale() -> None:
        while not (when() if when else Phase.AT_WORK in phases(stage).values()):
            await asyncio.sleep(0.002)
        for count in counts:
            await stage.pool.scale(count, lines.append)
        done.set()

    scaling = asyncio.create_task(scale())
    await stage.until(lambda: scaling.done() and then())
    scaling.result()
    return lines


def phases(stage: Stage) -> dict[str, str]:
    return {seat.member.name: str(seat.phase) for seat in stage.crew.roster}


def inflight(stage: Stage, name: str) -> int:
    """Groups of the first who played the part."""
    return len(stage.played(name)[0].inflight)


def put_once(stage: Stage, count: int) -> bool:
    return sorted(stage.queue.put_ids) == list(range(count))


# Joining.


def test_one_that_joins_installs_the_newest_version_before_its_first_ticket_while_the_others_go_on():
    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=200)).begin()

        lines = await scaled(stage, 2, then=lambda: stage.queue.done)

        assert put_once(stage, 200)
        assert stage.cluster.started[-1] == B and stage.cluster.reserved == ["generator-1"]
        assert stage.events.index("generator-1.install") < stage.events.index("generator-1.submit")
        assert stage.played("generator-0")[0].most_inflight and len(stage.played("generator-1")[0].sampled_by) > 10
        assert lines[-1].startswith("generator-1 joined after ") and phases(stage) == dict.fromkeys(
            ("generator-0", "generator-1"), "at work"
        )
        assert [(entry["event"], entry["name"]) for entry in stage.incidents] == [("joined", "generator-1")]

    run(story())


def test_one_that_joins_does_not_take_part_before_its_first_install():
    class SlowInstall(FakeGenerator):
        async def install(self, weights: Snapshot) -> InstallReport:
            if self.name == B:
                seen.append([member.name for member in stage.crew.generators])
            return await super().install(weights)

    stage: Any = None
    seen: list[list[str]] = []

    async def story() -> None:
        nonlocal stage
        stage = await Stage(FakeQueue(num_tickets=50), SlowInstall).begin()

        await scaled(stage, 2, then=lambda: stage.queue.done)

        assert seen == [["generator-0"]] and [member.name for member in stage.crew.generators] == ["generator-0", "generator-1"]

    run(story())


class BadStart(FakeGenerator):
    """None but the first comes up."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        if part_of(name) != "generator-0":
            raise ValueError("no such GPU")


class BadCanary(FakeGenerator):
    async def install(self, weights: Snapshot) -> InstallReport:
        if part_of(self.name) != "generator-0":
            raise EngineError("the canary is silent")
        return await super().install(weights)


@pytest.mark.parametrize(("kind", "cause"), [(BadStart, "no such GPU"), (BadCanary, "the canary is silent")])
def test_a_join_that_keeps_failing_is_given_up_by_the_limits_and_the_run_goes_on(kind: Any, cause: str):
    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=200), kind, (), "supervision.max_restarts=2").begin()

        with pytest.raises(RunError, match=rf"generator-1 did not join: generator-1 failed 3 times .*{cause}"):
            await scaled(stage, 2, then=lambda: stage.queue.done)

        assert put_once(stage, 200) and phases(stage) == {"generator-0": "at work"}
        assert stage.cluster.reserved == [], "its room is given back"
        assert stage.supervisor.restarts["generator-1"] == 2 and stage.incidents[-1]["event"] == "gave_up"

    run(story())


def test_without_room_for_all_of_them_nobody_joins_and_nothing_stays_reserved():
    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=9)).begin()
        stage.cluster.free = 2

        with pytest.raises(NoRoomError, match="generator-3 found no room"):
            await scaled(stage, 4)

        assert stage.cluster.free == 2 and stage.cluster.reserved == [] and phases(stage) == {"generator-0": "at work"}

    run(story())


def test_a_join_waits_for_the_room_of_those_that_still_leave_and_otherwise_only_a_moment():
    """generator-1 is stuck over its last completions; the run changes its mind, and later wants one more."""

    async def story() -> None:
        make: Make = lambda name: FakeGenerator(name, stuck=name == B)  # noqa: E731
        stage = await Stage(FakeQueue(num_tickets=50), make, (), "timeouts.leave_s=100", num_generators=2).begin()
        limits: list[float] = []
        reserve_more = stage.cluster.reserve_more

        async def reserve(spec: ActorSpec, timeout_s: float) -> None:
            limits.append(timeout_s)
            await reserve_more(spec, timeout_s)

        stage.cluster.reserve_more = reserve  # type: ignore[method-assign]

        async def change_of_mind() -> None:
            while not any(holder == B and tickets for (holder, _), tickets in stage.queue.requests.items()):
                await asyncio.sleep(0.002)
            leaving = asyncio.create_task(stage.pool.scale(1, lambda line: None))
            await asyncio.sleep(0.05)
            leaving.cancel()
            assert phases(stage)["generator-1"] == Phase.LEAVING
            await stage.pool.scale(2, lambda line: None)
            stage.cluster.handles[B].die()
            while "generator-1" in phases(stage):
                await asyncio.sleep(0.002)
            await stage.pool.scale(3, lambda line: None)

        changing = asyncio.create_task(change_of_mind())
        await stage.until(changing.done)

        changing.result()
        assert limits == [100 + ROOM_S, ROOM_S]

    run(story())


# Leaving.


def test_one_that_leaves_finishes_what_it_has_and_takes_no_more():
    """It holds four slow groups when it is asked; all of them are put, none goes out again, and only then it is gone."""

    class Slow(FakeGenerator):
        async def collect(self, gather_s: float, wait_s: float) -> tuple[Collected, Any]:
            await asyncio.sleep(0.03)
            return await super().collect(gather_s, wait_s)

    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=60), Slow, num_generators=2).begin()

        lines = await scaled(stage, 1, when=lambda: inflight(stage, "generator-1") == 4, then=lambda: stage.queue.done)

        (leaver,) = stage.played("generator-1")
        assert put_once(stage, 60) and stage.queue.lost == [] and leaver.inflight == []
        assert len(leaver.sampled_by) >= 4 and all(ticket.attempt == 0 for of in stage.queue.requests.values() for ticket in of)
        gone = stage.queue.facts.index(HolderGone(holder=B))
        late = [fact for fact in stage.queue.facts[gone:] if isinstance(fact, WithScorer)]
        assert all(ticket.ticket_id not in leaver.sampled_by for fact in late for ticket in fact.tickets)
        assert not stage.cluster.handles[B].alive and stage.cluster.handles[A].alive and B not in stage.crew.installs
        assert lines[-1].startswith("generator-1 left after ") and phases(stage) == {"generator-0": "at work"}

    run(story())


def test_what_is_left_after_leave_s_goes_out_again():
    async def story() -> None:
        make: Make = lambda name: FakeGenerator(name, stuck=name == B)  # noqa: E731
        stage = await Stage(FakeQueue(num_tickets=30), make, (), "timeouts.leave_s=0.1", num_generators=2).begin()

        await scaled(stage, 1, when=lambda: inflight(stage, "generator-1") > 0, then=lambda: stage.queue.done)

        assert put_once(stage, 30)
        held = set(stage.played("generator-1")[0].sampled_by)
        assert held and held <= set(stage.played("generator-0")[0].sampled_by)

    run(story())


def test_one_that_dies_while_it_leaves_is_not_started_again():
    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=40), lambda name: FakeGenerator(name, stuck=name == B), num_generators=2).begin()

        def die_when_leaving(handle: LocalHandle, method: str, args: tuple[Any, ...], through: bool) -> None:
            if handle.name == B and method == "collect" and phases(stage)["generator-1"] == Phase.LEAVING:
                handle.die()

        stage.fate = die_when_leaving
        await scaled(stage, 1, when=lambda: inflight(stage, "generator-1") > 0, then=lambda: stage.queue.done)

        assert put_once(stage, 40) and len(stage.played("generator-1")) == 1
        assert [entry["event"] for entry in stage.incidents] == ["left"] and stage.supervisor.restarts == {}

    run(story())


def test_one_that_is_still_starting_leaves_at_once():
    """A wish for one overtakes a wish for three whose generators never come up."""

    class NeverUp(FakeGenerator):
        async def install(self, weights: Snapshot) -> InstallReport:
            if self.name != A:
                await asyncio.sleep(20)
            return await super().install(weights)

    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=20), NeverUp).begin()

        async def change_of_mind() -> None:
            first = asyncio.create_task(stage.pool.scale(3, lambda line: None))
            while len(stage.crew.roster.health({})) < 3:
                await asyncio.sleep(0.002)
            await asyncio.sleep(0.05)
            first.cancel()
            await stage.pool.scale(1, lambda line: None)

        changing = asyncio.create_task(change_of_mind())
        await stage.until(lambda: changing.done() and stage.queue.done)

        changing.result()
        assert put_once(stage, 20) and phases(stage) == {"generator-0": "at work"} and stage.cluster.reserved == []
        assert not stage.cluster.handles[B].alive and not stage.cluster.handles[C].alive

    run(story())


def test_one_that_joins_again_is_named_like_nobody_before_it():
    """The queue has revoked whatever the first one of that name held."""

    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=300)).begin()

        await scaled(stage, 2, 1, 2, then=lambda: stage.queue.done)

        assert put_once(stage, 300)
        assert [name for name in stage.cluster.started if part_of(name) == "generator-1"] == [B, "generator-1.0.1"]

    run(story())


def test_those_without_work_leave_first_and_then_the_youngest():
    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=400), num_generators=4).begin()
        stage.cluster.homeless = {"generator-1"}
        stage.fate = lambda handle, method, args, through: handle.die() if handle.name == "generator-1.0.0" else None

        def others_at_work() -> bool:
            return list(phases(stage).values()).count(Phase.AT_WORK) == 3

        await scaled(stage, 2, when=others_at_work, then=lambda: len(stage.queue.put_ids) > 100)

        assert set(phases(stage)) == {"generator-0", "generator-2"}

    run(story())


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_joins_leaves_and_deaths_puts_every_ticket_exactly_once(seed: int):
    rng = random.Random(seed)

    def die_at_times(handle: LocalHandle, method: str, args: tuple[Any, ...], through: bool) -> None:
        if part_of(handle.name).startswith("generator") and rng.random() < 0.02:
            handle.die()

    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=400), num_generators=2).begin()
        stage.fate = die_at_times

        await scaled(stage, *(rng.randint(1, 4) for _ in range(5)), then=lambda: stage.queue.done)

        assert put_once(stage, 400)
        assert len(stage.cluster.reserved) <= len(phases(stage)), "no room is kept for those that left"

    run(story())


# Lost without room, and failing for ever.


def test_one_that_lost_its_node_is_missed_while_the_others_go_on_and_comes_back_when_there_is_room():
    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=250), FakeGenerator, (), "supervision.max_restarts=1", num_generators=2).begin()
        stage.fate = lambda handle, method, args, through: handle.die() if handle.name == B else None
        stage.cluster.homeless = {"generator-1"}

        await stage.until(lambda: len(stage.queue.put_ids) > 100)
        assert phases(stage)["generator-1"] == "lost: the cluster has no room for it"
        assert [member.name for member in stage.crew.generators] == ["generator-0"]
        assert [entry["event"] for entry in stage.incidents] == ["lost", "no_room"], "waiting counts as no failure"

    run(story())

    async def until_it_is_back() -> None:
        stage = await Stage(FakeQueue(num_tickets=250), FakeGenerator, (), "supervision.max_restarts=1", num_generators=2).begin()
        stage.fate = lambda handle, method, args, through: handle.die() if handle.name == B else None
        stage.cluster.homeless = {"generator-1"}

        async def bring_a_node() -> None:
            while not any(entry["event"] == "no_room" for entry in stage.incidents):
                await asyncio.sleep(0.002)
            stage.cluster.homeless = set()

        bringing = asyncio.create_task(bring_a_node())
        await stage.until(lambda: bringing.done() and stage.queue.done)
        bringing.result()
        assert put_once(stage, 250) and stage.crew.roster.health({})["generator-1"] == "at work"
        assert len(stage.played("generator-1")[-1].sampled_by) > 0
        assert [entry["event"] for entry in stage.incidents] == ["lost", "no_room", "back"]

    run(until_it_is_back())


def test_without_any_generator_and_without_room_the_run_ends_by_name_after_batch_s():
    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=50), FakeGenerator, (), "timeouts.batch_s=0.2", num_generators=2).begin()
        stage.fate = lambda handle, method, args, through: handle.die() if handle.name in (A, B) else None
        stage.cluster.homeless = {"generator-0", "generator-1"}

        with pytest.raises(
            NoRoomError, match=r"no generator is left, and for 0\.2 s \(timeouts\.batch_s\) the cluster had no room for one"
        ):
            await stage.until(lambda: False)

    run(story())


def test_a_second_loss_of_the_only_generator_has_batch_s_of_its_own(monkeypatch: pytest.MonkeyPatch):
    """Its node goes, and comes back; an hour later it goes again."""

    class Clock:
        now, looks = 0.0, 0

        def monotonic(self) -> float:
            self.looks += 1
            return self.now

    async def story() -> None:
        clock = Clock()
        monkeypatch.setattr(actors.generator_pool, "time", SimpleNamespace(monotonic=clock.monotonic, time=time.time))
        stage = await Stage(FakeQueue(num_tickets=10**6)).begin()

        async def lose_it_twice() -> None:
            for number in range(2):
                while phases(stage)["generator-0"] != Phase.AT_WORK:
                    await asyncio.sleep(0.002)
                looks, played = clock.looks, len(stage.played("generator-0"))
                stage.cluster.homeless = {"generator-0"}
                stage.cluster.handles[f"generator-0.0.{number}"].die()
                while clock.looks < looks + 2:  # it waits for room, and counts
                    await asyncio.sleep(0.002)
                stage.cluster.homeless = set()
                while len(stage.played("generator-0")) == played:
                    await asyncio.sleep(0.002)
                clock.now += 3600.0

        losing = asyncio.create_task(lose_it_twice())
        await stage.until(losing.done)

        losing.result()
        assert [entry["event"] for entry in stage.incidents][:5] == ["lost", "no_room", "back", "lost", "no_room"]

    run(story())


def test_without_any_generator_the_learners_wait_for_a_batch_does_not_end_the_run_first():
    async def story() -> None:
        stage = await Stage(FakeQueue(num_batches=0), FakeGenerator, (), "timeouts.batch_s=0.5").begin()
        stage.fate = lambda handle, method, args, through: handle.die() if handle.name == A else None
        stage.cluster.homeless = {"generator-0"}

        with pytest.raises(NoRoomError, match="no generator is left"):
            await stage.train()

    run(story())


def test_one_that_fails_too_often_rests_and_the_others_go_on():
    class Failing(FakeGenerator):
        async def collect(self, gather_s: float, wait_s: float) -> tuple[Collected, Any]:
            if part_of(self.name) == "generator-1":
                raise EngineError("out of memory")
            return await super().collect(gather_s, wait_s)

    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=300), Failing, (), "supervision.max_restarts=2", num_generators=2).begin()

        await stage.until(lambda: stage.queue.done)

        assert put_once(stage, 300) and phases(stage)["generator-1"] == "lost: it failed too often"
        assert [entry["event"] for entry in stage.incidents].count("rests") == 1 and stage.supervisor.restarts["generator-1"] == 2

    run(story())


def test_generators_that_all_fail_by_their_own_fault_end_the_run():
    class Failing(FakeGenerator):
        async def collect(self, gather_s: float, wait_s: float) -> tuple[Collected, Any]:
            raise EngineError("out of memory")

    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=30), Failing, (), "supervision.max_restarts=2", num_generators=3).begin()

        with pytest.raises(RestartLimitError, match=r"generator-\d failed 3 times .* out of memory"):
            await stage.until(lambda: False)

    run(story())


def test_all_are_started_again_when_their_history_was_undone():
    async def story() -> None:
        stage = await Stage(FakeQueue(num_tickets=200), num_generators=2).begin()

        async def undo() -> None:
            while len(stage.crew.installs) < 2:
                await asyncio.sleep(0.002)
            stage.pool.recast(RunError("undone"))

        undoing = asyncio.create_task(undo())
        await stage.until(lambda: undoing.done() and stage.queue.done)

        undoing.result()
        assert put_once(stage, 200) and {"generator-0.0.1", "generator-1.0.1"} <= set(stage.cluster.started)
        assert [entry["cause"] for entry in stage.incidents if entry["event"] == "lost"] == ["undone"] * 2

    run(story())


# The roster's clock.


def test_generator_seconds_count_those_that_take_part_by_hand():
    """Two for 10 s, three for 5 s, one of them lost without room for 20 s, then two: 20 + 15 + 40 = 75."""

    async def story() -> None:
        now = 0.0
        stage = Stage(num_generators=2)
        roster = Roster([stage.generator(0), stage.generator(1)], now=lambda: now)
        first, second = roster
        roster.turn(first, Phase.AT_WORK)
        now += 4.0
        third = roster.add(stage.generator(2))
        now += 6.0
        roster.turn(third, Phase.AT_WORK)
        now += 5.0
        roster.turn(second, Phase.NO_ROOM)
        now += 20.0

        assert roster.generator_s == 75.0 and [member.name for member in roster.members] == ["generator-0", "generator-2"]
        roster.turn(first, Phase.LEAVING)
        roster.turn(first, Phase.AT_WORK)
        assert first.phase is Phase.LEAVING, "who leaves does nothing else any more"
        now += 1.0
        roster.remove(first)
        assert roster.generator_s == 76.0

    run(story())
