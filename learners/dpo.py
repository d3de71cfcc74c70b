"""Online DPO takes the best and the worst completion of each group, and their reference log-probabilities."""

import numpy as np
from torch import Tensor

from async_rlhf.batching import Microbatch, Unit, sequence_of
from async_rlhf.config.schema import AlgorithmConfig
from async_rlhf.losses import LossOutput, dpo_loss
from async_rlhf.losses.base import masked_sum
from async_rlhf.types import ScoredGroup
from learners.objective import Totals


class DPO:
    """Pairs (best, worst); a tied group yields no pair but stays in the denominator."""

    def __init__(self, config: AlgorithmConfig) -> None:
        self._config = config.dpo

    def select(self, scored: ScoredGroup) -> Unit:
        """(chosen, rejected). Equal scores are broken by the ticket's seed: arrival order would favour short answers."""
        if scored.tied:
            return ()
        lottery = np.random.default_rng(scored.group.ticket.seed).permutation(len(scored.scores))
        ranking = np.lexsort((lottery, scored.scores))
        return sequence_of(scored, int(ranking[-1])), sequence_of(scored, int(ranking[0]))

    def loss(self, policy_logprobs: Tensor, microbatch: Microbatch, totals: Totals) -> LossOutput:
        """Sum over the microbatch's pairs / groups of the global minibatch."""
        policy = masked_sum(policy_logprobs, microbatch.loss_mask)
        reference = masked_sum(microbatch.reference_logprobs, microbatch.loss_mask)
        return dpo_loss(
            policy[0::2],
            policy[1::2],
            reference[0::2],
            reference[1::2],
            beta=self._config.beta,
            loss=self._config.loss,
            label_smoothing=self._config.label_smoothing,
            denominator=totals.groups,
        )
