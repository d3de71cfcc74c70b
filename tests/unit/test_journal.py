"""The journal keeps what was acknowledged, and says so when it cannot: cuts, flipped bytes, crashes, full disks, second writers."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from async_rlhf import journal as journal_module
from async_rlhf.errors import JournalError
from async_rlhf.journal import Frame, Journal, Mark, Position, check_mark, read_frames
from async_rlhf.journal_frames import FRAME_HEADER_BYTES, SEGMENT_HEADER_BYTES, segment_path

ROOT = Path(__file__).resolve().parents[2]

Record = tuple[str, bytes]
RECORDS: list[Record] = [("g", b"group"), ("d", b""), ("v", b"\0" * 5), ("g", bytes(range(30))), ("d", b"x"), ("c", b"RCRD")]


def records(frames: list[Frame]) -> list[Record]:
    return [(frame.kind, frame.payload) for frame in frames]


def content(folder: Path) -> list[Record]:
    return records(list(read_frames(folder)))


def write_journal(folder: Path, *segments: list[Record]) -> list[Mark]:
    """A closed journal with these segments; returns its end after each record, and at the start of each segment."""
    journal = Journal(folder)
    marks = [journal.end]
    for number, segment in enumerate(segments):
        if number:
            journal.rotate()
            marks.append(journal.end)
        for kind, payload in segment:
            journal.append(kind, payload)
            marks.append(journal.end)
    journal.close()
    return marks


def reopened(folder: Path) -> tuple[list[Record], int]:
    """What opening finds, and what it cut; the journal must take a record afterwards."""
    journal = Journal(folder)
    found = records(list(journal.frames()))
    journal.append("z", b"goes on")
    journal.close()
    assert content(folder) == [*found, ("z", b"goes on")]
    return found, journal.cut_bytes


def test_records_come_back_in_order_from_all_segments_and_one_by_one(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    positions = [journal.append(kind, payload) for kind, payload in RECORDS[:3]]
    assert journal.rotate() == 1
    positions += [journal.append(kind, memoryview(payload)) for kind, payload in RECORDS[3:]]

    frames = list(journal.frames())

    assert records(frames) == RECORDS == content(journal.folder)
    assert [frame.position for frame in frames] == positions == sorted(positions)
    assert [journal.read(position) for position in reversed(positions)] == frames[::-1]
    assert records(list(journal.frames(positions[4]))) == RECORDS[4:]
    assert list(journal.frames(journal.end.position)) == []
    journal.close()


def test_record_appended_while_frames_are_read_is_not_among_them(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append("a", b"1")
    journal.rotate()
    journal.append("a", b"2")
    reading = journal.frames()
    assert next(reading).payload == b"1"

    journal.append("a", b"3")
    journal.rotate()

    assert [frame.payload for frame in reading] == [b"2"]
    journal.close()


# Torn tails and damage


def test_cut_at_every_byte_of_the_last_segment_leaves_a_prefix_and_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    marks = write_journal(folder, RECORDS, RECORDS[::-1])
    whole = segment_path(folder, 1).read_bytes()
    ends = [mark.offset for mark in marks if mark.segment == 1]
    for size in range(len(whole)):
        segment_path(folder, 1).write_bytes(whole[:size])
        kept = sum(end <= size for end in ends) - 1  # -1: the segment's header is cut too
        expected = RECORDS + RECORDS[::-1][: max(kept, 0)]

        assert content(folder) == expected
        assert segment_path(folder, 1).read_bytes() == whole[:size], "reading changes nothing"
        with pytest.raises(JournalError, match="shorter"):
            check_mark(folder, marks[-1])
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        assert reopened(copy) == (expected, size - (ends[kept] if kept >= 0 else 0))
        shutil.rmtree(copy)


def test_cut_at_any_byte_of_an_earlier_segment_is_damage(tmp_path: Path) -> None:
    write_journal(tmp_path, RECORDS[:3], RECORDS[3:])
    path = segment_path(tmp_path, 0)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(JournalError, match="damaged at byte"):
            Journal(tmp_path)
        with pytest.raises(JournalError, match="damaged at byte"):
            content(tmp_path)


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF, 0x5A])
def test_no_flipped_byte_goes_unnoticed_or_loses_a_record_silently(mask: int, tmp_path: Path) -> None:
    write_journal(tmp_path, RECORDS, RECORDS[::-1])
    for index in (0, 1):
        path = segment_path(tmp_path, index)
        whole = bytearray(path.read_bytes())
        for place in range(len(whole)):
            flipped = bytearray(whole)
            flipped[place] ^= mask
            path.write_bytes(flipped)
            with pytest.raises(JournalError, match=r"damaged at byte|use the version that wrote it"):
                Journal(tmp_path)
            with pytest.raises(JournalError):
                content(tmp_path)
            assert path.read_bytes() == flipped, "a refused journal stays as it is"
        path.write_bytes(whole)


@pytest.mark.parametrize("zeros", [1, FRAME_HEADER_BYTES, 5000])
def test_zeros_that_a_crashed_machine_leaves_at_the_end_are_cut(zeros: int, tmp_path: Path) -> None:
    write_journal(tmp_path, RECORDS)
    with segment_path(tmp_path, 0).open("ab") as file:
        file.write(bytes(zeros))

    assert content(tmp_path) == RECORDS
    assert reopened(tmp_path) == (RECORDS, zeros)


@pytest.mark.parametrize("left", [b"", b"RLH", bytes(SEGMENT_HEADER_BYTES), bytes(4096)])
@pytest.mark.parametrize("index", [0, 1])
def test_segment_that_a_crash_left_without_a_header_is_removed(index: int, left: bytes, tmp_path: Path) -> None:
    write_journal(tmp_path, *[RECORDS] * index)
    segment_path(tmp_path, index).write_bytes(left)

    assert content(tmp_path) == RECORDS * index
    assert reopened(tmp_path) == (RECORDS * index, len(left))


def test_cut_is_logged_with_the_file_and_the_number_of_bytes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_journal(tmp_path, RECORDS)
    with segment_path(tmp_path, 0).open("ab") as file:
        file.write(b"RCRDg")

    with caplog.at_level(logging.WARNING, logger=journal_module.__name__):
        Journal(tmp_path).close()

    [message] = [entry.getMessage() for entry in caplog.records]
    assert str(segment_path(tmp_path, 0)) in message
    assert "cut 5 bytes" in message


def spoil_middle(folder: Path) -> None:
    path = segment_path(folder, 1)
    path.write_bytes(path.read_bytes()[:-1] + b"!")


@pytest.mark.parametrize(
    ("spoil", "left"),
    [
        (spoil_middle, RECORDS * 2),
        (lambda folder: segment_path(folder, 1).unlink(), RECORDS),
        (lambda folder: segment_path(folder, 1).write_bytes(b"?" * 100), RECORDS),
        (lambda folder: shutil.copy(segment_path(folder, 0), segment_path(folder, 1)), RECORDS),
        (lambda folder: segment_path(folder, 2).rename(segment_path(folder, 1)), RECORDS),
    ],
    ids=["flipped", "missing", "garbage", "copied", "renamed"],
)
def test_damage_names_file_offset_and_a_remedy_that_works(spoil: Callable[[Path], object], left: list[Record], tmp_path: Path) -> None:
    """The last byte of the middle segment belongs to its last record, so one record less is left of it."""
    folder = tmp_path / "a run" / "journal"
    write_journal(folder, RECORDS, RECORDS, RECORDS)
    spoil(folder)

    with pytest.raises(JournalError, match=r"segment-0000000[12]\.log is damaged at byte \d+: .* must be .*, got .*: restore") as caught:
        Journal(folder)
    [command] = re.findall(r"`(.*?)`", str(caught.value))
    subprocess.run(command, shell=True, check=True, timeout=30)

    assert reopened(folder)[0] == (left[:-1] if len(left) > len(RECORDS) else left)


def test_segment_of_another_journal_is_damage(tmp_path: Path) -> None:
    write_journal(tmp_path / "ours", RECORDS, RECORDS)
    write_journal(tmp_path / "theirs", RECORDS[::-1], RECORDS)
    shutil.copy(segment_path(tmp_path / "theirs", 1), segment_path(tmp_path / "ours", 1))

    with pytest.raises(JournalError, match="digest of what is before it"):
        Journal(tmp_path / "ours")


def test_valid_record_in_the_wrong_place_is_damage(tmp_path: Path) -> None:
    """Each frame below verifies by itself: first one is there twice, then one comes from another journal."""
    ours = write_journal(tmp_path / "ours", [("g", b"1"), ("g", b"2"), ("g", b"3")])
    write_journal(tmp_path / "theirs", [("g", b"!"), ("g", b"2"), ("g", b"3")])
    path = segment_path(tmp_path / "ours", 0)
    whole, foreign = path.read_bytes(), segment_path(tmp_path / "theirs", 0).read_bytes()
    begin, first, second = (mark.offset for mark in ours[:3])

    for spoiled, offset, what in [
        (whole[:first] + whole[begin:first] + whole[first:], first, "the sequence number must be 1, got 0"),
        (whole[:begin] + foreign[begin:first] + whole[first:], first, "the digest of everything up to here"),
        (whole[:first] + foreign[first:second] + whole[second:], first, "the digest of everything up to here"),
    ]:
        path.write_bytes(spoiled)
        with pytest.raises(JournalError, match=f"damaged at byte {offset}: {what}"):
            Journal(tmp_path / "ours")


def test_missing_segment_is_damage_even_if_it_held_no_record(tmp_path: Path) -> None:
    write_journal(tmp_path, RECORDS, [], RECORDS)
    segment_path(tmp_path, 1).unlink()

    with pytest.raises(JournalError, match=r"the next segment must be segment-00000001\.log, got segment-00000002\.log"):
        Journal(tmp_path)


def test_segments_of_equal_records_cannot_be_swapped(tmp_path: Path) -> None:
    write_journal(tmp_path, [], [], [])
    segment_path(tmp_path, 1).rename(tmp_path / "x")
    segment_path(tmp_path, 2).rename(segment_path(tmp_path, 1))
    (tmp_path / "x").rename(segment_path(tmp_path, 2))

    with pytest.raises(JournalError, match="index"):
        Journal(tmp_path)


# Marks


def test_every_mark_of_a_journal_is_found_again_and_reading_goes_on_from_it(tmp_path: Path) -> None:
    marks = write_journal(tmp_path, [], RECORDS, [], RECORDS[:2])
    everything = list(read_frames(tmp_path))

    for mark in marks:
        same = Mark(**json.loads(json.dumps(asdict(mark))))
        check_mark(tmp_path, same)
        assert list(read_frames(tmp_path, same.position)) == [frame for frame in everything if frame.position >= mark.position]


def test_another_history_of_the_same_length_is_refused(tmp_path: Path) -> None:
    *_, end = write_journal(tmp_path / "ours", [("g", b"one"), ("g", b"two")])
    *_, other = write_journal(tmp_path / "theirs", [("g", b"ONE"), ("g", b"two")])
    assert end.position == other.position

    with pytest.raises(JournalError, match="another history"):
        check_mark(tmp_path / "theirs", end)


def test_mark_of_a_dropped_segment_or_of_no_record_is_refused(tmp_path: Path) -> None:
    first, *_, end = write_journal(tmp_path, RECORDS, RECORDS)
    journal = Journal(tmp_path)
    journal.drop_before(1)
    journal.close()

    check_mark(tmp_path, end)
    with pytest.raises(JournalError, match=r"its segments: 1\)"):
        check_mark(tmp_path, first)
    with pytest.raises(JournalError, match="must have a record"):
        check_mark(tmp_path, Mark(segment=1, offset=end.offset - 1, digest=end.digest))
    with pytest.raises(JournalError, match="must have a record"):
        list(read_frames(tmp_path, Position(segment=1, offset=SEGMENT_HEADER_BYTES + 1)))


def test_reading_where_no_record_begins_is_an_error(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    position = journal.append("g", b"payload")

    for offset in (0, position.offset + 1, journal.end.offset, 10**6):
        with pytest.raises(JournalError, match="no record at byte"):
            journal.read(Position(segment=0, offset=offset))
    with pytest.raises(JournalError, match="does not exist"):
        journal.read(Position(segment=7, offset=position.offset))
    journal.close()
    with pytest.raises(JournalError, match="no such folder"):
        list(read_frames(tmp_path / "nothing"))


# Random use against a list

STEPS = st.one_of(
    st.tuples(st.just("append"), st.sampled_from("gdv"), st.binary(max_size=40)),
    st.sampled_from([("rotate",), ("reopen",), ("sync",), ("drop",), ("kill",)]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, max_size=30))
def test_random_use_equals_a_list(steps: list[tuple[str, ...]], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("run") / "journal"
    journal = Journal(folder)
    model: dict[int, list[Record]] = {0: []}
    for step in steps:
        last = max(model)
        if step[0] == "append":
            journal.append(step[1], step[2])  # type: ignore[arg-type]
            model[last].append((step[1], step[2]))  # type: ignore[arg-type]
        elif step[0] == "rotate":
            assert journal.rotate() == last + 1
            model[last + 1] = []
        elif step[0] == "sync":
            journal.sync()
        elif step[0] == "drop":
            journal.drop_before(last)
            model = {last: model[last]}
        else:
            end = journal.end
            if step[0] == "kill":  # what the death of the process does: no sync, no close
                os.close(journal._file)
                os.close(journal._lock)
            else:
                journal.close()
            journal = Journal(folder)
            assert (journal.end, journal.cut_bytes) == (end, 0)
        assert journal.first_segment == min(model)
    expected = [record for segment in model.values() for record in segment]
    check_mark(folder, journal.end)
    assert content(folder) == expected == records(list(journal.frames()))
    journal.close()


# Crashes and full disks


@pytest.mark.parametrize("act", ["append", "rotate"])
@pytest.mark.parametrize("written", range(0, SEGMENT_HEADER_BYTES, 7))
def test_death_in_the_middle_of_a_write_loses_only_that_record(act: str, written: int, tmp_path: Path) -> None:
    """A child process whose write stops after some bytes, and which is then killed."""
    write_journal(tmp_path, RECORDS)
    journal = Journal(tmp_path)
    pid = os.fork()
    if pid == 0:

        def die(handle: int, rest: memoryview) -> NoReturn:
            os.write(handle, rest[:written])
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError("dead processes raise nothing")

        try:
            journal_module._write = die
            journal.append("g", b"payload") if act == "append" else journal.rotate()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    os.close(journal._file)
    os.close(journal._lock)

    assert content(tmp_path) == RECORDS
    assert reopened(tmp_path) == (RECORDS, written)


def test_interrupted_append_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    journal.append("g", b"first")
    whole, end = segment_path(tmp_path, 0).read_bytes(), journal.end
    write = os.write

    def interrupted(handle: int, rest: memoryview) -> int:
        write(handle, rest[:10])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "write", interrupted)
        journal.append("g", b"second")

    assert (segment_path(tmp_path, 0).read_bytes(), journal.end) == (whole, end)
    journal.append("g", b"third")
    journal.close()
    assert content(tmp_path) == [("g", b"first"), ("g", b"third")]


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda handle, rest: write(handle, rest[:3]))
        write_journal(tmp_path, RECORDS[:3], RECORDS[3:])

    assert content(tmp_path) == RECORDS


def test_journal_takes_nothing_after_a_failed_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second sync would report success for pages that the kernel threw away after the first."""

    def fail(handle: int) -> None:
        raise OSError(5, "Input/output error")

    journal = Journal(tmp_path)
    journal.append("g", b"payload")
    with monkeypatch.context() as patch, pytest.raises(JournalError, match="mend the storage, then `async-rlhf resume"):
        patch.setattr(os, "fdatasync", fail)
        journal.sync()

    for act in (journal.sync, journal.rotate, lambda: journal.append("g", b"more")):
        with pytest.raises(JournalError, match="takes no records: a sync failed"):
            act()
    journal.close()
    assert reopened(tmp_path)[0] == [("g", b"payload")]


