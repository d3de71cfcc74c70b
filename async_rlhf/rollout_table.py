"""Scored groups as Arrow tables, one row per completion, and nothing lost: what the journal's payloads and the rollouts dataset are."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from async_rlhf.arrow_columns import SPANS, arrays_of, lists_column, spans_column, spans_of
from async_rlhf.errors import JournalError
from async_rlhf.types import FinishReason, Prompt, Rollout, RolloutGroup, ScoredGroup, Ticket

SCHEMA: pa.Schema = pa.schema(
    [
        ("ticket_id", pa.int64()),
        ("attempt", pa.int64()),
        ("holder", pa.string()),
        ("epoch", pa.int64()),
        ("seed", pa.int64()),
        ("deadline", pa.int64()),
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        # A list of pairs, because `datasets` knows no map type.
        ("prompt_columns", pa.list_(pa.struct([("name", pa.string()), ("json", pa.string())]))),
        ("completion_index", pa.int32()),  # 0 begins the next group
        ("completion", pa.string()),
        ("completion_ids", pa.list_(pa.int32())),
        ("behavior_logprobs", pa.list_(pa.float32())),
        ("reference_logprobs", pa.list_(pa.float32())),
        ("version_spans", SPANS),
        ("finish_reason", pa.string()),
        ("score", pa.float32()),
        ("reward_parts", pa.list_(pa.struct([("name", pa.string()), ("score", pa.float32())]))),
    ]
)
"""A group is a run of rows; the columns of ticket and prompt repeat in each."""

_ARRAYS = ("prompt_ids", "completion_ids", "behavior_logprobs", "reference_logprobs")
_PLAIN = tuple(name for name in SCHEMA.names if name not in (*_ARRAYS, "score", "version_spans", "completion_index"))

_PAYLOAD_MAGIC = b"GROUPS 2"
"""Begins each journal payload; the digit is the version of SCHEMA. 8 bytes, so that Arrow's buffers stay aligned."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupRows:
    """One group as rows of a record batch, of which nothing is copied or unpacked before somebody asks."""

    ticket_id: int
    batch: pa.RecordBatch
    begin: int
    end: int
    """Rows [begin, end)."""

    def unpacked(self) -> ScoredGroup:
        """The group itself; see from_batch."""
        return from_batch(self.batch.slice(self.begin, self.end - self.begin))[0]


