"""Runs that were killed go on; runs that ended are trained once more. Real runs: one is killed, and its folder copied for each test."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from async_rlhf.replayed import batches
from async_rlhf.types import Batch
from tests.support.command import Finished, ray_processes, rows_of, run_cli, run_until, summary_of, wait_gone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SMALL = ("train", "conf/quickstart.yaml", "algorithm=rloo", "batch_groups=16", "task.held_out=50", "checkpoint.every_updates=4")
UPDATES = 16
DETERMINISTIC = (*SMALL, "deterministic=true", "max_staleness=0", "queue.order=ticket", "updates=12")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Room for run folders, emptied at the end."""
    folder = tmp_path_factory.mktemp("resume")
    yield folder
    shutil.rmtree(folder)


@dataclass
class SecondDriver:
    """One that was started while the first one lived."""

    said: Finished = field(default_factory=lambda: Finished(0, ""))
    before: dict[str, bytes] = field(default_factory=dict)
    """The files of the run folder then."""
    after: dict[str, bytes] = field(default_factory=dict)


@pytest.fixture(scope="module")
def second_driver() -> SecondDriver:
    return SecondDriver()


@pytest.fixture(scope="module")
def killed(folders: Path, second_driver: SecondDriver) -> Path:
    """An asynchronous run of two checkpoints, killed with SIGKILL in the middle."""
    folder, before = folders / "killed", ray_processes()

    def hold() -> None:
        os.kill(json.loads((folder / "ray.json").read_text())["pid"], signal.SIGSTOP)  # or it ends before the second one is there
        second_driver.before = at_rest(folder)
        second_driver.said = run_cli("resume", str(folder), "generator.count=2")
        second_driver.after = files(folder)

    done = run_until(
        *(*SMALL, f"updates={UPDATES}", f"run.dir={folder}"),
        seen=lambda output: "update 10/" in output,
        between=hold,
        signum=signal.SIGKILL,
        log=folders / "log",
    )
    assert done.code == -signal.SIGKILL, done.output
    assert not wait_gone(before), "Ray must end with the driver that started it"
    assert checkpoints(folder) == [4, 8]
    return folder


@pytest.fixture(scope="module")
def undisturbed(folders: Path) -> Path:
    """A deterministic run that ended well."""
    folder = folders / "undisturbed"
    done = run_cli(*DETERMINISTIC, f"run.dir={folder}")
    assert done.code == 0, done.output
    return folder


@pytest.fixture
def copy(killed: Path, tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    yield folder
    shutil.rmtree(folder)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def at_rest(folder: Path) -> dict[str, bytes]:
    """The files, once a second has left them as they were: an actor may still write what its driver asked for before it was stopped."""
    last, since, ends = dict[str, bytes](), time.monotonic(), time.monotonic() + 60
    while not last or time.monotonic() - since < 1.0:
        assert time.monotonic() < ends, "the files never come to rest"
        time.sleep(0.1)
        with suppress(FileNotFoundError):  # a file for a moment, renamed since
            if (found := files(folder)) != last:
                last, since = found, time.monotonic()
    return last


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.parent.name) for path in (folder / "checkpoints").glob("*/COMMIT"))


def assert_contract_kept(folder: Path, max_staleness: int, num_updates: int = UPDATES) -> None:
    """Every update once and in order, every prompt once, no token beyond the bound, and all files agree."""
    summary, rows, trained = summary_of(folder), rows_of(folder), list(batches(folder))
    groups = [scored.group for batch in trained for scored in batch.groups]
    assert summary["exit"] == "success"
    assert [row["update"] for row in rows] == list(range(num_updates)) == [batch.update for batch in trained]
    assert len({group.ticket.ticket_id for group in groups}) == len(groups) == summary["prompts"] == num_updates * 16
    assert len({(group.ticket.epoch, group.ticket.prompt.prompt_id) for group in groups}) == len(groups), "a prompt was trained twice"
    assert sum(group.num_tokens for group in groups) == summary["tokens"]
    staleness = [
        batch.update - span.version
        for batch in trained
        for scored in batch.groups
        for rollout in scored.group.rollouts
        for span in rollout.version_spans
    ]
    assert min(staleness) >= 0 and max(staleness) == summary["staleness_max"] <= max_staleness
    assert summary["updates"] == summary["optimizer_steps"] == num_updates


