"""Listwise preference optimization takes all K completions of each group, their scores and reference log-probabilities."""

from torch import Tensor

from async_rlhf.batching import Microbatch, Unit
from async_rlhf.losses import LossOutput, listwise_loss
from async_rlhf.losses.base import masked_sum
from async_rlhf.types import ScoredGroup
from learners.objective import Objective, Totals


class Listwise(Objective):
    """The whole ranking; a tied group has none, but stays in the denominator."""

    def select(self, scored: ScoredGroup) -> Unit:
        """All K completions."""
        return () if scored.tied else super().select(scored)

    def loss(self, policy_logprobs: Tensor, microbatch: Microbatch, totals: Totals) -> LossOutput:
        """Sum over the microbatch's groups / groups of the global minibatch."""
        shape = (-1, microbatch.unit_size)
        return listwise_loss(
            masked_sum(policy_logprobs, microbatch.loss_mask).reshape(shape),
            masked_sum(microbatch.reference_logprobs, microbatch.loss_mask).reshape(shape),
            microbatch.scores.reshape(shape),
            beta=self._config.algorithm.listwise.beta,
            denominator=totals.groups,
        )
