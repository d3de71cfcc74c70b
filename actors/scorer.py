"""The scorer: a reward for each completion, and its log-probabilities under the frozen start."""

from collections.abc import Sequence
from pathlib import Path

from async_rlhf.config import Config
from async_rlhf.rewards import Rating, open_metric, open_reward
from async_rlhf.scores import penalise_cut
from async_rlhf.types import Prompt, Rollout, RolloutGroup, ScoredGroup


class Scorer:
    """Stateless between calls; a pool holds several."""

    def __init__(self, config: Config, model_folder: str, reward_path: str, metric_path: str) -> None:
        """Load tokenizer, frozen reference, reward function and metric.

        Args:
            metric_path: of the task's own metric; empty: evaluations measure the reward.
        Raises:
            ConfigError: a path does not import.
        """
        self._reward = None if config.reward.count else open_reward(config.reward, reward_path)
        own = self._reward if not metric_path else None
        self._metric = own or open_metric(config.reward, reward_path, metric_path)
        self._cut_score = config.reward.missing_eos_penalty
        from transformers import AutoTokenizer

        from actors.reference import ReferencePolicy

        self._tokenizer = AutoTokenizer.from_pretrained(model_folder)
        self._reference = ReferencePolicy(Path(model_folder), config)

    def score(self, groups: Sequence[RolloutGroup], only: int | None = None, rating: Rating | None = None) -> tuple[int, list[ScoredGroup]]:
        """Score finished groups, in their order, or the one of index `only`; returns how many, and them.

        Args:
            rating: of their completions, where reward actors rate; None: the scorer's own reward does.
        Raises:
            RewardError: no score for a completion. RewardLostError: whoever should answer cannot be reached.
        """
        groups = groups if only is None else groups[only : only + 1]
        prompts = [group.ticket.prompt for group in groups for _ in group.rollouts]
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        texts = self._decode(rollouts)
        if rating is None:
            assert self._reward is not None, "where reward actors rate, their rating comes with the groups"
            rating = self._reward.rate(prompts, texts)
        scores = rating.scores
        if self._cut_score is not None:
            scores = penalise_cut(scores, [rollout.finish_reason for rollout in rollouts], self._cut_score)
        references = self._reference.logprobs(groups)
        scored: list[ScoredGroup] = []
        start = 0
        for group in groups:
            end = start + len(group.rollouts)
            scored.append(
                ScoredGroup(
                    group=group,
                    scores=scores[start:end],
                    reference_logprobs=tuple(references[start:end]),
                    completions=tuple(texts[start:end]),
                    reward_parts={name: part[start:end] for name, part in rating.parts.items()},
                )
            )
            start = end
        return len(scored), scored

    def judge(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> tuple[list[float], list[str]]:
        """The metric of single completions, and their texts: an evaluation.

        Raises:
            RewardError: the reward function broke its contract.
        """
        texts = self._decode(rollouts)
        return [float(score) for score in self._metric.rate(prompts, texts).scores], texts

    def _decode(self, rollouts: Sequence[Rollout]) -> list[str]:
        return self._tokenizer.batch_decode([rollout.completion_ids.tolist() for rollout in rollouts], skip_special_tokens=True)
