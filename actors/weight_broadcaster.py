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

from actors.remote import RemoteActor
from actors.waiting import changed_before
from async_rlhf.errors import ActorFailedError, ActorLostError, DeadlineError, LearnerLostError, ObjectLostError
from async_rlhf.types import WeightsManifest, WeightsVersion

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
    buckets: list[Any]
    """References of the version's buckets, in order: in a list, because a bare one would arrive as its value's copy."""


class WeightBroadcaster:
    """Between the learner ranks and the generators. All methods are coroutines of one event loop."""

    def __init__(self, timeout_s: float, num_kept: int = KEPT_VERSIONS) -> None:
        """
        Args:
            timeout_s: deadline of a snapshot.
            num_kept: versions kept. Of one, the old version is let go before the new one is pulled: if the learner dies just then,
                the next version is that of its checkpoint.
        """
        self._timeout_s = timeout_s
        self._num_kept = num_kept
        self._versions: dict[int, list[Any]] = {}
        self._changed = asyncio.Condition()

    async def publish(self, version: int, ranks: Sequence[RemoteActor]) -> Published:
        """Pull `version` from the learner; offered to the generators unless they were offered a newer one already.

        The learner may change its parameters as soon as this returns.
        Args:
            ranks: the learner; every rank takes part in a snapshot, rank 0 returns it.
        Raises:
            LearnerLostError: a rank died, or did not answer in time, or a bucket is gone with the node that made it.
        """
        started = time.perf_counter()
        for old in sorted(self._versions)[: len(self._versions) + 1 - self._num_kept]:
            if old < version:
                del self._versions[old]
        pulls = [rank.stream("snapshot", version, look=_facts_of, timeout_s=self._timeout_s) for rank in ranks]
        try:
            buckets = (await asyncio.gather(*pulls))[0]
        except (ActorLostError, ActorFailedError, DeadlineError, ObjectLostError) as error:
            raise LearnerLostError(f"weights version {version} could not be pulled: {error}") from error
        manifest = WeightsManifest.of([of_bucket.manifest for _, of_bucket in buckets])
        async with self._changed:
            if version >= max(self._versions, default=0):
                self._versions[version] = [reference for reference, _ in buckets]
            for old in sorted(self._versions)[: -self._num_kept]:
                del self._versions[old]
            self._changed.notify_all()
        return Published(
            version=version,
            export_s=time.perf_counter() - started,
            digest=manifest.digest,
            canary_logprobs=manifest.canary_logprobs,
            gather_s=sum(of_bucket.gather_s for _, of_bucket in buckets),
        )

    async def newer_than(self, version: int, wait_s: float) -> Offer | None:
        """The newest version, if it is newer than `version`; waits up to `wait_s` for one, then None."""
        ends = time.monotonic() + wait_s
        async with self._changed:
            while max(self._versions, default=-1) <= version:
                if not await changed_before(self._changed, ends):
                    return None
            newest = max(self._versions)
            return Offer(version=newest, buckets=list(self._versions[newest]))


def _facts_of(bucket: WeightsVersion) -> WeightsVersion:
    return WeightsVersion(manifest=bucket.manifest, tensors={}, gather_s=bucket.gather_s)
