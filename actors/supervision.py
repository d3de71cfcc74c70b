"""Supervision: silence becomes death, death becomes a new start, and too many new starts become the end of the run.

watch    looks at an actor every few seconds; one that does not answer is frozen, and killed
Member   a part that must always be played: calls to it survive the death of whoever plays it now
Restarts counts, waits, and gives up
"""

import asyncio
import time
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from actors.launch import PERMANENT, ActorSpec, Cluster, leaf, ready
from actors.remote import RemoteActor, kill_process
from actors.wait_graph import WAITS
from async_rlhf.config import Config
from async_rlhf.errors import ActorFailedError, ActorLostError, DeadlineError, EngineError, NoRoomError, RestartLimitError, WeightsError

LOST = (ActorLostError, DeadlineError)
"""A call to an actor ended like this: the actor is gone, or as good as gone."""
BROKEN = (*LOST, ActorFailedError, EngineError, WeightsError)
"""The same for an actor that must not be used again after an error of its own."""

Report = Callable[[dict[str, Any]], None]
"""Takes what supervision did, as one entry."""


class Supervisor:
    """Starts actors on a cluster, and says how often and how soon they may start again."""

    def __init__(self, cluster: Cluster, config: Config, session: int, report: Report) -> None:
        """
        Args:
            session: of this driver; part of every incarnation's name, so that no two of a run are alike.
            report: told of each loss and each return.
        """
        self.cluster = cluster
        self.session = session
        self.restarts: Counter[str] = Counter()
        self._settings = config.supervision
        self._start_s = config.timeouts.start_s
        self.report = report
        self._recent: defaultdict[str, deque[float]] = defaultdict(deque)

    async def begin(self, spec: ActorSpec) -> RemoteActor:
        """Start an actor, once there is room for it, and wait until it is there; one that is not in time is killed, or it could take
        somebody's place later.
        """
        await self.cluster.placed(spec)
        actor = self.cluster.start(spec)
        try:
            await ready(actor, self._start_s, lambda name: None)
        except BaseException:
            kill_process(actor)
            raise
        return actor

    async def replace(self, name: str, cause: Exception, start: Callable[[], Awaitable[None]]) -> None:
        """Fill a place again by `start`, as often as the limits allow.

        Raises:
            RestartLimitError: they do not, any more. Names the last cause. NoRoomError: the node was lost, and there is no other.
        """
        lost_at = time.time()
        while True:
            delay_s = self._admit(name, cause)
            self.report({"event": "lost", "name": name, "time": lost_at, "cause": first_line(cause)})
            await asyncio.sleep(delay_s)
            try:
                await start()
            except (RestartLimitError, NoRoomError, *PERMANENT):
                raise
            except Exception as error:  # whatever keeps it from starting counts, and the limit ends it
                cause, lost_at = error, time.time()
                continue
            self.report({"event": "back", "name": name, "time": time.time(), "after_s": time.time() - lost_at})
            return

    async def watch(self, actor: RemoteActor) -> None:
        """Look at an actor for as long as it lives.

        Raises:
            ActorLostError: it died, or was silent for too long and was killed for it.
        """
        while True:
            await asyncio.sleep(self._settings.ping_s)
            try:
                await actor.ping(self._settings.silence_s)
            except DeadlineError:
                kill_process(actor)
                raise ActorLostError(
                    f"{actor.name} gave no sign of life for {self._settings.silence_s:g} s (supervision.silence_s) and was killed"
                ) from None

    def _admit(self, name: str, cause: Exception) -> float:
        """Count a restart; returns the seconds to wait before it."""
        now, recent = time.monotonic(), self._recent[name]
        while recent and now - recent[0] > self._settings.window_s:
            recent.popleft()
        if len(recent) >= self._settings.max_restarts:
            raise RestartLimitError(
                f"{name} failed {len(recent) + 1} times within {self._settings.window_s:g} s, allowed are "
                f"{self._settings.max_restarts} restarts (supervision.max_restarts); the last cause: {cause}"
            ) from cause
        recent.append(now)
        self.restarts[name] += 1
        return 0.0 if len(recent) == 1 else min(self._settings.max_backoff_s, self._settings.backoff_s * 2 ** (len(recent) - 2))


class Member:
    """A part that must always be played, and who plays it now."""

    def __init__(self, supervisor: Supervisor, name: str, make: Callable[[str], ActorSpec]) -> None:
        """
        Args:
            make: what to start for an incarnation's name.
        """
        self.name = name
        self._supervisor = supervisor
        self._make = make
        self._count = 0
        self._actor: RemoteActor | None = None
        self._replacing: asyncio.Task[None] | None = None

    @property
    def actor(self) -> RemoteActor:
        """Who plays the part now."""
        assert self._actor is not None, f"{self.name} was not started"
        return self._actor

    @property
    def is_played(self) -> bool:
        """Whether anybody plays the part, or did."""
        return self._actor is not None

    def next_spec(self) -> ActorSpec:
        """What to start next; its incarnation is used up by that."""
        spec = self._make(f"{self.name}.{self._supervisor.session}.{self._count}")
        self._count += 1
        return spec

    def cast(self, actor: RemoteActor) -> None:
        """`actor` plays the part from now on."""
        self._actor = actor

    async def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        """RemoteActor.call, made again after a replacement: for methods that may be called again."""
        return await self._insist(lambda actor: actor.call(method, *args, timeout_s=timeout_s))

    async def fetch(self, method: str, *args: Any, timeout_s: float) -> Any:
        """RemoteActor.fetch, likewise."""
        return await self._insist(lambda actor: actor.fetch(method, *args, timeout_s=timeout_s))

    async def replace(self, lost: RemoteActor, cause: Exception) -> RemoteActor:
        """Whoever plays the part after `lost`, who is killed if not dead yet.

        Raises:
            RestartLimitError: too many were lost.
        """
        if self._replacing is None and self.actor is lost:
            kill_process(lost)
            self._replacing = asyncio.create_task(self._replace(cause), name=f"replace {self.name}")
        if self._replacing is not None:
            # Shielded: whoever asks may be cancelled, and nobody would know of an incarnation that is just starting.
            await asyncio.shield(self._replacing)
        return self.actor

    async def keep(self) -> None:
        """Look at whoever plays the part, and replace who dies, for ever."""
        while True:
            actor = self.actor
            try:
                await self._supervisor.watch(actor)
            except BROKEN as error:
                await self.replace(actor, error)

    async def _replace(self, cause: Exception) -> None:
        try:
            await self._supervisor.replace(self.name, cause, self._begin)
        finally:
            self._replacing = None

    async def _begin(self) -> None:
        self._actor = await self._supervisor.begin(self.next_spec())

    async def _insist(self, attempt: Callable[[RemoteActor], Coroutine[Any, Any, Any]]) -> Any:
        while True:
            actor = self.actor
            try:
                return await attempt(actor)
            except LOST as error:
                await self.replace(actor, error)


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error) or type(error).__name__).splitlines()[0]


async def guarded(main: Awaitable[Any], *guards: Awaitable[Any]) -> Any:
    """Await `main` while the guards go on; the first error of any of them ends all, alone.

    Returns:
        What `main` returns; the guards end with it.
    """
    tasks = [asyncio.ensure_future(main), *(asyncio.ensure_future(guard) for guard in guards)]
    pending = set(tasks)
    try:
        while not tasks[0].done():
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        return tasks[0].result()
    except Exception as error:
        WAITS.at_failure = WAITS.render()  # the tasks below are about to end, and with them what they wait for
        inner = leaf(error)
        raise inner from inner.__cause__
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
