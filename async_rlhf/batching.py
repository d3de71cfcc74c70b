"""From scored groups to the tensors of one forward pass.

A *unit* is what must stay together in one microbatch: the pair of a preference loss, the K siblings of a group-relative one.
A rank's share of a minibatch (see `sharding.py`) is split into microbatches of bounded size, each `packed` (sequences behind
one another, no padding) or `padded` (one above another, padded on the right). Losses see no difference: their tensors are
[N, T], completion tokens padded on the right.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from async_rlhf.packing import PackedLayout, make_layout
from async_rlhf.types import ScoredGroup

Batching = Literal["packed", "padded"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSequence:
    """One completion with its prompt, as a loss needs it. What is None is not known yet, or not needed."""

    prompt_ids: np.ndarray
    """[P] int32"""
    completion_ids: np.ndarray
    """[T] int32"""
    behavior_logprobs: np.ndarray
    """[T] float32"""
    reference_logprobs: np.ndarray
    """[T] float32"""
    score: float
    weight: float = 1.0
    """0: in the denominators, but nothing to learn from."""
    proximal_logprobs: np.ndarray | None = None
    """[T] float32; None where proximal = policy without gradient: the batch takes a single optimizer step."""
    values: np.ndarray | None = None
    """[T] float32: the critic's, when the batch arrived."""
    advantages: np.ndarray | None = None
    """[T] float32."""
    returns: np.ndarray | None = None
    """[T] float32: the critic's targets."""

    @property
    def num_tokens(self) -> int:
        """Prompt and completion tokens."""
        return len(self.prompt_ids) + len(self.completion_ids)


