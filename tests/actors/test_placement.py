"""Places in a real Ray, whose nodes have as many CPUs and GPUs as they are told to have: shared, given back, waited for."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import ray

import actors.placement
from actors.launch import SHRINK, ActorSpec, Cluster, connect, ready
from actors.placement import Placement
from actors.remote import RemoteActor
from async_rlhf.demand import demands_of
from async_rlhf.errors import ActorLostError, ConfigError, NoRoomError
from tests.support.cluster import Nodes, several_nodes, small_config
from tests.support.guest import Guest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

HEAD = {"CPU": 3.0, "GPU": 1.0}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with several_nodes({"num_cpus": HEAD["CPU"], "num_gpus": HEAD["GPU"]}) as started:
        yield started


@pytest.fixture(scope="module")
def cluster(nodes: Nodes) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", nodes.address)
        joined = connect(small_config("timeouts.place_s=30"), "tests", None)
    yield joined
    joined.close()


@pytest.fixture(autouse=True)
def all_is_given_back(cluster: Cluster) -> Iterator[None]:
    """Each test begins with an empty cluster, and leaves none of it reserved."""
    yield
    cluster.placement.close()
    wait_for(lambda: all(ray.available_resources().get(kind) == ray.cluster_resources()[kind] for kind in HEAD))


def wait_for(what: Callable[[], bool]) -> None:
    ends = time.monotonic() + 30
    while not what():
        assert time.monotonic() < ends, ray.available_resources()
        time.sleep(0.05)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 90))


def guest(name: str, num_cpus: float = 0.0, num_gpus: float = 0.0, group: str = "") -> ActorSpec:
    return ActorSpec(name=name, cls=Guest, args=(), num_cpus=num_cpus, num_gpus=num_gpus, group=group)


async def moved_in(cluster: Cluster, *specs: ActorSpec) -> list[RemoteActor]:
    guests = [cluster.start(spec) for spec in specs]
    await asyncio.gather(*(ready(one, 60, lambda name: None) for one in guests))
    return guests


def test_shares_of_one_gpu_are_reserved_one_by_one_and_who_leaves_gives_room_to_the_next(cluster: Cluster) -> None:
    """The parts of cluster=one_gpu, the scorer as one that joins: together they are the whole GPU."""

    async def story() -> None:
        config = small_config("cluster=one_gpu")
        assert sum(demand.num_gpus for demand in demands_of(config)) == HEAD["GPU"]
        parts = {"generator": config.generator, "learner": config.learner, "scorer": config.scorer}
        *first, scorer = (guest(name, part.num_cpus, part.num_gpus) for name, part in parts.items())
        another = guest("another", 1.0, 0.25)

        await cluster.reserve(first)
        await cluster.reserve_more(scorer, 30)
        actors = await moved_in(cluster, *first, scorer)
        for actor in actors:
            assert await actor.call("gpus", timeout_s=30) == ([0], "0")
        with pytest.raises(NoRoomError, match=r"another within 0\.2 s: it takes 1 another x 1 CPU and 0\.25 GPU, free are 0 CPU and 0 GPU"):
            await cluster.reserve_more(another, 0.2)

        cluster.release("scorer")
        cluster.release("nobody")
        await cluster.reserve_more(another, 30)
        with pytest.raises(ActorLostError):
            await actors[2].call("gpus", timeout_s=30)
        assert await actors[0].call("gpus", timeout_s=30) == ([0], "0")
        with pytest.raises(ConfigError, match=r"3 halfs x 0\.5 GPU.*: its nodes have room for 2 of the 3 halfs"):
            await cluster.reserve([guest(f"half-{number}", 0.0, 0.5) for number in range(3)])

    run(story())


@pytest.mark.long
def test_what_is_too_large_today_is_refused_unless_nodes_come_on_demand(
    cluster: Cluster, nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actors.placement, "SAY_S", 0.1)
    said: list[str] = []
    wanted = [guest(f"learner-{rank}", 2.0, group="learner") for rank in range(2)]

    def placement(place_s: float, *, autoscales: bool, own: bool = False) -> Placement:
        return Placement(place_s, autoscales=autoscales, own=own, say=said.append)

    async def story() -> None:
        with pytest.raises(ConfigError, match=r"room for 1 of the 2 learner ranks; .*, add nodes, or, .* set run\.autoscale=true"):
            await placement(30, autoscales=False).reserve(wanted, SHRINK)
        with pytest.raises(ConfigError, match=r"room for 1 of the 2 learner ranks; .* or run on a cluster that has more"):
            await placement(30, autoscales=True, own=True).reserve(wanted, SHRINK)
        with pytest.raises(ConfigError, match=r"for 0\.2 s \(timeouts\.place_s\) the Ray cluster had no room for learner-0, learner-1; "):
            await placement(0.2, autoscales=True).reserve(wanted, SHRINK)

        patient = placement(60, autoscales=True)
        reserving = asyncio.create_task(patient.reserve(wanted, SHRINK))
        await asyncio.sleep(1.5)
        assert not reserving.done() and said[-1].startswith("waiting for room for learner-0, learner-1, ")
        there = {node["NodeID"] for node in ray.nodes()}
        await asyncio.to_thread(nodes.add, num_cpus=2)
        await reserving
        assert len({*patient.nodes().values()}) == 2 and len(there & {*patient.nodes().values()}) == 1
        patient.close()

    run(story())
