"""A segment whose beginning could not be written, at whichever write: nothing is lost by it, whatever follows and whenever it is reopened.

Groups 0 to 2 wait when the segment begins, so that its beginning is the ledger and, one by one, three groups.
"""

import errno
import json
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from async_rlhf import history as history_module
from async_rlhf import history_codec as codec
from async_rlhf import journal as journal_module
from async_rlhf import replayed, rollout_table
from async_rlhf.errors import JournalError
from async_rlhf.events import Arrived, Decided, Event
from async_rlhf.history import History
from async_rlhf.journal import Journal, read_frames
from async_rlhf.journal_frames import segment_path
from async_rlhf.rollout_parts import read_trained
from async_rlhf.rollouts import export_all, export_segment, fates
from async_rlhf.tickets import PutOutcome
from tests.support.samples import make_scored, make_ticket, plain
from tests.unit.test_history import IDENTITY, REWARD, Recorded, arrive, decide, grant, kinds, ledger_of, open_history
from tests.unit.test_replay_random_schedules import World

NUM_WRITES = 9
"""When it begins: the segment's header, then four records, each a header and a payload."""
GROUPS = [make_scored(make_ticket(number, holder="g")) for number in range(5)]
TRAINED = [(0, [GROUPS[0], GROUPS[3]]), (1, [GROUPS[1], GROUPS[2]])]


@pytest.fixture(autouse=True)
def groups_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history_module, "_CARRIED_GROUPS", 1)


