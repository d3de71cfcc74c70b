"""The weight broadcaster: the order of snapshot, install and report; overtaking; failures; slow generators."""

import asyncio
import gc
import weakref
from collections.abc import Coroutine
from typing import Any

import pytest

from actors.weight_broadcaster import WeightBroadcaster
from async_rlhf.errors import DeadlineError, EngineError, WeightsError
from async_rlhf.types import InstallReport
from tests.support.local_actors import LocalActor

pytestmark = pytest.mark.timeout(60)
A, B = "generator-0.0", "generator-1.0"


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 30))


class Snapshot:
    """Stands for a WeightsVersion; can be watched until nobody holds it."""

    def __init__(self, version: int) -> None:
        self.version = version


class Rank:
    def __init__(self, rank: int, stage: "Stage") -> None:
        self.rank, self.stage = rank, stage
        self.gate = asyncio.Event()
        self.gate.set()

    async def snapshot(self, version: int) -> Snapshot | None:
        await self.gate.wait()
        if self.stage.snapshot_error is not None:
            raise self.stage.snapshot_error
        self.stage.events.append(f"snapshot {version} rank {self.rank}")
        if self.rank:
            return None
        made = Snapshot(version)
        self.stage.alive[version] = weakref.ref(made)
        return made


class Installer:
    """A generator that installs when its gate is open."""

    def __init__(self, name: str, stage: "Stage") -> None:
        self.name, self.stage = name, stage
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None

    async def install(self, weights: Snapshot) -> InstallReport:
        self.stage.events.append(f"{self.name} starts {weights.version}")
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.stage.events.append(f"{self.name} has {weights.version}")
        return InstallReport(version=weights.version, install_s=0.1, pause_s=0.05, canary_error=1e-5)


class Queue:
    def __init__(self, stage: "Stage") -> None:
        self.stage = stage

    async def installed(self, holder: str, version: int) -> None:
        self.stage.events.append(f"queue told {holder} {version}")


class Stage:
    """Two ranks, two generators, a queue, and what happened to them in order."""

    def __init__(self, *, timeout_s: float = 20.0) -> None:
        self.events: list[str] = []
        self.alive: dict[int, weakref.ref[Snapshot]] = {}
        self.snapshot_error: Exception | None = None
        self.ranks = [Rank(rank, self) for rank in range(2)]
        self.installers = {name: Installer(name, self) for name in (A, B)}
        self.broadcaster = WeightBroadcaster(
            [LocalActor(f"learner-{rank.rank}", rank) for rank in self.ranks],  # type: ignore[misc]
            {name: LocalActor(name, installer) for name, installer in self.installers.items()},  # type: ignore[misc]
            LocalActor("queue", Queue(self)),  # type: ignore[arg-type]
            timeout_s,
        )

    def of(self, name: str) -> list[str]:
        return [event for event in self.events if name in event]

    async def settle(self) -> None:
        for _ in range(50):
            await asyncio.sleep(0)


def test_every_rank_takes_part_in_a_snapshot_before_any_generator_installs_it():
    async def story() -> None:
        stage = Stage()
        stage.ranks[1].gate.clear()
        publishing = asyncio.create_task(stage.broadcaster.publish(0))
        await stage.settle()
        assert not publishing.done() and stage.of("generator") == []

        stage.ranks[1].gate.set()

        assert await publishing >= 0
        assert await stage.broadcaster.wait_installed(0, 5.0)
        assert stage.events[:2] == ["snapshot 0 rank 0", "snapshot 0 rank 1"]

    run(story())


def test_the_queue_is_told_only_after_the_install_is_through():
    async def story() -> None:
        stage = Stage()
        await stage.broadcaster.publish(0)
        assert await stage.broadcaster.wait_installed(0, 5.0)

        for name in (A, B):
            assert stage.of(name) == [f"{name} starts 0", f"{name} has 0", f"queue told {name} 0"]

    run(story())


def test_publish_returns_when_the_snapshot_is_pulled_and_does_not_wait_for_installs():
    async def story() -> None:
        stage = Stage()
        stage.installers[A].gate.clear()
        stage.installers[B].gate.clear()

        await asyncio.wait_for(stage.broadcaster.publish(0), 5)

        assert await stage.broadcaster.wait_installed(0, 0.05) is False
        assert await stage.broadcaster.reports() == {}

    run(story())


