"""The learner group under supervision: one lost rank loses the group, and the group starts again from a checkpoint."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from actors.environment import LEARNER_NICENESS
from actors.launch import ActorSpec, first_failure, ready
from actors.remote import RemoteActor, kill_process
from actors.supervision import LOST, Supervisor
from async_rlhf.checkpoints import newest
from async_rlhf.config import Config
from async_rlhf.errors import ActorFailedError, LearnerLostError, ObjectLostError
from async_rlhf.run_plan import RunPlan
from async_rlhf.types import StepReport

T = TypeVar("T")

Saving = Callable[[], Awaitable[dict[str, tuple[int, int]]]]
"""Awaits the files of a checkpoint: name -> (size in bytes, CRC-32)."""


class Group(Protocol):
    """The ranks of one start, called all at once; see learners.group."""

    async def join(self, checkpoint: str | None = None) -> int: ...

    async def train_step(self, update: int, shards: Sequence[Any]) -> Sequence[StepReport]: ...

    async def save(self, folder: str, version: int) -> None: ...

    async def saved(self) -> dict[str, tuple[int, int]]: ...

    async def save_pretrained(self, folder: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class LearnerParts:
    """How to make a learner; handed in, because actors know nothing of learners."""

    rank_class: type
    """Constructed with (config, model_folder, rank)."""
    make_group: Callable[[Sequence[RemoteActor], Config], Group]


class LearnerCrew:
    """Whoever is the learner now. Every call raises LearnerLostError when a rank is gone."""

    def __init__(self, plan: RunPlan, parts: LearnerParts, supervisor: Supervisor) -> None:
        self._plan = plan
        self._config = plan.config
        self._parts = parts
        self._supervisor = supervisor
        self._count = 0
        self._version = 0
        self._group: Group | None = None
        self.ranks: Sequence[RemoteActor] = ()
        """The actors, by rank; all of one start."""
        self.lost: LearnerLostError | None = None
        """Set by watch() once one of `ranks` is gone, until others join."""

    def next_specs(self) -> list[ActorSpec]:
        """The ranks of the next start."""
        settings, incarnation = self._config.learner, f"{self._supervisor.session}.{self._count}"
        self._count += 1
        return [
            ActorSpec(
                name=f"learner-{rank}.{incarnation}",
                place=f"learner-{rank}",
                group="learner",
                cls=self._parts.rank_class,
                args=(self._config, str(self._plan.model_folder), rank),
                num_cpus=settings.num_cpus,
                num_gpus=settings.num_gpus,
                niceness=LEARNER_NICENESS,
                sends_weights=self._config.weights.by_group and rank == 0,
            )
            for rank in range(settings.num_ranks)
        ]

    async def join(self, ranks: Sequence[RemoteActor], checkpoint: Path | None) -> int:
        """Let started ranks meet and load; returns the version that they are at."""
        self.ranks, self.lost = ranks, None
        self._group = self._parts.make_group(ranks, self._config)
        self._version = await self._group.join(str(checkpoint) if checkpoint else None)
        return self._version

    async def restart(self, cause: LearnerLostError) -> int:
        """Start all ranks again from the newest whole checkpoint; returns its version.

        Raises:
            RestartLimitError: the group keeps failing. NoRoomError: a node was lost, and there is no other.
        """
        await self._supervisor.replace("learner", cause, self._start_again)
        return self._version

    async def watch(self) -> None:
        """Look at every rank, for ever: one that is frozen is killed, and whoever waits for it learns of that; see also `lost`."""
        while True:
            await first_failure(*(self._watch_rank(rank) for rank in range(self._config.learner.num_ranks)))

    async def train_step(self, update: int, shards: Sequence[Any]) -> Sequence[StepReport]:
        """See LearnerClient."""
        return await self._guard(self._joined.train_step(update, shards))

    async def save(self, folder: Path, version: int) -> Saving:
        """Copy the learner's state aside and begin to write it; returns what waits for the files, beside any training."""
        group = self._joined
        await self._guard(group.save(str(folder), version))
        return lambda: self._guard(group.saved())

    async def save_pretrained(self, folder: Path) -> None:
        """Write the policy as a Hugging Face folder."""
        await self._guard(self._joined.save_pretrained(str(folder)))

    @property
    def _joined(self) -> Group:
        assert self._group is not None, "join() comes first"
        return self._group

    async def _start_again(self) -> None:
        for rank in self.ranks:
            kill_process(rank)
        specs, cluster = self.next_specs(), self._supervisor.cluster
        for spec in specs:
            await cluster.placed(spec)
        started = [cluster.start(spec) for spec in specs]
        try:
            await first_failure(*(ready(actor, self._config.timeouts.start_s, lambda name: None) for actor in started))
            checkpoint, _ = newest(self._plan.run_folder)
            await self.join(started, checkpoint.folder if checkpoint else None)
        except BaseException:
            for rank in started:  # or they would hold their places
                kill_process(rank)
            raise

    async def _watch_rank(self, rank: int) -> None:
        while True:
            actor = self.ranks[rank]
            try:
                await self._supervisor.watch(actor)
            except (*LOST, ActorFailedError) as error:
                if self.ranks[rank] is actor:
                    self.lost = LearnerLostError(str(error))
                while self.ranks[rank] is actor:
                    await asyncio.sleep(1.0)

    async def _guard(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except (*LOST, ActorFailedError, ObjectLostError) as error:  # a rank died, or a collective call failed because another one did
            raise LearnerLostError(str(error)) from error
