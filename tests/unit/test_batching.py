"""From scored groups to padded tensors: every number in its place, every unit exactly once."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from async_rlhf.batching import (
    TrainingSequence,
    Unit,
    collate,
    empty_microbatch,
    sequence_of,
    split_units,
    with_proximal,
)
from tests.support.samples import make_scored, make_ticket


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


def test_collate_pads_prompt_and_completion_as_built_by_hand():
    units: list[Unit] = [(make_sequence([7, 8], [9, 1]), make_sequence([7, 8, 6], [3]))]

    microbatch = collate(units)

    assert microbatch.input_ids.tolist() == [[7, 8, 9, 1], [7, 8, 6, 3]]
    assert microbatch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    # Position p predicts the token at p + 1: completions start at 2 and 3.
    assert microbatch.completion_positions.tolist() == [[1, 2], [2, 0]]
    assert microbatch.completion_ids.tolist() == [[9, 1], [3, 0]]
    assert microbatch.loss_mask.tolist() == [[True, True], [True, False]]
    assert microbatch.behavior_logprobs.tolist() == [[-1.0, -2.0], [-1.0, 0.0]]
    assert microbatch.reference_logprobs.tolist() == [[-2.0, -3.0], [-2.0, 0.0]]
    assert microbatch.scores.tolist() == [2.0, 1.0]
    assert microbatch.proximal_logprobs is None
    assert microbatch.unit_size == 2


def test_rows_shorter_than_the_longest_are_padded_on_the_right():
    microbatch = collate([(make_sequence([7], [9]),), (make_sequence([7, 8, 6], [3, 5]),)])

    assert microbatch.input_ids.tolist() == [[7, 9, 0, 0, 0], [7, 8, 6, 3, 5]]
    assert microbatch.attention_mask.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert microbatch.unit_size == 1


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=8), st.integers(0, 2**31))
def test_each_position_is_the_one_before_its_completion_token(sizes: list[tuple[int, int]], seed: int):
    rng = np.random.default_rng(seed)
    sequences = [make_sequence(rng.integers(0, 9, p).tolist(), rng.integers(0, 9, t).tolist()) for p, t in sizes]

    microbatch = collate([(sequence,) for sequence in sequences])

    shifted = microbatch.input_ids.gather(1, microbatch.completion_positions + 1)
    assert torch.equal(shifted[microbatch.loss_mask], microbatch.completion_ids[microbatch.loss_mask])
    assert microbatch.attention_mask.sum(1).tolist() == [p + t for p, t in sizes]
    assert microbatch.loss_mask.sum(1).tolist() == [t for _, t in sizes]
    # Right padding: a mask never rises again.
    assert (microbatch.attention_mask.diff(dim=1) <= 0).all() and (microbatch.loss_mask.long().diff(dim=1) <= 0).all()
    assert not microbatch.input_ids[microbatch.attention_mask == 0].any()


@pytest.mark.parametrize("pad_id", [0, 1], ids=["pad", "eos"])
def test_known_mistake_5_a_real_token_that_equals_pad_or_eos_keeps_its_mask(pad_id: int):
    """Masks come from lengths: a pad id that the policy really sampled, or read in its prompt, is a token like any other."""
    microbatch = collate([(make_sequence([pad_id, 5, pad_id], [pad_id, 6, pad_id]),), (make_sequence([5], [6]),)])

    assert microbatch.attention_mask.tolist() == [[1] * 6, [1, 1, 0, 0, 0, 0]]
    assert microbatch.loss_mask.tolist() == [[True] * 3, [True, False, False]]
    assert microbatch.behavior_logprobs.tolist() == [[-1.0, -2.0, -3.0], [-1.0, 0.0, 0.0]]


def test_proximal_log_probabilities_are_padded_like_the_others():
    unit = with_proximal((make_sequence([4], [5, 6]), make_sequence([4], [5])), [np.float32([-0.5, -0.25]), np.float32([-4.0])])

    microbatch = collate([unit])

    assert microbatch.proximal_logprobs is not None
    assert microbatch.proximal_logprobs.tolist() == [[-0.5, -0.25], [-4.0, 0.0]]
    assert microbatch.behavior_logprobs.tolist() == [[-1.0, -2.0], [-1.0, 0.0]]


def test_a_sequence_is_one_completion_of_its_group_with_everything_that_belongs_to_it():
    scored = make_scored(make_ticket(), scores=(0.5, -1.5, 2.5))

    sequence = sequence_of(scored, 1)

    assert sequence.prompt_ids is scored.group.ticket.prompt.token_ids
    assert sequence.completion_ids is scored.group.rollouts[1].completion_ids
    assert sequence.behavior_logprobs is scored.group.rollouts[1].behavior_logprobs
    assert sequence.reference_logprobs is scored.reference_logprobs[1]
    assert sequence.score == -1.5
    assert sequence.num_tokens == 5 + len(sequence.completion_ids)


def test_to_moves_every_tensor_and_keeps_the_rest():
    microbatch = collate([with_proximal(sized_unit(4, 3), [np.zeros(3, np.float32), np.zeros(2, np.float32)])])

    moved = microbatch.to(torch.device("meta"))

    tensors = [value for name in microbatch.__slots__ if isinstance(value := getattr(moved, name), torch.Tensor)]
    assert len(tensors) == 9 and all(tensor.is_meta for tensor in tensors)
    assert moved.unit_size == 2


@given(
    st.integers(1, 4).flatmap(lambda size: st.lists(st.tuples(*[st.integers(2, 30)] * size), max_size=20)),
    st.integers(1, 120),
)
def test_every_unit_is_in_one_microbatch_within_the_budget(lengths: list[tuple[int, ...]], max_tokens: int):
    units = [sized_unit(*unit) for unit in lengths]

    microbatches = split_units(units, max_tokens)

    assert sorted(id(unit) for share in microbatches for unit in share) == sorted(map(id, units))
    for share in microbatches:
        padded = collate(share).input_ids.numel()
        assert padded <= max_tokens or len(share) == 1
        assert share


def test_units_of_like_length_share_a_microbatch():
    """Budget 12: three of 4 tokens fill one microbatch; mixing 4 with 12 would waste 8 of 24. Budget 11: two of them."""
    units = [sized_unit(length) for length in (4, 12, 4, 4)]

    assert [[unit[0].num_tokens for unit in share] for share in split_units(units, 12)] == [[4, 4, 4], [12]]
    assert [[unit[0].num_tokens for unit in share] for share in split_units(units, 11)] == [[4, 4], [4], [12]]


def test_no_units_make_no_microbatch():
    assert split_units([], 100) == []


def test_the_empty_microbatch_is_a_forward_pass_of_one_completion_token():
    microbatch = empty_microbatch()

    assert microbatch.input_ids.tolist() == [[0, 0]]
    assert microbatch.completion_positions.tolist() == [[0]]
    assert microbatch.loss_mask.tolist() == [[True]]
