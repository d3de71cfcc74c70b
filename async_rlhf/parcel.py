"""Scored groups between processes: a tuple that travels as one block of integers, one of floats, and plain values.

A group of K completions is 3 K + 2 small arrays in as many small objects; pickled one by one they cost more than everything else that
the queue does with them. In a parcel the arrays of all groups lie in two buffers, which Ray puts beside the pickle: on the other side
each array is a view of them, read-only and without a copy, as long as it is used.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from async_rlhf.types import FinishReason, Prompt, Rollout, RolloutGroup, ScoredGroup, Ticket, VersionSpan

_FINISHED = {reason.value: reason for reason in FinishReason}


class Parcel(tuple[ScoredGroup, ...]):
    """Groups that pickle well; otherwise a tuple."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Callable[..., "tuple[ScoredGroup, ...]"], tuple[Any, ...]]:
        """What pickle keeps; groups with arrays of other types or lengths than the messages promise travel as they are."""
        ids = [array for scored in self for array in _ids_of(scored)]
        floats = [array for scored in self for array in _floats_of(scored)]
        if any(array.dtype != np.int32 for array in ids) or any(array.dtype != np.float32 for array in floats):
            return tuple, (list(self),)
        plain = [_plain(scored) for scored in self]
        if [len(array) for array in floats] != [length for of_group in plain for length in _float_lengths(of_group)]:
            return tuple, (list(self),)
        return _unpacked, (plain, np.concatenate([np.empty(0, np.int32), *ids]), np.concatenate([np.empty(0, np.float32), *floats]))


def _ids_of(scored: ScoredGroup) -> list[np.ndarray]:
    group = scored.group
    return [group.ticket.prompt.token_ids, *(rollout.completion_ids for rollout in group.rollouts)]


def _floats_of(scored: ScoredGroup) -> list[np.ndarray]:
    judged = () if scored.judged_scores is None else (scored.judged_scores,)
    behavior = (rollout.behavior_logprobs for rollout in scored.group.rollouts)
    return [scored.scores, *judged, *scored.reward_parts.values(), *behavior, *scored.reference_logprobs]


_Plain = tuple[Any, ...]


def _plain(scored: ScoredGroup) -> _Plain:
    """Everything but the arrays; how they are cut comes first."""
    ticket, rollouts = scored.group.ticket, scored.group.rollouts
    prompt = ticket.prompt
    return (
        len(prompt.token_ids),
        [len(rollout.completion_ids) for rollout in rollouts],
        scored.judged_scores is not None,
        list(scored.reward_parts),
        (prompt.prompt_id, prompt.text, prompt.columns),
        (ticket.ticket_id, ticket.epoch, ticket.seed, ticket.deadline, ticket.attempt, ticket.holder),
        [[(span.version, span.start, span.end) for span in rollout.version_spans] for rollout in rollouts],
        [rollout.finish_reason.value for rollout in rollouts],
        scored.completions,
    )


def _float_lengths(plain: _Plain) -> list[int]:
    _, lengths, judged, parts, *_ = plain
    return [len(lengths)] * (1 + judged + len(parts)) + lengths * 2


def _unpacked(plain: Sequence[_Plain], ids: np.ndarray, floats: np.ndarray) -> Parcel:
    groups: list[ScoredGroup] = []
    at_id = at_float = 0
    for of_group in plain:
        num_prompt, lengths, judged, parts, of_prompt, of_ticket, spans, reasons, completions = of_group
        arrays: list[np.ndarray] = []
        for length in _float_lengths(of_group):
            arrays.append(floats[at_float : at_float + length])
            at_float += length
        token_ids = ids[at_id : at_id + num_prompt]
        at_id += num_prompt
        first = 1 + judged + len(parts)
        rollouts: list[Rollout] = []
        for index, length in enumerate(lengths):
            rollouts.append(
                Rollout(
                    completion_ids=ids[at_id : at_id + length],
                    behavior_logprobs=arrays[first + index],
                    version_spans=tuple(VersionSpan(version=version, start=start, end=end) for version, start, end in spans[index]),
                    finish_reason=_FINISHED[reasons[index]],
                )
            )
            at_id += length
        groups.append(
            ScoredGroup(
                group=RolloutGroup(ticket=_ticket(of_ticket, of_prompt, token_ids), rollouts=tuple(rollouts)),
                scores=arrays[0],
                reference_logprobs=tuple(arrays[first + len(lengths) :]),
                completions=completions,
                reward_parts=dict(zip(parts, arrays[1 + judged : first], strict=True)),
                judged_scores=arrays[1] if judged else None,
            )
        )
    return Parcel(groups)


def _ticket(of_ticket: tuple[Any, ...], of_prompt: tuple[Any, ...], token_ids: np.ndarray) -> Ticket:
    prompt_id, text, columns = of_prompt
    ticket_id, epoch, seed, deadline, attempt, holder = of_ticket
    prompt = Prompt(prompt_id=prompt_id, text=text, token_ids=token_ids, columns=columns)
    return Ticket(ticket_id=ticket_id, prompt=prompt, epoch=epoch, seed=seed, deadline=deadline, attempt=attempt, holder=holder)
