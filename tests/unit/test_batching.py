"""From scored groups to tensors, packed and padded: every number in its place, every unit exactly once."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rlhf.batching import (
    Batching,
    TrainingSequence,
    Unit,
    collate,
    empty_microbatch,
    sequence_of,
    split_units,
    text_microbatch,
    with_proximal,
)
from async_rlhf.packing import PackedLayout
from tests.support.samples import make_scored, make_ticket

batchings = pytest.mark.parametrize("batching", ["packed", "padded"])
sizes_of_sequences = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=8)


def make_sequence(prompt: list[int], completion: list[int], *, behavior: float = -1.0, reference: float = -2.0) -> TrainingSequence:
    """Token t of the completion has log-probabilities `behavior` - t and `reference` - t."""
    steps = np.arange(len(completion), dtype=np.float32)
    return TrainingSequence(
        prompt_ids=np.array(prompt, dtype=np.int32),
        completion_ids=np.array(completion, dtype=np.int32),
        behavior_logprobs=behavior - steps,
        reference_logprobs=reference - steps,
        score=float(len(completion)),
    )


def sized_unit(*lengths: int) -> Unit:
    return tuple(make_sequence([4], [5] * (length - 1)) for length in lengths)


def random_sequences(sizes: list[tuple[int, int]], seed: int) -> list[TrainingSequence]:
    rng = np.random.default_rng(seed)
    return [make_sequence(rng.integers(0, 9, p).tolist(), rng.integers(0, 9, t).tolist()) for p, t in sizes]


# What both batchings share: the tensors that losses see.


@batchings
def test_completion_tensors_are_those_built_by_hand(batching: Batching):
    microbatch = collate([(make_sequence([7, 8], [9, 1]), make_sequence([7, 8, 6], [3]))], batching)

    assert microbatch.completion_ids.tolist() == [[9, 1], [3, 0]]
    assert microbatch.loss_mask.tolist() == [[True, True], [True, False]]
    assert microbatch.behavior_logprobs.tolist() == [[-1.0, -2.0], [-1.0, 0.0]]
    assert microbatch.reference_logprobs.tolist() == [[-2.0, -3.0], [-2.0, 0.0]]
    assert microbatch.scores.tolist() == [2.0, 1.0]
    assert microbatch.weights.tolist() == [1.0, 1.0]
    assert (microbatch.proximal_logprobs, microbatch.values, microbatch.advantages, microbatch.returns) == (None,) * 4
    assert microbatch.unit_size == 2


@batchings
@pytest.mark.parametrize("pad_id", [0, 1], ids=["pad", "eos"])
def test_known_mistake_5_a_real_token_that_equals_pad_or_eos_keeps_its_mask(pad_id: int, batching: Batching):
    """Masks come from lengths: a pad id that the policy really sampled, or read in its prompt, is a token like any other."""
    microbatch = collate([(make_sequence([pad_id, 5, pad_id], [pad_id, 6, pad_id]),), (make_sequence([5], [6]),)], batching)

    if microbatch.attention_mask is not None:
        assert microbatch.attention_mask.tolist() == [[1] * 6, [1, 1, 0, 0, 0, 0]]
    else:
        assert microbatch.input_ids.tolist() == [[pad_id, 5, pad_id, pad_id, 6, pad_id, 5, 6]]
    assert microbatch.loss_mask.tolist() == [[True] * 3, [True, False, False]]
    assert microbatch.behavior_logprobs.tolist() == [[-1.0, -2.0, -3.0], [-1.0, 0.0, 0.0]]


@batchings
@settings(deadline=None)
@given(sizes=sizes_of_sequences, seed=st.integers(0, 2**31))
def test_each_token_is_predicted_from_the_place_before_it_in_its_own_sequence(batching: Batching, sizes: list[tuple[int, int]], seed: int):
    microbatch = collate([(sequence,) for sequence in random_sequences(sizes, seed)], batching)

    mask, places = microbatch.loss_mask, microbatch.predicted_from
    assert mask.sum(1).tolist() == [t for _, t in sizes]
    assert torch.equal(microbatch.input_ids.flatten()[places[mask] + 1], microbatch.completion_ids[mask])
    assert microbatch.position_ids.flatten()[places[mask]].tolist() == [p - 1 + step for p, t in sizes for step in range(t)]
    assert not places[~mask].any() and not microbatch.completion_ids[~mask].any()
    # Right padding: a mask never rises again.
    assert (mask.long().diff(dim=1) <= 0).all()


@batchings
def test_what_was_found_out_about_each_token_is_padded_like_its_log_probabilities(batching: Batching):
    def known(sequence: TrainingSequence, start: float) -> TrainingSequence:
        steps = np.arange(len(sequence.completion_ids), dtype=np.float32)
        return replace(sequence, values=start + steps, advantages=start + 10 + steps, returns=start + 20 + steps, weight=start)

    unit = (known(make_sequence([4], [5, 6]), 0.25), known(make_sequence([4], [5]), 0.5))
    unit = with_proximal(unit, [np.float32([-0.5, -0.25]), np.float32([-4.0])])

    microbatch = collate([unit], batching)

    assert microbatch.proximal_logprobs is not None and microbatch.proximal_logprobs.tolist() == [[-0.5, -0.25], [-4.0, 0.0]]
    assert microbatch.values is not None and microbatch.values.tolist() == [[0.25, 1.25], [0.5, 0.0]]
    assert microbatch.advantages is not None and microbatch.advantages.tolist() == [[10.25, 11.25], [10.5, 0.0]]
    assert microbatch.returns is not None and microbatch.returns.tolist() == [[20.25, 21.25], [20.5, 0.0]]
    assert microbatch.weights.tolist() == [0.25, 0.5]
    assert microbatch.behavior_logprobs.tolist() == [[-1.0, -2.0], [-1.0, 0.0]]


def test_without_arrival_log_probabilities_proximal_is_the_policy_without_gradient():
    microbatch, policy = collate([sized_unit(3, 2)], "packed"), torch.full((2, 2), -0.75, requires_grad=True)

    proximal = microbatch.proximal(policy)

    assert torch.equal(proximal, policy) and not proximal.requires_grad


def test_with_arrival_log_probabilities_proximal_is_those():
    unit = with_proximal(sized_unit(3, 2), [np.float32([-0.5, -0.25]), np.float32([-4.0])])

    assert collate([unit], "packed").proximal(torch.full((2, 2), -0.75)).tolist() == [[-0.5, -0.25], [-4.0, 0.0]]


def test_a_sequence_is_one_completion_of_its_group_with_everything_that_belongs_to_it():
    scored = make_scored(make_ticket(), scores=(0.5, -1.5, 2.5))

    sequence = sequence_of(scored, 1)

    assert sequence.prompt_ids is scored.group.ticket.prompt.token_ids
    assert sequence.completion_ids is scored.group.rollouts[1].completion_ids
    assert sequence.behavior_logprobs is scored.group.rollouts[1].behavior_logprobs
    assert sequence.reference_logprobs is scored.reference_logprobs[1]
    assert (sequence.score, sequence.weight) == (-1.5, 1.0)
    assert sequence.num_tokens == 5 + len(sequence.completion_ids)


# Padded.


def test_padded_prompt_and_completion_are_those_built_by_hand():
    """Position p predicts the token at p + 1: completions start at 1 and 3, and the second row begins at place 4."""
    microbatch = collate([(make_sequence([7], [9, 1]), make_sequence([7, 8, 6], [3]))], "padded")

    assert microbatch.input_ids.tolist() == [[7, 9, 1, 0], [7, 8, 6, 3]]
    assert microbatch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert microbatch.attention_mask is not None and microbatch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert microbatch.predicted_from.tolist() == [[0, 1], [6, 0]]
    assert microbatch.layout is None


def test_rows_shorter_than_the_longest_are_padded_on_the_right():
    microbatch = collate([(make_sequence([7], [9]),), (make_sequence([7, 8, 6], [3, 5]),)], "padded")

    assert microbatch.input_ids.tolist() == [[7, 9, 0, 0, 0], [7, 8, 6, 3, 5]]
    assert microbatch.attention_mask is not None and microbatch.attention_mask.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert microbatch.unit_size == 1


@settings(deadline=None)
@given(sizes_of_sequences, st.integers(0, 2**31))
def test_padding_is_zero_and_only_behind_the_real_tokens(sizes: list[tuple[int, int]], seed: int):
    microbatch = collate([(sequence,) for sequence in random_sequences(sizes, seed)], "padded")

    mask = microbatch.attention_mask
    assert mask is not None and mask.sum(1).tolist() == [p + t for p, t in sizes]
    assert (mask.diff(dim=1) <= 0).all()
    assert not microbatch.input_ids[mask == 0].any()


# Packed.


def test_packed_prompt_and_completion_are_those_built_by_hand():
    """Behind one another: 7 9 1 at places 0 to 2, 7 8 6 3 at 3 to 6. Their completions begin at 1 and 6."""
    microbatch = collate([(make_sequence([7], [9, 1]), make_sequence([7, 8, 6], [3]))], "packed")

    assert microbatch.input_ids.tolist() == [[7, 9, 1, 7, 8, 6, 3]]
    assert microbatch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3]]
    assert microbatch.predicted_from.tolist() == [[0, 1], [5, 0]]
    assert microbatch.attention_mask is None
    assert microbatch.layout is not None and microbatch.layout.longest == 4


@settings(deadline=None)
@given(sizes_of_sequences, st.integers(0, 2**31))
def test_a_pack_is_its_sequences_behind_one_another_each_counted_from_zero(sizes: list[tuple[int, int]], seed: int):
    sequences = random_sequences(sizes, seed)

    microbatch = collate([(sequence,) for sequence in sequences], "packed")

    assert microbatch.input_ids.tolist() == [[token for s in sequences for token in (*s.prompt_ids, *s.completion_ids)]]
    assert microbatch.position_ids.tolist() == [[place for p, t in sizes for place in range(p + t)]]
    assert microbatch.layout is not None and len(microbatch.layout.restore) == sum(p + t for p, t in sizes)
    assert microbatch.layout.longest == max(p + t for p, t in sizes)


# Devices.


@batchings
def test_to_moves_every_tensor_the_layout_too_and_keeps_the_rest(batching: Batching):
    found = [np.zeros(3, np.float32), np.zeros(2, np.float32)]
    unit = with_proximal(sized_unit(4, 3), found)
    unit = tuple(replace(s, values=row, advantages=row, returns=row) for s, row in zip(unit, found, strict=True))
    microbatch = collate([unit], batching)

    moved = microbatch.to(torch.device("meta"))

    tensors = {name: value for name in microbatch.__slots__ if isinstance(value := getattr(moved, name), torch.Tensor)}
    layouts = [value for name in microbatch.__slots__ if isinstance(value := getattr(moved, name), PackedLayout)]
    assert len(tensors) == (13 if batching == "packed" else 14) and all(tensor.is_meta for tensor in tensors.values())
    assert len(layouts) == (1 if batching == "packed" else 0)
    assert all(tensor.is_meta for layout in layouts for tensor in (layout.cells, layout.restore))
    assert [layout.longest for layout in layouts] == [4] * len(layouts)
    assert moved.unit_size == 2


# Splitting into microbatches.


@batchings
@settings(deadline=None)
@given(
    lengths=st.integers(1, 4).flatmap(lambda size: st.lists(st.tuples(*[st.integers(2, 30)] * size), max_size=20)),
    max_tokens=st.integers(1, 120),
)
def test_every_unit_is_in_one_microbatch_within_the_budget(batching: Batching, lengths: list[tuple[int, ...]], max_tokens: int):
    """The budget counts what really goes through the model: padding where there is some, and only then."""
    units = [sized_unit(*unit) for unit in lengths]

    microbatches = split_units(units, max_tokens, batching)

    assert sorted(index for share in microbatches for index in share) == list(range(len(units)))
    for share in microbatches:
        assert share
        in_memory = collate([units[index] for index in share], batching).input_ids.numel()
        assert in_memory <= max_tokens or len(share) == 1


def lengths_by_share(units: list[Unit], max_tokens: int, batching: Batching) -> list[list[int]]:
    return [[units[index][0].num_tokens for index in share] for share in split_units(units, max_tokens, batching)]


@batchings
def test_units_of_like_length_share_a_microbatch(batching: Batching):
    """Budget 12: three of 4 tokens fill one microbatch; mixing 4 with 12 would waste 8 of 24. Budget 11: two of them."""
    units = [sized_unit(length) for length in (4, 12, 4, 4)]

    assert lengths_by_share(units, 12, batching) == [[4, 4, 4], [12]]
    assert lengths_by_share(units, 11, batching) == [[4, 4], [4], [12]]


def test_a_packed_budget_counts_real_tokens_and_a_padded_one_padding_too():
    """3 + 4 + 5 tokens: packed 12, padded 3 * 5 = 15."""
    units = [sized_unit(length) for length in (5, 3, 4)]

    assert lengths_by_share(units, 12, "packed") == [[3, 4, 5]]
    assert lengths_by_share(units, 11, "packed") == [[3, 4], [5]]
    assert lengths_by_share(units, 15, "padded") == [[3, 4, 5]]
    assert lengths_by_share(units, 14, "padded") == [[3, 4], [5]]


def test_the_padding_inside_a_unit_counts_against_a_padded_budget():
    """Two units of 2 and 6 tokens: packed 16 tokens, padded 4 rows of 6 = 24."""
    units = [sized_unit(2, 6), sized_unit(6, 2)]

    assert [split_units(units, budget, "packed") for budget in (16, 15)] == [[[0, 1]], [[0], [1]]]
    assert [split_units(units, budget, "padded") for budget in (24, 23)] == [[[0, 1]], [[0], [1]]]


@batchings
def test_no_units_make_no_microbatch(batching: Batching):
    assert split_units([], 100, batching) == []


# Microbatches without a group.


@batchings
def test_a_text_is_scored_from_its_second_token_on(batching: Batching):
    microbatch = text_microbatch((3, 9, 14), batching)

    assert microbatch.input_ids.tolist() == [[3, 9, 14]]
    assert microbatch.predicted_from.tolist() == [[0, 1]]
    assert microbatch.completion_ids.tolist() == [[9, 14]]
    assert microbatch.loss_mask.tolist() == [[True, True]]


@batchings
def test_the_empty_microbatch_is_a_forward_pass_of_one_completion_token(batching: Batching):
    microbatch = empty_microbatch(batching)

    assert microbatch.input_ids.tolist() == [[0, 0]]
    assert microbatch.predicted_from.tolist() == [[0]]
    assert microbatch.loss_mask.tolist() == [[True]]
