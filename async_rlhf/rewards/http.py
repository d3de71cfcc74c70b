"""A reward behind HTTP.

POST {"prompts": [...], "completions": [...], "columns": {"name": [...]}}  ->  {"scores": [...]}
"""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from async_rlhf.config.rewards import RewardPartConfig
from async_rlhf.errors import ConfigError, RewardError
from async_rlhf.rewards.attempts import BackgroundLoop, in_order
from async_rlhf.rewards.base import Rating, Texts, checked_scores, shown, texts_of
from async_rlhf.rewards.client import Address, JsonClient, probe
from async_rlhf.types import Prompt


def http_address(key: str, part: RewardPartConfig) -> Address:
    """Where the part named by `key` asks."""
    return Address(key=f"{key}.url", url=part.url, token_env=part.token_env, allow_plain_http=part.allow_plain_http)


def check_http(key: str, part: RewardPartConfig) -> None:
    """Send an empty batch.

    Raises:
        ConfigError: the address is wrong, nobody answers there, or the answer is certain to be no reward's.
    """
    if not part.url:
        raise ConfigError(f"{key}.url must say where batches are posted; `async-rlhf serve-reward` offers such an address")
    answer = probe(http_address(key, part), "POST", part.url, {"prompts": [], "completions": [], "columns": {}})
    if answer is not None and not (isinstance(answer, dict) and "scores" in answer):
        raise ConfigError(f'{key}.url: {part.url} must answer {{"scores": []}} to an empty batch, got {shown(answer)}')


class HttpReward:
    """Batches of `batch_size`, `concurrency` at once."""

    def __init__(self, key: str, part: RewardPartConfig) -> None:
        """
        Raises:
            ConfigError: the address may not be asked.
        """
        self._part = part
        self._client = JsonClient(http_address(key, part), part)
        self._loop = BackgroundLoop()

    def rate(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Rating:
        """See Reward."""
        texts, size = texts_of(prompts, completions), self._part.batch_size
        batches = [texts.part(begin, begin + size) for begin in range(0, len(texts.completions), size)]
        scores = self._loop.run(in_order(batches, self._score, self._part.concurrency))
        return Rating(scores=np.concatenate([np.empty(0, np.float32), *scores]))

    def close(self) -> None:
        """See Reward."""
        self._loop.run(self._client.close())
        self._loop.close()

    async def _score(self, texts: Texts) -> np.ndarray:
        def read(answer: Any) -> np.ndarray:
            if not isinstance(answer, dict) or "scores" not in answer:
                raise RewardError(f'{self._part.url} must answer {{"scores": [...]}}, got {shown(cast(object, answer))}')
            return checked_scores(self._part.url, cast(dict[str, Any], answer)["scores"], texts)

        body = {"prompts": texts.prompts, "completions": texts.completions, "columns": texts.columns}
        return await self._client.ask(lambda attempt: body, read)
