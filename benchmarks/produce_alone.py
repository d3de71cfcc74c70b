"""The generator actor at the end of the real produce loop, with everybody else played: one side of generator.py."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray
from bare_vllm import seed_of

from actors.crew import Crew
from actors.generator import Generator
from actors.launch import ActorSpec, Cluster, ready
from actors.pipeline import produce
from actors.remote import RemoteActor, resolve
from actors.roster import Roster
from actors.transport import ByReference
from actors.weight_broadcaster import Offer
from async_rlhf.config import Config
from async_rlhf.types import Prompt, Ticket, WeightsVersion

UPDATE_S = 0.5
"""What an update is said to have taken, about that of the quickstart: finished groups wait for others for a tenth of it."""


class Ours:
    """The generator actor, at work for the produce loop."""

    def __init__(self, cluster: Cluster, folder: Path, config: Config, weights: WeightsVersion) -> None:
        self._config = config
        self._weights = weights
        spec = ActorSpec(
            name=f"generator-{config.generator.max_inflight}-{config.completions_per_prompt}",
            cls=Generator,
            args=(config, str(folder), "generator-0.0.0"),
            max_concurrency=8,
        )
        self.actor = cluster.start(spec)

    def ready(self) -> None:
        """Wait until it is."""
        asyncio.run(ready(self.actor, 120, lambda name: None))

    def sample(self, prompts: Sequence[Sequence[int]]) -> list[tuple[float, int]]:
        """As Bare.sample; a group has ended when it is here."""
        self._weights = replace(self._weights, manifest=replace(self._weights.manifest, version=self._weights.manifest.version + 1))
        return asyncio.run(Round(self.actor, self._config, self._weights, prompts).run())

    def close(self) -> None:
        ray.kill(self.actor.handle)


class Round:
    """The produce loop with everybody else played: who grants tickets, offers a version, scores, and takes the scored groups."""

    def __init__(self, actor: RemoteActor, config: Config, weights: WeightsVersion, prompts: Sequence[Sequence[int]]) -> None:
        version = weights.manifest.version
        self._actor, self._config = actor, config
        self._offer = Offer(version=version, buckets=[ray.put(weights)])
        self._tickets = [
            Ticket(
                ticket_id=version * 1_000_000 + index,
                prompt=Prompt(prompt_id=str(index), text="", token_ids=np.asarray(ids, dtype=np.int32)),
                epoch=0,
                seed=seed_of(index),
                deadline=version + 1,
                attempt=0,
                holder=actor.name,
            )
            for index, ids in enumerate(prompts)
        ]
        self._num_groups = len(prompts)
        self._ends: list[tuple[float, int]] = []
        self._done = asyncio.Event()

    async def run(self) -> list[tuple[float, int]]:
        """Install a version, and sample all groups; see Ours.sample."""
        member: Any = SimpleNamespace(name="generator-0", actor=self._actor)
        scorer: Any = SimpleNamespace(name="scorer-0", actor=self)
        played: Any = self
        roster = Roster([member])
        crew = Crew(
            supervisor=played,
            roster=roster,
            scorers=[scorer] * 4,
            queue=played,
            broadcaster=SimpleNamespace(actor=self, call=self.call),  # type: ignore[arg-type]
            learner=SimpleNamespace(ranks=()),  # type: ignore[arg-type]
            transport=ByReference(self._config),
            update_s=UPDATE_S,
        )
        [seat] = roster
        async with asyncio.TaskGroup() as scoring:
            producing = asyncio.ensure_future(produce(seat, crew, self._config, scoring))
            await seat.arrived.wait()
            crew.begun.set()
            await self._done.wait()
            seat.leaving.set()
            await producing
        return self._ends

    async def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Queue and broadcaster."""
        if method == "tickets":
            wanted = args[3]
            granted, self._tickets = self._tickets[:wanted], self._tickets[wanted:]
            return granted or None
        if method == "newer_than":
            if args[0] < self._offer.version:
                return self._offer
            await asyncio.sleep(timeout_s)
        return SimpleNamespace(voided={})

    async def fetch(self, method: str, groups_ref: Any, *_: Any, timeout_s: float) -> Any:
        """The scorer: takes the groups as a process of its own would."""
        groups = await resolve(groups_ref, edge="scorer.score", timeout_s=timeout_s)
        now = time.perf_counter()
        self._ends += [(now, group.num_tokens) for group in groups]
        if len(self._ends) == self._num_groups:
            self._done.set()

    async def watch(self, actor: RemoteActor) -> None:
        """The supervisor."""
        await asyncio.Event().wait()
