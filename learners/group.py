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

    async def join(self, checkpoint: str | None = None) -> int:
        """Let the ranks meet and load the policy; returns the version that the learner starts from.

        Args:
            checkpoint: go on from this folder, which any number of ranks wrote; None: version 0.
        Raises:
            ConfigError: the checkpoint is incomplete, damaged, or of another model or algorithm.
        """
        address, port = await self._ranks[0].call("rendezvous", timeout_s=self._timeouts.start_s)
        versions = await self._all("join", address, port, checkpoint, timeout_s=self._timeouts.start_s)
        assert len(set(versions)) == 1, f"the ranks start from different versions: {versions}"
        return versions[0]

    async def train_step(self, update: int, shards: Sequence[Any]) -> Sequence[StepReport]:
        """See LearnerClient."""
        calls = (
            rank.call("train_step", update, shard, timeout_s=self._timeouts.step_s) for rank, shard in zip(self._ranks, shards, strict=True)
        )
        return await asyncio.gather(*calls)

    async def save_pretrained(self, folder: str) -> None:
        """Write the policy as a Hugging Face folder."""
        await self._all("save_pretrained", folder, timeout_s=self._timeouts.weights_s)

    async def save(self, folder: str, version: int) -> None:
        """Copy the state of `version` aside and begin to write it into `folder`; training may go on at once."""
        await self._all("save", folder, version, timeout_s=self._timeouts.weights_s)

    async def saved(self) -> dict[str, tuple[int, int]]:
        """Wait for the files of `save`, of all ranks: name relative to the folder -> (size in bytes, CRC-32).

        Raises:
            RunError: a rank could not write; the learner itself is as it was.
        """
        of_ranks: list[dict[str, tuple[int, int]]] = await self._all("saved", timeout_s=self._timeouts.weights_s)
        merged = {name: facts for of_rank in of_ranks for name, facts in of_rank.items()}
        assert len(merged) == sum(map(len, of_ranks)), f"two ranks wrote the same file: {of_ranks}"
        return merged

    async def _all(self, method: str, *args: Any, timeout_s: float) -> list[Any]:
        return await asyncio.gather(*(rank.call(method, *args, timeout_s=timeout_s) for rank in self._ranks))
