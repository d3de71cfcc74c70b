"""Listwise preference optimization: the Plackett-Luce likelihood of the whole ranking of K completions."""

import torch
from torch import Tensor

from async_rlhf.errors import ShapeError
from async_rlhf.losses.base import LossOutput, mean_of, require_same_shape


def listwise_loss(policy_logps: Tensor, reference_logps: Tensor, scores: Tensor, *, beta: float, denominator: float) -> LossOutput:
    """-sum_i [z_i - logsumexp(z_i and all z_j of strictly worse j)], with z = beta (policy - reference).

    With ties, an item competes with the strictly worse ones only; a group of equal scores costs nothing. For K = 2 this is
    sigmoid DPO.

    Args:
        policy_logps: [G, K] summed log-probability of each completion, in nats; carries the gradient.
        reference_logps: [G, K] the same under the frozen reference.
        scores: [G, K]; larger is better.
        beta: KL strength, > 0.
        denominator: groups in the global minibatch, tied ones included.
    Returns:
        Sum over G / denominator; metrics over pairs with s_i > s_j: `listwise/margin` (z_i - z_j), `listwise/accuracy`
        (share with z_i > z_j).
    Raises:
        ShapeError: shapes differ, or are not [G, K >= 2].
    Source: Rafailov et al. 2023, arXiv:2305.18290, app. A.3 (Plackett-Luce); Liu et al. 2024 (LiPO), arXiv:2402.01878.
    """
    require_same_shape(policy=policy_logps, reference=reference_logps, scores=scores)
    if policy_logps.dim() != 2 or policy_logps.shape[1] < 2:
        raise ShapeError(f"log-probabilities must be [groups, K >= 2], got {tuple(policy_logps.shape)}; a ranking needs two items")
    strength = beta * (policy_logps - reference_logps.detach())
    beats = scores[:, :, None] > scores[:, None, :]
    competes = beats | torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    rivals = strength[:, None, :].expand(competes.shape).masked_fill(~competes, -torch.inf)
    margins = strength[:, :, None] - strength[:, None, :]
    return LossOutput(
        loss=(rivals.logsumexp(-1) - strength).sum() / denominator,
        metrics={
            "listwise/margin": mean_of(margins, beats),
            "listwise/accuracy": mean_of((margins > 0).to(margins.dtype), beats),
        },
    )