def to_batch(groups: Sequence[ScoredGroup]) -> pa.RecordBatch:
    """One row per completion, in order."""
    for scored in groups:
        _check_lossless(scored)
    tickets = [scored.group.ticket for scored in groups]
    prompts = [ticket.prompt for ticket in tickets]
    of_groups: dict[str, Any] = {
        **{name: [getattr(ticket, name) for ticket in tickets] for name in ("ticket_id", "attempt", "holder", "epoch", "seed", "deadline")},
        "prompt_id": [prompt.prompt_id for prompt in prompts],
        "prompt": [prompt.text for prompt in prompts],
        "prompt_ids": lists_column([prompt.token_ids for prompt in prompts], np.int32),
        "prompt_columns": [[{"name": name, "json": json.dumps(value)} for name, value in prompt.columns.items()] for prompt in prompts],
    }
    counts = [len(scored.group.rollouts) for scored in groups]
    group_of_row = pa.array(np.repeat(np.arange(len(groups)), counts))
    rollouts = [rollout for scored in groups for rollout in scored.group.rollouts]
    of_rows: dict[str, Any] = {
        "completion_index": [index for count in counts for index in range(count)],
        "completion": [completion for scored in groups for completion in scored.completions],
        "completion_ids": lists_column([rollout.completion_ids for rollout in rollouts], np.int32),
        "behavior_logprobs": lists_column([rollout.behavior_logprobs for rollout in rollouts], np.float32),
        "reference_logprobs": lists_column([logprobs for scored in groups for logprobs in scored.reference_logprobs], np.float32),
        "version_spans": spans_column([rollout.version_spans for rollout in rollouts]),
        "finish_reason": [rollout.finish_reason.value for rollout in rollouts],
        "score": np.concatenate([np.empty(0, np.float32), *(scored.scores for scored in groups)]),
        "reward_parts": [
            [{"name": name, "score": scores[index]} for name, scores in scored.reward_parts.items()]
            for scored, count in zip(groups, counts, strict=True)
            for index in range(count)
        ],
    }
    arrays = [
        *(pa.array(column, SCHEMA.field(name).type).take(group_of_row) for name, column in of_groups.items()),
        *(pa.array(column, SCHEMA.field(name).type) for name, column in of_rows.items()),
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def from_batch(batch: pa.RecordBatch) -> list[ScoredGroup]:
    """The groups whose rows these are, bit for bit; their arrays own their memory.

    Raises:
        JournalError: rows of a group are missing.
    """
    columns = {name: arrays_of(batch.column(name)) for name in _ARRAYS}
    scores = batch.column("score").to_numpy()
    spans = spans_of(batch.column("version_spans"))
    plain = {name: batch.column(name).to_pylist() for name in _PLAIN}
    groups: list[ScoredGroup] = []
    for begin, end in pairwise(_bounds(batch)):
        rollouts = tuple(
            Rollout(
                completion_ids=columns["completion_ids"][row],
                behavior_logprobs=columns["behavior_logprobs"][row],
                version_spans=spans[row],
                finish_reason=FinishReason(plain["finish_reason"][row]),
            )
            for row in range(begin, end)
        )
        groups.append(
            ScoredGroup(
                group=RolloutGroup(ticket=_ticket(plain, begin, columns["prompt_ids"][begin]), rollouts=rollouts),
                scores=scores[begin:end].copy(),
                reference_logprobs=tuple(columns["reference_logprobs"][begin:end]),
                completions=tuple(plain["completion"][begin:end]),
                reward_parts=_parts(plain["reward_parts"][begin:end]),
            )
        )
    return groups


def rows_of(batch: pa.RecordBatch) -> list[GroupRows]:
    """The same groups as from_batch gives, still rows.

    Raises:
        JournalError: rows of a group are missing.
    """
    ticket_ids = batch.column("ticket_id").to_pylist()
    return [GroupRows(ticket_id=ticket_ids[begin], batch=batch, begin=begin, end=end) for begin, end in pairwise(_bounds(batch))]


def encode(groups: Sequence[ScoredGroup]) -> bytes:
    """The groups as a journal payload: an Arrow record batch without its schema, which is always SCHEMA."""
    return b"".join([_PAYLOAD_MAGIC, memoryview(to_batch(groups).serialize())])


def decode(payload: bytes) -> list[ScoredGroup]:
    """The groups that `encode` was given.

    Raises:
        JournalError: the bytes are nothing that this version of `encode` wrote.
    """
    return _decode(payload, from_batch)


def decode_rows(payload: bytes) -> list[GroupRows]:
    """The same groups, still rows of the payload; see `decode`."""
    return _decode(payload, rows_of)


def _decode(payload: bytes, unpack: Callable[[pa.RecordBatch], list[T]]) -> list[T]:
    if not payload.startswith(_PAYLOAD_MAGIC):
        raise JournalError(
            f"a payload of groups must begin with {_PAYLOAD_MAGIC!r}, got {payload[: len(_PAYLOAD_MAGIC)]!r}; "
            "read it with the version of async-rlhf that wrote it"
        )
    try:
        batch: pa.RecordBatch = pa.ipc.read_record_batch(pa.py_buffer(payload)[len(_PAYLOAD_MAGIC) :], SCHEMA)
        batch.validate(full=True)
        if any(column.null_count for column in batch.columns):
            raise ValueError("no value may be missing")
        return unpack(batch)
    except (pa.ArrowException, OSError, EOFError, ValueError, TypeError, JournalError) as error:
        raise JournalError(
            f"a payload of {len(payload)} bytes must hold groups, but does not: {error}; restore a copy of the journal"
        ) from error


def _bounds(batch: pa.RecordBatch) -> list[int]:
    """Where each group begins, and where the last one ends."""
    indices = batch.column("completion_index").to_numpy()
    begins = indices == 0
    if len(indices) and not (begins[0] and (begins[1:] | (indices[1:] == indices[:-1] + 1)).all()):
        raise JournalError(
            f"the rows of each group must count up from 0 in completion_index, got {indices.tolist()}; read all rows of the table"
        )
    return [*np.flatnonzero(begins).tolist(), batch.num_rows]


def _check_lossless(scored: ScoredGroup) -> None:
    group = scored.group
    name = f"ticket {group.ticket.ticket_id}"
    counts = {len(group.rollouts), len(scored.completions), len(scored.reference_logprobs), *scored.scores.shape}
    assert len(counts) == 1 and counts != {0}, f"{name}: one score, text and reference array per completion, got counts {counts}"
    assert scored.judged_scores is None, f"{name}: groups are journaled before a batch shapes their scores"
    for part, values in scored.reward_parts.items():
        assert values.dtype == np.float32 and values.shape == scored.scores.shape, f"{name}: part {part} has one float32 score each"
    assert scored.scores.dtype == np.float32, f"{name}: scores are float32, got {scored.scores.dtype}"


def _parts(of_rows: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, np.ndarray]:
    names = [pair["name"] for pair in of_rows[0]]
    if any([pair["name"] for pair in pairs] != names for pairs in of_rows):
        raise JournalError(f"the completions of a group must have one reward_parts each, {names}, got others; restore a copy of the table")
    return {name: np.array([pairs[index]["score"] for pairs in of_rows], dtype=np.float32) for index, name in enumerate(names)}


def _ticket(plain: Mapping[str, list[Any]], row: int, prompt_ids: np.ndarray) -> Ticket:
    columns = {pair["name"]: json.loads(pair["json"]) for pair in plain["prompt_columns"][row]}
    prompt = Prompt(prompt_id=plain["prompt_id"][row], text=plain["prompt"][row], token_ids=prompt_ids, columns=columns)
    names = ("ticket_id", "attempt", "holder", "epoch", "seed", "deadline")
    return Ticket(prompt=prompt, **{name: plain[name][row] for name in names})
