"""Checkpoints: whole or refused, whatever byte is missing or wrong; the newest whole one is found, old ones go."""

import itertools
import json
import os
import shutil
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from async_rlhf import checkpoints
from async_rlhf.checkpoints import COMMIT, JOURNAL, STATE, commit, discard, folder_of, folders, newest, prune, read
from async_rlhf.errors import ConfigError
from async_rlhf.journal import Mark
from async_rlhf.scores import ScoreMoments
from async_rlhf.state import TrainingState

MARK = Mark(segment=3, offset=77, digest="ab" * 16)
LEARNER = {"learner/rank-0.safetensors": b"\0\1masters and moments\xff", "learner/random/rank-0.json": b"{}", "learner/empty": b""}


def state_of(version: int) -> TrainingState:
    return TrainingState(
        run_id="r",
        phase="training",
        version=version,
        num_updates=9,
        optimizer_steps=version,
        prompts=1,
        completions=2,
        tokens=3,
        seed=0,
        reward_mean=1 / 3,
        score_moments=ScoreMoments(count=2, mean=0.1, sum_squares=1e-7, recent=(0.5,)),
    )


def write_learner(folder: Path) -> dict[str, tuple[int, int]]:
    """What the ranks write: their files, and what these must be."""
    for name, content in LEARNER.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return {name: (len(content), zlib.crc32(content)) for name, content in LEARNER.items()}


def make(run_folder: Path, version: int) -> Path:
    folder = folder_of(run_folder, version)
    commit(folder, state_of(version), MARK, write_learner(folder))
    return folder


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def refusal(folder: Path) -> str:
    """Why `folder` is refused; the message must name it."""
    with pytest.raises(ConfigError) as caught:
        read(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def newest_version(run_folder: Path) -> int | None:
    checkpoint, _ = newest(run_folder)
    return None if checkpoint is None else checkpoint.version


# Whole ones.


def test_a_checkpoint_comes_back_as_it_was_made(tmp_path: Path) -> None:
    folder = make(tmp_path, 120)

    checkpoint = read(folder)

    assert folder == tmp_path / "checkpoints" / "00000120"
    assert (checkpoint.folder, checkpoint.version, checkpoint.mark, checkpoint.state) == (folder, 120, MARK, state_of(120))


def test_the_newest_whole_checkpoint_is_found_by_number_not_by_name_or_age(tmp_path: Path) -> None:
    for version in (99_999_999, 100_000_000, 7, 0):
        make(tmp_path, version)

    assert newest_version(tmp_path) == 100_000_000
    assert [int(folder.name) for folder in folders(tmp_path)] == [100_000_000, 99_999_999, 7, 0]


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert newest(tmp_path) == (None, [])
    assert folders(tmp_path) == [] and prune(tmp_path, 2) == 0


def test_what_is_no_checkpoint_folder_is_left_alone(tmp_path: Path) -> None:
    make(tmp_path, 1)
    for name in ("notes", "00000002.old", "-1"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / "00000009").write_text("a file")

    assert newest_version(tmp_path) == 1 and [folder.name for folder in folders(tmp_path)] == ["00000001"]
    assert prune(tmp_path, 1) == 1 and (tmp_path / "checkpoints" / "notes").is_dir()


def test_a_checkpoint_asked_for_by_version_is_that_one(tmp_path: Path) -> None:
    for version in (2, 4, 6):
        make(tmp_path, version)

    checkpoint, skipped = newest(tmp_path, 4)

    assert checkpoint is not None and checkpoint.version == 4 and skipped == []


def test_a_version_without_a_checkpoint_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    for version in (2, 4):
        make(tmp_path, version)

    with pytest.raises(ConfigError, match="has no checkpoint of version 3; there are: 4, 2"):
        newest(tmp_path, 3)
    with pytest.raises(ConfigError, match="has no checkpoint of version 3; there are: none"):
        newest(tmp_path / "elsewhere", 3)


def test_a_damaged_checkpoint_asked_for_by_version_is_refused_and_not_replaced_by_another(tmp_path: Path) -> None:
    make(tmp_path, 2)
    (make(tmp_path, 4) / STATE).unlink()

    with pytest.raises(ConfigError, match=r"00000004: state\.json is missing"):
        newest(tmp_path, 4)


def test_a_second_commit_of_a_version_takes_the_place_of_the_first(tmp_path: Path) -> None:
    folder = make(tmp_path, 5)
    mark = Mark(segment=9, offset=1, digest="cd" * 16)

    commit(folder, state_of(5), mark, write_learner(folder))

    assert read(folder).mark == mark


# Damage.


def test_a_file_cut_at_any_byte_is_refused_by_name(tmp_path: Path) -> None:
    folder = make(tmp_path, 8)
    for path in files_of(folder):
        whole = path.read_bytes()
        name = str(path.relative_to(folder))
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            message = refusal(folder)
            assert name in message, f"{name} cut to {size} bytes: {message}"
            if name != COMMIT:
                assert f"{name} has {size} bytes, expected {len(whole)}" in message
        path.write_bytes(whole)
    assert read(folder).version == 8


def test_a_flipped_bit_in_any_byte_of_a_file_is_refused_by_name(tmp_path: Path) -> None:
    """Every byte of every file, the COMMIT's own too: what it says would no longer fit, or no longer be read."""
    folder = make(tmp_path, 8)
    for path in files_of(folder):
        whole = path.read_bytes()
        name = str(path.relative_to(folder))
        for index in range(len(whole)):
            for bit in (0, 3, 7):
                path.write_bytes(whole[:index] + bytes([whole[index] ^ 1 << bit]) + whole[index + 1 :])
                if name == COMMIT and same_meaning(path, whole):
                    continue
                message = refusal(folder)
                assert name == COMMIT or name in message, f"{name}, byte {index}: {message}"
        path.write_bytes(whole)
    assert read(folder).version == 8


def same_meaning(path: Path, whole: bytes) -> bool:
    """A flipped bit may turn a line break of the JSON into another blank."""
    try:
        return json.loads(path.read_bytes()) == json.loads(whole)
    except ValueError:
        return False


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    folder = make(tmp_path, 8)
    for path in files_of(folder):
        whole = path.read_bytes()
        path.unlink()
        name = str(path.relative_to(folder))
        assert ("has no COMMIT file" if name == COMMIT else f"{name} is missing") in refusal(folder)
        path.write_bytes(whole)


def test_a_file_longer_than_it_was_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path, 8)
    with (folder / "learner" / "empty").open("ab") as file:
        file.write(b"x")

    assert "learner/empty has 1 bytes, expected 0" in refusal(folder)


