"""The weight broadcaster: which version is offered to whom and when, what it keeps, and what becomes of a learner that is lost."""

import asyncio
import gc
import time
import weakref
from collections.abc import Coroutine
from typing import Any

import pytest

from actors.remote import RemoteActor
from actors.weight_broadcaster import Offer, WeightBroadcaster
from async_rlhf.errors import EngineError, LearnerLostError, ObjectLostError
from async_rlhf.types import WeightsManifest
from tests.support.local_actors import LocalHandle

pytestmark = pytest.mark.timeout(60)
LONG_S = 20.0


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 30))


class Snapshot:
    """Stands for a WeightsVersion; can be watched until nobody holds it."""

    def __init__(self, version: int) -> None:
        self.version, self.gather_s = version, 0.0
        self.manifest = WeightsManifest(version=version, tensors=(), canary_ids=(1, 2), canary_logprobs=(-0.5 * version,))


class Rank:
    def __init__(self, rank: int, stage: "Stage") -> None:
        self.rank, self.stage = rank, stage
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None

    async def snapshot(self, version: int) -> list[Snapshot]:
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.stage.events.append(f"snapshot {version} rank {self.rank}")
        if self.rank:
            return []
        made = Snapshot(version)
        self.stage.alive[version] = weakref.ref(made)
        return [made]


class Stage:
    """Two ranks and a broadcaster."""

    def __init__(self, *, timeout_s: float = LONG_S) -> None:
        self.events: list[str] = []
        self.alive: dict[int, weakref.ref[Snapshot]] = {}
        self.ranks = [Rank(rank, self) for rank in range(2)]
        self.handles = [LocalHandle(f"learner-{rank.rank}", lambda rank=rank: rank) for rank in self.ranks]
        self.actors = [RemoteActor(handle, handle.name) for handle in self.handles]
        self.broadcaster = WeightBroadcaster(timeout_s)

    async def publish(self, *versions: int) -> None:
        for version in versions:
            await self.broadcaster.publish(version, self.actors)

    async def offered(self, than: int, wait_s: float = 0.0) -> int | None:
        return await version_of(await self.broadcaster.newer_than(than, wait_s))


async def version_of(offer: Offer | None) -> int | None:
    """The version of an offer, having looked into its weights."""
    if offer is None:
        return None
    (reference,) = offer.buckets
    assert (await reference).version == offer.version
    return offer.version


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


def test_a_version_is_offered_only_after_every_rank_took_part_in_its_snapshot():
    async def story() -> None:
        stage = Stage()
        stage.ranks[1].gate.clear()
        publishing = asyncio.create_task(stage.publish(0))
        await settle()
        assert not publishing.done() and await stage.offered(-1) is None

        stage.ranks[1].gate.set()

        await publishing
        assert await stage.offered(-1) == 0
        assert sorted(stage.events) == ["snapshot 0 rank 0", "snapshot 0 rank 1"]

    run(story())


def test_publish_says_what_the_weights_are():
    async def story() -> None:
        stage = Stage()

        published = await stage.broadcaster.publish(3, stage.actors)

        assert (published.version, published.digest) == (3, Snapshot(3).manifest.digest)
        assert published.canary_logprobs == (-1.5,) and published.export_s >= 0

    run(story())


def test_a_generator_that_asks_for_a_newer_version_is_woken_by_it_and_not_before():
    async def story() -> None:
        stage = Stage()
        await stage.publish(0)
        waiting = [asyncio.create_task(stage.offered(0, LONG_S)) for _ in range(2)]
        await settle()
        assert not any(task.done() for task in waiting)

        await stage.publish(1)

        assert await asyncio.wait_for(asyncio.gather(*waiting), 5) == [1, 1]

    run(story())


def test_waiting_for_a_newer_version_ends_with_none_after_wait_s():
    async def story() -> None:
        stage = Stage()
        await stage.publish(4)
        started = time.monotonic()

        assert await stage.offered(4, 0.2) is None

        assert 0.2 <= time.monotonic() - started < 5

    run(story())


def test_a_newer_version_overtakes_one_that_still_waits():
    async def story() -> None:
        stage = Stage()
        await stage.publish(0, 1, 2, 3)

        assert await stage.offered(0) == 3
        assert await stage.offered(3) is None

    run(story())