FULL_DISK = """
import resource, sys
from pathlib import Path
from async_rlhf.errors import JournalError
from async_rlhf.journal import Journal

journal = Journal(Path(sys.argv[1]) / "journal")
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
kept = 0
try:
    while True:
        journal.append("g", b"%03d" % kept + b"." * 200)
        kept += 1
except JournalError as error:
    print(error)
for size in (200, 900):
    try:
        journal.append("g", b"#" * size)
    except JournalError:
        continue
    print("a smaller record fits")
resource.setrlimit(resource.RLIMIT_FSIZE, (20, unlimited[1]))
try:
    journal.rotate()
except JournalError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
journal.append("d", b"%d" % kept)
journal.rotate()
journal.append("d", b"next")
journal.close()
"""


def test_full_disk_is_told_clearly_and_leaves_a_valid_journal_that_goes_on(tmp_path: Path) -> None:
    """A limit of 1000 bytes per file: 44 + n * (53 + 203) <= 1000 lets three records in; the fourth is written in part."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
    )

    told = done.stdout.splitlines()
    assert len(told) == 2, told
    for line in told:
        assert line.startswith(f"cannot write the journal: no space for {tmp_path / 'journal'} (File too large): free space, then")
        assert line.endswith(f"`async-rlhf resume {tmp_path}`")
    kept = [("g", b"%03d" % number + b"." * 200) for number in range(3)]
    assert reopened(tmp_path / "journal") == ([*kept, ("d", b"3"), ("d", b"next")], 0)


# One writer

HOLD = """
import sys, time
from pathlib import Path
from async_rlhf.journal import Journal

