"""Scored groups as Arrow tables, one row per completion, and nothing lost: journal payloads and the rollouts dataset.

rollouts/part-00000000.parquet   what became of each group too; `datasets.load_dataset("parquet", data_files=...)` opens it
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from async_rlhf.arrow_columns import SPANS, arrays_of, lists_column, spans_column, spans_of
from async_rlhf.errors import JournalError
from async_rlhf.files import sync_folder
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

FATE_SCHEMA: pa.Schema = pa.schema([*SCHEMA, ("fate", pa.string()), ("update", pa.int64()), ("position", pa.int64())])
"""The rollouts dataset."""

TRAINED = "trained"

_PAYLOAD_MAGIC = b"GROUPS 2"
"""Begins each journal payload; the digit is the version of SCHEMA. 8 bytes, so that Arrow's buffers stay aligned."""
_GROUPS_PER_WRITE = 64
"""Groups in one row group of a part: what writing holds in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupFate:
    """A scored group and what became of it."""

    scored: ScoredGroup
    fate: str
    """trained, tied, dropped, lost_history or failed: REASON."""
    update: int | None = None
    """The update that trained it; None: none did."""
    position: int | None = None
    """Its place in the batch of that update; None: it was in none."""


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
    columns = {name: arrays_of(batch.column(name)) for name in ("prompt_ids", "completion_ids", "behavior_logprobs", "reference_logprobs")}
    scores = batch.column("score").to_numpy()
    spans = spans_of(batch.column("version_spans"))
    plain = {name: batch.column(name).to_pylist() for name in SCHEMA.names if name not in (*columns, "score", "version_spans")}
    indices = plain["completion_index"]
    if any(
        index not in ((0, before + 1) if row else (0,)) for row, (before, index) in enumerate(zip([0, *indices], indices, strict=False))
    ):
        raise JournalError(f"the rows of each group must count up from 0 in completion_index, got {indices}; read all rows of the table")
    begins = [row for row, index in enumerate(indices) if index == 0]
    groups: list[ScoredGroup] = []
    for begin, end in pairwise([*begins, batch.num_rows]):
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


def encode(groups: Sequence[ScoredGroup]) -> bytes:
    """The groups as a journal payload: an Arrow record batch without its schema, which is always SCHEMA."""
    return b"".join([_PAYLOAD_MAGIC, memoryview(to_batch(groups).serialize())])


def decode(payload: bytes) -> list[ScoredGroup]:
    """The groups that `encode` was given.

    Raises:
        JournalError: the bytes are nothing that this version of `encode` wrote.
    """
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
        return from_batch(batch)
    except (pa.ArrowException, OSError, EOFError, ValueError, TypeError, JournalError) as error:
        raise JournalError(
            f"a payload of {len(payload)} bytes must hold groups, but does not: {error}; restore a copy of the journal"
        ) from error


def part_path(folder: Path, index: int) -> Path:
    """Where part `index` of the dataset lies."""
    return folder / f"part-{index:08d}.parquet"


def write_part(folder: Path, index: int, fates: Iterable[GroupFate]) -> Path:
    """Write one part of the dataset in one step: a reader, or a crash, sees all of it or nothing.

    Raises:
        JournalError: the storage refuses.
    """
    path = part_path(folder, index)
    unfinished = folder / f".{path.name}.unfinished"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            # Hardly a number of a rollout comes twice: dictionaries of them cost most of the writing, and room.
            with pq.ParquetWriter(file, FATE_SCHEMA, compression="zstd", use_dictionary=False) as writer:
                rest = iter(fates)
                while some := list(islice(rest, _GROUPS_PER_WRITE)):
                    writer.write_batch(_with_fates(some))
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        sync_folder(folder)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink()
        raise JournalError(f"cannot write {path}: {error}: free space or mend the storage, then write it again") from error
    return path


def read_trained(folder: Path) -> Iterator[tuple[int, list[ScoredGroup]]]:
    """The batches that were trained: (update, groups in batch order), in order of updates. Holds one part in memory.

    A batch may begin in one part and end in the next, but no part goes back behind the last update of the part before it.

    Raises:
        JournalError: an update or a group is missing, or is there twice.
    """
    begun: dict[int, dict[int, ScoredGroup]] = {}
    last: int | None = None  # the last update given out
    for path in sorted(folder.glob("part-*.parquet")):
        for fate in _read_trained_part(path):
            assert fate.update is not None and fate.position is not None, f"{path} has a trained group without update or position"
            batch = begun.setdefault(fate.update, {})
            if (last is not None and fate.update <= last) or fate.position in batch:
                raise JournalError(
                    f"{path} has group {fate.position} of update {fate.update} again; a part is there twice, or of another run"
                )
            batch[fate.position] = fate.scored
        for update in sorted(begun)[:-1]:
            yield update, _whole(folder, last, update, begun.pop(update))
            last = update
    for update, batch in begun.items():
        yield update, _whole(folder, last, update, batch)


def _whole(folder: Path, last: int | None, update: int, batch: Mapping[int, ScoredGroup]) -> list[ScoredGroup]:
    """The groups of a batch in order, having proven that no batch after `last` and no group before the batch's last is missing."""
    if last is not None and update != last + 1:
        raise JournalError(f"{folder} must go on with update {last + 1}, got update {update}; restore the missing part")
    missing = sorted(set(range(max(batch) + 1)) - set(batch))
    if missing:
        raise JournalError(
            f"{folder} must have {max(batch) + 1} groups of update {update}, got none at {missing}; restore the missing part"
        )
    return [batch[position] for position in range(len(batch))]


def _read_trained_part(path: Path) -> Iterator[GroupFate]:
    with pq.ParquetFile(path) as file:
        for rows in file.iter_batches(file.metadata.num_rows or 1):
            trained = rows.filter(_is(rows.column("fate"), TRAINED))
            first = trained.filter(_is(trained.column("completion_index"), 0))
            where = zip(first.column("update").to_pylist(), first.column("position").to_pylist(), strict=True)
            for scored, (update, position) in zip(from_batch(trained), where, strict=True):
                yield GroupFate(scored=scored, fate=TRAINED, update=update, position=position)


def _is(column: pa.Array, wanted: object) -> pa.BooleanArray:
    return pa.array([each == wanted for each in column.to_pylist()], pa.bool_())


def _with_fates(fates: Sequence[GroupFate]) -> pa.RecordBatch:
    for fate in fates:
        trained = fate.fate == TRAINED
        assert trained == (fate.update is not None) == (fate.position is not None), f"trained groups have update and position, got {fate}"
    batch = to_batch([fate.scored for fate in fates])
    each = [fate for fate in fates for _ in fate.scored.group.rollouts]
    more = [pa.array([getattr(fate, field.name) for fate in each], field.type) for field in list(FATE_SCHEMA)[len(SCHEMA) :]]
    return pa.RecordBatch.from_arrays([*batch.columns, *more], schema=FATE_SCHEMA)


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
