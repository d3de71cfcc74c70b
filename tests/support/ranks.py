"""Real learner ranks, kept over many learners: processes and their imports are what costs time."""

import asyncio
import functools
import os
import random
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from actors.launch import ActorSpec, Cluster
from actors.remote import RemoteActor, kill
from async_rlhf.config import Config
from async_rlhf.types import Batch, WeightsVersion
from learners.group import LearnerGroup
from learners.rank import LearnerRank
from tests.support.cluster import small_config
from tests.support.samples import make_scored, make_ticket


class SwitchingRank(LearnerRank):
    """A rank that starts over as another learner."""

    def switch(self, config: Config, max_logits_bytes: int = 1 << 20, checkpoint: str | None = None, folder: str = "") -> int:
        """A fresh learner of `config`, whose head works in chunks of `max_logits_bytes`; returns the version it starts from.

        Args:
            checkpoint: as in LearnerRank.join. folder: another model than the one it was constructed with.
        """
        import learners.learner as module
        from async_rlhf.policy import CompletionScorer

        module.CompletionScorer = functools.partial(CompletionScorer, max_logits_bytes=max_logits_bytes)  # type: ignore[misc]
        self._learner = module.Learner(config, Path(folder) if folder else self._folder)
        return 0 if checkpoint is None else self._learner.load(Path(checkpoint))

    def draw(self) -> tuple[float, float, float]:
        """The next number of each random number generator."""
        return random.random(), float(np.random.random()), float(torch.rand(()))

    def limit_file_size(self, num_bytes: int) -> None:
        """Let the process write no file beyond `num_bytes`; negative: as large as it likes."""
        limit = resource.RLIM_INFINITY if num_bytes < 0 else num_bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    def slow_disk(self, seconds: float) -> None:
        """Let every later fsync take at least `seconds`."""
        os.fsync = functools.partial(_slow_sync, seconds)  # type: ignore[assignment]

    def hold_disk(self, until: str) -> None:
        """Let every later fsync wait until the file `until` exists; empty: wait for nothing."""
        os.fsync = functools.partial(_held_sync, Path(until)) if until else SYNC  # type: ignore[assignment]


SYNC = os.fsync
HOLD_S = 100.0


def _slow_sync(seconds: float, descriptor: int) -> None:
    time.sleep(seconds)
    SYNC(descriptor)


def _held_sync(until: Path, descriptor: int) -> None:
    ends = time.monotonic() + HOLD_S
    while not until.exists():
        if time.monotonic() > ends:
            raise OSError(f"{until} did not come in {HOLD_S:g} s")
        time.sleep(0.005)
    SYNC(descriptor)


class Ranks:
    """All ranks of one world size, kept over several learners."""

    def __init__(self, cluster: Cluster, folder: Path, size: int) -> None:
        config = small_config(f"learner.num_ranks={size}", "batch_groups=8")
        self.actors: list[RemoteActor] = [
            cluster.start(ActorSpec(name=f"of-{size}-rank-{rank}", cls=SwitchingRank, args=(config, str(folder), rank)))
            for rank in range(size)
        ]
        self.group = LearnerGroup(self.actors, config)
        asyncio.run(self.group.join())

    def weights(self, version: int) -> WeightsVersion:
        """What the ranks have now, all of it; it comes from rank 0 alone."""

        async def pull() -> list[list[tuple[object, WeightsVersion]]]:
            return await asyncio.gather(*(actor.stream("snapshot", version, look=whole, timeout_s=120) for actor in self.actors))

        def whole(bucket: WeightsVersion) -> WeightsVersion:
            return bucket

        of_first, *of_others = asyncio.run(pull())
        assert not any(of_others)
        return WeightsVersion.of([bucket for _, bucket in of_first])

    async def all(self, method: str, *args: object) -> list[object]:
        return await asyncio.gather(*(actor.call(method, *args, timeout_s=120) for actor in self.actors))


@contextmanager
def learner_worlds(cluster: Cluster, folder: Path, sizes: Sequence[int]) -> Iterator[dict[int, Ranks]]:
    """World size -> ranks that start from `folder`."""
    worlds = {size: Ranks(cluster, folder, size) for size in sizes}
    yield worlds
    for ranks in worlds.values():
        for actor in ranks.actors:
            kill(actor)


def make_batch(update: int) -> Batch:
    """Eight groups; some are tied, lengths differ."""
    scores = [(1, 0, 0, 1), (0, 0, 0, 0), (0, 1, 0, 0), (1, 1, 1, 0)]
    groups = [make_scored(make_ticket(8 * update + i, seed=i), scores=scores[i % 4], version=update, seed=1) for i in range(8)]
    return Batch(update=update, groups=tuple(groups))
