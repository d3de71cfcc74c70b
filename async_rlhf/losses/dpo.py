"""Online direct preference optimization on the best and the worst of K sampled completions."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from async_rlhf.losses.base import LossOutput, mean_of, require_same_shape


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    denominator: float,
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid",
    label_smoothing: float = 0.0,
) -> LossOutput:
    """Direct Preference Optimization, IPO, or the hinge of SLiC, over pairs.

    h = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    sigmoid: -(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h) with s = label_smoothing
    ipo:     (h - 1 / (2 beta))^2
    hinge:   max(0, 1 - beta h)

    Args:
        policy_chosen_logps: [P] summed log-probability of each chosen completion, in nats; carries the gradient.
        policy_rejected_logps: [P] likewise for the rejected completion of the same prompt.
        reference_chosen_logps: [P] the same under the frozen reference; no gradient flows into it.
        reference_rejected_logps: [P] likewise.
        beta: KL strength, > 0; larger keeps the policy nearer to the reference.
        denominator: groups in the global minibatch, tied ones included.
        loss: which of the three.
        label_smoothing: assumed share of wrong preferences, in [0, 0.5); sigmoid only.
    Returns:
        Sum over P / denominator; metrics over pairs `dpo/margin` (beta h) and `dpo/accuracy` (share with h > 0).
    Raises:
        ShapeError: the four tensors do not share one shape.
    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; Azar et al. 2023, arXiv:2310.12036, eq. 17; Zhao et al. 2023
        (SLiC-HF), arXiv:2305.10425, eq. 5 (hinge); Mitchell 2023, https://ericmitchell.ai/cdpo.pdf (label smoothing).
    """
    require_same_shape(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        reference_chosen_logps=reference_chosen_logps,
        reference_rejected_logps=reference_rejected_logps,
    )
    chosen = policy_chosen_logps - reference_chosen_logps.detach()
    rejected = policy_rejected_logps - reference_rejected_logps.detach()
    preference = chosen - rejected
    if loss == "ipo":
        per_pair = torch.square(preference - 1 / (2 * beta))
    elif loss == "hinge":
        per_pair = torch.relu(1 - beta * preference)
    else:
        per_pair = -(1 - label_smoothing) * logsigmoid(beta * preference) - label_smoothing * logsigmoid(-beta * preference)
    return LossOutput(
        loss=per_pair.sum() / denominator,
        metrics={
            "dpo/margin": mean_of(beta * preference),
            "dpo/accuracy": mean_of((preference > 0).to(preference.dtype)),
            "dpo/chosen_gain_nats": mean_of(chosen),
            "dpo/rejected_gain_nats": mean_of(rejected),
        },
    )
