"""What single completions are worth: text, the task's metric, and the divergence from the reference."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from async_rlhf.evaluation import Sample, expected_of
from async_rlhf.rewards import Reward
from async_rlhf.types import Prompt, Rollout, RolloutGroup, Ticket

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from actors.reference import ReferencePolicy


class Assessor:
    """Judges completions of held-out prompts."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        metric: Reward | None,
        reference: "ReferencePolicy | None",
    ) -> None:
        """
        Args:
            metric: None: somebody else gives the scores.
            reference: None: no divergence is estimated.
        """
        self._tokenizer = tokenizer
        self._metric = metric
        self._reference = reference

    def assess(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], sampled: bool) -> list[Sample]:
        """
        Args:
            prompts, rollouts: N each.
            sampled: at the training temperature, so that the divergence from the reference can be estimated.
        Returns:
            N samples, their score 0 where there is no metric.
        Raises:
            RewardError: the metric broke its contract. RewardLostError: whoever should answer cannot be reached.
        """
        texts = self._tokenizer.batch_decode([rollout.completion_ids.tolist() for rollout in rollouts], skip_special_tokens=True)
        scores = self.grade(prompts, texts) if self._metric is not None else [0.0] * len(texts)
        nats = divergences(self._reference, prompts, rollouts) if sampled and self._reference is not None else None
        return [
            Sample(
                prompt=prompt.text,
                completion=texts[index],
                expected=expected_of(prompt),
                score=scores[index],
                kl_nats=nats[index] if nats else None,
                num_tokens=len(rollout.completion_ids),
                finish_reason=rollout.finish_reason.value,
                prompt_id=prompt.prompt_id,
            )
            for index, (prompt, rollout) in enumerate(zip(prompts, rollouts, strict=True))
        ]

    def grade(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """The metric of N texts.

        Raises:
            RewardError: the metric broke its contract. RewardLostError: whoever should answer cannot be reached.
        """
        assert self._metric is not None, "where reward actors measure, they are asked"
        return self._metric.rate(prompts, texts).scores.tolist()


def divergences(reference: "ReferencePolicy", prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[float]:
    """Per completion: sum over tokens of behavior minus reference log-probability, in nats; its mean estimates KL(policy || reference)."""
    groups = [
        RolloutGroup(
            ticket=Ticket(ticket_id=index, prompt=prompt, epoch=0, seed=0, deadline=0, attempt=0, holder="evaluation"), rollouts=(rollout,)
        )
        for index, (prompt, rollout) in enumerate(zip(prompts, rollouts, strict=True))
    ]
    return [
        float(np.sum(rollout.behavior_logprobs - logprobs, dtype=np.float64))
        for rollout, logprobs in zip(rollouts, reference.logprobs(groups), strict=True)
    ]
