"""Best-of-K: supervised fine-tuning on the best of K sampled completions (rejection sampling, RAFT)."""

from torch import Tensor

from async_rlhf.errors import ShapeError
from async_rlhf.losses.base import LossOutput, masked_sum, mean_of, require_same_shape


def bok_loss(policy_logprobs: Tensor, loss_mask: Tensor, weights: Tensor, *, denominator: float) -> LossOutput:
    """-sum_t m_t log policy_t of the best completions, summed over tokens / tokens. Needs no reference.

    Args:
        policy_logprobs: [N, T] of each group's best completion; carries the gradient.
        loss_mask: [N, T] true up to and including the first end-of-sequence token.
        weights: [N] 1, or 0 for a tied group: it teaches nothing, and stays in the denominator.
        denominator: completion tokens in the global minibatch, those of tied groups included.
    Returns:
        Sum / denominator; metric `bok/nll_nats`: the negative log-likelihood of a trained completion.
    Raises:
        ShapeError: shapes differ, or weights are not [N].
    Source: Dong et al. 2023 (RAFT), arXiv:2304.06767, alg. 1; Noukhovitch et al. 2024, arXiv:2410.18252, app. B.
    """
    require_same_shape(policy=policy_logprobs, mask=loss_mask)
    if weights.shape != policy_logprobs.shape[:1]:
        raise ShapeError(f"weights must be [{policy_logprobs.shape[0]}], got {tuple(weights.shape)}")
    nll = -masked_sum(policy_logprobs, loss_mask)
    return LossOutput(loss=(weights * nll).sum() / denominator, metrics={"bok/nll_nats": mean_of(nll, weights > 0)})
