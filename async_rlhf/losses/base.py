"""What every loss returns, and the masked sums that all of them need.

A loss is a pure function: tensors and floats in, LossOutput out. It sums over the rows that it is given and divides by a
denominator that the caller counted over the *global* minibatch, so that any split over ranks and microbatches adds up to
the same loss and gradient.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from async_rlhf.errors import ShapeError

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-this before exp: e^20 is beyond any cap, and an infinity would poison the batch."""


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean in two parts, so that parts add up exactly over microbatches and ranks: total / weight."""

    total: Tensor
    """[] sum of the values, no gradient."""
    weight: Tensor
    """[] number (or weight) of the values."""


@dataclass(frozen=True, slots=True)
class Peak:
    """A maximum; parts combine over microbatches and ranks by taking the larger one."""

    value: Tensor
    """[] no gradient."""


@dataclass(frozen=True, slots=True)
class LossOutput:
    """A share of the global loss, and what is worth watching."""

    loss: Tensor
    """[] sum over the given rows / global denominator; carries the gradient."""
    metrics: Mapping[str, Mean | Peak]


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """[N] sums over T of values [N, T] where mask [N, T] is true. Masked values may be anything, NaN included."""
    return torch.where(mask, values, torch.zeros_like(values)).sum(-1)


def mean_of(values: Tensor, mask: Tensor | None = None) -> Mean:
    """The mean of `values` (where `mask` is true), without gradient."""
    values = values.detach()
    if mask is None:
        return Mean(values.sum(), torch.tensor(float(values.numel())))
    return Mean(torch.where(mask, values, torch.zeros_like(values)).sum(), mask.sum().to(values.dtype))


def ratio_of(log_ratio: Tensor) -> Tensor:
    """exp of a log-ratio, kept finite."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def kl_metrics(name: str, logprobs: Tensor, other: Tensor, mask: Tensor) -> dict[str, Mean]:
    """Monte-Carlo KL(p || q) per completion, in nats, from tokens sampled by p.

    k1 = sum_t m (log p - log q) is unbiased; k3 = sum_t m (exp(log q - log p) - 1 - (log q - log p)) is never negative.

    Args:
        name: metrics are called `<name>_k1_nats` and `<name>_k3_nats`.
        logprobs: [N, T] log p. other: [N, T] log q. mask: [N, T] true on completion tokens.
    Source: Schulman 2020, http://joschu.net/blog/kl-approx.html.
    """
    difference = (other - logprobs).detach()
    k3 = ratio_of(difference) - 1 - difference
    return {f"{name}_k1_nats": mean_of(masked_sum(-difference, mask)), f"{name}_k3_nats": mean_of(masked_sum(k3, mask))}


def require_same_shape(**tensors: Tensor) -> None:
    """Raise ShapeError unless all tensors share one shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ShapeError(f"these tensors must share one shape, got {shapes}")
