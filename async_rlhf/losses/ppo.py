"""Proximal policy optimization with a learned critic: token rewards, generalized advantage estimation, two losses."""

import torch
from torch import Tensor

from async_rlhf.losses.base import LossOutput, mean_of, require_same_shape
from async_rlhf.losses.clipping import clipped_surrogate
from async_rlhf.losses.correction import Correction, corrected_ratios


def token_rewards(scores: Tensor, proximal_logprobs: Tensor, reference_logprobs: Tensor, loss_mask: Tensor, *, kl_coef: float) -> Tensor:
    """r_t = -kl_coef (proximal - reference)_t, plus the completion's score on its last unmasked token.

    Args:
        scores: [N]. proximal_logprobs, reference_logprobs: [N, T]. loss_mask: [N, T], true first, false after the last token.
        kl_coef: weight of the KL penalty, in score per nat.
    Returns:
        [N, T] rewards, 0 where masked; no gradient.
    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 2; Stiennon et al. 2020, arXiv:2009.01325, sec. 3.4.
    """
    require_same_shape(proximal=proximal_logprobs, reference=reference_logprobs, mask=loss_mask)
    require_same_shape(scores=scores, completions=proximal_logprobs[:, 0])
    penalty = -kl_coef * (proximal_logprobs - reference_logprobs).detach()
    rewards = torch.where(loss_mask, penalty, torch.zeros_like(penalty))
    is_last = loss_mask & ~torch.nn.functional.pad(loss_mask, (0, 1))[:, 1:]
    return rewards + torch.where(is_last, scores.detach()[:, None].to(rewards.dtype), torch.zeros_like(rewards))


def generalized_advantages(rewards: Tensor, values: Tensor, loss_mask: Tensor, *, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """GAE: A_t = delta_t + gamma lambda A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t; the value after the last token is 0.

    Args:
        rewards: [N, T]. values: [N, T], V_t of the state before token t. loss_mask: [N, T], true first.
        gamma, gae_lambda: in [0, 1]; lambda 1 gives A_t = return - V_t.
    Returns:
        [N, T] advantages and [N, T] returns A_t + V_t, the critic's targets; both 0 where masked, without gradient.
    Source: Schulman et al. 2016, arXiv:1506.02438, eq. 16.
    """
    require_same_shape(rewards=rewards, values=values, mask=loss_mask)
    rewards = torch.where(loss_mask, rewards, torch.zeros_like(rewards)).detach()
    values = torch.where(loss_mask, values, torch.zeros_like(values)).detach()
    advantages = torch.zeros_like(values)
    next_advantage, next_value = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(loss_mask[:, t], delta + gamma * gae_lambda * next_advantage, torch.zeros_like(delta))
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def whiten(advantages: Tensor, loss_mask: Tensor, *, mean: float, std: float) -> Tensor:
    """(A - mean) / std where the mask is true, else 0; both moments counted over the global batch's tokens.

    All 0 where std is 0: what is left of equal advantages is rounding, which must not be blown up.
    """
    whitened = (advantages - mean) / std if std > 0 else torch.zeros_like(advantages)
    return torch.where(loss_mask, whitened, torch.zeros_like(whitened))


def ppo_loss(
    policy_logprobs: Tensor,
    proximal_logprobs: Tensor,
    behavior_logprobs: Tensor,
    loss_mask: Tensor,
    advantages: Tensor,
    *,
    clip_range: float,
    correction: Correction,
    correction_cap: float,
    denominator: float,
) -> LossOutput:
    """Clipped per-token policy gradient: -w min(R_t A_t, clip(R_t, 1 - e, 1 + e) A_t), summed over tokens / tokens.

    Args:
        policy_logprobs: [N, T], carries the gradient. proximal_logprobs, behavior_logprobs: [N, T].
        loss_mask: [N, T] true up to and including the first end-of-sequence token.
        advantages: [N, T], whitened or not.
        clip_range: e, in (0, 1).
        correction: how stale data is weighted, per token; see corrected_ratios. correction_cap: its c.
        denominator: completion tokens in the global minibatch.
    Returns:
        Sum / denominator; the metrics of clipped_surrogate.
    Raises:
        ShapeError: shapes differ.
    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7.
    """
    require_same_shape(
        policy=policy_logprobs, proximal=proximal_logprobs, behavior=behavior_logprobs, mask=loss_mask, advantages=advantages
    )
    ratios = corrected_ratios(
        policy_logprobs, proximal_logprobs, behavior_logprobs, loss_mask, per="token", correction=correction, cap=correction_cap
    )
    terms, metrics = clipped_surrogate(ratios, advantages, clip_low=clip_range, clip_high=clip_range)
    return LossOutput(loss=terms.sum() / denominator, metrics=metrics)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, loss_mask: Tensor, *, clip_range: float, denominator: float
) -> LossOutput:
    """Clipped squared error: 1/2 max((V - R)^2, (V_old + clip(V - V_old, -e, e) - R)^2), summed over tokens / tokens.

    Args:
        values: [N, T] of the critic now; carries the gradient.
        old_values: [N, T] of the critic when the batch arrived. returns: [N, T] from generalized_advantages.
        loss_mask: [N, T]. clip_range: e, > 0. denominator: completion tokens in the global minibatch.
    Returns:
        Sum / denominator; metrics `value/mean`, `value/clip_share`.
    Raises:
        ShapeError: shapes differ.
    Source: Schulman et al. 2017, the authors' implementation; Engstrom et al. 2020, arXiv:2005.12729, sec. 3.
    """
    require_same_shape(values=values, old_values=old_values, returns=returns, mask=loss_mask)
    old_values, returns = old_values.detach(), returns.detach()
    change = values - old_values
    plain = (values - returns).square()
    clipped = (old_values + change.clamp(-clip_range, clip_range) - returns).square()
    held = (change.detach().abs() > clip_range) & (clipped > plain)
    terms = torch.where(loss_mask, torch.maximum(plain, clipped) / 2, torch.zeros_like(plain))
    return LossOutput(
        loss=terms.sum() / denominator,
        metrics={"value/mean": mean_of(values, loss_mask), "value/clip_share": mean_of(held.to(values.dtype), loss_mask)},
    )
