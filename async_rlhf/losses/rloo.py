"""REINFORCE leave-one-out: each completion against the mean of its siblings."""

from typing import Literal

from torch import Tensor

from async_rlhf.errors import ShapeError
from async_rlhf.losses.base import LossOutput, require_same_shape
from async_rlhf.losses.clipping import clipped_surrogate
from async_rlhf.losses.correction import Correction, corrected_ratios


def rloo_advantages(returns: Tensor) -> Tensor:
    """A_i = R_i - mean of the other K - 1 returns of the group.

    Args:
        returns: [G, K] score minus KL penalty of each completion; no gradient flows.
    Returns:
        [G, K] advantages; each group sums to 0.
    Raises:
        ShapeError: not a matrix, or K < 2.
    Source: Ahmadian et al. 2024, arXiv:2402.14740, eq. 8.
    """
    if returns.dim() != 2 or returns.shape[1] < 2:
        raise ShapeError(f"returns must be [groups, K >= 2], got {tuple(returns.shape)}; leave-one-out needs a sibling")
    # Counted from the first: equal returns give exactly 0, however far from 0 they are.
    returns = returns.detach() - returns.detach()[:, :1]
    num_siblings = returns.shape[1] - 1
    return returns - (returns.sum(1, keepdim=True) - returns) / num_siblings


def rloo_loss(
    policy_logprobs: Tensor,
    proximal_logprobs: Tensor,
    behavior_logprobs: Tensor,
    loss_mask: Tensor,
    advantages: Tensor,
    *,
    clip_range: float,
    ratio: Literal["sequence", "token"],
    correction: Correction,
    correction_cap: float,
    denominator: float,
) -> LossOutput:
    """Clipped leave-one-out policy gradient: -w min(R A, clip(R, 1 - e, 1 + e) A), summed over tokens / completions.

    Args:
        policy_logprobs: [N, T] log-probabilities of the completion tokens, at the sampling temperature; carries the gradient.
        proximal_logprobs: [N, T] of the learner when the batch arrived.
        behavior_logprobs: [N, T] at sampling time.
        loss_mask: [N, T] true up to and including the first end-of-sequence token.
        advantages: [N] from rloo_advantages.
        clip_range: e, in (0, 1).
        ratio: `sequence` (the paper's Proximal RLOO: one ratio per completion) or `token`.
        correction: how stale data is weighted; see corrected_ratios. correction_cap: its c.
        denominator: completions in the global minibatch.
    Returns:
        Sum / denominator; the metrics of clipped_surrogate.
    Raises:
        ShapeError: shapes differ, or advantages are not [N].
    Source: Noukhovitch et al. 2024, arXiv:2410.18252, sec. 3.3; Ahmadian et al. 2024, arXiv:2402.14740.
    """
    require_same_shape(policy=policy_logprobs, proximal=proximal_logprobs, behavior=behavior_logprobs, mask=loss_mask)
    require_same_shape(advantages=advantages, completions=policy_logprobs[:, 0])
    ratios = corrected_ratios(
        policy_logprobs, proximal_logprobs, behavior_logprobs, loss_mask, per=ratio, correction=correction, cap=correction_cap
    )
    each = advantages[:, None] if ratio == "token" else advantages
    terms, metrics = clipped_surrogate(ratios, each, clip_low=clip_range, clip_high=clip_range)
    return LossOutput(loss=terms.sum() / denominator, metrics=metrics)
