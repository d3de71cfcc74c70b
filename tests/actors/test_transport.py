"""The order in which a version goes straight from the learner to a generator, and who is let go of when one of the two fails."""

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import pytest

from actors.remote import RemoteActor
from actors.transport import ByGroup
from actors.weight_broadcaster import Offer
from async_rlhf.errors import ActorLostError, DeadlineError, TransferError, WeightsError
from async_rlhf.types import InstallReport
from tests.support.cluster import small_config
from tests.support.local_actors import LocalHandle

pytestmark = pytest.mark.timeout(60)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 30))


class FakeSender:
    """Rank 0: holds one version; blocks or fails where it is told to."""

    def __init__(self, name: str, stage: "Stage") -> None:
        self.name, self.stage, self.version = name, stage, 0
        self.error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def pin(self, generator: str, version: int) -> bool:
        self.stage.note(f"pin {version}")
        return version == self.version

    async def open(self, generator: str, world_size: int) -> str:
        self.stage.note(f"open for {world_size}")
        return f"meeting of {self.name} and {generator}"

    async def meet(self, generator: str, meeting: str) -> None:
        self.stage.note("sender meets")

    async def send(self, generator: str, num_rounds: int) -> None:
        self.stage.note(f"send {num_rounds}")
        await self.gate.wait()
        if self.error is not None:
            raise self.error

    async def give_up(self, generator: str) -> None:
        self.stage.note(f"give up {generator}")
        self.gate.set()


class FakeGenerator:
    def __init__(self, name: str, stage: "Stage") -> None:
        self.name, self.stage, self.proven, self.announced = name, stage, False, -1
        self.error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def meet(self, meeting: str) -> None:
        self.stage.note("generator meets")

    async def prepare(self, announced: int) -> int:
        self.stage.note(f"prepare {announced}")
        self.announced = announced
        return 1 if self.proven else 3

    async def receive(self) -> InstallReport:
        self.stage.note("receive")
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.proven = True
        return InstallReport(version=self.announced, install_s=0.1, pause_s=0.1, canary_error=0.0)


class Stage:
    def __init__(self, **timeouts: float) -> None:
        self.events: list[str] = []
        config = small_config("generator.tensor_parallel_size=2")
        self.transport = ByGroup(replace(config, timeouts=replace(config.timeouts, **timeouts)))
        self.sender, self.rank = self.rank_of("learner-0.0.0")
        self.generator, self.actor = self.generator_of("generator-0.0.0")

    def note(self, event: str) -> None:
        self.events.append(event)

    def rank_of(self, name: str) -> tuple[FakeSender, RemoteActor]:
        sender = FakeSender(name, self)
        return sender, RemoteActor(LocalHandle(name, lambda: sender), name)

    def generator_of(self, name: str) -> tuple[FakeGenerator, RemoteActor]:
        generator = FakeGenerator(name, self)
        return generator, RemoteActor(LocalHandle(name, lambda: generator), name)

    async def deliver(self, version: int, actor: RemoteActor | None = None, rank: RemoteActor | None = None) -> InstallReport | None:
        announced: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        announced.set_result(version)
        return await self.transport.deliver(actor or self.actor, Offer(version=version, buckets=[announced]), [rank or self.rank])

    async def until(self, event: str) -> None:
        while event not in self.events:
            await asyncio.sleep(0.001)

    async def settle(self) -> None:
        for _ in range(50):
            await asyncio.sleep(0)


def test_the_first_version_is_pinned_met_for_announced_and_sent_three_times_the_next_ones_once():
    async def story() -> None:
        stage = Stage()

        first = await stage.deliver(0)
        of_first, stage.events = stage.events, []
        stage.sender.version = 1
        second = await stage.deliver(1)

        assert first is not None and second is not None and (first.version, second.version) == (0, 1)
        assert of_first[:2] == ["pin 0", "open for 3"] and set(of_first[2:4]) == {"sender meets", "generator meets"}
        assert of_first[4] == "prepare 0" and set(of_first[5:]) == {"send 3", "receive"}
        assert stage.events[:2] == ["pin 1", "prepare 1"] and set(stage.events[2:]) == {"send 1", "receive"}

    run(story())


@pytest.mark.parametrize("held", [3, 5], ids=["not-yet-there-again", "overtaken"])
def test_a_version_that_the_learner_does_not_hold_is_asked_for_anew_and_nothing_has_begun(held: int):
    async def story() -> None:
        stage = Stage()
        stage.sender.version = held

        assert await stage.deliver(4) is None

        assert stage.events == ["pin 4"]

    run(story())


