"""What a replay reads: every batch of the surviving history once, in order, as it was trained, wherever it lies by now."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from async_rlhf.comparison import DIGEST, Comparison
from async_rlhf.config.rewards import RewardConfig
from async_rlhf.errors import ConfigError, JournalError
from async_rlhf.history import History
from async_rlhf.journal import Journal
from async_rlhf.journal_frames import segment_path
from async_rlhf.prompts import TaskStream
from async_rlhf.replay import ReplayBuffer
from async_rlhf.replayed import batches, shaped, survey
from async_rlhf.rollout_parts import part_path
from async_rlhf.rollout_table import encode
from async_rlhf.rollouts import export_all, export_segment
from async_rlhf.staleness import StalenessRule
from async_rlhf.tasks.base import Problem
from async_rlhf.tickets import ReplaySettings
from async_rlhf.types import Batch
from tests.support.samples import make_scored

SIZE = 2
SHAPING = RewardConfig(normalize=True, missing_eos_percentile=25.0)


class NumberedProblems:
    num_problems = 1000

    def problem(self, index: int) -> Problem:
        return Problem(prompt_id=str(index), text=str(index))


class Past:
    """A run's queue without its actors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.history = History(Journal(folder / "journal"), SHAPING, {"batch_groups": SIZE}, 0)
        prompts = TaskStream(NumberedProblems(), lambda text: [len(text)], seed=0, max_epochs=0)
        rule = StalenessRule(batch_groups=SIZE, max_staleness=1)
        self.buffer = ReplayBuffer(rule, prompts, ReplaySettings(num_updates=100, lease_s=10.0), self.history.ledger)

    def fill(self, version: int) -> None:
        """Everything that policy `version` may sample, with scores that say which group it is."""
        for ticket in self.buffer.grant("g", version, 100, 0.0):
            self.buffer.put(make_scored(ticket, scores=(ticket.ticket_id, 0.25, 0.5), version=version))
        self.history.flush()

    def train(self, num_updates: int = 1) -> list[Batch]:
        """The next batches, as the learner gets them; update u leads to weights of digest 100 + u."""
        trained: list[Batch] = []
        for _ in range(num_updates):
            update = self.buffer.decided
            self.fill(update)
            assert self.buffer.decide() is not None
            self.history.flush()
            trained.append(self.history.batch(update))
            self.buffer.mark_trained(update, digest=100 + update)
            self.history.flush()
        return trained

    def checkpoint(self, oldest_kept: int) -> None:
        """A checkpoint now: what lies before `oldest_kept` leaves the journal."""
        self.history.begin_segment()
        for segment in self.history.forget_before(oldest_kept):
            export_segment(self.folder, segment)
            self.history.drop_segment(segment)


def bits(found: list[Batch]) -> list[tuple[int, bytes, list[bytes]]]:
    """Everything that a learner reads of the batches."""
    plain = [tuple(replace(scored, scores=scored.judged_scores, judged_scores=None) if scored.judged_scores is not None else scored
                   for scored in batch.groups) for batch in found]  # fmt: skip
    return [
        (batch.update, encode(groups), [scored.scores.tobytes() for scored in batch.groups])
        for batch, groups in zip(found, plain, strict=True)
    ]


def replayed(folder: Path) -> list[Batch]:
    return list(shaped(batches(folder), SHAPING))


def test_batches_come_back_shaped_as_they_were_trained_from_the_dataset_and_from_the_journal(tmp_path: Path) -> None:
    past = Past(tmp_path)
    trained: list[Batch] = []
    for version in (2, 4, 6):
        trained += past.train(2)
        past.checkpoint(oldest_kept=version - 2)
    trained += past.train()

    extent = survey(tmp_path)

    assert not segment_path(tmp_path / "journal", 1).exists(), "the older segments must have been dropped"
    assert (extent.first_in_journal, extent.num_updates) == (4, 7)
    assert bits(replayed(tmp_path)) == bits(trained)
    assert any(scored.judged_scores is not None for batch in trained for scored in batch.groups), "nothing was shaped"
    assert {update: digest for update, digest in extent.digests.items() if update >= 4} == {4: 104, 5: 105, 6: 106}


def test_journal_counts_where_a_part_of_the_dataset_tells_of_a_batch_that_was_undone_since(tmp_path: Path) -> None:
    past = Past(tmp_path)
    trained = past.train(2)
    past.checkpoint(oldest_kept=0)
    trained += past.train(2)
    export_all(tmp_path)

    past.history.annul(2, newest_faithful=1)
    left = survey(tmp_path)
    again = past.train(2)

    assert left.num_updates == 2 and left.digests.keys() == {0, 1}
    found = replayed(tmp_path)
    assert bits(found) == bits([*trained[:2], *again]) != bits(trained)
    tickets = [scored.group.ticket.ticket_id for batch in found for scored in batch.groups]
    assert len(set(tickets)) == len(tickets), "a prompt of an undone batch may be in another one, but only once"


