"""From the journal to the rollouts dataset: what became of every group, one Parquet part per segment."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from async_rlhf import history_codec as codec
from async_rlhf import rollout_table
from async_rlhf.events import Annulled, Arrived, Decided, Dropped
from async_rlhf.journal import Frame, Position, read_frames
from async_rlhf.ledger import LOST_HISTORY
from async_rlhf.rollout_table import TRAINED, GroupFate, write_part
from async_rlhf.tickets import PutOutcome
from async_rlhf.types import ScoredGroup

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
    waiting: dict[int, ScoredGroup] = {}
    for frame in read_frames(journal):
        if frame.position.segment > segment:
            return
        if frame.position.segment == segment:
            yield from _fates_of(frame, waiting, [undoing for undoing in undoings if undoing.at > frame.position])


def _undoing(frame: Frame) -> _Undoing:
    fields = json.loads(frame.payload)
    return _Undoing(at=frame.position, version=fields["version"], voided=frozenset(fields["voided"]))


def _fates_of(frame: Frame, waiting: dict[int, ScoredGroup], undone_later: list[_Undoing]) -> Iterator[GroupFate]:
    if frame.kind == codec.OPENING:
        return
    if frame.kind == codec.CARRIED:
        waiting.update({scored.group.ticket.ticket_id: scored for scored in rollout_table.decode(frame.payload)})
        return
    for event in codec.decode(frame.kind, frame.payload, waiting.__getitem__):
        match event:
            case Arrived(scored=scored, outcome=PutOutcome.KEPT):
                waiting[scored.group.ticket.ticket_id] = scored
            case Arrived(scored=scored, outcome=outcome):
                yield GroupFate(scored=scored, fate=str(outcome))
            case Decided(update=update):
                undoing = next((undoing for undoing in undone_later if undoing.version <= update), None)
                for position, number in enumerate(event.ticket_ids):
                    if undoing is None:
                        yield GroupFate(scored=waiting.pop(number), fate=TRAINED, update=update, position=position)
                    elif number in undoing.voided:
                        yield GroupFate(scored=waiting.pop(number), fate=LOST_HISTORY)
            case Dropped():
                for number in event.ticket_ids:
                    yield GroupFate(scored=waiting.pop(number), fate="dropped")
            case Annulled():
                for number in event.voided:
                    if number in waiting:
                        yield GroupFate(scored=waiting.pop(number), fate=LOST_HISTORY)
            case _:
                pass
