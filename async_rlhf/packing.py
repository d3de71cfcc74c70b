"""Sequences behind one another instead of one above another: no padding in the linear layers, and attention that stays inside each.

Attention is block-diagonal without a mask of the whole pack: sequences of like length are gathered into one causal attention
call each, so its cost grows with the sum of squared lengths, not with the square of the sum, on CPU and GPU alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

BUCKET_RATIO = 1.25
"""Sequences attend together when the longest is at most this much longer than the shortest."""


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Where the sequences of a pack of L tokens lie, and where they go: C cells of buckets, filled up behind each sequence's end."""

    shapes: tuple[tuple[int, int], ...]
    """Per bucket: its sequences, and cells of each."""
    cells: Tensor
    """[C] int64: the pack's token in each cell, bucket after bucket; a cell behind a sequence's end repeats token 0."""
    restore: Tensor
    """[L] int64: the cell of each token of the pack."""
    longest: int
    """Tokens of the longest sequence."""

    def to(self, device: torch.device) -> "PackedLayout":
        """The same layout on `device`."""
        return replace(self, cells=self.cells.to(device), restore=self.restore.to(device))


def make_layout(lengths: Sequence[int]) -> PackedLayout:
    """The layout of sequences that lie behind one another in this order; every length is at least 1."""
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    sizes = torch.tensor(lengths)
    restore = torch.zeros(sum(lengths), dtype=torch.long)
    shapes: list[tuple[int, int]] = []
    cells: list[Tensor] = []
    base = 0
    for members in _alike(lengths):
        offsets = torch.arange(max(lengths[index] for index in members))[None, :]
        real = offsets < sizes[members, None]
        tokens = starts[members, None] + offsets
        restore[tokens[real]] = base + torch.arange(real.numel()).reshape(real.shape)[real]
        shapes.append((len(members), offsets.shape[1]))
        cells.append(torch.where(real, tokens, torch.zeros_like(tokens)).flatten())
        base += real.numel()
    return PackedLayout(tuple(shapes), torch.cat(cells), restore, max(lengths))


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
    num_tokens, num_heads = query.shape[1], query.shape[0]
    sizes = [count * longest for count, longest in layout.shapes]
    in_buckets = [
        cast(Tensor, _ToBuckets.apply(tensor.transpose(0, 1).reshape(num_tokens, -1), layout.cells, layout.restore)).split(sizes)
        for tensor in (query, key, value)
    ]
    outputs: list[Tensor] = []
    for (count, longest), *of_bucket in zip(layout.shapes, *in_buckets, strict=True):
        q, k, v = (
            tokens.view(count, longest, heads.shape[0], -1).transpose(1, 2)
            for tokens, heads in zip(of_bucket, (query, key, value), strict=True)
        )
        # What follows a sequence's end is behind it in causal order: no real token sees it, so no mask is needed.
        attended = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=key.shape[0] != num_heads)
        outputs.append(attended.transpose(1, 2).reshape(count * longest, -1))
    return cast(Tensor, _FromBuckets.apply(torch.cat(outputs), layout.restore)).view(num_tokens, num_heads, -1)


class _ToBuckets(torch.autograd.Function):
    """Tokens [L, W] to cells [C, W].

    No gradient reaches a cell behind a sequence's end (nobody reads its output, and no real token attends to it), so that of the tokens is
    a selection again. Autograd's own would add up zeros of the pack's size.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, cells: Tensor, restore: Tensor) -> Tensor:
        ctx.save_for_backward(restore)
        return tokens.index_select(0, cells)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (restore,) = ctx.saved_tensors
        return grad_outputs[0].index_select(0, restore), None, None


class _FromBuckets(torch.autograd.Function):
    """Cells [C, W] to tokens [L, W]."""

    @staticmethod
    def forward(ctx: Any, cells: Tensor, restore: Tensor) -> Tensor:
        ctx.save_for_backward(restore)
        ctx.num_cells = len(cells)
        return cells.index_select(0, restore)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        ((restore,), (gradient,)) = ctx.saved_tensors, grad_outputs
        return gradient.new_zeros(ctx.num_cells, gradient.shape[1]).index_copy_(0, restore, gradient), None