def went_on_from(done: Finished) -> int:
    """The version of the checkpoint that a resume said it goes on from; 0: the start."""
    [line] = [line for line in done.output.splitlines() if line.startswith("going on from")]
    return 0 if "version 0" in line else int(line.rpartition("/")[2])


# Going on


def test_killed_deterministic_run_goes_on_to_the_losses_of_one_that_was_not(undisturbed: Path, folders: Path) -> None:
    """Bit for bit, without any tolerance: a checkpoint holds the weights and moments as they are, and a deterministic run samples in
    whole rounds. A round that was lost is sampled again by the same groups together, so that rounding is the same too.
    """
    disturbed, seen, moment_s = folders / "disturbed", random.randint(5, 8), random.uniform(0.0, 0.5)
    run_until(
        *(*DETERMINISTIC, f"run.dir={disturbed}"),
        seen=lambda output: f"update {seen}/" in output,
        between=lambda: time.sleep(moment_s),
        signum=signal.SIGKILL,
        log=folders / "log",
    )
    done = run_cli("resume", str(disturbed))

    assert done.code == 0, done.output
    where = f"killed {moment_s:.2f} s after update {seen}, resumed from {went_on_from(done)}"
    expected, got = rows_of(undisturbed), rows_of(disturbed)
    for name in ("queue/batch_digest", "reward/mean", "train/loss", "train/grad_norm"):
        assert [row[name] for row in got] == [row[name] for row in expected], f"{name}: {where}"
    first, second = (load_file(folder / "model" / "model.safetensors") for folder in (undisturbed, disturbed))
    assert all((first[name] == second[name]).all() for name in first), where
    assert_contract_kept(disturbed, 0, 12)


def test_run_goes_on_with_another_number_of_ranks_and_generators_and_another_zero_stage(copy: Path) -> None:
    done = run_cli("resume", str(copy), "learner.num_ranks=2", "learner.zero_stage=2", "generator.count=2")

    assert done.code == 0, done.output
    assert went_on_from(done) == 8
    assert "learner.num_ranks 1 -> 2" in done.output and "generator.count 1 -> 2" in done.output
    assert "decided and trained anew" not in done.output, "the number of ranks changes an update by rounding alone"
    assert_contract_kept(copy, 1)


def test_damaged_newest_checkpoint_is_named_and_the_one_before_is_taken(copy: Path) -> None:
    newest = copy / "checkpoints" / "00000008"
    file = max((newest / "learner").iterdir() if (newest / "learner").is_dir() else newest.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)

    done = run_cli("resume", str(copy))

    assert done.code == 0, done.output
    [line] = [line for line in done.output.splitlines() if line.startswith("skipped:")]
    assert str(newest) in line and file.name in line and "CRC-32" in line
    assert went_on_from(done) == 4
    assert_contract_kept(copy, 1)


def test_older_checkpoint_and_another_learning_rate_undo_the_batches_after_it(copy: Path) -> None:
    (copy / "checkpoints" / "00000008" / "COMMIT").unlink()
    before = {batch.update: batch for batch in batches(copy)}

    done = run_cli("resume", str(copy), "--checkpoint", "4", "learner.learning_rate=1e-4")

    assert done.code == 0, done.output
    assert went_on_from(done) == 4
    assert "learner.learning_rate 0.0003 -> 0.0001" in done.output and "decided and trained anew" in done.output
    assert_contract_kept(copy, 1)
    after = {batch.update: batch for batch in batches(copy)}
    assert all(tickets(before[update]) == tickets(after[update]) for update in range(4)), "what the checkpoint covers stays"
    undone = {ticket for update in before if update >= 4 for ticket in tickets(before[update])}
    assert undone & {ticket for update in after if update >= 4 for ticket in tickets(after[update])}, "samples of version 4 come back"


def tickets(batch: Batch) -> list[int]:
    return [scored.group.ticket.ticket_id for scored in batch.groups]


