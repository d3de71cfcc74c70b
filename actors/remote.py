"""Calls to actors: each with a deadline, each failing with a sentence that says who waited for whom."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import psutil
import ray
from ray.exceptions import ObjectLostError as RayObjectLostError
from ray.exceptions import RayActorError, RayTaskError

from actors.wait_graph import WAITS
from async_rlhf.errors import ActorFailedError, ActorLostError, AsyncRLHFError, DeadlineError, ObjectLostError

T = TypeVar("T")

CONTROL_GROUP = "control"
"""Threads of an actor that answer while its other ones work."""

WEIGHTS_GROUP = "weights"
"""Those of a learner rank that send weights while its other ones work."""

RAY_ADVICE = " Some common causes include"
"""Begins what Ray says of every death alike."""

SLICE_S = 5.0
"""A deadline is counted in slices of this length: if this very process is stopped for an hour, one slice has passed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """Where an actor runs."""

    node_id: str
    pid: int
    started_at: float
    """Unix seconds: a process id may be used again."""


class RemoteActor:
    """An actor behind its Ray handle."""

    def __init__(self, handle: Any, name: str, niceness: int = 0) -> None:
        self.handle = handle
        self.name = name
        self.niceness = niceness
        """Added to what Ray gives its process, once it is ready."""
        self.process: Process | None = None
        """Known once it is ready."""

    async def call(self, method: str, *args: Any, timeout_s: float, group: str = "") -> Any:
        """Call and await the answer. References among `args` reach the method as their values.

        Args:
            group: whose threads run it: CONTROL_GROUP, WEIGHTS_GROUP, or those that do the actor's work.
        Raises:
            DeadlineError: no answer in time. ActorLostError: the actor died. ObjectLostError: an argument is gone.
            AsyncRLHFError: what the method raised, if one of ours. ActorFailedError: what it raised, if not.
        """
        answer = await resolve(self.start(method, *args, group=group), edge=f"{self.name}.{method}", timeout_s=timeout_s)
        WAITS.heard_from(self.name)
        return answer

    async def fetch(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Call a method that returns (anything small, anything large): the reference of the second, once it is there."""
        small, large = self.start(method, *args, num_returns=2)
        await resolve(small, edge=f"{self.name}.{method}", timeout_s=timeout_s)
        WAITS.heard_from(self.name)
        return large

    async def stream(self, method: str, *args: Any, look: Callable[[Any], T], timeout_s: float) -> list[tuple[Any, T]]:
        """Call a method that yields: of each thing its reference, owned by the caller, and what `look` sees in it, once all are there."""
        seen: list[tuple[Any, T]] = []

        async def collect() -> None:
            async for reference in self.start(method, *args, num_returns="streaming"):
                seen.append((reference, look(await reference)))  # an error comes as the last reference

        edge = f"{self.name}.{method}"
        await within(_unwrapped(collect(), edge), edge=edge, timeout_s=timeout_s)
        WAITS.heard_from(self.name)
        return seen

    def start(self, method: str, *args: Any, num_returns: int | Literal["streaming"] = 1, group: str = "") -> Any:
        """Call without waiting: the reference (or references) of the answer, owned by the caller."""
        options = {"num_returns": num_returns, **({"concurrency_group": group} if group else {})}
        return getattr(self.handle, method).options(**options).remote(*args)

    async def ping(self, timeout_s: float) -> None:
        """Wait for a sign of life, whatever the actor is busy with; see `call` for the errors."""
        answer = self.handle.__ray_ready__.options(concurrency_group=CONTROL_GROUP).remote()
        await resolve(answer, edge=f"{self.name}: a sign of life", timeout_s=timeout_s)
        WAITS.heard_from(self.name)


async def resolve(reference: Any, *, edge: str, timeout_s: float) -> Any:
    """The value of a reference; see RemoteActor.call for the errors."""
    return await within(_unwrapped(reference, edge), edge=edge, timeout_s=timeout_s)


async def within(awaitable: Awaitable[Any], *, edge: str, timeout_s: float) -> Any:
    """Await with a deadline.

    Raises:
        DeadlineError: it passed. Its text holds everybody who waits.
    """
    work = asyncio.ensure_future(awaitable)
    left_s = timeout_s
    with WAITS.waiting(edge):
        try:
            while left_s > 0:
                slice_s = min(left_s, SLICE_S)
                await asyncio.wait({work}, timeout=slice_s)
                if work.done():
                    return work.result()
                left_s -= slice_s
            raise DeadlineError(
                f"waited {timeout_s:g} s for {edge} without an answer; raise the deadline under `timeouts` if that work may take "
                f"longer\n{WAITS.render()}"
            )
        finally:
            work.cancel()


def kill(actor: RemoteActor) -> None:
    """End the actor and free its name. A frozen process lives a few seconds longer; see kill_process."""
    ray.kill(actor.handle, no_restart=True)
    WAITS.forget(actor.name)


def kill_process(actor: RemoteActor) -> None:
    """The same at once, a frozen process included if it is on this node."""
    kill(actor)
    process = actor.process
    if process is not None and process.node_id == ray.get_runtime_context().get_node_id():
        with suppress(psutil.Error):
            living = psutil.Process(process.pid)
            if living.create_time() == process.started_at:
                living.kill()


async def _unwrapped(reference: Any, edge: str) -> Any:
    try:
        return await reference
    except RayTaskError as error:
        if isinstance(error.cause, AsyncRLHFError):
            raise error.cause from error
        if isinstance(error.cause, RayObjectLostError | RayActorError):  # of an argument: who should have made it is gone
            raise ObjectLostError(f"{edge}: {last_line(error)}") from error
        raise ActorFailedError(f"{edge} failed: {last_line(error)}") from error
    except RayObjectLostError as error:
        raise ObjectLostError(f"{edge}: {last_line(error)}") from error
    except RayActorError as error:
        raise ActorLostError(f"{edge}: the actor died: {last_line(error)}") from error


def last_line(error: BaseException) -> str:
    """The last line of an error's text: what happened, without the remote traceback before it."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].partition(RAY_ADVICE)[0].strip() if lines else type(error).__name__