def test_files_of_a_whole_checkpoint_under_another_number_are_refused(tmp_path: Path) -> None:
    shutil.copytree(make(tmp_path, 8), folder_of(tmp_path, 9))

    assert "COMMIT file is damaged (version 8" in refusal(folder_of(tmp_path, 9))


@pytest.mark.parametrize("left_out", [STATE, JOURNAL])
def test_a_commit_that_does_not_vouch_for_state_and_journal_is_refused(left_out: str, tmp_path: Path) -> None:
    folder = make(tmp_path, 8)
    entry = json.loads((folder / COMMIT).read_text())
    del entry["files"][left_out]
    (folder / COMMIT).write_text(json.dumps(entry))

    assert "COMMIT file is damaged" in refusal(folder)


@pytest.mark.parametrize("name", ["../outside", "learner/../../outside", "/etc/hostname", "../00000001/state.json"])
def test_a_commit_that_names_a_file_outside_is_refused_and_the_file_not_read(name: str, tmp_path: Path) -> None:
    make(tmp_path, 1)
    folder = make(tmp_path, 8)
    (tmp_path / "checkpoints" / "outside").write_bytes(b"secret")
    entry = json.loads((folder / COMMIT).read_text())
    entry["files"][name] = {"bytes": 6, "crc32": zlib.crc32(b"secret")}
    (folder / COMMIT).write_text(json.dumps(entry))

    message = refusal(folder)
    assert repr(name) in message and "outside of it" in message


def test_a_link_that_leads_outside_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path, 8)
    outside = tmp_path / "outside"
    outside.write_bytes(LEARNER["learner/random/rank-0.json"])
    (folder / "learner/random/rank-0.json").unlink()
    (folder / "learner/random/rank-0.json").symlink_to(outside)

    assert "outside of it" in refusal(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\x00",
        "[]",
        "null",
        "7",
        '{"version": 8}',
        '{"files": {}}',
        '{"version": 8, "files": []}',
        '{"version": "x", "files": {}}',
        '{"version": 8, "files": {"state.json": {}}}',
        '{"version": 8, "files": {"state.json": {"bytes": null, "crc32": 0}}}',
    ],
)
def test_a_commit_that_is_no_commit_is_refused(text: str, tmp_path: Path) -> None:
    folder = make(tmp_path, 8)
    (folder / COMMIT).write_text(text)

    assert "COMMIT file is damaged" in refusal(folder)


def test_a_commit_that_is_no_text_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path, 8)
    (folder / COMMIT).write_bytes(b"\xff\xfe\x00")

    assert "COMMIT file is damaged" in refusal(folder)


@pytest.mark.parametrize("name", [STATE, JOURNAL])
@pytest.mark.parametrize("text", ["{}", "[]", "not JSON", '{"segment": 1, "offset": 2, "digest": "", "more": 3}'])
def test_a_state_or_mark_of_another_release_is_refused_by_name(name: str, text: str, tmp_path: Path) -> None:
    """Whole by size and checksum, but with other fields."""
    folder = make(tmp_path, 8)
    (folder / name).write_text(text)
    entry = json.loads((folder / COMMIT).read_text())
    entry["files"][name] = {"bytes": len(text), "crc32": zlib.crc32(text.encode())}
    (folder / COMMIT).write_text(json.dumps(entry))

    assert name in refusal(folder)


