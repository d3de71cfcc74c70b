"""GRPO takes all K completions of each group; their scores alone make the advantages."""

from torch import Tensor

from async_rlhf.batching import Microbatch
from async_rlhf.losses import LossOutput, grpo_advantages, grpo_loss
from learners.objective import Objective, Totals


class GRPO(Objective):
    """Siblings stay together: each is measured against their mean, in units of their spread."""

    def loss(self, policy_logprobs: Tensor, microbatch: Microbatch, totals: Totals) -> LossOutput:
        """Sum over the microbatch's tokens / what `loss_norm` counts in the global minibatch."""
        algorithm, settings = self._config.algorithm, self._config.algorithm.grpo
        denominators = {
            "token": totals.tokens,
            "sequence": totals.sequences,
            "constant": totals.sequences * self._config.generator.max_new_tokens,
        }
        return grpo_loss(
            policy_logprobs,
            microbatch.proximal(policy_logprobs),
            microbatch.behavior_logprobs,
            microbatch.reference_logprobs,
            microbatch.loss_mask,
            grpo_advantages(microbatch.scores.reshape(-1, microbatch.unit_size), normalize=settings.normalize).reshape(-1),
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            correction=algorithm.correction_used,
            correction_cap=algorithm.correction_cap,
            kl_coef=settings.kl_coef,
            loss_norm=settings.loss_norm,
            denominator=denominators[settings.loss_norm],
        )
