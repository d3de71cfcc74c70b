"""The scorer: a reward for each completion, and its log-probabilities under the frozen start."""

from collections.abc import Sequence
from pathlib import Path

from actors.assessor import Assessor
from async_rlhf.config import Config
from async_rlhf.evaluation import Sample
from async_rlhf.parcel import Parcel
from async_rlhf.rewards import Rating, open_metric, open_reward
from async_rlhf.scores import penalise_cut
from async_rlhf.types import Prompt, Rollout, RolloutGroup, ScoredGroup


class Scorer:
    """Stateless between calls; a pool holds several."""

    def __init__(self, config: Config, model_folder: str, reward_path: str, metric_path: str) -> None:
        """Load tokenizer, frozen reference, reward function and metric.

        Args:
            metric_path: of the task's own metric; empty: evaluations measure the reward, and ask the reward actors where there are any.
        Raises:
            ConfigError: a path does not import.
        """
        self._reward = None if config.reward.count else open_reward(config.reward, reward_path)
        metric = open_metric(config.reward, reward_path, metric_path) if metric_path else self._reward
        self._cut_score = config.reward.missing_eos_penalty
        from transformers import AutoTokenizer

        from actors.reference import ReferencePolicy

        self._tokenizer = AutoTokenizer.from_pretrained(model_folder)
        self._reference = ReferencePolicy(Path(model_folder), config)
        self._assessor = Assessor(self._tokenizer, metric, self._reference)

    def score(self, groups: Sequence[RolloutGroup], only: int | None = None, rating: Rating | None = None) -> tuple[int, Parcel]:
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
        return len(scored), Parcel(scored)

    def assess(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], sampled: bool) -> list[Sample]:
        """Single completions of held-out prompts, for an evaluation; see Assessor."""
        return self._assessor.assess(prompts, rollouts, sampled)

    def grade(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """The metric of texts that anybody wrote; see Assessor."""
        return self._assessor.grade(prompts, texts)

    def rate_texts(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """The run's reward of such texts.

        Raises:
            RewardError: no score for a completion. RewardLostError: whoever should answer cannot be reached.
        """
        assert self._reward is not None, "where reward actors rate, they are asked"
        return self._reward.rate(prompts, texts).scores.tolist()

    def _decode(self, rollouts: Sequence[Rollout]) -> list[str]:
        return self._tokenizer.batch_decode([rollout.completion_ids.tolist() for rollout in rollouts], skip_special_tokens=True)
