"""A policy, the broadcaster and up to two generators, between which versions are delivered in their benchmark; see weights.py."""

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from weight_stand_ins import Copier, Policy

from actors.launch import ActorSpec, Cluster, ready
from actors.remote import RemoteActor
from actors.weight_broadcaster import Offer, WeightBroadcaster
from async_rlhf.config import Config
from async_rlhf.types import InstallReport

NUM_GENERATORS = 2
WARM_VERSIONS = 4
LIMIT_S = 180.0

SETTLED_S = 0.02
"""Until a generator's request waits at the broadcaster."""


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """One version, from its publication until the last generator had it. Seconds."""

    publish_s: float
    transfer_s: float
    """Of the slowest generator."""
    moved_s: float
    """Both, and nothing of the engine's own."""
    pause_s: float
    """Of the slowest generator."""
    total_s: float


class Stage:
    """The parts for one size."""

    def __init__(self, cluster: Cluster, config: Config, folder: str, cls: type) -> None:
        """Until all are there, and the store's memory has been used.

        Args:
            folder: of the model. cls: what stands for a generator.
        """
        self._cluster = cluster
        self._name = f"{Path(folder).name}-{cls.__name__}"
        self._version = 0
        self._runner = asyncio.Runner()
        self._policy = self._start("policy", Policy, config, folder)
        self._broadcaster = self._start("broadcaster", WeightBroadcaster, LIMIT_S)
        self._copier = self._start("copier", Copier)
        self._generators = [
            self._start(f"generator-{index}", cls, config, folder, f"g{index}", max_concurrency=8) for index in range(NUM_GENERATORS)
        ]
        self._actors = [self._policy, self._broadcaster, self._copier, *self._generators]
        self._runner.run(self._ready())
        for _ in range(WARM_VERSIONS):
            self.deliver(NUM_GENERATORS)
            self.put()

    def deliver(self, count: int) -> Delivery:
        """Publish the next version, and install it in `count` generators at once."""
        return self._runner.run(self._deliver(count))

    def copy(self) -> float:
        """Seconds of a memcpy of the newest version."""
        return max(self._runner.run(self._of_newest("copy", [self._copier])))

    def put(self) -> float:
        """Seconds of Ray's own copy of the policy into its store."""
        return float(self._runner.run(self._policy.call("put", timeout_s=LIMIT_S)))

    def reload(self, count: int) -> float:
        """Seconds of the engine's own load of the newest version, in the slowest of `count` generators at once."""
        return max(self._runner.run(self._of_newest("reload_alone", self._generators[:count])))

    def close(self) -> None:
        """End all actors."""
        for actor in self._actors:
            ray.kill(actor.handle)
        self._runner.close()

    async def _ready(self) -> None:
        await asyncio.gather(*(ready(actor, LIMIT_S, lambda name: None) for actor in self._actors))

    async def _deliver(self, count: int) -> Delivery:
        self._version += 1
        taking = [asyncio.create_task(self._take(generator)) for generator in self._generators[:count]]
        await asyncio.sleep(SETTLED_S)
        started = time.perf_counter()
        await self._broadcaster.call("publish", self._version, [self._policy], timeout_s=LIMIT_S)
        taken = await asyncio.gather(*taking)
        assert all(report.version == self._version for *_, report in taken)
        return Delivery(
            publish_s=max(offered - started for offered, *_ in taken),
            transfer_s=max(ended - offered - _of_engine(report) for offered, ended, report in taken),
            moved_s=max(ended - started - _of_engine(report) for _, ended, report in taken),
            pause_s=max(report.pause_s for *_, report in taken),
            total_s=max(ended - started for _, ended, _ in taken),
        )

    async def _take(self, generator: RemoteActor) -> tuple[float, float, InstallReport]:
        """As the produce loop: when the next version was offered, when it was installed, and what the generator says of it."""
        offer: Offer | None = await self._broadcaster.call("newer_than", self._version - 1, LIMIT_S, timeout_s=LIMIT_S)
        offered = time.perf_counter()
        assert offer is not None
        report: InstallReport = await generator.call("install", *offer.buckets, timeout_s=LIMIT_S)
        return offered, time.perf_counter(), report

    async def _of_newest(self, method: str, actors: list[RemoteActor]) -> list[float]:
        offer: Offer | None = await self._broadcaster.call("newer_than", self._version - 1, LIMIT_S, timeout_s=LIMIT_S)
        assert offer is not None
        return await asyncio.gather(*(actor.call(method, *offer.buckets, timeout_s=LIMIT_S) for actor in actors))

    def _start(self, name: str, cls: type, *args: Any, max_concurrency: int | None = None) -> RemoteActor:
        return self._cluster.start(ActorSpec(name=f"{name}-{self._name}", cls=cls, args=args, max_concurrency=max_concurrency))


def _of_engine(report: InstallReport) -> float:
    return report.pause_s + report.canary_s
