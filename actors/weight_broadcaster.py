"""The weight broadcaster: pulls each new version from the learner and owns it, for generators to install.

Pulled, because what a call returns belongs to its caller: the snapshot outlives the learner. Two versions are kept, and whoever
asks gets the newest, so that a newer version overtakes one that still waits. It may die: it starts empty, and is given the
learner's version again.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actors.remote import RemoteActor, resolve
from actors.waiting import changed_before
from async_rlhf.errors import ActorFailedError, ActorLostError, DeadlineError, LearnerLostError
from async_rlhf.types import WeightsVersion

KEPT_VERSIONS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """What became of a version that was asked for."""

    version: int
    export_s: float
    """Seconds for the snapshot and its way to the broadcaster."""
    digest: int
    """Of the weights: equal digests, equal weights."""
    canary_logprobs: tuple[float, ...]
    """The learner's, nats: nearly equal weights have nearly equal ones."""
    gather_s: float = 0.0
    """Part of `export_s`: the snapshot, in rank 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """A version to install."""

    version: int
    weights: list[Any]
    """[reference]: in a list, because a bare one would arrive as its value's copy."""


class WeightBroadcaster:
    """Between the learner ranks and the generators. All methods are coroutines of one event loop."""

    def __init__(self, timeout_s: float) -> None:
        """
        Args:
            timeout_s: deadline of a snapshot.
        """
        self._timeout_s = timeout_s
        self._versions: dict[int, Any] = {}
        self._changed = asyncio.Condition()

    async def publish(self, version: int, ranks: Sequence[RemoteActor]) -> Published:
        """Pull `version` from the learner; offered to the generators unless they were offered a newer one already.

        The learner may change its parameters as soon as this returns.
        Args:
            ranks: the learner; every rank takes part in a snapshot, rank 0 returns it.
        Raises:
            LearnerLostError: a rank died, or did not answer in time.
        """
        started = time.perf_counter()
        references = [rank.start("snapshot", version) for rank in ranks]
        edges = [f"{rank.name}.snapshot" for rank in ranks]
        pulls = (resolve(reference, edge=edge, timeout_s=self._timeout_s) for reference, edge in zip(references, edges, strict=True))
        try:
            weights: WeightsVersion = (await asyncio.gather(*pulls))[0]
        except (ActorLostError, ActorFailedError, DeadlineError) as error:
            raise LearnerLostError(f"weights version {version} could not be pulled: {error}") from error
        async with self._changed:
            if version >= max(self._versions, default=0):
                self._versions[version] = references[0]
            for old in sorted(self._versions)[:-KEPT_VERSIONS]:
                del self._versions[old]
            self._changed.notify_all()
        return Published(
            version=version,
            export_s=time.perf_counter() - started,
            digest=weights.manifest.digest,
            canary_logprobs=weights.manifest.canary_logprobs,
            gather_s=weights.gather_s,
        )

    async def newer_than(self, version: int, wait_s: float) -> Offer | None:
        """The newest version, if it is newer than `version`; waits up to `wait_s` for one, then None."""
        ends = time.monotonic() + wait_s
        async with self._changed:
            while max(self._versions, default=-1) <= version:
                if not await changed_before(self._changed, ends):
                    return None
            newest = max(self._versions)
            return Offer(version=newest, weights=[self._versions[newest]])
