"""What the ranks agree on: sums, maxima and metrics over all of them. Every function is called by all ranks at once."""

from collections.abc import Mapping
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from async_rlhf.losses.base import Mean, Peak


def sum_over_ranks(values: Tensor, device: torch.device) -> Tensor:
    """Elementwise; the result is on the CPU."""
    values = values.to(device)
    dist.all_reduce(values)
    return values.cpu()


def max_over_ranks(values: Tensor, device: torch.device) -> Tensor:
    """Elementwise; the result is on the CPU."""
    values = values.to(device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.cpu()


def combine(known: Mean | Peak | None, part: Mean | Peak) -> Mean | Peak:
    """Two parts of one metric as one."""
    match known, part:
        case Mean(), Mean():
            return Mean(known.total + part.total, known.weight + part.weight)
        case Peak(), Peak():
            return Peak(torch.maximum(known.value, part.value))
        case _:
            return part


def reduce_metrics(metrics: Mapping[str, Mean | Peak], device: torch.device) -> dict[str, float]:
    """Global values. A rank without any part has no keys of its own and still takes part; its 0 is the neutral element."""
    kinds = _of_all_ranks({key: type(part).__name__ for key, part in metrics.items()})
    pairs, peaks = torch.zeros(len(kinds), 2, dtype=torch.float64), torch.full((len(kinds),), -torch.inf, dtype=torch.float64)
    for index, key in enumerate(kinds):
        match metrics.get(key):
            case Mean(total, weight):
                pairs[index] = torch.stack([total.cpu().double(), weight.cpu().double()])
            case Peak(value):
                peaks[index] = value.cpu().double()
            case _:
                pass
    pairs, peaks = sum_over_ranks(pairs, device), max_over_ranks(peaks, device)
    means = torch.where(pairs[:, 1] != 0, pairs[:, 0] / pairs[:, 1], torch.zeros_like(pairs[:, 0]))
    return {key: float(peaks[i] if kind == "Peak" else means[i]) for i, (key, kind) in enumerate(kinds.items())}


def _of_all_ranks(mine: dict[str, str]) -> dict[str, str]:
    """The union of the ranks' dicts, in the same order on all."""
    if dist.get_world_size() == 1:
        return mine
    gathered: list[dict[str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    merged = {key: value for of_rank in cast(list[dict[str, str]], gathered) for key, value in of_rank.items()}
    return dict(sorted(merged.items()))
