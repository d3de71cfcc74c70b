"""RLOO takes all K completions of each group, with behavior, proximal and reference log-probabilities."""

from torch import Tensor

from async_rlhf.batching import Microbatch
from async_rlhf.losses import LossOutput, rloo_advantages, rloo_loss
from async_rlhf.losses.base import masked_sum
from learners.objective import Objective, Totals


class RLOO(Objective):
    """Siblings stay together: their returns, score minus KL penalty, are each other's baseline."""

    def loss(self, policy_logprobs: Tensor, microbatch: Microbatch, totals: Totals) -> LossOutput:
        """Sum over the microbatch's completions / completions of the global minibatch."""
        algorithm, settings = self._config.algorithm, self._config.algorithm.rloo
        proximal = microbatch.proximal(policy_logprobs)
        penalty = settings.kl_coef * masked_sum(proximal - microbatch.reference_logprobs, microbatch.loss_mask)
        returns = (microbatch.scores - penalty).reshape(-1, microbatch.unit_size)
        return rloo_loss(
            policy_logprobs,
            proximal,
            microbatch.behavior_logprobs,
            microbatch.loss_mask,
            rloo_advantages(returns).reshape(-1),
            clip_range=settings.clip_range,
            ratio=settings.ratio,
            correction=algorithm.correction_used,
            correction_cap=algorithm.correction_cap,
            denominator=totals.sequences,
        )
