"""All ranks of the learner as one: every call goes to each of them at once, and the first failure is the group's."""

import asyncio
from collections.abc import Sequence
from typing import Any

from async_rlhf.config import Config
from async_rlhf.protocols import Caller
from async_rlhf.types import StepReport


class LearnerGroup:
    """The learner, as the train loop sees it."""

    def __init__(self, ranks: Sequence[Caller], config: Config) -> None:
        self._ranks = list(ranks)
        self._timeouts = config.timeouts

    async def join(self) -> None:
        """Let the ranks meet and load the policy."""
        address, port = await self._ranks[0].call("rendezvous", timeout_s=self._timeouts.start_s)
        await self._all("join", address, port, timeout_s=self._timeouts.start_s)

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
