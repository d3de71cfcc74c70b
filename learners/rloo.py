"""RLOO takes all K completions of each group, with behavior, proximal and reference log-probabilities."""

from torch import Tensor

from async_rlhf.batching import Microbatch, Unit, sequence_of
from async_rlhf.config.schema import AlgorithmConfig
from async_rlhf.losses import LossOutput, rloo_advantages, rloo_loss
from async_rlhf.losses.base import masked_sum
from async_rlhf.types import ScoredGroup
from learners.objective import Totals


class RLOO:
    """Siblings stay together: their returns, score minus KL penalty, are each other's baseline."""

    def __init__(self, config: AlgorithmConfig) -> None:
        self._config = config.rloo

    def select(self, scored: ScoredGroup) -> Unit:
        """All K completions."""
        return tuple(sequence_of(scored, index) for index in range(len(scored.scores)))

    def loss(self, policy_logprobs: Tensor, microbatch: Microbatch, totals: Totals) -> LossOutput:
        """Sum over the microbatch's completions / completions of the global minibatch."""
        proximal = policy_logprobs.detach() if microbatch.proximal_logprobs is None else microbatch.proximal_logprobs
        penalty = self._config.kl_coef * masked_sum(proximal - microbatch.reference_logprobs, microbatch.loss_mask)
        returns = (microbatch.scores - penalty).reshape(-1, microbatch.unit_size)
        return rloo_loss(
            policy_logprobs,
            proximal,
            microbatch.behavior_logprobs,
            microbatch.loss_mask,
            rloo_advantages(returns).reshape(-1),
            clip_range=self._config.clip_range,
            ratio=self._config.ratio,
            correction=self._config.correction,
            correction_cap=self._config.correction_cap,
            denominator=totals.sequences,
        )
