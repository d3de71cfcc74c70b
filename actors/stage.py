"""A stage before reinforcement learning, in an actor: it works in one thread and tells what it does in another."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress

from actors.launch import ActorSpec, Cluster, ready
from actors.remote import CONTROL_GROUP, RemoteActor, resolve
from async_rlhf.stages.messages import StageJob, StageProgress, StageResult, StageWatch
from async_rlhf.stages.perform import perform
from async_rlhf.stages.trainer import use_threads

NEWS_WAIT_S = 2.0
"""How long the actor waits for news before it answers that there is none: its sign of life."""

REMEDY = "lower the stage's num_cpus / num_gpus"


class StageWorker:
    """Does one stage."""

    def __init__(self, job: StageJob, num_cpus: float) -> None:
        """
        Args:
            num_cpus: threads to compute with.
        """
        use_threads(num_cpus)
        self._job = job
        self._news: list[StageProgress] = []
        self._changed = threading.Condition()
        self._stopping = threading.Event()

    def perform(self) -> StageResult:
        """Do it; see stages.perform."""
        return perform(self._job, StageWatch(on_progress=self._tell, stopping=self._stopping.is_set))

    def news(self) -> list[StageProgress]:
        """What happened since the last call; waits a moment for the first."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._news), timeout=NEWS_WAIT_S)
            told, self._news = self._news, []
        return told

    def stop(self) -> None:
        """End with a checkpoint as soon as possible."""
        self._stopping.set()

    def _tell(self, progress: StageProgress) -> None:
        with self._changed:
            # Of steps that nobody heard of yet the last one says it all.
            if self._news and not (self._news[-1].looked or self._news[-1].note):
                self._news.pop()
            self._news.append(progress)
            self._changed.notify_all()


class RemoteStage:
    """A stage on a cluster, from its start to its end."""

    def __init__(self, job: StageJob, cluster: Cluster, on_progress: Callable[[StageProgress], None]) -> None:
        self._job = job
        self._cluster = cluster
        self._on_progress = on_progress
        self._actor: RemoteActor | None = None

    async def perform(self) -> StageResult:
        """Start the actor and let it work; nobody restarts it.

        Raises:
            ConfigError: the cluster is too small; and what the stage raises. ActorLostError, DeadlineError: it died, or froze.
        """
        section = getattr(self._job.config, self._job.kind)
        spec = ActorSpec(
            name=self._job.kind,
            cls=StageWorker,
            args=(self._job, section.num_cpus),
            num_cpus=section.num_cpus,
            num_gpus=section.num_gpus,
        )
        timeouts = self._job.config.timeouts
        await self._cluster.reserve([spec], REMEDY)
        actor = self._actor = self._cluster.start(spec)
        await ready(actor, timeouts.start_s, lambda name: None)
        work = asyncio.ensure_future(resolve(actor.start("perform"), edge=f"{actor.name}.perform", timeout_s=float("inf")))
        head = asyncio.ensure_future(self._cluster.watch_head())
        try:
            while not work.done():
                listening = asyncio.ensure_future(self._listen(actor, timeouts.call_s))
                await asyncio.wait({work, listening, head}, return_when=asyncio.FIRST_COMPLETED)
                if head.done():
                    head.result()
                if not listening.done():  # the work is done; what it told last is worth a moment
                    with suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(asyncio.shield(listening), 2 * NEWS_WAIT_S)
                if listening.done() and not work.done():
                    listening.result()
                listening.cancel()
            return work.result()
        finally:
            for task in (work, head):
                task.cancel()

    def stop(self) -> None:
        """Ask it to end with a checkpoint."""
        if self._actor is not None:
            self._actor.handle.stop.options(concurrency_group=CONTROL_GROUP).remote()

    async def _listen(self, actor: RemoteActor, timeout_s: float) -> None:
        reference = actor.handle.news.options(concurrency_group=CONTROL_GROUP).remote()
        for progress in await resolve(reference, edge=f"{actor.name}: news", timeout_s=timeout_s):
            self._on_progress(progress)
