"""What drives a replay queue in a benchmark: producers, the queue's actor, ranks, as in a run; see replay_queue.py."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from queue_stand_ins import MAX_STALENESS, K, Shelf, Sink, Source

from actors.launch import ActorSpec, Cluster, ready
from actors.remote import RemoteActor
from actors.replay_queue import Installed, Kept, NextBatch, ReplayQueue, WithScorer
from async_rlhf.config import Config, load_config
from async_rlhf.tasks.start import build_tokenizer

PUT_GROUPS = 64
"""Of one put: what a generator, or several behind one scorer, finished at once."""
BATCH_GROUPS = 512
CHECKPOINT_GROUPS = 8192
"""Trained between two checkpoints."""
PRODUCERS, RANKS = 16, 1
"""Of the goal; the tables vary them."""
WARM_UPDATES, REST_UPDATES = 3, MAX_STALENESS + 1
"""Before and after what is measured: producers are ahead of the ranks by as much as the last."""
LEAD_S = 0.2
"""Before a put is due, its producer asks for tickets."""
LIMIT_S = 120.0
"""Of any call."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """One measurement's work."""

    producers: int = PRODUCERS
    ranks: int = RANKS
    batch_groups: int = BATCH_GROUPS
    put_groups: int = PUT_GROUPS
    updates: int = 20
    rate: float = 0.0
    """Groups per second that are put; 0: as many as there is room for."""

    @property
    def measured(self) -> int:
        """Updates that count."""
        return self.updates - WARM_UPDATES - REST_UPDATES


@dataclass(frozen=True, kw_only=True)
class Look:
    """At memory, when so many groups were trained."""

    groups: int
    queue_bytes: int
    """What the queue's process shares with no other."""
    store_bytes: int
    """What Ray's object store has touched."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What it gave."""

    groups_per_s: float
    put_s: Sequence[float]
    """At a given rate from when the put was due, else from the call, until it was acknowledged."""
    memory: Sequence[Look]
    """After each checkpoint."""
    cpu_us: Mapping[str, float]
    """Who -> processor time per group, microseconds."""

    def put_ms(self, share: float) -> float:
        """A quantile of the puts."""
        return float(np.quantile(self.put_s, share)) * 1e3