Damage = Callable[[Path], object]


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda folder: (folder / COMMIT).unlink(), "has no COMMIT file"),
        (lambda folder: (folder / STATE).unlink(), "state.json is missing"),
        (lambda folder: (folder / "learner" / "empty").write_bytes(b"x"), "learner/empty has 1 bytes, expected 0"),
    ],
)
def test_a_damaged_newest_falls_back_to_the_one_before_and_says_why(damage: Damage, why: str, tmp_path: Path) -> None:
    for version in (2, 4, 6, 8):
        make(tmp_path, version)
    for version in (8, 6):
        damage(folder_of(tmp_path, version))

    checkpoint, skipped = newest(tmp_path)

    assert checkpoint is not None and checkpoint.version == 4
    assert len(skipped) == 2 and all(why in text for text in skipped)
    assert "00000008" in skipped[0] and "00000006" in skipped[1]


def test_when_all_are_damaged_there_is_none_and_each_says_why(tmp_path: Path) -> None:
    for version in (2, 4):
        (make(tmp_path, version) / JOURNAL).unlink()

    checkpoint, skipped = newest(tmp_path)

    assert checkpoint is None and len(skipped) == 2


# Crashes.


class Crash(Exception):
    """The process ends here."""


def crash_at_step(patch: pytest.MonkeyPatch, crash_at: int, *, half: bool) -> None:
    """Of the writes and the syncs of folders; with `half`, half of the write is done."""
    write, fsync, steps = checkpoints._write, os.fsync, itertools.count()

    def write_or_crash(path: Path, text: str) -> None:
        if next(steps) == crash_at:
            if half:
                path.write_text(text[: len(text) // 2])
            raise Crash
        write(path, text)

    def fsync_or_crash(handle: int) -> None:
        if next(steps) == crash_at:
            raise Crash
        fsync(handle)

    patch.setattr(checkpoints, "_write", write_or_crash)
    patch.setattr(checkpoints.os, "fsync", fsync_or_crash)


def test_a_crash_between_any_two_steps_of_a_commit_leaves_no_checkpoint_or_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each write and each sync of a folder: before it, and, for a write, with half of it done."""
    make(tmp_path, 2)
    folder, outcomes = folder_of(tmp_path, 4), list[int | None]()
    for crash_at in range(12):
        for half in (False, True):
            shutil.rmtree(folder, ignore_errors=True)
            files = write_learner(folder)
            with monkeypatch.context() as patch:
                crash_at_step(patch, crash_at, half=half)
                with suppress(Crash):
                    commit(folder, state_of(4), MARK, files)
                    outcomes.append(-1)  # went through
            outcomes.append(newest_version(tmp_path))
    assert outcomes[-2:] == [-1, 4], "twelve steps are not enough to see the end"
    outcomes = [outcome for outcome in outcomes if outcome != -1]
    assert set(outcomes) == {2, 4}, "before COMMIT the one before, after it this one"
    assert outcomes == sorted(outcomes, key=int)


@pytest.mark.parametrize("name", [*LEARNER, STATE, JOURNAL, COMMIT])
def test_a_folder_that_lacks_what_any_step_of_the_commit_writes_is_no_checkpoint(name: str, tmp_path: Path) -> None:
    """A disk may have kept later writes and lost earlier ones."""
    make(tmp_path, 2)
    (make(tmp_path, 4) / name).unlink()

    assert newest_version(tmp_path) == 2


def test_commit_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    write = checkpoints._write
    monkeypatch.setattr(checkpoints, "_write", lambda path, text: (written.append(path.name), write(path, text)))

    make(tmp_path, 2)

    assert written == [STATE, JOURNAL, COMMIT]


def test_a_learner_file_that_was_never_written_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 4)
    files = write_learner(folder)

    commit(folder, state_of(4), MARK, {**files, "learner/rank-1.safetensors": (4, 5)})

    assert "learner/rank-1.safetensors is missing" in refusal(folder)


def test_a_discard_that_crashes_halfway_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, 2)
    folder = make(tmp_path, 4)

    def crash(path: Path, *, ignore_errors: bool) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "rmtree", crash)
        with pytest.raises(Crash):
            discard(folder)

    assert newest_version(tmp_path) == 2
    discard(folder)
    discard(folder)
    assert not folder.exists()


# Which ones to keep.


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_the_newest_committed_ones_are_kept_and_the_oldest_of_them_is_named(keep: int, tmp_path: Path) -> None:
    for version in (2, 4, 6, 8):
        make(tmp_path, version)

    oldest = prune(tmp_path, keep)

    kept = [8, 6, 4, 2][:keep]
    assert [int(folder.name) for folder in folders(tmp_path)] == kept and oldest == kept[-1]


def test_what_was_never_committed_is_neither_counted_nor_kept_unless_it_is_the_newest(tmp_path: Path) -> None:
    """Version 9 may be written right now."""
    for version in (2, 4, 6, 8, 9):
        make(tmp_path, version)
    for version in (6, 9):
        (folder_of(tmp_path, version) / COMMIT).unlink()

    assert prune(tmp_path, 2) == 4

    assert [int(folder.name) for folder in folders(tmp_path)] == [9, 8, 4]


def test_nothing_goes_as_long_as_nothing_is_committed(tmp_path: Path) -> None:
    for version in (2, 4):
        (make(tmp_path, version) / COMMIT).unlink()

    assert prune(tmp_path, 1) == 0 and len(folders(tmp_path)) == 2