class Disk:
    """What the journal writes to: out of space for some of the next writes, as when another program needs it for a while."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._write: Callable[[int, memoryview], None] = journal_module._write
        self._refused = range(0)
        self._num_writes = 0
        monkeypatch.setattr(journal_module, "_write", self.write)

    def write(self, handle: int, rest: memoryview) -> None:
        self._num_writes += 1
        if self._num_writes - 1 in self._refused:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._write(handle, rest)

    def refuse(self, first: int, count: int = 1) -> None:
        self._num_writes, self._refused = 0, range(first, first + count)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def begun(run_folder: Path) -> tuple[Journal, History]:
    """A history in which groups 0 to 2 wait and 3 and 4 are to come."""
    journal, history = open_history(run_folder)
    grant(history, *range(5))
    arrive(history, 0, 1, 2)
    history.flush()
    return journal, history


def forget(history: History, run_folder: Path, version: int) -> None:
    for segment in history.forget_before(version):
        export_segment(run_folder, segment)
        history.drop_segment(segment)


def assert_goes_on(run_folder: Path) -> None:
    """Batch 0 = groups 0 and 3 was decided. Reopened, made to forget, and ended: all groups are in the dataset once, in their place."""
    for version in (0, 0, 1, 1):
        journal, history = open_history(run_folder)
        if version == 0:
            assert plain(history._read_groups((0, 3))) == plain((GROUPS[0], GROUPS[3]))
        assert plain(history._read_groups((1, 2))) == plain((GROUPS[1], GROUPS[2]))
        forget(history, run_folder, version)
        history.begin_segment()
        forget(history, run_folder, version)
        journal.close()
    journal, history = open_history(run_folder)
    decide(history, 1, 1, 2)
    history.flush()
    journal.close()
    open_history(run_folder)[0].close()
    export_all(run_folder)
    assert plain(list(read_trained(run_folder / "rollouts"))) == plain(TRAINED)
    assert plain([(batch.update, list(batch.groups)) for batch in replayed.batches(run_folder)]) == plain(TRAINED)
    rows = [row for part in sorted((run_folder / "rollouts").glob("part-*")) for row in pq.read_table(part).to_pylist()]
    fates = Counter((row["ticket_id"], row["fate"]) for row in rows if row["completion_index"] == 0)
    assert fates == {(0, "trained"): 1, (1, "trained"): 1, (2, "trained"): 1, (3, "trained"): 1, (4, "tied"): 1}


def events_follow(history: History) -> None:
    arrive(history, 3)
    history.flush()
    history.ledger.record(Arrived(scored=GROUPS[4], outcome=PutOutcome.TIED))
    decide(history, 0, 0, 3)
    history.flush()


@pytest.mark.parametrize("write", range(NUM_WRITES))
def test_a_beginning_that_found_no_space_is_completed_before_any_event_follows(write: int, tmp_path: Path, disk: Disk) -> None:
    journal, history = begun(tmp_path)
    disk.refuse(write)
    with pytest.raises(JournalError, match="no space"):
        history.begin_segment()

    events_follow(history)

    assert kinds(tmp_path) == ("OGKOCCCKTD" if write else "OGKKTD")
    journal.close()
    assert_goes_on(tmp_path)


def test_a_beginning_that_found_no_space_counts_although_an_older_segment_went_before_it_was_completed(tmp_path: Path, disk: Disk) -> None:
    journal, history = begun(tmp_path)
    decide(history, 0, 0, 1)
    history.begin_segment()
    arrive(history, 3)
    decide(history, 1, 2, 3)
    history.flush()
    disk.refuse(1)
    with pytest.raises(JournalError, match="no space"):
        history.begin_segment()
    forget(history, tmp_path, 1)
    history.flush()

    assert history.forget_before(2) == [1]
    journal.close()


@pytest.mark.parametrize("write", range(1, NUM_WRITES))
def test_while_there_is_no_space_for_the_beginning_no_event_is_written(write: int, tmp_path: Path, disk: Disk) -> None:
    journal, history = begun(tmp_path)
    disk.refuse(write, 3)
    with pytest.raises(JournalError, match="no space"):
        history.begin_segment()
    written = kinds(tmp_path)
    arrive(history, 3)

    for _ in range(2):
        with pytest.raises(JournalError, match="no space"):
            history.flush()
        assert kinds(tmp_path) == written

    history.ledger.record(Arrived(scored=GROUPS[4], outcome=PutOutcome.TIED))
    decide(history, 0, 0, 3)
    history.flush()
    assert kinds(tmp_path) == "OGKOCCCKTD"
    assert history.forget_before(0) == [0], "it stands for itself, as of when it began"
    journal.close()
    assert_goes_on(tmp_path)


@pytest.mark.parametrize("write", range(NUM_WRITES))
def test_a_beginning_that_found_no_space_is_completed_by_whoever_opens_the_journal_next(write: int, tmp_path: Path, disk: Disk) -> None:
    journal, history = begun(tmp_path)
    expected = ledger_of(history)
    disk.refuse(write)
    with pytest.raises(JournalError, match="no space"):
        history.begin_segment()
    journal.close()

    journal, history = open_history(tmp_path)

    assert ledger_of(history) == expected
    assert kinds(tmp_path) == ("OGKOCCC" if write else "OGK")
    events_follow(history)
    journal.close()
    assert_goes_on(tmp_path)


@pytest.mark.parametrize("write", range(NUM_WRITES))
def test_a_checkpoint_after_one_that_found_no_space_begins_a_segment_of_its_own(write: int, tmp_path: Path, disk: Disk) -> None:
    journal, history = begun(tmp_path)
    disk.refuse(write)
    with pytest.raises(JournalError, match="no space"):
        history.begin_segment()

    mark = history.begin_segment()

    assert mark.segment == (2 if write else 1)
    assert kinds(tmp_path) == "OGK" + ("OCCCOCCC" if write else "OCCC")
    assert history.forget_before(0) == list(range(mark.segment))
    events_follow(history)
    journal.close()
    assert_goes_on(tmp_path)


@pytest.mark.parametrize("write", range(1, NUM_WRITES - 2))
def test_undoing_waits_for_a_beginning_that_found_no_space(write: int, tmp_path: Path, disk: Disk) -> None:
    """Batch 0 is decided before it, so two groups wait, and the two others come back."""
    journal, history = begun(tmp_path)
    arrive(history, 3)
    decide(history, 0, 0, 3)
    history.flush()
    disk.refuse(write)
    with pytest.raises(JournalError, match="no space"):
        history.begin_segment()

    history.annul(0, newest_faithful=0)

    assert kinds(tmp_path) == "OGKKD" + "OCC" + "CA"
    history.ledger.record(Arrived(scored=GROUPS[4], outcome=PutOutcome.TIED))
    decide(history, 0, 0, 3)
    history.flush()
    journal.close()
    assert_goes_on(tmp_path)


EVENTS: list[Event] = [
    Arrived(scored=GROUPS[3], outcome=PutOutcome.KEPT),
    Arrived(scored=GROUPS[4], outcome=PutOutcome.TIED),
    Decided(update=0, ticket_ids=(0, 3)),
]


def leave_without_beginning(run_folder: Path, num_left: int, num_events: int, opened_again: bool) -> None:
    """Segment 1 as earlier releases could leave it: of its beginning the first records, then events, then perhaps the ledger."""
    journal, history = begun(run_folder)
    history.begin_segment()
    journal.close()
    first_lost = [frame for frame in read_frames(run_folder / "journal") if frame.position.segment == 1][num_left]
    os.truncate(segment_path(run_folder / "journal", 1), first_lost.position.offset)
    journal = Journal(run_folder / "journal")
    for event in EVENTS[:num_events]:
        history.ledger.apply(event)
        payload = rollout_table.encode([event.scored]) if isinstance(event, Arrived) else codec.encode(event)
        journal.append(codec.kind_of(event), payload)
    if opened_again:
        opening = {"identity": IDENTITY, "ledger": codec.ledger_to_json(history.ledger), "moments": {}, "scores": []}
        journal.append(codec.OPENING, json.dumps(opening).encode())
    journal.close()


@pytest.mark.parametrize("opened_again", [False, True], ids=["as it was", "opened again"])
@pytest.mark.parametrize("num_events", range(1, 4))
@pytest.mark.parametrize("num_left", range(4), ids=["nothing", "the ledger", "one group", "two groups"])
def test_a_segment_that_went_on_without_its_whole_beginning_goes_with_the_one_before_it(
    num_left: int, num_events: int, opened_again: bool, tmp_path: Path
) -> None:
    leave_without_beginning(tmp_path, num_left, num_events, opened_again)

    journal, history = open_history(tmp_path)
    forgotten = history.forget_before(0)

    assert journal.end.segment == 2, "which stands for itself"
    assert forgotten == ([] if num_events == 3 else [0, 1]), "with three events batch 0 lies in segment 1, and half of it in segment 0"
    for segment in forgotten:
        export_segment(tmp_path, segment)
        history.drop_segment(segment)
        assert journal.first_segment == (2 if segment == 1 else 0), "what segment 1 refers to goes no earlier than it"
    for event in EVENTS[num_events:]:
        history.ledger.record(event)
    history.flush()
    journal.close()
    assert_goes_on(tmp_path)


@pytest.mark.parametrize("num_left", range(4), ids=["nothing", "the ledger", "one group", "two groups"])
def test_a_segment_without_its_whole_beginning_whose_predecessor_is_gone_is_refused(num_left: int, tmp_path: Path) -> None:
    leave_without_beginning(tmp_path, num_left, 3, False)
    segment_path(tmp_path / "journal", 0).unlink()

    with pytest.raises(
        JournalError, match=r"segment-00000001\.log does not begin with all that it refers to, .*: restore segment-00000000\.log"
    ):
        open_history(tmp_path)


@pytest.mark.parametrize("write", range(NUM_WRITES + 2))
def test_whoever_opens_such_a_journal_may_find_no_space_for_a_new_segment(write: int, tmp_path: Path, disk: Disk) -> None:
    leave_without_beginning(tmp_path, 1, 2, False)
    journal = Journal(tmp_path / "journal")
    disk.refuse(write)
    with pytest.raises(JournalError, match="no space"):
        History(journal, REWARD, IDENTITY, 0)
    journal.close()

    journal, history = open_history(tmp_path)

    assert kinds(tmp_path) == "OGK" + "OKT" + "OCCCC"
    decide(history, 0, 0, 3)
    history.flush()
    journal.close()
    assert_goes_on(tmp_path)


@pytest.mark.parametrize("left", [b"", b"RLH"])
def test_nothing_was_sealed_in_a_segment_that_has_no_whole_header_yet(left: bytes, tmp_path: Path) -> None:
    begun(tmp_path)[0].close()
    segment_path(tmp_path / "journal", 1).write_bytes(left)

    assert list(fates(tmp_path / "journal", 1)) == []


class Starved(Recorded):
    """Now and then there is no space while a segment begins; half of the time everything is thrown away but the files then."""

    num_failures = 0

    def __init__(self, world: World, run_folder: Path, disk: Disk) -> None:
        self.disk, self.starving = disk, random.Random(world.seed + 2)
        super().__init__(world, run_folder, 0)

    def check(self) -> None:
        super().check()
        if self.starving.random() < 0.1:
            self.disk.refuse(self.starving.randrange(6), self.starving.randrange(1, 3))
            try:
                self.history.begin_segment()
            except JournalError:
                self.num_failures += 1
            self.disk.refuse(0, 0)
            if self.starving.random() < 0.5:
                self.reopen()


def test_a_history_that_finds_no_space_in_the_middle_of_everything_loses_nothing(tmp_path: Path, disk: Disk) -> None:
    """The same schedules with and without: same ledger, same groups, and a dataset that holds every group once."""
    num_failures = 0
    for seed in range(8):
        world = World(
            seed=seed, batch_groups=2 + seed % 3, max_staleness=2, order="ready", tie_share=0.2, annul_weight=seed % 2, num_steps=120
        )
        starved = Starved(world, tmp_path / f"starved-{seed}", disk)
        starved.run()
        never = Recorded(world, tmp_path / f"never-{seed}", 0)
        never.run()
        assert ledger_of(starved.history) == ledger_of(never.history)
        assert plain(starved.batches) == plain(never.batches)
        num_failures += starved.num_failures
    assert num_failures >= 40
