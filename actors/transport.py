"""How a version that the broadcaster offers gets into a generator. Which way is the config's; the produce loop does not know.

    by reference    generator.install(buckets): Ray brings them to the generator's node, once for all that live there
    by group        rank 0 of the learner and the generator's workers are a group of their own, and nobody else's

| by group | learner's rank 0                              | generator                            | on a failure here                    |
|----------|-----------------------------------------------|--------------------------------------|--------------------------------------|
| pin      | holds the version? keeps it for this delivery |                                      | nothing has begun: asked again       |
| meet     | joins a fresh group                           | its workers join (once per pair)     | the group ends, the generator starts |
| prepare  |                                               | checks names, shapes, types          | anew; the learner trains on          |
| send     | sends, lot by lot                             | start update, receive, check, finish | likewise                             |
| verify   |                                               | the canary; then it may take tickets | likewise                             |

Rank 0 sends what it held back at the last publication, from a thread of its own: a generator that comes in the middle of an update
gets the newest version at once. One delivery at a time: what they would share is rank 0's connection.
"""

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, Protocol, TypeVar

from actors.remote import CONTROL_GROUP, WEIGHTS_GROUP, RemoteActor
from actors.supervision import LOST
from actors.weight_broadcaster import Offer
from async_rlhf.config import Config
from async_rlhf.errors import ActorFailedError, TransferError
from async_rlhf.types import InstallReport, Meeting

T = TypeVar("T")

RETRY_S = 0.5
"""Before the learner is asked again for a version that it does not hold now."""


class Transport(Protocol):
    """One way from an offer into a generator."""

    by_sender: bool
    """Whether the learner must still be there, with the version, when a generator takes it."""

    async def deliver(self, generator: RemoteActor, offer: Offer, ranks: Sequence[RemoteActor]) -> InstallReport | None:
        """Install and verify; None: the version was overtaken, or nobody can send it now; ask for the newest again.

        Args:
            ranks: the learner, as it is now.
        Raises:
            ObjectLostError: the offer is gone with whoever made it. Other errors: this generator must be replaced.
        """
        ...

    def forget(self, generator: RemoteActor, ranks: Sequence[RemoteActor]) -> None:
        """Let go of what is kept for a generator that is gone, or about to go. It may be unknown; no delivery to it is under way."""
        ...


class ByReference:
    """Through Ray's object store."""

    by_sender = False

    def __init__(self, config: Config) -> None:
        self._timeout_s = config.timeouts.weights_s

    async def deliver(self, generator: RemoteActor, offer: Offer, ranks: Sequence[RemoteActor]) -> InstallReport | None:
        """See Transport."""
        return await generator.call("install", *offer.buckets, timeout_s=self._timeout_s)

    def forget(self, generator: RemoteActor, ranks: Sequence[RemoteActor]) -> None:
        """Nothing is kept."""


class ByGroup:
    """Straight from the learner's rank 0; see the table above."""

    by_sender = True

    def __init__(self, config: Config) -> None:
        self._num_workers = config.generator.tensor_parallel_size
        self._call_s = config.timeouts.call_s
        self._transfer_s = config.timeouts.weights_s
        self._sending = asyncio.Lock()
        self._met: dict[str, str] = {}
        """Incarnation of a generator -> of the rank 0 that it met."""

    async def deliver(self, generator: RemoteActor, offer: Offer, ranks: Sequence[RemoteActor]) -> InstallReport | None:
        """See Transport."""
        sender = ranks[0]
        async with self._sending:
            try:
                pinned = await sender.call("pin", generator.name, offer.version, timeout_s=self._call_s, group=CONTROL_GROUP)
            except (*LOST, ActorFailedError):  # its own supervision sees to it
                pinned = False
            if pinned:
                try:
                    return await self._deliver(generator, offer, sender)
                except BaseException:  # a cancelled delivery too: the other side must not wait for its deadline
                    self._give_up(generator, sender)
                    raise
        await asyncio.sleep(RETRY_S)
        return None

    def forget(self, generator: RemoteActor, ranks: Sequence[RemoteActor]) -> None:
        """Rank 0 ends the group that it has with it: a communicator each would stay for every one that ever took part."""
        if generator.name in self._met:
            self._give_up(generator, ranks[0])

    def _give_up(self, generator: RemoteActor, sender: RemoteActor) -> None:
        self._met.pop(generator.name, None)
        sender.start("give_up", generator.name, group=CONTROL_GROUP)

    async def _deliver(self, generator: RemoteActor, offer: Offer, sender: RemoteActor) -> InstallReport:
        if self._met.get(generator.name) != sender.name:
            world_size = 1 + self._num_workers
            meeting: Meeting = await _of_sender(
                sender.call("open", generator.name, world_size, timeout_s=self._call_s, group=CONTROL_GROUP), generator
            )
            limit = self._transfer_s + self._call_s
            meets = sender.call("meet", generator.name, meeting, timeout_s=limit, group=WEIGHTS_GROUP)
            await _both(generator.call("meet", meeting, timeout_s=limit), _of_sender(meets, generator))
            self._met[generator.name] = sender.name
        num_rounds: int = await generator.call("prepare", *offer.buckets, timeout_s=self._call_s)
        limit = num_rounds * self._transfer_s + self._call_s
        sends = sender.call("send", generator.name, num_rounds, timeout_s=limit, group=WEIGHTS_GROUP)
        return await _both(generator.call("receive", timeout_s=limit), _of_sender(sends, generator))


async def _of_sender(call: Awaitable[T], generator: RemoteActor) -> T:
    """The generator has half a version, or half a group, if the learner fails now."""
    try:
        return await call
    except (*LOST, ActorFailedError) as error:
        raise TransferError(f"{generator.name} lost the learner that was sending to it: {error}") from error


async def _both(main: Awaitable[T], other: Awaitable[Any]) -> T:
    """What `main` returns, once `other` is through as well; the first failure of either ends both."""
    tasks = [asyncio.ensure_future(main), asyncio.ensure_future(other)]
    try:
        answer, _ = await asyncio.gather(*tasks)
        return answer
    finally:
        for task in tasks:
            task.cancel()
