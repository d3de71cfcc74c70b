"""From the journal to the rollouts dataset: what became of every group, one Parquet part per segment."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from async_rlhf import history_codec as codec
from async_rlhf import rollout_table
from async_rlhf.events import Annulled, Decided, Dropped
from async_rlhf.journal import Frame, Position, read_frames
from async_rlhf.journal_frames import segment_paths
from async_rlhf.ledger import LOST_HISTORY
from async_rlhf.rollout_parts import TRAINED, GroupFate, write_part
from async_rlhf.rollout_table import GroupRows
from async_rlhf.tickets import PutOutcome, TicketState

FOLDER = "rollouts"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Undoing:
    at: Position
    version: int
    voided: frozenset[int]


def export_segment(run_folder: Path, segment: int) -> Path:
    """Write part `segment` of the dataset: every group whose fate was sealed in that segment. Idempotent."""
    return write_part(run_folder / FOLDER, segment, fates(run_folder / "journal", segment))


def export_all(run_folder: Path) -> None:
    """Write a part for every segment that the journal still has."""
    for segment in sorted({frame.position.segment for frame in read_frames(run_folder / "journal")}):
        export_segment(run_folder, segment)


def fates(journal: Path, segment: int) -> Iterator[GroupFate]:
    """What became of the groups of a segment, in order; those that waited at its end belong to the next one.

    A batch that was undone later, in this segment or after it, was not trained: its groups belong to where they were decided again.
    """
    undoings = [_undoing(frame) for frame in read_frames(journal) if frame.kind == codec.ANNULLED]
    first = _first_needed(journal, segment)
    waiting: dict[int, GroupRows] = {}
    for frame in read_frames(journal):
        if frame.position.segment > segment:
            return
        if frame.position.segment >= first:
            for fate in _fates_of(frame, waiting, [undoing for undoing in undoings if undoing.at > frame.position]):
                if frame.position.segment == segment:
                    yield fate


def _first_needed(journal: Path, segment: int) -> int:
    """Where to begin to read what waits in a segment: itself, unless there was no room for its beginning and it went on without."""
    oldest = min(segment_paths(journal), default=segment)
    while segment > oldest and not _stands_for_itself(journal, segment):
        segment -= 1
    return segment


def _stands_for_itself(journal: Path, segment: int) -> bool:
    """Whether a segment begins with the ledger and every group that waits in it."""
    lacking: set[int] | None = None
    for frame in (frame for frame in read_frames(journal) if frame.position.segment == segment):
        if frame.kind == codec.OPENING and lacking is None:
            slots = json.loads(frame.payload)["ledger"]["slots"]
            lacking = {slot["ticket"]["ticket_id"] for slot in slots if slot["state"] == TicketState.WAITING}
        elif frame.kind == codec.CARRIED and lacking is not None:
            lacking -= {rows.ticket_id for rows in rollout_table.decode_rows(frame.payload)}
        else:
            break
    return lacking is not None and not lacking


def _undoing(frame: Frame) -> _Undoing:
    fields = json.loads(frame.payload)
    return _Undoing(at=frame.position, version=fields["version"], voided=frozenset(fields["voided"]))


def _fates_of(frame: Frame, waiting: dict[int, GroupRows], undone_later: list[_Undoing]) -> Iterator[GroupFate]:
    if frame.kind in (codec.OPENING, codec.GRANTED):  # the largest of those that say nothing here
        return
    if frame.kind in (codec.CARRIED, codec.KEPT):
        waiting.update({rows.ticket_id: rows for rows in rollout_table.decode_rows(frame.payload)})
        return
    if frame.kind == codec.TIED:
        for rows in rollout_table.decode_rows(frame.payload):
            yield GroupFate(rows=rows, fate=str(PutOutcome.TIED))
        return
    for event in codec.decode(frame.kind, frame.payload, lambda number: waiting[number].unpacked()):
        match event:
            case Decided(update=update):
                undoing = next((undoing for undoing in undone_later if undoing.version <= update), None)
                for position, number in enumerate(event.ticket_ids):
                    if undoing is None:
                        yield GroupFate(rows=waiting.pop(number), fate=TRAINED, update=update, position=position)
                    elif number in undoing.voided:
                        yield GroupFate(rows=waiting.pop(number), fate=LOST_HISTORY)
            case Dropped():
                for number in event.ticket_ids:
                    yield GroupFate(rows=waiting.pop(number), fate="dropped")
            case Annulled():
                for number in event.voided:
                    if number in waiting:
                        yield GroupFate(rows=waiting.pop(number), fate=LOST_HISTORY)
            case _:
                pass
