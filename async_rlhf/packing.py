"""Sequences behind one another instead of one above another: no padding in the linear layers, and attention that stays inside each.

Attention is block-diagonal without a mask of the whole pack: sequences of like length are gathered into one causal attention
call each, so its cost grows with the sum of squared lengths, not with the square of the sum, on CPU and GPU alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

BUCKET_RATIO = 1.25
"""Sequences attend together when the longest is at most this much longer than the shortest."""


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Where the sequences of a pack of L tokens lie."""

    buckets: tuple[Tensor, ...]
    """Per bucket: [n, longest] int64 token of the pack; positions after a sequence's end repeat token 0."""
    restore: Tensor
    """[L] int64: for each token of the pack, its place among the flattened buckets behind one another."""
    longest: int
    """Tokens of the longest sequence."""

    def to(self, device: torch.device) -> "PackedLayout":
        """The same layout on `device`."""
        return replace(self, buckets=tuple(bucket.to(device) for bucket in self.buckets), restore=self.restore.to(device))


def make_layout(lengths: Sequence[int]) -> PackedLayout:
    """The layout of sequences that lie behind one another in this order; every length is at least 1."""
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    sizes = torch.tensor(lengths)
    restore = torch.zeros(sum(lengths), dtype=torch.long)
    buckets: list[Tensor] = []
    base = 0
    for members in _alike(lengths):
        offsets = torch.arange(max(lengths[index] for index in members))[None, :]
        real = offsets < sizes[members, None]
        tokens = starts[members, None] + offsets
        restore[tokens[real]] = base + torch.arange(real.numel()).reshape(real.shape)[real]
        buckets.append(torch.where(real, tokens, torch.zeros_like(tokens)))
        base += real.numel()
    return PackedLayout(tuple(buckets), restore, max(lengths))


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of the sequences, shortest first, cut where one is too long to attend with the first of its bucket."""
    buckets: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not buckets or lengths[index] > BUCKET_RATIO * lengths[buckets[-1][0]]:
            buckets.append([])
        buckets[-1].append(index)
    return buckets


def packed_attention(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, scale: float | None) -> Tensor:
    """Causal attention inside each sequence of a pack.

    Args:
        query: [H, L, D]. key, value: [H_kv, L, D], H a multiple of H_kv.
    Returns:
        [L, H, D].
    """
    num_tokens = query.shape[1]
    # index_select, whose backward is a plain add, on whole tokens.
    by_token = [tensor.transpose(0, 1).reshape(num_tokens, -1) for tensor in (query, key, value)]
    outputs: list[Tensor] = []
    for bucket in layout.buckets:
        count, longest = bucket.shape
        q, k, v = (
            tokens.index_select(0, bucket.flatten()).view(count, longest, heads.shape[0], -1).transpose(1, 2)
            for tokens, heads in zip(by_token, (query, key, value), strict=True)
        )
        # What follows a sequence's end is behind it in causal order: no real token sees it, so no mask is needed.
        attended = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=key.shape[0] != query.shape[0])
        outputs.append(attended.transpose(1, 2).reshape(count * longest, query.shape[0], -1))
    return torch.cat(outputs).index_select(0, layout.restore)
