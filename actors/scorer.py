"""The scorer: a reward for each completion, and its log-probabilities under the frozen start."""

from collections.abc import Sequence
from pathlib import Path

from actors.assessor import Assessor
from async_rlhf.config import Config
from async_rlhf.evaluation import Sample
from async_rlhf.rewards import call_reward, load_reward
from async_rlhf.scores import penalise_cut
from async_rlhf.types import Prompt, Rollout, RolloutGroup, ScoredGroup


class Scorer:
    """Stateless between calls; a pool holds several."""

    def __init__(self, config: Config, model_folder: str, reward_path: str, metric_path: str) -> None:
        """Load tokenizer, frozen reference, reward function and the task's own metric.

        Raises:
            ConfigError: a path does not import.
        """
        self._reward = load_reward(reward_path)
        self._cut_score = config.reward.missing_eos_penalty
        from transformers import AutoTokenizer

        from actors.reference import ReferencePolicy

        self._tokenizer = AutoTokenizer.from_pretrained(model_folder)
        self._reference = ReferencePolicy(Path(model_folder), config)
        separate_reward = self._reward if reward_path != metric_path else None
        self._assessor = Assessor(self._tokenizer, load_reward(metric_path), separate_reward, self._reference)

    def score(self, groups: Sequence[RolloutGroup], only: int | None = None) -> tuple[int, list[ScoredGroup]]:
        """Score finished groups, in their order, or the one of index `only`; returns how many, and them.

        Raises:
            RewardError: the reward function broke its contract.
        """
        groups = groups if only is None else groups[only : only + 1]
        prompts = [group.ticket.prompt for group in groups for _ in group.rollouts]
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        texts = self._decode(rollouts)
        scores = call_reward(self._reward, [p.text for p in prompts], texts, [p.columns for p in prompts])
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
                )
            )
            start = end
        return len(scored), scored

    def assess(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], sampled: bool) -> list[Sample]:
        """Single completions of held-out prompts, for an evaluation; see Assessor."""
        return self._assessor.assess(prompts, rollouts, sampled)

    def grade(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> tuple[list[float], list[float]]:
        """Metric and reward of texts that anybody wrote; see Assessor."""
        return self._assessor.grade(prompts, texts)

    def _decode(self, rollouts: Sequence[Rollout]) -> list[str]:
        return self._tokenizer.batch_decode([rollout.completion_ids.tolist() for rollout in rollouts], skip_special_tokens=True)
