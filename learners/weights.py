"""Gather the policy from its ranks, adapters merged: under ZeRO-3 every rank holds a part of every parameter."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import deepspeed
import torch
from torch import Tensor, nn

from async_rlhf.adapters import Part, plain_parts
from async_rlhf.snapshot import DTYPES, make_buckets
from async_rlhf.types import TensorSpec, WeightsManifest, WeightsVersion
from async_rlhf.weight_group import tensor_checksum
from learners.sending import HeldVersion

GATHER_BYTES = 64 << 20
"""Partitioned parameters are gathered in lots of this size, so that memory stays bounded."""


def snapshot(parts: Iterable[Part], empty: WeightsManifest, *, dtype: str, keep: bool, lent: bool) -> Iterator[WeightsVersion]:
    """An immutable copy of the parts, bucket by bucket; see make_buckets. A collective call under ZeRO-3.

    Args:
        keep: whether this rank wants the result; the others only take part in the gathering, and get nothing.
        lent: see make_buckets.
    """
    if keep:
        yield from make_buckets(gathered(parts), empty, dtype, lent=lent)
        return
    for _ in gathered(parts):
        pass


def held_version(parts: Iterable[Part], empty: WeightsManifest, *, dtype: str, device: torch.device, keep: bool) -> HeldVersion | None:
    """The same as tensors on `device`, with checksums that are computed there; None where `keep` is False."""
    tensors: list[Tensor] = []
    specs: list[TensorSpec] = []
    for name, tensor in gathered(parts):
        if keep:
            tensors.append(tensor.detach().to(device=device, dtype=DTYPES[dtype], copy=True).contiguous())
            specs.append(TensorSpec(name=name, shape=tuple(tensor.shape), dtype=dtype, checksum=tensor_checksum(tensors[-1])))
    return HeldVersion(manifest=replace(empty, tensors=tuple(specs)), tensors=tensors) if keep else None


def full_state_dict(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Every parameter by name, on the CPU, in its own dtype; empty where keep is False. A collective call under ZeRO-3."""
    return {name: tensor.detach().to("cpu", model_dtype(model), copy=True) for name, tensor in gathered(plain_parts(model)) if keep}


def model_dtype(model: nn.Module) -> torch.dtype:
    """Of its parameters, which share one."""
    return next(model.parameters()).dtype


def gathered(parts: Iterable[Part]) -> Iterator[tuple[str, Tensor]]:
    """Every part by name with its full value, adapters merged. Use each before asking for the next."""
    lot: list[Part] = []
    num_bytes = 0
    for part in parts:
        lot.append(part)
        num_bytes += sum(getattr(each, "ds_numel", each.numel()) * each.element_size() for each in part.parameters)
        if num_bytes >= GATHER_BYTES:
            yield from _gather(lot)
            lot, num_bytes = [], 0
    yield from _gather(lot)


def _gather(lot: list[Part]) -> Iterator[tuple[str, Tensor]]:
    partitioned = [parameter for part in lot for parameter in part.parameters if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
        for part in lot:
            yield part.name, part.merged()
