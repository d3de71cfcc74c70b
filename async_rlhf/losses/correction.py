"""How a loss on stale data is corrected for the policy that sampled it.

Three policies meet: `behavior` sampled the tokens, `proximal` is the learner when the batch arrived, `policy` is the learner
now. W = policy / proximal is what clipping looks at; C = proximal / behavior is staleness and engine mismatch together.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from async_rlhf.losses.base import Mean, Peak, kl_metrics, masked_sum, mean_of, ratio_of

Correction = Literal["behavior", "none", "truncated", "masked", "decoupled"]


class Ratios(NamedTuple):
    """What the clipped objective multiplies: L = -weight * min(ratio A, clip(ratio) A)."""

    ratio: Tensor
    """[N, T] or [N]; carries the gradient."""
    weight: Tensor
    """Like `ratio`; no gradient."""
    mask: Tensor
    """Like `ratio`; true where an entry counts."""


def corrected_ratios(
    policy_logprobs: Tensor,
    proximal_logprobs: Tensor,
    behavior_logprobs: Tensor,
    loss_mask: Tensor,
    *,
    per: Literal["sequence", "token"],
    correction: Correction,
    cap: float,
) -> Ratios:
    """The ratio R and the weight w of each token, or of each sequence (exp of masked sums).

    behavior:  R = policy / behavior, w = 1      (the paper's Proximal RLOO)
    otherwise: R = W, and w = 1 (none) | min(C, c) (truncated) | C where 1/c <= C <= c, else 0 (masked) | C (decoupled)

    Args:
        policy_logprobs: [N, T] of the learner now; carries the gradient.
        proximal_logprobs: [N, T] of the learner when the batch arrived; detached here.
        behavior_logprobs: [N, T] at sampling time, each token under the version that sampled it; detached here.
        loss_mask: [N, T] true on trained tokens.
        per: one ratio per token ([N, T]) or per sequence ([N]).
        correction: see above. cap: c >= 1.
    Source: Noukhovitch et al. 2024, arXiv:2410.18252, sec. 3; Fu et al. 2025 (AReaL), arXiv:2505.24298, eq. 5.
    """
    proximal, behavior = proximal_logprobs.detach(), behavior_logprobs.detach()
    log_policy = policy_logprobs - (behavior if correction == "behavior" else proximal)
    log_stale = proximal - behavior
    mask = loss_mask
    if per == "sequence":
        log_policy, log_stale = masked_sum(log_policy, loss_mask), masked_sum(log_stale, loss_mask)
        mask = torch.ones_like(log_stale, dtype=torch.bool)
    else:
        # Positions outside the mask may hold anything; they must not reach exp, where an infinity times 0 is NaN.
        log_policy = torch.where(mask, log_policy, torch.zeros_like(log_policy))
        log_stale = torch.where(mask, log_stale, torch.zeros_like(log_stale))
    stale = ratio_of(log_stale)
    match correction:
        case "behavior" | "none":
            weight = torch.ones_like(stale)
        case "truncated":
            weight = stale.clamp(max=cap)
        case "masked":
            weight = torch.where((stale >= 1 / cap) & (stale <= cap), stale, torch.zeros_like(stale))
        case "decoupled":
            weight = stale
    return Ratios(ratio_of(log_policy), weight, mask)


def correction_metrics(ratios: Ratios) -> dict[str, Mean]:
    """Means of w and w^2, from which `metrics.derive` computes the effective sample size (sum w)^2 / (n sum w^2)."""
    return {
        "correction/weight": mean_of(ratios.weight, ratios.mask),
        "correction/weight_square": mean_of(ratios.weight.square(), ratios.mask),
    }


def mismatch_metrics(proximal_logprobs: Tensor, behavior_logprobs: Tensor, loss_mask: Tensor) -> dict[str, Mean | Peak]:
    """How far the policy that sampled is from the policy that trains: KL(behavior || proximal), and C per completion.

    C = exp(sum_t m (proximal - behavior)): its mean (1 in expectation), its square, from which `metrics.derive` computes the
    effective sample size, and its maximum.
    """
    ratio = ratio_of(masked_sum(proximal_logprobs - behavior_logprobs, loss_mask).detach())
    return {
        **kl_metrics("mismatch/kl", behavior_logprobs, proximal_logprobs, loss_mask),
        "mismatch/ratio_mean": mean_of(ratio),
        "mismatch/ratio_square": mean_of(ratio.square()),
        "mismatch/ratio_max": Peak(ratio.max()),
    }
