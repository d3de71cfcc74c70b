"""Best-of-K takes the best completion of each group."""

from dataclasses import replace

from torch import Tensor

from async_rlhf.batching import Microbatch, Unit, sequence_of
from async_rlhf.losses import LossOutput, bok_loss
from async_rlhf.types import ScoredGroup
from learners.objective import Objective, Totals
from learners.ranking import ranking


class BoK(Objective):
    """The best alone; that of a tied group has weight 0 and stays in the denominator."""

    def select(self, scored: ScoredGroup) -> Unit:
        """(best,)."""
        return (replace(sequence_of(scored, ranking(scored)[-1]), weight=0.0 if scored.tied else 1.0),)

    def loss(self, policy_logprobs: Tensor, microbatch: Microbatch, totals: Totals) -> LossOutput:
        """Sum over the microbatch's tokens / completion tokens of the global minibatch."""
        return bok_loss(policy_logprobs, microbatch.loss_mask, microbatch.weights, denominator=totals.tokens)
