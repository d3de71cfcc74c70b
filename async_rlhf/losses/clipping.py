"""The clipped surrogate that PPO, RLOO and GRPO share, with a weight for stale data."""

import torch
from torch import Tensor

from async_rlhf.losses.base import Mean, mean_of
from async_rlhf.losses.correction import Ratios, correction_metrics


def clipped_surrogate(ratios: Ratios, advantages: Tensor, *, clip_low: float, clip_high: float) -> tuple[Tensor, dict[str, Mean]]:
    """-w min(R A, clip(R, 1 - clip_low, 1 + clip_high) A) for each ratio; 0 where its mask is false.

    Args:
        ratios: R with gradient, w without; [N, T] or [N]. See corrected_ratios.
        advantages: A, broadcast to the ratios' shape; no gradient flows.
        clip_low: in (0, 1). clip_high: > 0.
    Returns:
        The terms in the ratios' shape, to be summed and divided by the caller; metrics `policy/clip_share` (share of ratios
        whose clipped term is the smaller one: they have no gradient) and the correction's weights.
    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; unequal sides: Yu et al. 2025 (DAPO), arXiv:2503.14476, eq. 10.
    """
    advantages = advantages.detach().expand_as(ratios.ratio)
    plain = ratios.ratio * advantages
    clipped = ratios.ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    terms = -ratios.weight * torch.minimum(plain, clipped)
    return torch.where(ratios.mask, terms, torch.zeros_like(terms)), {
        "policy/clip_share": mean_of((clipped < plain).to(plain.dtype), ratios.mask),
        **correction_metrics(ratios),
    }
