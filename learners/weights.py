"""Gather the policy from its ranks: under ZeRO-3 every rank holds a part of every parameter."""

from collections.abc import Iterator

import deepspeed
from torch import Tensor, nn

from async_rlhf.snapshot import make_snapshot
from async_rlhf.types import WeightsVersion

BUCKET_BYTES = 64 << 20
"""Partitioned parameters are gathered in buckets of this size, so that memory stays bounded."""


def snapshot(
    model: nn.Module, *, version: int, dtype: str, keep: bool, canary_ids: tuple[int, ...], canary_logprobs: tuple[float, ...]
) -> WeightsVersion | None:
    """An immutable copy of the model's parameters; see make_snapshot. A collective call under ZeRO-3.

    Args:
        keep: whether this rank wants the result; the others only take part in the gathering, and get None.
    """
    if not keep:
        for _ in gathered(model):
            pass
        return None
    parameters = gathered(model)
    return make_snapshot(parameters, version=version, dtype=dtype, canary_ids=canary_ids, canary_logprobs=canary_logprobs)


def full_state_dict(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Every parameter by name, on the CPU, in its own dtype; empty where keep is False. A collective call under ZeRO-3."""
    return {name: parameter.detach().cpu().clone() for name, parameter in gathered(model) if keep}


def gathered(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter with its full value, in layer order. Use each before asking for the next."""
    bucket: list[tuple[str, nn.Parameter]] = []
    num_bytes = 0
    for name, parameter in model.named_parameters():
        bucket.append((name, parameter))
        num_bytes += getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        if num_bytes >= BUCKET_BYTES:
            yield from _gather(bucket)
            bucket, num_bytes = [], 0
    yield from _gather(bucket)


def _gather(bucket: list[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, nn.Parameter]]:
    partitioned = [parameter for _, parameter in bucket if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
        yield from bucket
