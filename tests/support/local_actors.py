"""Actors without processes: Ray handles and a cluster that live in the test's own event loop, and die when the test says so.

What the code under test holds is a true RemoteActor around a LocalHandle, which answers with the errors that Ray gives.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from actors.launch import ActorSpec
from actors.remote import RemoteActor
from async_rlhf.errors import AsyncRLHFError, NoRoomError

OnCall = Callable[["LocalHandle", str, tuple[Any, ...], bool], None]
"""Told of each call (handle, method, arguments, whether it is through): it may end or freeze the handle's actor there."""


class LocalHandle:
    """Calls the methods (plain or coroutine) of `target`; a started call runs at once, its reference is a task."""

    def __init__(self, name: str, make: Callable[[], Any], on_call: OnCall | None = None) -> None:
        self.name = name
        self.alive = True
        self.frozen = False
        self._on_call = on_call
        self._works: set[asyncio.Future[Any]] = set()
        self._answers: set[asyncio.Future[Any]] = set()
        self._failure: Exception | None = None
        self.target: Any = None
        try:
            self.target = make()
        except Exception as error:
            self._failure = error

    def __getattr__(self, method: str) -> "_Method":
        return _Method(self, method)

    def die(self) -> None:
        """Like SIGKILL: whoever waits learns that the actor died, and nothing that it was at goes on."""
        if not self.alive:
            return
        self.alive = False
        for work in self._works:
            work.cancel()
        for answer in self._answers:
            if not answer.done():
                answer.set_exception(RayActorError())
        if hasattr(self.target, "died"):
            self.target.died()

    def freeze(self) -> None:
        """Like SIGSTOP: alive, and silent."""
        self.frozen = True

    def run(self, method: str, args: tuple[Any, ...]) -> "asyncio.Future[Any]":
        """The reference of a call's answer."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(_seen)
        if not self.alive:
            answer.set_exception(RayActorError())
            return answer
        self._answers.add(answer)
        if not self.frozen:
            work = asyncio.ensure_future(self._run(method, args, answer))
            work.set_name(f"{self.name}.{method}")
            self._works.add(work)
            work.add_done_callback(self._works.discard)
        answer.add_done_callback(self._answers.discard)
        return answer

    async def _run(self, method: str, args: tuple[Any, ...], answer: "asyncio.Future[Any]") -> None:
        try:
            value = await self._answer(method, args)
        except Exception as error:
            if not answer.done():
                answer.set_exception(error if isinstance(error, AsyncRLHFError) else RayTaskError(method, f"Traceback\n{error!r}", error))
        else:
            if not answer.done() and not self.frozen:
                answer.set_result(value)

    async def _answer(self, method: str, args: tuple[Any, ...]) -> Any:
        if method in ("__ray_ready__", "__ray_call__"):
            if self._failure is not None:
                raise self._failure
            return None
        # As with Ray: a reference reaches the method as its value, and a failed reference fails the call.
        values = tuple([await value if asyncio.isfuture(value) else value for value in args])
        if self._on_call is not None:
            self._on_call(self, method, values, False)
        await asyncio.sleep(0)  # whoever is dead by now does no work
        answer = getattr(self.target, method)(*values)
        answer = await answer if asyncio.iscoroutine(answer) else answer
        if self._on_call is not None:
            self._on_call(self, method, values, True)
        return answer


class _Method:
    def __init__(self, handle: LocalHandle, method: str) -> None:
        self._handle, self._method, self._num_returns = handle, method, 1

    def options(self, *, num_returns: int = 1, concurrency_group: str = "") -> "_Method":
        self._num_returns = num_returns
        return self

    def remote(self, *args: Any) -> Any:
        answer = self._handle.run(self._method, args)
        if self._num_returns == 1:
            return answer
        items = tuple(asyncio.ensure_future(_item(answer, index)) for index in range(self._num_returns))
        for item in items:
            item.add_done_callback(_seen)
        return items


async def _item(answer: "asyncio.Future[Any]", index: int) -> Any:
    return (await asyncio.shield(answer))[index]


def _seen(answer: "asyncio.Future[Any]") -> None:
    """A failed reference that nobody awaits is no news."""
    with suppress(asyncio.CancelledError):
        answer.exception()


def local_actor(name: str, target: Any, on_call: OnCall | None = None) -> RemoteActor:
    """One actor around an object that exists already."""
    return RemoteActor(LocalHandle(name, lambda: target, on_call), name)


def lost_reference() -> "asyncio.Future[Any]":
    """A reference whose object is gone with its owner."""
    lost: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    lost.set_exception(ObjectLostError("ab" * 14, None, ""))  # type: ignore[arg-type]
    return lost


class LocalCluster:
    """Starts actors as the cluster of a run does."""

    def __init__(self, on_call: OnCall | None = None) -> None:
        self.started: list[str] = []
        """Names, in order."""
        self.handles: dict[str, LocalHandle] = {}
        """By name; the dead ones stay."""
        self.reserved: list[str] = []
        """Places of those that joined, as long as they have them."""
        self.free = 100
        """How many more there is room for."""
        self.homeless: set[str] = set()
        """Places whose node is lost, as long as no other one has room."""
        self._on_call = on_call

    async def reserve_more(self, spec: ActorSpec, timeout_s: float) -> None:
        await asyncio.sleep(0)
        if not self.free:
            raise NoRoomError(f"{spec.place} found no room")
        self.free -= 1
        self.reserved.append(spec.place)

    def release(self, place: str) -> None:
        if place in self.reserved:
            self.reserved.remove(place)
            self.free += 1

    async def placed(self, spec: ActorSpec, timeout_s: float | None = None) -> None:
        if spec.place in self.homeless:
            await asyncio.sleep(min(timeout_s or 0.0, 0.01))
        if spec.place in self.homeless:
            raise NoRoomError(f"{spec.place} lost its node")

    def start(self, spec: ActorSpec) -> RemoteActor:
        self.started.append(spec.name)
        self.handles[spec.name] = LocalHandle(spec.name, lambda: spec.cls(*spec.args), self._on_call)
        return RemoteActor(self.handles[spec.name], spec.name)


@pytest.fixture
def local_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    """actors.remote.kill ends local actors."""

    def kill(handle: LocalHandle, *, no_restart: bool) -> None:
        handle.die()

    monkeypatch.setattr("ray.kill", kill)
