"""When the journal of a queue is on the disk. It is synced in another thread: meanwhile the queue answers everybody else."""

import asyncio

from async_rlhf.history import History
from async_rlhf.journal import Journal, Mark


class Durability:
    """Syncs a history's journal now and then, and when somebody must know."""

    def __init__(self, history: History, journal: Journal, every_s: float) -> None:
        self._history = history
        self._journal = journal
        self._every_s = every_s
        self._num_durable = 0
        """Decisions that are known to be on the disk."""
        self._task: asyncio.Task[None] | None = None
        self.still = asyncio.Lock()
        """Held while the other thread works: whoever ends a segment, or takes decisions back, waits for it."""

    def keep_going(self) -> None:
        """Sync every `every_s` seconds from now on; raises what ended that."""
        if self._task is not None and self._task.done():
            self._task.result()
        self._task = self._task or asyncio.create_task(self._sync_for_ever())

    async def decision(self, update: int) -> None:
        """Wait until batch `update`'s decision is on the disk.

        Raises:
            JournalError: the storage failed.
        """
        if update >= self._num_durable:
            await self._sync()

    async def segment(self) -> Mark:
        """Begin a segment; returns how far the history goes, all of it on the disk.

        Raises:
            JournalError: the storage failed.
        """
        await self._sync()  # what is left to sync while nobody is answered is little
        async with self.still:
            mark = self._history.begin_segment()
        await self._sync()
        return mark

    async def drop(self, segment: int) -> None:
        """Delete a segment that nobody needs; to unlink a large file takes tens of milliseconds."""
        async with self.still:
            await asyncio.to_thread(self._history.drop_segment, segment)

    def undo(self, update: int) -> None:
        """The decisions from `update` on were taken back. With `still` held."""
        self._num_durable = min(self._num_durable, update)

    async def _sync(self) -> None:
        """Not to be cancelled: the thread would go on without the lock."""
        async with self.still:
            self._history.flush()
            num_decided = self._history.ledger.decided
            await asyncio.to_thread(self._journal.sync)
            self._num_durable = max(self._num_durable, num_decided)

    async def _sync_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            await self._sync()
