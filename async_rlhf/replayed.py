"""What a run trained, read back from its folder: batch 0, 1, 2, ... of the history that survived.

Old batches are in the rollouts dataset, later ones in the journal. Where both have a batch, the journal's counts: a part may have
been written before the batch was undone. Read are JSON, Arrow and Parquet alone.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from async_rlhf import history_codec as codec
from async_rlhf import rollout_parts, rollout_table, rollouts
from async_rlhf.config.rewards import RewardConfig
from async_rlhf.errors import ConfigError, JournalError
from async_rlhf.events import Annulled, Decided, Dropped, Trained
from async_rlhf.journal import Position, read_frames
from async_rlhf.scores import ScoreMoments, shape_scores
from async_rlhf.types import Batch, ScoredGroup

JOURNAL = "journal"

_GROUPS = (codec.CARRIED, codec.KEPT)
"""Records of groups that may be in a batch."""


@dataclass(kw_only=True, slots=True)
class Extent:
    """Which batches a run folder still has."""

    num_updates: int = 0
    """Batches 0 to num_updates - 1 are there."""
    first_in_journal: int = 0
    """From this one on they are in the journal, before it in the rollouts dataset."""
    decisions: dict[int, Position] = field(default_factory=dict[int, Position])
    """Update -> its decision in the journal; those that were undone are left out."""
    digests: dict[int, int] = field(default_factory=dict[int, int])
    """Update -> digest of the weights that it led to, as far as the journal says."""


def survey(run_folder: Path) -> Extent:
    """Which batches there are. Verifies every byte of the journal.

    Raises:
        ConfigError: there is neither a journal nor a dataset. JournalError: either is damaged, or a batch is missing.
    """
    extent = _survey_journal(run_folder / JOURNAL) if (run_folder / JOURNAL).is_dir() else None
    in_parts = _updates_in_parts(run_folder / rollouts.FOLDER)
    if extent is None:
        if not in_parts:
            raise ConfigError(
                f"{run_folder} holds no batch, neither in {JOURNAL}/ nor in {rollouts.FOLDER}/: nothing was trained, or they were deleted"
            )
        end = max(in_parts) + 1
        extent = Extent(num_updates=end, first_in_journal=end)
    missing = [update for update in range(extent.first_in_journal) if update not in in_parts]
    if missing:
        raise JournalError(
            f"{run_folder / rollouts.FOLDER} must have batches 0 to {extent.first_in_journal - 1}, which left the journal, but lacks "
            f"{', '.join(map(str, missing[:10]))}{' ...' if missing[10:] else ''}; restore the missing part"
        )
    return extent


def batches(run_folder: Path) -> Iterator[Batch]:
    """Batch 0, 1, 2, ... as they were decided, scores not shaped yet. Holds one part, or the groups that wait, in memory.

    Raises:
        ConfigError, JournalError: see survey.
    """
    extent = survey(run_folder)
    expected = 0
    for batch in _all(run_folder, extent):
        if batch.update != expected:
            raise JournalError(f"{run_folder} must go on with batch {expected}, got batch {batch.update}; restore what is missing")
        yield batch
        expected += 1
    if expected != extent.num_updates:
        raise JournalError(f"{run_folder} must hold {extent.num_updates} batches, got {expected}; restore what is missing")


def shaped(raw: Iterable[Batch], reward: RewardConfig) -> Iterator[Batch]:
    """The batches as they are trained: each is shaped by those before it, so `raw` begins with batch 0."""
    moments = ScoreMoments()
    for batch in raw:
        trained, moments = shape_scores(batch, moments, reward)
        yield trained


def _all(run_folder: Path, extent: Extent) -> Iterator[Batch]:
    if extent.first_in_journal:
        yield from _from_parts(run_folder / rollouts.FOLDER, extent.first_in_journal)
    if extent.decisions:
        yield from _from_journal(run_folder / JOURNAL, extent.decisions)


def _survey_journal(journal: Path) -> Extent | None:
    """What the journal tells; None: no batch was decided in it or before it."""
    extent, begun = Extent(), False
    for frame in read_frames(journal):
        if frame.kind == codec.OPENING and not begun:
            begun = True
            ledger = codec.ledger_from_json(json.loads(frame.payload)["ledger"])
            extent.first_in_journal = extent.num_updates = ledger.decided
            extent.digests = {update: entry.digest for update, entry in ledger.batches.items() if entry.digest is not None}
        elif frame.kind == codec.ANNULLED:
            version = int(json.loads(frame.payload)["version"])
            extent.num_updates = version
            extent.decisions = {update: at for update, at in extent.decisions.items() if update < version}
            extent.digests = {update: digest for update, digest in extent.digests.items() if update < version}
        elif frame.kind not in (codec.OPENING, codec.TIED, *_GROUPS):
            for event in codec.decode(frame.kind, frame.payload, _nothing):
                match event:
                    case Decided(update=update):
                        extent.decisions[update] = frame.position
                        extent.num_updates = update + 1
                    case Trained(update=update, digest=digest):
                        extent.digests[update] = digest
                    case _:
                        pass
    return extent if extent.num_updates else None


def _nothing(ticket_id: int) -> ScoredGroup:
    raise AssertionError(f"only the undoing of batches names groups, but ticket {ticket_id} was asked for")


def _updates_in_parts(folder: Path) -> set[int]:
    found: set[int] = set()
    for path in sorted(folder.glob("part-*.parquet")):
        try:
            column = pq.read_table(path, columns=["update"]).column("update")
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(folder, error) from error
        found |= {update for update in column.to_pylist() if update is not None}
    return found


def _from_parts(folder: Path, end: int) -> Iterator[Batch]:
    """Batches 0 to end - 1. Parts may go further."""
    try:
        for update, groups in rollout_parts.read_trained(folder):
            yield Batch(update=update, groups=tuple(groups))
            if update == end - 1:
                return
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: Exception) -> JournalError:
    return JournalError(f"the parts in {folder} cannot be read: {error}; restore a copy of the damaged one")


def _from_journal(journal: Path, decisions: Mapping[int, Position]) -> Iterator[Batch]:
    """The decided batches, in order."""
    surviving = set(decisions.values())
    waiting: dict[int, ScoredGroup] = {}
    for frame in read_frames(journal):
        if frame.kind in _GROUPS:
            waiting |= {scored.group.ticket.ticket_id: scored for scored in rollout_table.decode(frame.payload)}
            continue
        if frame.kind in (codec.OPENING, codec.TIED):
            continue
        for event in codec.decode(frame.kind, frame.payload, waiting.__getitem__):
            match event:
                case Decided(update=update, ticket_ids=ticket_ids) if frame.position in surviving:
                    yield Batch(update=update, groups=tuple(waiting.pop(number) for number in ticket_ids))
                case Annulled(voided=gone) | Dropped(ticket_ids=gone):
                    waiting = {number: scored for number, scored in waiting.items() if number not in gone}
                case _:
                    pass