def test_a_newer_version_overtakes_one_that_still_waits():
    async def story() -> None:
        stage = Stage()
        stage.installers[A].gate.clear()
        await stage.broadcaster.publish(0)
        await stage.settle()
        for version in (1, 2, 3):
            await stage.broadcaster.publish(version)
        stage.installers[A].gate.set()

        assert await stage.broadcaster.wait_installed(3, 5.0)

        assert [event for event in stage.of(A) if "starts" in event] == [f"{A} starts 0", f"{A} starts 3"]
        assert [event for event in stage.of("queue told") if A in event] == [f"queue told {A} 0", f"queue told {A} 3"]

    run(story())


def test_a_slow_generator_does_not_delay_the_other():
    async def story() -> None:
        stage = Stage()
        stage.installers[A].gate.clear()
        for version in range(3):
            await stage.broadcaster.publish(version)
            await stage.settle()

        assert [event for event in stage.of(B) if "has" in event] == [f"{B} has {version}" for version in range(3)]
        reports = await stage.broadcaster.reports()
        assert {name: report.version for name, report in reports.items()} == {B: 2}
        assert await stage.broadcaster.wait_installed(2, 0.05) is False

    run(story())


def test_two_versions_are_kept_and_older_ones_are_let_go():
    async def story() -> None:
        stage = Stage()
        for version in range(5):
            await stage.broadcaster.publish(version)
            assert await stage.broadcaster.wait_installed(version, 5.0)
        await stage.settle()
        gc.collect()

        assert [version for version, held in stage.alive.items() if held() is not None] == [3, 4]

    run(story())


def test_a_version_that_is_being_installed_outlives_its_successors():
    async def story() -> None:
        stage = Stage()
        stage.installers[A].gate.clear()
        for version in range(4):
            await stage.broadcaster.publish(version)
            await stage.settle()
        gc.collect()

        assert stage.alive[0]() is not None
        stage.installers[A].gate.set()
        assert await stage.broadcaster.wait_installed(3, 5.0)

    run(story())


def test_an_older_version_counts_as_installed_when_a_newer_one_is():
    async def story() -> None:
        stage = Stage()
        await stage.broadcaster.publish(4)
        assert await stage.broadcaster.wait_installed(4, 5.0)

        assert await stage.broadcaster.wait_installed(2, 0.0)
        assert not await stage.broadcaster.wait_installed(5, 0.0)

    run(story())


def test_the_failure_of_an_install_wakes_the_waiter_and_is_raised_to_everyone_who_asks():
    async def story() -> None:
        stage = Stage()
        await stage.broadcaster.publish(0)
        assert await stage.broadcaster.wait_installed(0, 5.0)
        stage.installers[B].error = WeightsError("the canary does not sing")
        waiting = asyncio.create_task(stage.broadcaster.wait_installed(1, 20.0))
        await stage.broadcaster.publish(1)

        with pytest.raises(WeightsError, match="does not sing"):
            await asyncio.wait_for(waiting, 5)
        with pytest.raises(WeightsError, match="does not sing"):
            await stage.broadcaster.reports()
        with pytest.raises(WeightsError, match="does not sing"):
            await stage.broadcaster.publish(2)
        assert stage.of("snapshot 2") == []
        assert f"queue told {B} 1" not in stage.events

    run(story())


def test_an_install_that_takes_too_long_is_named_with_its_generator():
    async def story() -> None:
        stage = Stage(timeout_s=0.1)
        stage.installers[A].gate.clear()
        await stage.broadcaster.publish(0)

        with pytest.raises(DeadlineError, match=rf"waited 0.1 s for {A}\.install"):
            await stage.broadcaster.wait_installed(0, 10.0)

    run(story())


def test_a_snapshot_that_takes_too_long_is_named_with_its_rank():
    async def story() -> None:
        stage = Stage(timeout_s=0.1)
        stage.ranks[1].gate.clear()

        with pytest.raises(DeadlineError, match=r"waited 0.1 s for learner-1\.snapshot"):
            await stage.broadcaster.publish(0)

    run(story())


def test_a_snapshot_that_fails_is_raised_and_nothing_is_installed():
    async def story() -> None:
        stage = Stage()
        stage.snapshot_error = EngineError("the learner is out of memory")

        with pytest.raises(EngineError, match="out of memory"):
            await stage.broadcaster.publish(0)
        await stage.settle()
        assert stage.events == []

    run(story())