def test_a_new_broadcaster_has_nothing_until_it_is_given_the_learners_version():
    async def story() -> None:
        stage = Stage()
        assert await stage.offered(-1) is None

        await stage.publish(7)

        assert await stage.offered(-1) == 7

    run(story())


def test_a_learner_that_fell_back_does_not_take_the_generators_back():
    """Version 3, trained again, is the same as it was: whoever has 5 keeps it, and nobody is offered an older one."""

    async def story() -> None:
        stage = Stage()
        await stage.publish(4, 5)

        again = await stage.broadcaster.publish(3, stage.actors)

        assert again.version == 3 and again.canary_logprobs == (-1.5,)
        assert await stage.offered(2) == 5 and await stage.offered(5) is None

    run(story())


def test_a_version_that_is_published_again_is_offered_from_its_new_snapshot():
    """The first may be gone with its node."""

    async def story() -> None:
        stage = Stage()
        await stage.publish(2)
        first = stage.alive[2]()

        await stage.publish(2)

        offer = await stage.broadcaster.newer_than(1, 0.0)
        assert offer is not None and await offer.buckets[0] is stage.alive[2]() is not first

    run(story())


def test_two_versions_are_kept_and_older_ones_are_let_go():
    async def story() -> None:
        stage = Stage()
        await stage.publish(0, 1, 2, 3, 4)
        await settle()
        gc.collect()

        assert [version for version, held in stage.alive.items() if held() is not None] == [3, 4]

    run(story())


def test_a_version_that_is_being_installed_outlives_its_successors():
    async def story() -> None:
        stage = Stage()
        await stage.publish(0)
        offer = await stage.broadcaster.newer_than(-1, 0.0)
        await stage.publish(1, 2, 3)
        await settle()
        gc.collect()

        assert offer is not None and stage.alive[0]() is await offer.buckets[0]
        assert stage.alive[1]() is None

    run(story())


def test_a_snapshot_that_takes_too_long_loses_the_learner_and_names_the_rank():
    async def story() -> None:
        stage = Stage(timeout_s=0.1)
        stage.ranks[1].gate.clear()

        with pytest.raises(LearnerLostError, match=r"version 0 could not be pulled: waited 0\.1 s for learner-1\.snapshot"):
            await stage.publish(0)
        assert await stage.offered(-1) is None

    run(story())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_over_a_snapshot_loses_the_learner_and_the_next_learner_is_pulled_as_usual(rank: int):
    async def story() -> None:
        stage, successor = Stage(), Stage()
        stage.ranks[rank].gate.clear()
        publishing = asyncio.create_task(stage.publish(1))
        await settle()
        stage.handles[rank].die()

        with pytest.raises(LearnerLostError, match=rf"learner-{rank}\.snapshot: the actor died"):
            await publishing
        assert await stage.offered(-1) is None

        await stage.broadcaster.publish(1, successor.actors)
        assert await stage.offered(-1) == 1

    run(story())


def test_a_snapshot_that_fails_by_an_error_nobody_expected_loses_the_learner():
    async def story() -> None:
        stage = Stage()
        stage.ranks[1].error = ValueError("collective call failed")

        with pytest.raises(LearnerLostError, match="collective call failed"):
            await stage.publish(0)
        assert await stage.offered(-1) is None

    run(story())


def test_a_bucket_that_is_gone_with_the_node_that_made_it_loses_the_learner():
    async def story() -> None:
        stage = Stage()
        stage.ranks[0].error = ObjectLostError("the node of the second bucket died")

        with pytest.raises(LearnerLostError, match="version 0 could not be pulled: the node of the second bucket died"):
            await stage.publish(0)
        assert await stage.offered(-1) is None

    run(story())


def test_an_error_of_ours_in_a_snapshot_is_raised_as_it_is():
    async def story() -> None:
        stage = Stage()
        stage.ranks[0].error = EngineError("the parameters are not whole")

        with pytest.raises(EngineError, match="the parameters are not whole"):
            await stage.publish(0)
        assert await stage.offered(-1) is None

    run(story())


def test_a_failed_publish_leaves_the_version_before_on_offer():
    async def story() -> None:
        stage = Stage()
        await stage.publish(0)
        stage.ranks[1].error = ValueError("boom")

        with pytest.raises(LearnerLostError):
            await stage.publish(1)

        assert await stage.offered(-1) == 0

    run(story())
