"""Packed attention against a slow transcription of softmax attention, one sequence at a time."""

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from async_rlhf.packing import BUCKET_RATIO, PackedLayout, make_layout, packed_attention

some_lengths = st.lists(st.integers(1, 60), min_size=1, max_size=20)


class Heads(NamedTuple):
    """What attention takes, [H, L, D] each."""

    query: Tensor
    key: Tensor
    value: Tensor


def make_heads(lengths: list[int], *, heads: int = 2, kv_heads: int = 2, width: int = 4, seed: int = 0) -> Heads:
    generator = torch.Generator().manual_seed(seed)
    return Heads(
        *(torch.randn(number, sum(lengths), width, generator=generator, dtype=torch.float64) for number in (heads, kv_heads, kv_heads))
    )


def buckets_of(layout: PackedLayout) -> list[Tensor]:
    """Per bucket: [n, longest] tokens of the pack."""
    parts = layout.cells.split([count * longest for count, longest in layout.shapes])
    return [part.view(shape) for part, shape in zip(parts, layout.shapes, strict=True)]


def spans(lengths: list[int]) -> list[slice]:
    ends = np.cumsum(lengths).tolist()
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def slow_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention is all you need, eq. 1, one head and one query at a time, on one sequence; on purpose without any trick.

    out_t = sum_{s <= t} softmax_s(scale q_t . k_s) v_s; query head h reads key and value head h // (H / H_kv).
    """
    per_key = query.shape[0] // key.shape[0]
    rows = []
    for t in range(query.shape[1]):
        row = []
        for head in range(query.shape[0]):
            keys, values = key[head // per_key, : t + 1], value[head // per_key, : t + 1]
            weights = (scale * (keys @ query[head, t])).exp()
            row.append((weights / weights.sum()) @ values)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def one_by_one(heads: Heads, lengths: list[int], scale: float) -> Tensor:
    return torch.cat([slow_attention(*(tensor[:, span] for tensor in heads), scale) for span in spans(lengths)])


# The layout.


@settings(deadline=None)
@given(some_lengths)
def test_every_token_of_the_pack_is_restored_exactly_once(lengths: list[int]):
    layout = make_layout(lengths)

    assert layout.cells[layout.restore].tolist() == list(range(sum(lengths)))
    assert len(set(layout.restore.tolist())) == sum(lengths)
    assert layout.longest == max(lengths)


@settings(deadline=None)
@given(some_lengths)
def test_a_row_of_a_bucket_is_one_whole_sequence_in_its_order(lengths: list[int]):
    layout = make_layout(lengths)

    rows = [row.tolist() for bucket in buckets_of(layout) for row in bucket]
    expected = {span.start: list(range(span.start, span.stop)) for span in spans(lengths)}
    assert sorted(row[0] for row in rows) == sorted(expected)
    for row in rows:
        tokens = expected[row[0]]
        assert row == tokens + [0] * (len(row) - len(tokens))


@settings(deadline=None)
@given(some_lengths)
def test_waste_is_bounded_by_the_bucket_ratio_and_so_is_the_number_of_buckets(lengths: list[int]):
    """Each bucket begins with a sequence more than BUCKET_RATIO times as long as the one before began with."""
    layout = make_layout(lengths)

    assert len(layout.cells) <= BUCKET_RATIO * sum(lengths)
    assert len(layout.shapes) <= 1 + math.log(max(lengths) / min(lengths), BUCKET_RATIO)


def test_sequences_of_like_length_attend_together_by_hand():
    """Ratio 1.25: 4 and 5 together, 8 and 10 together, 11 alone. Tokens 0-7, 8-11, 12-22, 23-32, 33-37."""
    layout = make_layout([8, 4, 11, 10, 5])

    assert layout.shapes == ((2, 5), (2, 10), (1, 11))
    fours, eights, _ = buckets_of(layout)
    assert fours.tolist() == [[8, 9, 10, 11, 0], [33, 34, 35, 36, 37]]
    assert eights.tolist() == [[*range(8), 0, 0], [*range(23, 33)]]
    assert layout.restore.tolist() == [*range(10, 18), *range(4), *range(30, 41), *range(20, 30), *range(5, 10)]


# Attention.


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    shape=st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 2), (3, 1)]),
    scale=st.sampled_from([None, 0.125, 1.5]),
    seed=st.integers(0, 1000),
)
def test_packed_attention_and_its_gradients_are_those_of_each_sequence_alone(
    lengths: list[int], shape: tuple[int, int], scale: float | None, seed: int
):
    heads = Heads(*(tensor.requires_grad_() for tensor in make_heads(lengths, heads=shape[0], kv_heads=shape[1], seed=seed)))
    expected = one_by_one(heads, lengths, heads.query.shape[-1] ** -0.5 if scale is None else scale)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    attended = packed_attention(*heads, make_layout(lengths), scale)

    torch.testing.assert_close(attended, expected, rtol=1e-10, atol=1e-12)
    ours, theirs = (torch.autograd.grad((output * upstream).sum(), heads) for output in (attended, expected))
    for name, got, wanted in zip(Heads._fields, ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_attention_in_training_precision_is_near_the_exact_one(dtype: torch.dtype):
    lengths = [3, 17, 16, 1, 40]
    heads = make_heads(lengths, heads=4, kv_heads=2, width=8)

    attended = packed_attention(*(tensor.to(dtype) for tensor in heads), make_layout(lengths), None)

    assert attended.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(attended.double(), one_by_one(heads, lengths, 8**-0.5), rtol=0, atol=tolerance)


def test_a_sequence_of_one_token_attends_to_itself_alone():
    heads = make_heads([1, 1, 5, 1])

    attended = packed_attention(*heads, make_layout([1, 1, 5, 1]), None)

    for place in (0, 1, 7):
        torch.testing.assert_close(attended[place], heads.value[:, place], rtol=1e-12, atol=0)


def test_reordered_sequences_give_their_outputs_in_the_new_order():
    lengths, order = [5, 1, 9, 5, 3], [3, 0, 4, 2, 1]
    heads = make_heads(lengths)
    moved = torch.cat([torch.arange(span.start, span.stop) for span in (spans(lengths)[index] for index in order)])

    attended = packed_attention(*heads, make_layout(lengths), None)
    again = packed_attention(*(tensor[:, moved] for tensor in heads), make_layout([lengths[index] for index in order]), None)

    torch.testing.assert_close(again, attended[moved], rtol=1e-12, atol=1e-14)


# Leaks. Lengths that share buckets, so that rows are padded, and lengths that do not; token 0 is what padding repeats.

LENGTHS = [4, 9, 5, 1, 8, 20]
each_sequence = pytest.mark.parametrize("changed", range(len(LENGTHS)))


@each_sequence
def test_another_sequence_of_the_same_length_changes_no_output_but_its_own(changed: int):
    """Bit by bit, and the other values are a million times as large."""
    heads, layout = make_heads(LENGTHS), make_layout(LENGTHS)
    before = packed_attention(*heads, layout, None)
    span = spans(LENGTHS)[changed]
    for tensor, other in zip(heads, make_heads(LENGTHS, seed=9), strict=True):
        tensor[:, span] = 1e6 * other[:, span]

    after = packed_attention(*heads, layout, None)

    others = torch.ones(len(before), dtype=torch.bool)
    others[span] = False
    assert torch.equal(after[others], before[others])
    assert (after[span] != before[span]).all()


@each_sequence
def test_neither_values_nor_gradient_of_a_sequence_reach_the_gradients_of_another(changed: int):
    """Other values and another upstream gradient in one sequence: every other sequence gets the same gradient, bit by bit."""
    layout, span = make_layout(LENGTHS), spans(LENGTHS)[changed]

    def gradients(heads: Heads, upstream: Tensor) -> tuple[Tensor, ...]:
        leaves = Heads(*(tensor.clone().requires_grad_() for tensor in heads))
        return torch.autograd.grad((packed_attention(*leaves, layout, None) * upstream).sum(), leaves)

    heads, upstream = make_heads(LENGTHS), torch.ones(sum(LENGTHS), 2, 4, dtype=torch.float64)
    before = gradients(heads, upstream)
    for tensor, other in zip(heads, make_heads(LENGTHS, seed=9), strict=True):
        tensor[:, span] = other[:, span]
    upstream[span] = -3.0

    after = gradients(heads, upstream)

    others = torch.ones(sum(LENGTHS), dtype=torch.bool)
    others[span] = False
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new[:, others], old[:, others])
    assert not torch.equal(after[2][:, span], before[2][:, span])


@each_sequence
def test_a_loss_on_one_sequence_has_no_gradient_in_the_others(changed: int):
    heads = Heads(*(tensor.requires_grad_() for tensor in make_heads(LENGTHS)))
    span = spans(LENGTHS)[changed]

    got = torch.autograd.grad(packed_attention(*heads, make_layout(LENGTHS), None)[span].square().sum(), heads)

    for gradient in got:
        assert torch.count_nonzero(gradient[:, : span.start]) == torch.count_nonzero(gradient[:, span.stop :]) == 0
    assert torch.count_nonzero(got[2][:, span]) == got[2][:, span].numel()


def test_a_token_sees_the_past_of_its_sequence_and_never_its_future():
    lengths = [3, 6, 6]
    heads = Heads(*(tensor.requires_grad_() for tensor in make_heads(lengths)))

    (of_value,) = torch.autograd.grad(packed_attention(*heads, make_layout(lengths), None)[5].sum(), [heads.value])

    assert of_value.abs().sum((0, 2)).nonzero().flatten().tolist() == [3, 4, 5]


def test_buckets_are_cut_from_short_to_long():
    layout = make_layout([30, 2, 7, 100, 6])

    assert all(short < long for (_, short), (_, long) in pairwise(layout.shapes))
