"""Waiting with a deadline on the side of whoever is waited for."""

import asyncio
import time


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