def test_a_learner_that_is_dead_before_anything_began_costs_no_generator():
    async def story() -> None:
        stage = Stage()
        stage.rank.handle.die()

        assert await stage.deliver(0) is None

        assert stage.events == []

    run(story())


def test_a_generator_that_dies_in_the_middle_is_given_up_and_the_next_delivery_is_not_kept_waiting():
    async def story() -> None:
        stage = Stage()
        stage.sender.gate.clear()
        stage.generator.gate.clear()
        dying = asyncio.create_task(stage.deliver(0))
        await stage.until("receive")
        other, other_actor = stage.generator_of("generator-1.0.0")
        waiting = asyncio.create_task(stage.deliver(0, other_actor))

        stage.actor.handle.die()

        with pytest.raises(ActorLostError):
            await dying
        report = await waiting
        assert "give up generator-0.0.0" in stage.events and report is not None and other.proven

    run(story())


def test_a_learner_that_dies_in_the_middle_takes_the_generator_with_it():
    """It has half a version."""

    async def story() -> None:
        stage = Stage()
        stage.sender.gate.clear()
        stage.generator.gate.clear()
        delivering = asyncio.create_task(stage.deliver(0))
        await stage.until("receive")

        stage.rank.handle.die()

        with pytest.raises(TransferError, match=r"generator-0\.0\.0 lost the learner that was sending to it"):
            await delivering

    run(story())


@pytest.mark.parametrize("error", [TransferError("the transfer of w failed"), WeightsError("the canary does not sing")])
def test_a_generator_with_an_error_of_its_own_is_given_up(error: Exception):
    async def story() -> None:
        stage = Stage()
        stage.generator.error = error

        with pytest.raises(type(error), match=str(error)):
            await stage.deliver(0)

        await stage.settle()
        assert stage.events[-1] == "give up generator-0.0.0"

    run(story())


def test_a_transfer_that_takes_too_long_is_given_up():
    async def story() -> None:
        stage = Stage(weights_s=0.05, call_s=0.05)
        stage.generator.gate.clear()

        with pytest.raises(DeadlineError, match=r"generator-0\.0\.0\.receive"):
            await stage.deliver(0)

        await stage.settle()
        assert stage.events[-1] == "give up generator-0.0.0"

    run(story())


def test_a_delivery_that_is_cancelled_is_given_up():
    """Its generator was found dead by whoever watches it."""

    async def story() -> None:
        stage = Stage()
        stage.sender.gate.clear()
        delivering = asyncio.create_task(stage.deliver(0))
        await stage.until("send 3")

        delivering.cancel()

        await asyncio.gather(delivering, return_exceptions=True)
        await stage.settle()
        assert stage.events[-1] == "give up generator-0.0.0"

    run(story())


def test_a_new_incarnation_and_a_new_learner_meet_anew():
    async def story() -> None:
        stage = Stage()
        await stage.deliver(0)
        stage.events.clear()

        _, successor = stage.generator_of("generator-0.0.1")
        await stage.deliver(0, successor)
        _, rank = stage.rank_of("learner-0.0.1")
        await stage.deliver(0, rank=rank)
        await stage.deliver(0, rank=rank)

        assert [event for event in stage.events if event.startswith("open")] == ["open for 3"] * 2

    run(story())


def test_a_generator_that_is_gone_between_two_deliveries_leaves_no_group_behind():
    async def story() -> None:
        stage = Stage()
        _, leaver = stage.generator_of("generator-1.0.0")
        await stage.deliver(0)
        await stage.deliver(0, leaver)
        stage.events.clear()

        stage.transport.forget(leaver, [stage.rank])
        stage.transport.forget(leaver, [stage.rank])
        await stage.settle()
        of_forgotten, stage.events = stage.events, []
        await stage.deliver(0)
        await stage.deliver(0, leaver)

        assert of_forgotten == ["give up generator-1.0.0"], "once: it has no other"
        assert [event for event in stage.events if event.startswith("open")] == ["open for 3"], "the other one has met"

    run(story())


def test_a_generator_that_met_nobody_is_forgotten_without_a_word():
    async def story() -> None:
        stage = Stage()

        stage.transport.forget(stage.actor, [stage.rank])
        await stage.settle()

        assert stage.events == []

    run(story())
