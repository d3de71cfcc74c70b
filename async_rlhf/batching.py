"""From scored groups to the tensors of one forward pass.

A *unit* is what must stay together in one microbatch: the pair of a preference loss, the K siblings of a group-relative one.
A rank's share of a minibatch (see `sharding.py`) is split into microbatches of bounded padded size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from async_rlhf.types import ScoredGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSequence:
    """One completion with its prompt, as a loss needs it."""

    prompt_ids: np.ndarray
    """[P] int32"""
    completion_ids: np.ndarray
    """[T] int32"""
    behavior_logprobs: np.ndarray
    """[T] float32"""
    reference_logprobs: np.ndarray
    """[T] float32"""
    score: float
    proximal_logprobs: np.ndarray | None = None
    """[T] float32; None while the batch takes a single optimizer step, where proximal = policy without gradient."""

    @property
    def num_tokens(self) -> int:
        """Prompt and completion tokens."""
        return len(self.prompt_ids) + len(self.completion_ids)


Unit = tuple[TrainingSequence, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Microbatch:
    """The tensors of one forward pass; N sequences padded on the right to L tokens, completions to T."""

    input_ids: Tensor
    """[N, L] int64, prompt then completion, padded with 0."""
    attention_mask: Tensor
    """[N, L] int64, 1 on real tokens. From lengths, never from token ids."""
    completion_positions: Tensor
    """[N, T] int64: the input position whose output predicts completion token t; 0 where masked."""
    completion_ids: Tensor
    """[N, T] int64, 0 where masked."""
    loss_mask: Tensor
    """[N, T] bool, true on completion tokens."""
    behavior_logprobs: Tensor
    """[N, T] float32, 0 where masked."""
    reference_logprobs: Tensor
    """[N, T] float32, 0 where masked."""
    proximal_logprobs: Tensor | None
    """[N, T] float32, 0 where masked; None: proximal = policy without gradient."""
    scores: Tensor
    """[N] float32."""
    unit_size: int
    """Sequences per unit; N is a multiple of it."""

    def to(self, device: torch.device) -> "Microbatch":
        """The same microbatch with all tensors on `device`."""
        moved = {item.name: value.to(device) for item in fields(self) if isinstance(value := getattr(self, item.name), Tensor)}
        return replace(self, **moved)


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


def split_units(units: Sequence[Unit], max_tokens: int) -> list[list[Unit]]:
    """Group units of like length into microbatches of at most `max_tokens` padded tokens; a larger unit stands alone."""
    microbatches: list[list[Unit]] = []
    longest = num_sequences = 0
    for unit in sorted(units, key=_unit_length):
        longest = max(longest, _unit_length(unit))
        num_sequences += len(unit)
        if not microbatches or longest * num_sequences > max_tokens:
            microbatches.append([])
            longest, num_sequences = _unit_length(unit), len(unit)
        microbatches[-1].append(unit)
    return microbatches


def _unit_length(unit: Unit) -> int:
    return max(sequence.num_tokens for sequence in unit)


def collate(units: Sequence[Unit]) -> Microbatch:
    """Pad the units' sequences on the right into one Microbatch. All units have the same size."""
    sequences = [sequence for unit in units for sequence in unit]
    lengths = [sequence.num_tokens for sequence in sequences]
    num_completion = [len(sequence.completion_ids) for sequence in sequences]
    starts = torch.tensor([len(sequence.prompt_ids) for sequence in sequences])
    loss_mask = _length_mask(num_completion)
    offsets = torch.arange(loss_mask.shape[1])
    positions = torch.where(loss_mask, starts[:, None] - 1 + offsets[None, :], torch.zeros_like(loss_mask, dtype=torch.long))
    proximal = [sequence.proximal_logprobs for sequence in sequences]
    return Microbatch(
        input_ids=_pad([np.concatenate([sequence.prompt_ids, sequence.completion_ids]) for sequence in sequences], torch.long),
        attention_mask=_length_mask(lengths).long(),
        completion_positions=positions,
        completion_ids=_pad([sequence.completion_ids for sequence in sequences], torch.long),
        loss_mask=loss_mask,
        behavior_logprobs=_pad([sequence.behavior_logprobs for sequence in sequences], torch.float32),
        reference_logprobs=_pad([sequence.reference_logprobs for sequence in sequences], torch.float32),
        proximal_logprobs=None if any(p is None for p in proximal) else _pad([p for p in proximal if p is not None], torch.float32),
        scores=torch.tensor([sequence.score for sequence in sequences], dtype=torch.float32),
        unit_size=len(units[0]),
    )


def empty_microbatch() -> Microbatch:
    """A smallest forward pass for a rank that has nothing left while others still work; its result must not count."""
    nothing = np.zeros(1, dtype=np.float32)
    token = np.zeros(1, dtype=np.int32)
    sequence = TrainingSequence(prompt_ids=token, completion_ids=token, behavior_logprobs=nothing, reference_logprobs=nothing, score=0.0)
    return collate([(sequence,)])


def with_proximal(unit: Unit, logprobs: Sequence[np.ndarray]) -> Unit:
    """The unit with the learner's log-probabilities at the batch's arrival, one array [T] per sequence."""
    return tuple(replace(sequence, proximal_logprobs=values) for sequence, values in zip(unit, logprobs, strict=True))


def _length_mask(lengths: Sequence[int]) -> Tensor:
    """[N, max] bool, true below each length."""
    return torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]


def _pad(rows: Sequence[np.ndarray], dtype: torch.dtype) -> Tensor:
    """[N, max] rows padded with 0 on the right."""
    padded = np.zeros((len(rows), max(len(row) for row in rows)), dtype=np.float32 if dtype == torch.float32 else np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return torch.from_numpy(padded)
