"""Rewards in an actor of their own, so that a slow or large one overlaps everything else."""

from collections.abc import Sequence

from async_rlhf.config import Config
from async_rlhf.rewards import Rating, open_reward
from async_rlhf.types import Prompt, RolloutGroup


class Rater:
    """Stateless between calls; a pool holds several. What it says goes to a Scorer, with the groups."""

    def __init__(self, config: Config, model_folder: str, reward_path: str) -> None:
        """Load tokenizer and reward.

        Raises:
            ConfigError: a part of the reward cannot be there.
        """
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(model_folder)
        self._reward = open_reward(config.reward, reward_path)

    def rate(self, groups: Sequence[RolloutGroup], only: int | None = None) -> tuple[int, Rating]:
        """Rate all completions of the groups, in order, or of the one of index `only`; returns how many, and the rating.

        Raises:
            RewardError: no score for a completion. RewardLostError: whoever should answer cannot be reached.
        """
        groups = groups if only is None else groups[only : only + 1]
        prompts = [group.ticket.prompt for group in groups for _ in group.rollouts]
        sampled = [rollout.completion_ids.tolist() for group in groups for rollout in group.rollouts]
        texts: list[str] = self._tokenizer.batch_decode(sampled, skip_special_tokens=True)
        rating = self._reward.rate(prompts, texts)
        return len(texts), rating

    def rate_texts(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """The scores of single texts, for an evaluation; likewise."""
        return self._reward.rate(prompts, texts).scores.tolist()