class Run:
    """Producers, one queue and ranks, until all updates are through."""

    def __init__(self, load: Load, queue: RemoteActor, sources: Sequence[RemoteActor], sinks: Sequence[RemoteActor]) -> None:
        self._load, self._queue = load, queue
        self._sources, self._sinks = sources, sinks
        self._version = 0
        self._puts: list[tuple[float, float]] = []
        """(when, seconds)."""
        self._memory: list[Look] = []

    async def measure(self) -> Found:
        """Run all of it."""
        async with asyncio.TaskGroup() as tasks:
            for index in range(self._load.producers):
                tasks.create_task(self._produce(index))
            return await self._train()

    async def _produce(self, index: int) -> None:
        name, load, request = f"generator-{index}.0", self._load, 0
        pause_s = load.put_groups * load.producers / load.rate if load.rate else 0.0
        due = time.perf_counter() + pause_s * index / load.producers
        while True:
            await asyncio.sleep(due - LEAD_S - time.perf_counter() if load.rate else 0.0)
            request += 1
            tickets = await self._call("tickets", name, self._version, request, load.put_groups, 5.0)
            if tickets is None:
                return
            if not tickets:
                continue
            source = self._sources[index % len(self._sources)]
            scored = await source.fetch("score", tickets, timeout_s=LIMIT_S)
            await self._call("note", WithScorer(tickets=tuple(tickets)))
            await asyncio.sleep(due - time.perf_counter() if load.rate else 0.0)
            started = due if load.rate else time.perf_counter()
            await self._call("put", scored)
            self._puts.append((started, time.perf_counter() - started))
            due += pause_s

    async def _train(self) -> Found:
        load, began, ended, keeping = self._load, 0.0, 0.0, None
        before = after = self._cpu_s()
        while self._version < load.updates:
            update = self._version
            if update == WARM_UPDATES:
                began, before = time.perf_counter(), self._cpu_s()
            if update == WARM_UPDATES + load.measured:
                ended, after = time.perf_counter(), self._cpu_s()
            answer: NextBatch | None = await self._call("next_batch", update, LIMIT_S)
            assert answer is None or answer.summary is not None, "the queue closed early"
            shards = [await self._queue.fetch("take", update, rank, timeout_s=LIMIT_S) for rank in range(load.ranks)]
            await asyncio.gather(
                *(sink.call("train_step", shard, timeout_s=LIMIT_S) for sink, shard in zip(self._sinks, shards, strict=True))
            )
            await self._call("trained", update, update, ())
            self._version += 1
            generators = [Installed(holder=f"generator-{index}.0", version=self._version) for index in range(load.producers)]
            await asyncio.gather(*(self._call("note", fact) for fact in generators))
            if self._version % max(1, CHECKPOINT_GROUPS // load.batch_groups) == 0:
                if keeping is not None:
                    await keeping
                await self._call("checkpoint")
                keeping = asyncio.create_task(self._call("note", Kept(version=self._version)))  # beside training, as in a run
                self._memory.append(self._look())
        if keeping is not None:
            await keeping
        groups = load.measured * load.batch_groups
        return Found(
            groups_per_s=groups / (ended - began),
            put_s=[seconds for when, seconds in self._puts if began <= when <= ended],
            memory=self._memory,
            cpu_us={who: (after[who] - before[who]) / groups * 1e6 for who in after},
        )

    def _cpu_s(self) -> dict[str, float]:
        """Processor time so far: the queue, what stands for generators and scorers, for ranks, this process, Ray's own."""
        actors = {"queue": [self._queue], "sources": self._sources, "ranks": self._sinks}
        pids = {actor.process.pid: who for who, group in actors.items() for actor in group if actor.process is not None}
        spent = dict.fromkeys([*actors, "driver", "Ray"], 0.0)
        for process in (own := psutil.Process(), *own.children(recursive=True)):
            with suppress(psutil.Error):
                times = process.cpu_times()
                spent["driver" if process is own else pids.get(process.pid, "Ray")] += times.user + times.system
        return spent

    def _look(self) -> Look:
        assert self._queue.process is not None
        memory = psutil.Process(self._queue.process.pid).memory_info()
        [raylet] = [process for process in psutil.Process().children(recursive=True) if process.name() == "raylet"]
        return Look(
            groups=self._version * self._load.batch_groups,
            queue_bytes=memory.rss - memory.shared,
            store_bytes=raylet.memory_info().shared,
        )

    async def _call(self, method: str, *args: Any) -> Any:
        return await self._queue.call(method, *args, timeout_s=LIMIT_S)


def config_of(load: Load) -> Config:
    """A run's config with this work."""
    settings = [
        f"updates={load.updates}",
        f"batch_groups={load.batch_groups}",
        f"max_staleness={MAX_STALENESS}",
        f"completions_per_prompt={K}",
        f"learner.num_ranks={load.ranks}",
        "learner.warmup_steps=0",
        "run.object_store_mib=2048",
    ]
    return load_config(overrides=settings).config


class Bench:
    """Starts what a load needs, measures it, ends it."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._cluster, self._folder = cluster, folder
        self._count = 0
        build_tokenizer().save_pretrained(folder / "tokenizer")

    def through_queue(self, load: Load) -> Found:
        """Through ours."""
        folder = self._folder / f"run-{self._count}"
        args = (config_of(load), str(self._folder / "tokenizer"), str(folder), 0)
        return asyncio.run(self._measure(load, ReplayQueue, args))

    def through_shelf(self, load: Load) -> Found:
        """Through the one without rules and journal."""
        args = (load.batch_groups, load.ranks, load.updates, (MAX_STALENESS + 1) * load.batch_groups)
        return asyncio.run(self._measure(load, Shelf, args))

    async def _measure(self, load: Load, cls: type, args: tuple[Any, ...]) -> Found:
        self._count += 1
        specs = [ActorSpec(name=f"queue-{self._count}", cls=cls, args=args)]
        specs += [ActorSpec(name=f"source-{self._count}-{index}", cls=Source, args=()) for index in range(min(2, load.producers))]
        specs += [ActorSpec(name=f"rank-{self._count}-{rank}", cls=Sink, args=()) for rank in range(load.ranks)]
        actors = [self._cluster.start(spec) for spec in specs]
        try:
            await asyncio.gather(*(ready(actor, LIMIT_S, lambda name: None) for actor in actors))
            queue, sinks = actors[0], actors[-load.ranks :]
            return await Run(load, queue, actors[1 : -load.ranks], sinks).measure()
        finally:
            for actor in actors:
                ray.kill(actor.handle)
