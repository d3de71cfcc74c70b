"""The rollouts dataset: one row per completion, and what became of its group.

rollouts/part-00000000.parquet   `datasets.load_dataset("parquet", data_files=...)` opens it

Rows go from the journal into it as they are: no group is unpacked on the way.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from async_rlhf.errors import JournalError
from async_rlhf.files import sync_folder
from async_rlhf.rollout_table import SCHEMA, GroupRows, from_batch
from async_rlhf.types import ScoredGroup

FATE_SCHEMA: pa.Schema = pa.schema([*SCHEMA, ("fate", pa.string()), ("update", pa.int64()), ("position", pa.int64())])
"""Of the dataset."""

TRAINED = "trained"

_GROUPS_PER_WRITE = 256
"""Groups in one row group of a part: what writing holds in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupFate:
    """A scored group and what became of it."""

    rows: GroupRows
    fate: str
    """trained, tied, dropped, lost_history or failed: REASON."""
    update: int | None = None
    """The update that trained it; None: none did."""
    position: int | None = None
    """Its place in the batch of that update; None: it was in none."""


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
                    writer.write_table(_with_fates(some))
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
        for update, position, scored in _read_trained_part(path):
            batch = begun.setdefault(update, {})
            if (last is not None and update <= last) or position in batch:
                raise JournalError(f"{path} has group {position} of update {update} again; a part is there twice, or of another run")
            batch[position] = scored
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


def _read_trained_part(path: Path) -> Iterator[tuple[int, int, ScoredGroup]]:
    """(update, position in its batch, group) of each group that was trained."""
    with pq.ParquetFile(path) as file:
        for rows in file.iter_batches(file.metadata.num_rows or 1):
            trained = rows.filter(_is(rows.column("fate"), TRAINED))
            first = trained.filter(_is(trained.column("completion_index"), 0))
            yield from zip(first.column("update").to_pylist(), first.column("position").to_pylist(), from_batch(trained), strict=True)


def _is(column: pa.Array, wanted: object) -> pa.BooleanArray:
    return pa.array([each == wanted for each in column.to_pylist()], pa.bool_())


def _with_fates(fates: Sequence[GroupFate]) -> pa.Table:
    for fate in fates:
        trained = fate.fate == TRAINED
        assert trained == (fate.update is not None) == (fate.position is not None), f"trained groups have update and position, got {fate}"
    table = pa.Table.from_batches(_slices(fates), SCHEMA).combine_chunks()  # many small chunks are slow to write
    fate_of_row = pa.array(np.repeat(np.arange(len(fates)), [fate.rows.end - fate.rows.begin for fate in fates]))
    for field in list(FATE_SCHEMA)[len(SCHEMA) :]:
        table = table.append_column(field, pa.array([getattr(fate, field.name) for fate in fates], field.type).take(fate_of_row))
    return table


def _slices(fates: Sequence[GroupFate]) -> Iterator[pa.RecordBatch]:
    """Their rows; those that follow one another in their batch in one piece."""
    begin = 0
    for index, (fate, following) in enumerate(zip(fates, [*fates[1:], None], strict=True)):
        rows = fate.rows
        if following is None or following.rows.batch is not rows.batch or following.rows.begin != rows.end:
            first = fates[begin].rows.begin
            yield rows.batch.slice(first, rows.end - first)
            begin = index + 1
