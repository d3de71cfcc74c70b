"""The weight broadcaster: pulls each new version from the learner, owns it, and brings every generator up to the newest.

Pulled, because what a call returns belongs to its caller: the snapshot outlives the learner. Two versions are kept. Each
generator installs at its own pace; a newer version overtakes one that still waits.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from actors.remote import RemoteActor, resolve
from actors.waiting import changed_before
from async_rlhf.types import InstallReport

KEPT_VERSIONS = 2


class WeightBroadcaster:
    """Between the learner ranks and the generators. All methods are coroutines of one event loop."""

    def __init__(self, ranks: Sequence[RemoteActor], generators: Mapping[str, RemoteActor], queue: RemoteActor, timeout_s: float) -> None:
        """
        Args:
            ranks: the learner; every rank takes part in a snapshot, rank 0 returns it.
            generators: by incarnation.
            queue: learns of each finished install, which is what admits further tickets.
            timeout_s: deadline of a snapshot, and of an install.
        """
        self._ranks = list(ranks)
        self._generators = dict(generators)
        self._queue = queue
        self._timeout_s = timeout_s
        self._versions: dict[int, Any] = {}
        self._reports: dict[str, InstallReport] = {}
        self._changed = asyncio.Condition()
        self._failure: BaseException | None = None
        self._workers: list[asyncio.Task[None]] = []

    async def publish(self, version: int) -> float:
        """Pull `version` and have it installed everywhere; returns when it is pulled: seconds that took.

        The learner may change its parameters as soon as this returns.
        Raises:
            WeightsError, EngineError, ActorLostError, DeadlineError: of an earlier install, or of this snapshot.
        """
        self._raise_failure()
        started = time.perf_counter()
        references = [rank.start("snapshot", version) for rank in self._ranks]
        edges = [f"{rank.name}.snapshot" for rank in self._ranks]
        pulls = (resolve(reference, edge=edge, timeout_s=self._timeout_s) for reference, edge in zip(references, edges, strict=True))
        await asyncio.gather(*pulls)
        async with self._changed:
            self._versions[version] = references[0]
            for old in sorted(self._versions)[:-KEPT_VERSIONS]:
                del self._versions[old]
            self._changed.notify_all()
        if not self._workers:
            self._workers = [asyncio.create_task(self._keep_current(name)) for name in self._generators]
        return time.perf_counter() - started

    async def wait_installed(self, version: int, wait_s: float) -> bool:
        """Wait until every generator samples from `version` or a newer one; False after `wait_s`.

        Raises:
            the failure of an install.
        """
        ends = time.monotonic() + wait_s
        async with self._changed:
            while not self._all_at(version):
                self._raise_failure()
                if not await changed_before(self._changed, ends):
                    return False
        return True

    async def reports(self) -> dict[str, InstallReport]:
        """The last install of each generator.

        Raises:
            the failure of an install.
        """
        self._raise_failure()
        return dict(self._reports)

    async def _keep_current(self, name: str) -> None:
        """One generator's worker: install the newest version, again and again."""
        installed = -1
        try:
            while True:
                async with self._changed:
                    while max(self._versions) <= installed:
                        await self._changed.wait()
                    version = max(self._versions)
                    reference = self._versions[version]
                report = await self._generators[name].call("install", reference, timeout_s=self._timeout_s)
                installed = version
                await self._queue.call("installed", name, version, timeout_s=self._timeout_s)
                async with self._changed:
                    self._reports[name] = report
                    self._changed.notify_all()
        except Exception as error:
            # Kept for whoever asks next: publish, wait_installed or reports raises it in the run.
            async with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _all_at(self, version: int) -> bool:
        return all(name in self._reports and self._reports[name].version >= version for name in self._generators)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
