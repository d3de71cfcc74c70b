"""Decisions are on the disk before anybody learns of them, and meanwhile the queue answers everybody else."""

import asyncio
import threading
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from actors.durability import Durability
from async_rlhf.errors import JournalError

pytestmark = pytest.mark.timeout(30)


class SlowDisk:
    """A journal whose sync ends when it may."""

    def __init__(self) -> None:
        self.may_end = threading.Event()
        self.syncs = 0
        self.failure = ""

    def sync(self) -> None:
        assert self.may_end.wait(20)
        self.syncs += 1
        if self.failure:
            raise JournalError(self.failure)


def make(disk: SlowDisk, decided: int) -> Durability:
    history: Any = SimpleNamespace(
        flush=lambda: None,
        begin_segment=lambda: disk.syncs,
        drop_segment=lambda segment: disk.sync(),
        ledger=SimpleNamespace(decided=decided),
    )
    journal: Any = disk
    return Durability(history, journal, every_s=1000.0)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 20))


def test_others_go_on_while_a_decision_is_synced_and_its_asker_waits() -> None:
    async def story() -> None:
        disk = SlowDisk()
        waiting = asyncio.create_task(make(disk, decided=1).decision(0))
        for _ in range(50):
            await asyncio.sleep(0.001)
        assert not waiting.done()
        disk.may_end.set()
        await waiting

    run(story())


def test_a_decision_that_is_on_the_disk_costs_no_further_sync_until_it_is_undone() -> None:
    async def story() -> None:
        disk = SlowDisk()
        disk.may_end.set()
        durability = make(disk, decided=3)
        for update in (2, 0, 1, 2):
            await durability.decision(update)
        assert disk.syncs == 1
        durability.undo(1)
        await durability.decision(0)
        assert disk.syncs == 1
        await durability.decision(1)
        assert disk.syncs == 2

    run(story())


def test_a_segment_begins_between_two_syncs_and_others_go_on_meanwhile() -> None:
    async def story() -> None:
        disk = SlowDisk()
        marking = asyncio.create_task(make(disk, decided=0).segment())
        for _ in range(50):
            await asyncio.sleep(0.001)
        assert not marking.done()
        disk.may_end.set()
        num_syncs_before: Any = await marking
        assert (num_syncs_before, disk.syncs) == (1, 2)

    run(story())


def test_others_go_on_while_a_segment_is_deleted_and_none_begins_meanwhile() -> None:
    async def story() -> None:
        disk = SlowDisk()
        durability = make(disk, decided=0)
        dropping = asyncio.create_task(durability.drop(0))
        for _ in range(50):
            await asyncio.sleep(0.001)
        assert not dropping.done() and durability.still.locked()
        disk.may_end.set()
        await dropping
        assert not durability.still.locked()

    run(story())


def test_a_disk_that_fails_is_heard_by_who_waits_for_a_decision() -> None:
    async def story() -> None:
        disk = SlowDisk()
        disk.may_end.set()
        disk.failure = "no disk"
        with pytest.raises(JournalError, match="no disk"):
            await make(disk, decided=1).decision(0)

    run(story())
