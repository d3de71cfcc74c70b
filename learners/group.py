"""All ranks of the learner as one: every call goes to each of them at once, and the first failure is the group's."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from async_rlhf.config import Config
from async_rlhf.errors import RunError
from async_rlhf.protocols import Caller
from async_rlhf.types import StepReport

logger = logging.getLogger(__name__)

JOIN_ATTEMPTS = 3
"""The rendezvous port is found free and then bound by another process: now and then somebody else is faster."""


class LearnerGroup:
    """The learner, as the train loop sees it."""

    def __init__(self, ranks: Sequence[Caller], config: Config) -> None:
        self._ranks = list(ranks)
        self._timeouts = config.timeouts

    async def join(self) -> None:
        """Let the ranks meet and load the policy.

        Raises:
            RunError: they did not meet in JOIN_ATTEMPTS attempts.
        """
        for attempt in range(1, JOIN_ATTEMPTS + 1):
            address, port = await self._ranks[0].call("rendezvous", timeout_s=self._timeouts.start_s)
            try:
                await self._all("join", address, port, timeout_s=self._timeouts.start_s)
                return
            except Exception as error:
                if "EADDRINUSE" not in str(error) and "address already in use" not in str(error).lower():
                    raise
                logger.warning("port %s:%s was taken meanwhile (attempt %s of %s)", address, port, attempt, JOIN_ATTEMPTS)
        raise RunError(f"the learner ranks found no free rendezvous port in {JOIN_ATTEMPTS} attempts; is this host out of ports?")

    async def train_step(self, update: int, shards: Sequence[Any]) -> Sequence[StepReport]:
        """See LearnerClient."""
        calls = (
            rank.call("train_step", update, shard, timeout_s=self._timeouts.step_s) for rank, shard in zip(self._ranks, shards, strict=True)
        )
        return await asyncio.gather(*calls)

    async def save_pretrained(self, folder: str) -> None:
        """Write the policy as a Hugging Face folder."""
        await self._all("save_pretrained", folder, timeout_s=self._timeouts.weights_s)

    async def _all(self, method: str, *args: Any, timeout_s: float) -> None:
        await asyncio.gather(*(rank.call(method, *args, timeout_s=timeout_s) for rank in self._ranks))
