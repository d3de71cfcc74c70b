"""Group-relative policy optimization: each completion against its group's mean, in units of the group's spread."""

from typing import Literal

import torch
from torch import Tensor

from async_rlhf.errors import ShapeError
from async_rlhf.losses.base import MAX_LOG_RATIO, LossOutput, require_same_shape
from async_rlhf.losses.clipping import clipped_surrogate
from async_rlhf.losses.correction import Correction, corrected_ratios

STD_EPSILON = 1e-4
"""Added to the group's standard deviation, in units of score."""


def grpo_advantages(scores: Tensor, *, normalize: bool) -> Tensor:
    """A_i = (s_i - mean) / (std + 1e-4) with the std of ddof 1; without `normalize` s_i - mean (Dr. GRPO).

    Args:
        scores: [G, K]; no gradient flows.
    Returns:
        [G, K] advantages; each group sums to 0.
    Raises:
        ShapeError: not a matrix, or K < 2.
    Source: Shao et al. 2024, arXiv:2402.03300, sec. 4.1.2; Liu et al. 2025 (Dr. GRPO), arXiv:2503.20783, sec. 3.2.
    """
    if scores.dim() != 2 or scores.shape[1] < 2:
        raise ShapeError(f"scores must be [groups, K >= 2], got {tuple(scores.shape)}; a group of one has no spread")
    # Counted from the first: equal scores give exactly 0, where the rounding of a mean far from 0 would be blown up.
    scores = scores.detach() - scores.detach()[:, :1]
    centred = scores - scores.mean(1, keepdim=True)
    return centred / (scores.std(1, correction=1, keepdim=True) + STD_EPSILON) if normalize else centred


def grpo_loss(
    policy_logprobs: Tensor,
    proximal_logprobs: Tensor,
    behavior_logprobs: Tensor,
    reference_logprobs: Tensor,
    loss_mask: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    correction: Correction,
    correction_cap: float,
    kl_coef: float,
    loss_norm: Literal["token", "sequence", "constant"],
    denominator: float,
) -> LossOutput:
    """Clipped per-token policy gradient, plus kl_coef k3: -w min(R A, clip(R, 1 - low, 1 + high) A) + kl_coef k3.

    k3 = exp(reference - policy) - 1 - (reference - policy). As a loss it has, on-policy, the gradient of
    KL(reference || policy) of the next token, at the prefixes that the policy visits; not that of KL(policy || reference).

    Args:
        policy_logprobs: [N, T], carries the gradient. proximal_logprobs, behavior_logprobs, reference_logprobs: [N, T].
        loss_mask: [N, T] true up to and including the first end-of-sequence token.
        advantages: [N] from grpo_advantages.
        clip_low, clip_high: the two sides of the clip.
        correction: how stale data is weighted, per token; see corrected_ratios. correction_cap: its c.
        kl_coef: weight of k3, in score per nat; 0: none.
        loss_norm: what is summed, and so what `denominator` has to be, over the global minibatch:
            token: tokens / completion tokens; sequence: each completion's mean over its tokens / completions;
            constant: tokens / (completions x a fixed length), so that length earns nothing (Dr. GRPO).
        denominator: see loss_norm.
    Returns:
        Sum / denominator; the metrics of clipped_surrogate.
    Raises:
        ShapeError: shapes differ, or advantages are not [N].
    Source: Shao et al. 2024, arXiv:2402.03300, eq. 3; Yu et al. 2025 (DAPO), arXiv:2503.14476, eq. 8; Liu et al. 2025,
        arXiv:2503.20783; Schulman 2020, http://joschu.net/blog/kl-approx.html (k3).
    """
    require_same_shape(
        policy=policy_logprobs, proximal=proximal_logprobs, behavior=behavior_logprobs, reference=reference_logprobs, mask=loss_mask
    )
    require_same_shape(advantages=advantages, completions=policy_logprobs[:, 0])
    ratios = corrected_ratios(
        policy_logprobs, proximal_logprobs, behavior_logprobs, loss_mask, per="token", correction=correction, cap=correction_cap
    )
    terms, metrics = clipped_surrogate(ratios, advantages[:, None], clip_low=clip_low, clip_high=clip_high)
    if kl_coef:
        difference = torch.where(loss_mask, reference_logprobs.detach() - policy_logprobs, torch.zeros_like(policy_logprobs))
        difference = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)  # all of it: exp alone would leave -difference, which pushes away
        terms = terms + kl_coef * (difference.exp() - 1 - difference)
    if loss_norm == "sequence":
        terms = terms / loss_mask.sum(1, keepdim=True).clamp(min=1)
    return LossOutput(loss=terms.sum() / denominator, metrics=metrics)