def test_batch_that_was_decided_and_not_trained_yet_is_there(tmp_path: Path) -> None:
    past = Past(tmp_path)
    past.train()
    past.fill(1)
    decided = past.buffer.decide()
    past.history.flush()

    assert decided is not None
    assert [scored.group.ticket.ticket_id for scored in list(batches(tmp_path))[1].groups] == [
        scored.group.ticket.ticket_id for scored in decided.groups
    ]
    assert survey(tmp_path).digests.keys() == {0}


def test_dataset_alone_is_enough(tmp_path: Path) -> None:
    past = Past(tmp_path)
    trained = past.train(3)
    past.checkpoint(oldest_kept=0)
    trained += past.train(2)
    export_all(tmp_path)
    for path in sorted((tmp_path / "journal").iterdir()):
        path.unlink()

    assert bits(replayed(tmp_path)) == bits(trained)
    assert survey(tmp_path).digests == {}


def test_missing_part_of_the_dataset_is_named_before_anything_is_trained(tmp_path: Path) -> None:
    past = Past(tmp_path)
    for version in (1, 2, 3):
        past.train()
        past.checkpoint(oldest_kept=version)
    part_path(tmp_path / "rollouts", 1).unlink()

    with pytest.raises(JournalError, match=r"must have batches 0 to 2.*lacks 1; restore the missing part"):
        next(batches(tmp_path))


@pytest.mark.parametrize("folders", [(), ("journal",), ("rollouts",)])
def test_folder_without_any_batch_is_refused(folders: tuple[str, ...], tmp_path: Path) -> None:
    for name in folders:
        (tmp_path / name).mkdir()

    with pytest.raises(ConfigError, match="holds no batch, neither in journal/ nor in rollouts/"):
        survey(tmp_path)


def test_damaged_journal_and_damaged_part_are_errors_that_name_the_file_or_its_folder(tmp_path: Path) -> None:
    past = Past(tmp_path)
    past.train(2)
    past.checkpoint(oldest_kept=2)
    past.train(2)
    part, segment = part_path(tmp_path / "rollouts", 0), segment_path(tmp_path / "journal", 1)
    whole = part.read_bytes()

    part.write_bytes(whole[:-20])
    with pytest.raises(JournalError, match="rollouts cannot be read"):
        survey(tmp_path)
    part.write_bytes(whole)
    content = bytearray(segment.read_bytes())
    content[len(content) // 2] ^= 1
    segment.write_bytes(content)
    with pytest.raises(JournalError, match=r"segment-00000001.log is damaged at byte"):
        survey(tmp_path)


# What is said of two sets of numbers


def test_comparison_names_the_first_number_that_differs_and_takes_not_a_number_for_itself() -> None:
    nan = float("nan")
    rows = {0: {"train/loss": 1.0, "value/x": nan}, 1: {"train/loss": 2.0}, 2: {"train/loss": 4.0}}
    comparison = Comparison(rows, {1: 7}, num_updates=4)

    said = [
        comparison.add(0, {"train/loss": 1.0, "value/x": nan}, None),
        comparison.add(1, {"train/loss": float(np.nextafter(2.0, 3.0))}, 8),
        comparison.add(2, {"train/loss": 3.0}, None),
        comparison.add(3, {"train/loss": 3.0}, None),
    ]

    assert said == ["(bit-equal)", "(2 numbers differ)", "(1 numbers differ)", "(the run has no metrics of it)"]
    assert [(found.update, found.name) for found in comparison.differences] == [(1, "train/loss"), (1, DIGEST), (2, "train/loss")]
    lines = comparison.verdict()
    assert lines[0].startswith("1 of 4 updates could not be compared")
    assert lines[1].startswith("2 of 3 updates compared differ") and lines[1].endswith("first update 2:")
    assert "train/loss 2.0 in the run, 2.0000000000000004 now (relative difference 2.2e-16)" in lines[2]
    assert lines[3].strip() == "weights digest 7 in the run, 8 now"
    assert lines[-1].strip() == "train/loss 0.25 (update 3)", "|4 - 3| / 4"


def test_comparison_without_a_difference_says_how_much_was_compared() -> None:
    comparison = Comparison({0: {"a": 0.5}, 1: {"a": 0.25}}, {1: 5}, num_updates=2)
    comparison.add(0, {"a": 0.5}, None)
    comparison.add(1, {"a": 0.25}, 5)

    assert comparison.differences == []
    assert comparison.verdict() == [
        "all 2 updates compared are bit-equal to the run (1 of them with the weights' digest, as far as the journal has it)"
    ]
