"""Calls to actors: each with a deadline, each failing with a sentence that says who waited for whom."""

import asyncio
from collections.abc import Awaitable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from async_rlhf.errors import ActorLostError, AsyncRLHFError, DeadlineError, RunError


class RemoteActor:
    """An actor behind its Ray handle."""

    def __init__(self, handle: Any, name: str) -> None:
        self.handle = handle
        self.name = name

    async def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        """Call and await the answer. References among `args` reach the method as their values.

        Raises:
            DeadlineError: no answer in time. ActorLostError: the actor died. AsyncRLHFError: what the method raised, if one of ours.
        """
        return await resolve(self.start(method, *args), edge=f"{self.name}.{method}", timeout_s=timeout_s)

    def start(self, method: str, *args: Any, num_returns: int = 1) -> Any:
        """Call without waiting: the reference (or references) of the answer, owned by the caller."""
        return getattr(self.handle, method).options(num_returns=num_returns).remote(*args)


async def resolve(reference: Any, *, edge: str, timeout_s: float) -> Any:
    """The value of a reference; see RemoteActor.call for the errors."""
    return await within(_unwrapped(reference, edge), edge=edge, timeout_s=timeout_s)


async def within(awaitable: Awaitable[Any], *, edge: str, timeout_s: float) -> Any:
    """Await with a deadline.

    Raises:
        DeadlineError: it passed.
    """
    deadline = asyncio.timeout(timeout_s)
    try:
        async with deadline:
            return await awaitable
    except TimeoutError:
        if not deadline.expired():
            raise  # the work's own timeout, not ours
        raise DeadlineError(
            f"waited {timeout_s:g} s for {edge} without an answer; raise the deadline under `timeouts` if that work may take longer"
        ) from None


def kill(actor: RemoteActor) -> None:
    """End the actor's process at once."""
    ray.kill(actor.handle, no_restart=True)


async def _unwrapped(reference: Any, edge: str) -> Any:
    try:
        return await reference
    except RayTaskError as error:
        if isinstance(error.cause, AsyncRLHFError):
            raise error.cause from error
        raise RunError(f"{edge} failed: {last_line(error)}") from error
    except RayActorError as error:
        raise ActorLostError(f"{edge}: the actor died: {last_line(error)}") from error


def last_line(error: BaseException) -> str:
    """The last line of an error's text: what happened, without the remote traceback before it."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
