"""The gate between the updates of a deterministic run: an evaluation has the engines for itself, and training cannot tell.

Once batch v is decided, and as long as no generator has version v + 1, nothing is sampled for training: the learner is at work.
An evaluation of version v takes place in that time. The install that follows forgets what the engines remember of it.
"""

import asyncio

OPEN = -1


class InstallGate:
    """Holds back installs of later versions while it is closed."""

    def __init__(self) -> None:
        self._closed_at = OPEN
        self._decided = -1
        self._changed = asyncio.Condition()

    def close(self, version: int) -> None:
        """From now on no later version than this passes."""
        self._closed_at = version

    async def open(self) -> None:
        """Every version passes."""
        async with self._changed:
            self._closed_at = OPEN
            self._changed.notify_all()

    async def passed(self, version: int) -> None:
        """Wait until `version` may be installed."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed_at == OPEN or version <= self._closed_at)

    async def decide(self, update: int) -> None:
        """The batch of `update` is decided: everything that it needs is sampled."""
        async with self._changed:
            self._decided = update
            self._changed.notify_all()

    async def decided(self, update: int) -> None:
        """Wait for that."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._decided >= update)
