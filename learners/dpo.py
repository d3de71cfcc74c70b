"""Online DPO takes the best and the worst completion of each group, and their reference log-probabilities."""

from torch import Tensor

from async_rlhf.batching import Microbatch, Unit, sequence_of
from async_rlhf.losses import LossOutput, dpo_loss
from async_rlhf.losses.base import masked_sum
from async_rlhf.types import ScoredGroup
from learners.objective import Objective, Totals
from learners.ranking import ranking


class DPO(Objective):
    """Pairs (best, worst); a tied group yields no pair but stays in the denominator."""

    def select(self, scored: ScoredGroup) -> Unit:
        """(chosen, rejected)."""
        if scored.tied:
            return ()
        worst, *_, best = ranking(scored)
        return sequence_of(scored, best), sequence_of(scored, worst)

    def loss(self, policy_logprobs: Tensor, microbatch: Microbatch, totals: Totals) -> LossOutput:
        """Sum over the microbatch's pairs / groups of the global minibatch."""
        settings = self._config.algorithm.dpo
        policy = masked_sum(policy_logprobs, microbatch.loss_mask)
        reference = masked_sum(microbatch.reference_logprobs, microbatch.loss_mask)
        return dpo_loss(
            policy[0::2],
            policy[1::2],
            reference[0::2],
            reference[1::2],
            beta=settings.beta,
            loss=settings.loss,
            label_smoothing=settings.label_smoothing,
            denominator=totals.groups,
        )