Unit = tuple[TrainingSequence, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Microbatch:
    """The tensors of one forward pass over N sequences, whose completions have at most T tokens."""

    input_ids: Tensor
    """int64, prompt then completion: padded [N, L], with 0; packed [1, L]."""
    position_ids: Tensor
    """Like input_ids; counts from 0 in each sequence."""
    attention_mask: Tensor | None
    """Padded: [N, L] int64, 1 on real tokens. From lengths, never from token ids. Packed: None."""
    layout: PackedLayout | None
    """Packed: where each sequence lies. Padded: None."""
    predicted_from: Tensor
    """[N, T] int64: the place in input_ids.flatten() whose output predicts completion token t; 0 where masked."""
    completion_ids: Tensor
    """[N, T] int64, 0 where masked."""
    loss_mask: Tensor
    """[N, T] bool, true on completion tokens."""
    behavior_logprobs: Tensor
    """[N, T] float32, 0 where masked, like the next five."""
    reference_logprobs: Tensor
    proximal_logprobs: Tensor | None
    values: Tensor | None
    advantages: Tensor | None
    returns: Tensor | None
    scores: Tensor
    """[N] float32."""
    weights: Tensor
    """[N] float32."""
    unit_size: int
    """Sequences per unit; N is a multiple of it."""

    def to(self, device: torch.device) -> "Microbatch":
        """The same microbatch with all tensors on `device`."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in values.items() if isinstance(value, Tensor | PackedLayout)})

    def proximal(self, policy_logprobs: Tensor) -> Tensor:
        """[N, T] the policy when the batch arrived, which in a batch of one optimizer step is the policy now. No gradient."""
        return policy_logprobs.detach() if self.proximal_logprobs is None else self.proximal_logprobs


def sequence_of(scored: ScoredGroup, index: int) -> TrainingSequence:
    """Completion `index` of a group."""
    rollout = scored.group.rollouts[index]
    return TrainingSequence(
        prompt_ids=scored.group.ticket.prompt.token_ids,
        completion_ids=rollout.completion_ids,
        behavior_logprobs=rollout.behavior_logprobs,
        reference_logprobs=scored.reference_logprobs[index],
        score=float(scored.scores[index]),
    )


def split_units(units: Sequence[Unit], max_tokens: int, batching: Batching) -> list[list[int]]:
    """Indices of the units, by microbatch: units of like length together, at most `max_tokens` tokens, padding included.

    A unit larger than that is a microbatch of its own.
    """
    microbatches: list[list[int]] = []
    num_sequences = num_tokens = 0
    for index in sorted(range(len(units)), key=lambda i: _longest(units[i])):
        unit = units[index]
        num_sequences += len(unit)
        num_tokens += sum(sequence.num_tokens for sequence in unit)
        size = num_tokens if batching == "packed" else _longest(unit) * num_sequences
        if not microbatches or size > max_tokens:
            microbatches.append([])
            num_sequences, num_tokens = len(unit), sum(sequence.num_tokens for sequence in unit)
        microbatches[-1].append(index)
    return microbatches


def _longest(unit: Unit) -> int:
    return max(sequence.num_tokens for sequence in unit)


def collate(units: Sequence[Unit], batching: Batching) -> Microbatch:
    """One Microbatch of the units' sequences, in order. All units have the same size."""
    sequences = [sequence for unit in units for sequence in unit]
    tokens = [np.concatenate([sequence.prompt_ids, sequence.completion_ids]) for sequence in sequences]
    lengths = [len(row) for row in tokens]
    loss_mask = _length_mask([len(sequence.completion_ids) for sequence in sequences])
    if batching == "packed":
        input_ids = torch.from_numpy(np.concatenate(tokens).astype(np.int64))[None]
        position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        attention_mask, layout = None, make_layout(lengths)
    else:
        input_ids = _pad(tokens, torch.long)
        position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        starts = torch.arange(len(sequences)) * input_ids.shape[1]
        attention_mask, layout = _length_mask(lengths).long(), None
    first = starts + torch.tensor([len(sequence.prompt_ids) for sequence in sequences]) - 1
    predicted_from = first[:, None] + torch.arange(loss_mask.shape[1])
    return Microbatch(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=attention_mask,
        layout=layout,
        predicted_from=torch.where(loss_mask, predicted_from, torch.zeros_like(predicted_from)),
        completion_ids=_pad([sequence.completion_ids for sequence in sequences], torch.long),
        loss_mask=loss_mask,
        behavior_logprobs=_pad([sequence.behavior_logprobs for sequence in sequences], torch.float32),
        reference_logprobs=_pad([sequence.reference_logprobs for sequence in sequences], torch.float32),
        proximal_logprobs=_pad_known([sequence.proximal_logprobs for sequence in sequences]),
        values=_pad_known([sequence.values for sequence in sequences]),
        advantages=_pad_known([sequence.advantages for sequence in sequences]),
        returns=_pad_known([sequence.returns for sequence in sequences]),
        scores=torch.tensor([sequence.score for sequence in sequences], dtype=torch.float32),
        weights=torch.tensor([sequence.weight for sequence in sequences], dtype=torch.float32),
        unit_size=len(units[0]),
    )


def text_sequence(token_ids: Sequence[int]) -> TrainingSequence:
    """One text, every token of it but the first to be scored."""
    ids = np.array(token_ids, dtype=np.int32)
    nothing = np.zeros(len(ids) - 1, dtype=np.float32)
    return TrainingSequence(prompt_ids=ids[:1], completion_ids=ids[1:], behavior_logprobs=nothing, reference_logprobs=nothing, score=0.0)


def text_microbatch(token_ids: Sequence[int], batching: Batching) -> Microbatch:
    """The text_sequence alone."""
    return collate([(text_sequence(token_ids),)], batching)


def empty_microbatch(batching: Batching) -> Microbatch:
    """A smallest forward pass for a rank that has nothing left while others still work; its result must not count."""
    return text_microbatch((0, 0), batching)


def with_proximal(unit: Unit, logprobs: Sequence[np.ndarray]) -> Unit:
    """The unit with the learner's log-probabilities at the batch's arrival, one array [T] per sequence."""
    return tuple(replace(sequence, proximal_logprobs=values) for sequence, values in zip(unit, logprobs, strict=True))


def _length_mask(lengths: Sequence[int]) -> Tensor:
    """[N, max] bool, true below each length."""
    return torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]


def _pad_known(rows: Sequence[np.ndarray | None]) -> Tensor | None:
    known = [row for row in rows if row is not None]
    return _pad(known, torch.float32) if len(known) == len(rows) else None


def _pad(rows: Sequence[np.ndarray], dtype: torch.dtype) -> Tensor:
    """[N, max] rows padded with 0 on the right."""
    padded = np.zeros((len(rows), max(len(row) for row in rows)), dtype=np.float32 if dtype == torch.float32 else np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return torch.from_numpy(padded)