# Refusing to go on


def assert_refused(done: Finished, code: int, *words: str) -> None:
    assert done.code == code, done.output
    assert all(word in done.output for word in words), done.output
    assert len(done.output.strip().splitlines()) == 1 and "starting Ray" not in done.output, done.output


def test_second_driver_of_a_living_run_is_refused_and_changes_nothing(second_driver: SecondDriver, killed: Path) -> None:
    assert_refused(second_driver.said, 2, "must have one driver, got a second: process", "That run still goes on: wait for it, or stop it")
    assert second_driver.before == second_driver.after
    assert [row["update"] for row in rows_of(killed)] == list(range(len(rows_of(killed))))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("batch_groups=32",), ("resume cannot change batch_groups 16 -> 32", "start a new run")),
        (("max_staleness=2",), ("resume cannot change max_staleness 1 -> 2", "start a new run")),
        (("--checkpoint", "6"), ("has no checkpoint of version 6; there are: 8, 4",)),
    ],
)
def test_change_that_a_run_cannot_survive_is_refused(words: tuple[str, ...], said: tuple[str, ...], killed: Path) -> None:
    assert_refused(run_cli("resume", str(killed), *words), 2, *said)


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    assert_refused(run_cli("resume", str(tmp_path)), 2, "is no run folder")


def test_run_whose_checkpoints_are_all_damaged_is_refused_when_its_journal_does_not_reach_back(copy: Path) -> None:
    for version in (4, 8):
        (copy / "checkpoints" / f"{version:08d}" / "COMMIT").unlink()

    done = run_cli("resume", str(copy))

    assert done.code == 2 and "has no whole checkpoint, and its journal begins at update 4" in done.output, done.output


def test_finished_run_says_that_it_is_finished(undisturbed: Path) -> None:
    done = run_cli("resume", str(undisturbed))

    assert done.code == 0, done.output
    assert "is finished: all 12 updates are trained; for more:" in done.output and "starting Ray" not in done.output


# Training the same batches once more


def test_replay_of_a_finished_run_is_bit_equal_to_it(undisturbed: Path) -> None:
    done = run_cli("replay", str(undisturbed), "--compare")

    assert done.code == 0, done.output
    assert "batches: 12 (8 in the rollouts dataset and 4 in the journal)" in done.output
    assert "all 12 updates compared are bit-equal to the run (8 of them with the weights' digest" in done.output


def test_replay_names_the_first_number_that_is_not_the_runs(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    rows = rows_of(folder)
    rows[3]["train/loss"] += 1.0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    done = run_cli("replay", str(folder), "--compare", "--until", "5")

    assert done.code == 1, done.output
    assert "to be trained again: 5" in done.output and "update 5/5" in done.output and "update 6/" not in done.output
    assert "1 of 5 updates compared differ from the run" in done.output and "first update 4:" in done.output
    assert f"train/loss {rows[3]['train/loss']!r} in the run" in done.output


@pytest.mark.long
def test_replay_on_two_ranks_differs_by_rounding_and_says_by_how_much(undisturbed: Path) -> None:
    done = run_cli("replay", str(undisturbed), "--compare", "--until", "3", "learner.num_ranks=2", "learner.zero_stage=2")

    assert done.code == 1, done.output
    shares = [float(line.split()[1]) for line in done.output.splitlines() if line.startswith("  train/grad_norm") and "(update" in line]
    assert shares and 0 < shares[-1] < 1e-4, done.output


def test_replay_refuses_what_it_cannot_train(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)

    assert_refused(run_cli("replay", str(folder), "--until", "13"), 2, "--until must be 1 to 12")
    assert_refused(run_cli("replay", str(folder), "model.path=/no/model"), 2, "/no/model", "does not exist")
    (folder / "journal" / "segment-00000002.log").write_bytes(b"?" * 200)
    assert_refused(run_cli("replay", str(folder)), 1, "segment-00000002.log is damaged")
    for name in ("journal", "rollouts"):
        shutil.rmtree(folder / name)
    assert_refused(run_cli("replay", str(folder)), 2, "holds no batch, neither in journal/ nor in rollouts/")