journal = Journal(Path(sys.argv[1]))
journal.append("g", b"1")
print("open", flush=True)
time.sleep(60)
"""


def test_second_writer_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "open\n"
        with pytest.raises(JournalError, match=f"process {first.pid} on .* wait for it, or stop it"):
            Journal(tmp_path)
        assert content(tmp_path) == [("g", b"1")], "readers need no lock"
        first.kill()
        first.wait(timeout=10)

    assert reopened(tmp_path) == ([("g", b"1")], 0)


def test_refused_or_closed_writer_holds_no_lock(tmp_path: Path) -> None:
    first = Journal(tmp_path)
    with pytest.raises(JournalError, match="must have one writer"):
        Journal(tmp_path)
    first.close()
    first.close()
    with pytest.raises(JournalError, match="closed"):
        first.append("g", b"")
    segment_path(tmp_path, 0).write_bytes(b"?" * 100)

    for _ in range(2):
        with pytest.raises(JournalError, match="damaged"):
            Journal(tmp_path)


def test_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "journal").write_text("a file")

    with pytest.raises(JournalError, match="cannot write the journal"):
        Journal(tmp_path / "journal")


def test_record_over_the_limit_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "MAX_PAYLOAD_BYTES", 10)
    journal = Journal(tmp_path)
    journal.append("g", bytes(10))

    with pytest.raises(JournalError, match="at most 10 bytes, got 11"):
        journal.append("g", bytes(11))

    assert content(tmp_path) == [("g", bytes(10))]
    journal.close()
