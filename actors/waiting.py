"""Waits that end: by a deadline on the side of whoever is waited for, or by an event."""

import asyncio
import time
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def changed_before(changed: asyncio.Condition, ends_s: float) -> bool:
    """Wait, holding the condition, until somebody notifies it; False when `ends_s` (time.monotonic) has come."""
    rest_s = ends_s - time.monotonic()
    if rest_s <= 0:
        return False
    try:
        async with asyncio.timeout(rest_s):
            await changed.wait()
    except TimeoutError:
        return False
    return True


async def unless(event: asyncio.Event, call: Awaitable[T]) -> T | None:
    """The answer of `call`, or None as soon as the event is set; the call has ended by then."""
    asking, waiting = asyncio.ensure_future(call), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({asking, waiting}, return_when=asyncio.FIRST_COMPLETED)
        return asking.result() if asking.done() else None
    finally:
        asking.cancel()
        waiting.cancel()
        await asyncio.gather(asking, waiting, return_exceptions=True)
