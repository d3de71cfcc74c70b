"""The audit finds nothing wrong with a true history, and finds each single thing that was made wrong."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from async_rlhf import history_codec as codec
from async_rlhf import rollout_table
from async_rlhf.audit import Audit, audit
from async_rlhf.config import load_config, to_yaml
from async_rlhf.errors import JournalError
from async_rlhf.events import Decided, Dropped, Event, Failed, Granted, Trained
from async_rlhf.history import History
from async_rlhf.journal import Journal
from async_rlhf.ledger import FAILED
from async_rlhf.prompts import PromptCursor, TaskStream
from async_rlhf.replay import ReplayBuffer
from async_rlhf.rollouts import FOLDER, export_all, export_segment
from async_rlhf.staleness import StalenessRule
from async_rlhf.state import TrainingState
from async_rlhf.tasks.base import Problem
from async_rlhf.tickets import PutOutcome, ReplaySettings
from async_rlhf.types import ScoredGroup, Ticket
from tests.support.samples import make_scored, make_ticket

SIZE, ETA, UPDATES = 2, 1, 5
CONFIG = load_config(overrides=[f"batch_groups={SIZE}", f"max_staleness={ETA}", f"updates={UPDATES}"]).config
CURSOR = PromptCursor(epoch=0, index=0)


class NumberedProblems:
    num_problems = 100

    def problem(self, index: int) -> Problem:
        return Problem(prompt_id=f"p{index}", text=str(index))


class MadeUpRun:
    """A run without actors: `updates` batches, one tied group, one prompt that nobody could score, one lease that was lost."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._requests = 0
        (folder / "config.yaml").write_text(to_yaml(CONFIG))
        self._begin()

    def _begin(self) -> None:
        self.history = History(Journal(self.folder / "journal"), CONFIG.reward, {"batch_groups": SIZE, "max_staleness": ETA}, 0)
        cursor = self.history.ledger.cursor
        prompts = TaskStream(NumberedProblems(), lambda text: [len(text)], seed=0, max_epochs=0, cursor=cursor)
        settings = ReplaySettings(num_updates=UPDATES, max_replacements_per_batch=1, max_attempts=1)
        rule = StalenessRule(batch_groups=SIZE, max_staleness=ETA)
        self.buffer = ReplayBuffer(rule, prompts, settings, self.history.ledger)

    def train(self, updates: int) -> None:
        for _ in range(updates):
            self.decide()
            self.buffer.mark_trained(self.buffer.decided - 1, digest=1)
            self.history.flush()

    def decide(self) -> None:
        """The next batch, sampled by the newest version; before the second one everything happens that can happen to a ticket."""
        version = self.buffer.decided
        while self.buffer.decided == version:
            tickets = self.grant(version)
            if version == 1 and self.buffer.counters.lost == 0 and not self.buffer.counters.voided:
                self.buffer.lose_holder("generator-0.0")
                first, second, *tickets = self.grant(version)
                self.buffer.fail([first], "no reward for this")
                assert self.buffer.put(make_scored(second, scores=(1.0, 1.0), version=version)) is PutOutcome.TIED
            for ticket in tickets:
                assert self.buffer.put(make_scored(ticket, version=version)) is PutOutcome.KEPT
            self.buffer.decide()
            self.history.flush()

    def reopen(self) -> None:
        """As after the queue's death: another one goes on from the journal."""
        self.history._journal.close()
        self._begin()

    def grant(self, version: int) -> list[Ticket]:
        self._requests += 1
        return self.buffer.grant("generator-0.0", version, 10, 0.0, self._requests)

    def checkpoint(self, oldest: int) -> None:
        """Begin a segment; what lies before the checkpoint of version `oldest` leaves the journal."""
        self.history.begin_segment()
        for segment in self.history.forget_before(oldest):
            export_segment(self.folder, segment)
            self.history.drop_segment(segment)

    def end(self) -> None:
        """Write the files that speak of the journal after the last update."""
        export_all(self.folder)
        rows = [{"version": version} for version in range(1, UPDATES + 1)]
        (self.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = audit_of(self.folder, "finished", UPDATES)
        state = TrainingState(
            run_id="run",
            phase="finished",
            version=UPDATES,
            num_updates=UPDATES,
            optimizer_steps=UPDATES,
            prompts=found.groups,
            completions=2 * found.groups,
            tokens=found.tokens,
            staleness_max=found.staleness_max,
            seed=0,
        )
        (self.folder / "state.json").write_text(state.to_json())
        told = {name: getattr(state, name) for name in ("prompts", "completions", "tokens", "optimizer_steps", "staleness_max")}
        (self.folder / "summary.json").write_text(json.dumps({"updates": UPDATES, **told}))

    def append(self, kind: str, payload: bytes) -> None:
        """Write to the journal behind the history's back."""
        self.history._journal.append(kind, payload)

    def append_event(self, event: Event) -> None:
        self.append(codec.kind_of(event), codec.encode(event))


def audit_of(folder: Path, phase: str, version: int) -> Audit:
    """The audit of a folder whose books are not written yet."""
    state = TrainingState(
        run_id="run", phase=phase, version=version, num_updates=UPDATES, optimizer_steps=0, prompts=0, completions=0, tokens=0, seed=0
    )
    (folder / "state.json").write_text(state.to_json())
    return audit(folder)


@pytest.fixture
def run(tmp_path: Path) -> MadeUpRun:
    return MadeUpRun(tmp_path)


def problem_of(folder: Path) -> str:
    """All that the audit says."""
    problems = audit(folder).problems
    assert problems, "the audit found nothing"
    return "\n".join(problems)


# True histories


def test_true_history_has_no_problem_and_is_counted_in_full(run: MadeUpRun) -> None:
    run.train(UPDATES)
    run.end()

    found = audit(run.folder)

    assert found.problems == ()
    assert (found.updates, found.groups, found.completions) == (UPDATES, UPDATES * SIZE, 2 * UPDATES * SIZE)
    assert found.tokens == sum(run.history.summary(update).num_completion_tokens for update in range(UPDATES))  # type: ignore[union-attr]
    assert found.voided == {"tied": 1, FAILED: 1}
    assert found.issued == found.groups + 2 and found.live == 0
    assert (found.lost, found.duplicated, found.bound_violations) == (0, 0, 0)
    assert found.staleness_max == 1


def test_history_of_which_the_first_segments_left_the_journal_is_counted_alike(tmp_path: Path) -> None:
    audits: list[Audit] = []
    for name, checkpoints in (("kept", ()), ("left", (2, 3))):
        (tmp_path / name).mkdir()
        run = MadeUpRun(tmp_path / name)
        for update in range(1, UPDATES + 1):
            run.train(1)
            if update in checkpoints:
                run.checkpoint(oldest=update)
        run.end()
        audits.append(audit(run.folder))

    assert audits[0] == audits[1]
    assert audits[1].problems == ()
    assert not (tmp_path / "left" / "journal" / "segment-00000000.log").exists()


def test_queue_that_died_after_forgetting_batches_leaves_a_history_that_can_be_taken_up_again(run: MadeUpRun) -> None:
    run.train(1)
    run.checkpoint(oldest=0)
    run.train(2)
    run.checkpoint(oldest=1)  # forgets batch 0, of which the segment before this one still tells
    run.train(1)
    run.checkpoint(oldest=1)  # begins without batch 0
    run.reopen()  # remembers it again
    run.train(1)
    run.checkpoint(oldest=4)  # begins with it, and drops everything before the segment without
    run.reopen()
    run.end()

    assert audit(run.folder).problems == ()


def test_killed_run_with_live_tickets_and_an_untrained_batch_has_no_problem(run: MadeUpRun) -> None:
    run.train(3)
    run.checkpoint(oldest=2)
    run.decide()

    found = audit_of(run.folder, "training", 3)

    assert [text for text in found.problems if "state.json counts" not in text and "metrics.jsonl" not in text] == []
    assert found.updates == 3 and found.live > 0


def test_undone_batches_are_not_counted_and_their_groups_are_trained_once(run: MadeUpRun) -> None:
    run.train(3)
    run.history.annul(2, newest_faithful=2)
    run.train(3)
    run.end()

    found = audit(run.folder)

    assert found.problems == ()
    assert found.updates == UPDATES and found.groups == UPDATES * SIZE


# Histories that were tampered with


def decide_again(run: MadeUpRun) -> None:
    run.append_event(Decided(update=3, ticket_ids=run.buffer.ledger.batches[1].ticket_ids))


def decide_what_nobody_sampled(run: MadeUpRun) -> None:
    tickets = run.grant(3)
    run.history.flush()
    run.append_event(Decided(update=3, ticket_ids=tuple(ticket.ticket_id for ticket in tickets[:SIZE])))


def skip_a_batch(run: MadeUpRun) -> None:
    run.append_event(Decided(update=4, ticket_ids=()))


def skip_a_ticket(run: MadeUpRun) -> None:
    run.append_event(Granted(tickets=(make_ticket(run.buffer.ledger.tally.issued + 1),), request=99, cursor=CURSOR))


def draw_a_prompt_again(run: MadeUpRun) -> None:
    number = run.buffer.ledger.tally.issued
    tickets = tuple(replace(make_ticket(number + i), prompt=make_ticket(0).prompt) for i in range(2))
    run.append_event(Granted(tickets=tickets, request=99, cursor=CURSOR))


def put_late(run: MadeUpRun) -> None:
    (ticket, *_) = run.grant(3)
    run.history.flush()
    run.append(codec.KEPT, rollout_table.encode([make_scored(replace(ticket, attempt=7), version=3)]))


def train_what_is_too_old(run: MadeUpRun) -> None:
    train_of_version(run, 1)


def train_what_is_from_the_future(run: MadeUpRun) -> None:
    train_of_version(run, 4)


def train_of_version(run: MadeUpRun, version: int) -> None:
    tickets = run.grant(3)[:SIZE]
    run.history.flush()
    run.append(codec.KEPT, rollout_table.encode([make_scored(ticket, version=version) for ticket in tickets]))
    run.append_event(Decided(update=3, ticket_ids=tuple(ticket.ticket_id for ticket in tickets)))


def break_a_completion(run: MadeUpRun) -> None:
    tickets = run.grant(3)[:SIZE]
    run.history.flush()
    run.append(codec.KEPT, rollout_table.encode([without_first_token(make_scored(ticket, version=3)) for ticket in tickets]))
    run.append_event(Decided(update=3, ticket_ids=tuple(ticket.ticket_id for ticket in tickets)))


def without_first_token(scored: ScoredGroup) -> ScoredGroup:
    rollouts = tuple(
        replace(rollout, version_spans=tuple(replace(span, start=span.start + 1) for span in rollout.version_spans))
        for rollout in scored.group.rollouts
    )
    return replace(scored, group=replace(scored.group, rollouts=rollouts))


def end_twice(run: MadeUpRun) -> None:
    run.append_event(Failed(ticket_id=run.buffer.ledger.batches[2].ticket_ids[0], reason="late", for_good=True))


def train_ahead(run: MadeUpRun) -> None:
    run.append_event(Trained(update=4, digest=0, canary_logprobs=()))


def undo_into_nothing(run: MadeUpRun) -> None:
    run.append(codec.ANNULLED, json.dumps({"version": 2, "returned": [], "voided": [], "lost": []}).encode())


def drop_the_unknown(run: MadeUpRun) -> None:
    run.append_event(Dropped(ticket_ids=(1000,)))


def carry_something_else(run: MadeUpRun) -> None:
    number = run.buffer.ledger.batches[2].ticket_ids[0]
    run.append(codec.CARRIED, rollout_table.encode([make_scored(make_ticket(number), seed=5)]))


@pytest.mark.parametrize(
    ("tamper", "said", "counted"),
    [
        (decide_again, "expected only live tickets with a sample", "duplicated"),
        (decide_what_nobody_sampled, "expected only live tickets with a sample", ""),
        (skip_a_batch, "batch 4 was decided, expected batch 3", ""),
        (skip_a_ticket, "of which nothing became", "lost"),
        (draw_a_prompt_again, "expected it once", "duplicated"),
        (put_late, "was answered by attempt 7, expected a live one of attempt 0", ""),
        (train_what_is_too_old, "of versions 1 to 1, expected 1 updates of age at most", "bound_violations"),
        (train_what_is_from_the_future, "of versions 4 to 4, expected 1 updates of age at most", "bound_violations"),
        (break_a_completion, "tickets with tokens of no version", ""),
        (end_twice, "without being live", "duplicated"),
        (train_ahead, "update 4 was trained, expected at most 3", ""),
        (undo_into_nothing, "expected all to return or be voided", "lost"),
        (drop_the_unknown, "ticket 1000 ended (dropped) without being live", ""),
        (carry_something_else, "with another sample", ""),
    ],
)
def test_each_breach_in_the_journal_is_found(run: MadeUpRun, tamper: Callable[[MadeUpRun], None], said: str, counted: str) -> None:
    run.train(3)
    tamper(run)

    found = audit_of(run.folder, "training", 3)

    assert said in "\n".join(found.problems)
    if counted:
        assert getattr(found, counted) > 0


# Files that contradict the journal


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name", ["prompts", "completions", "tokens"])
def test_state_with_another_count_than_the_journal_is_found(run: MadeUpRun, name: str) -> None:
    run.train(UPDATES)
    run.end()
    change_json(run.folder / "state.json", **{name: 7})

    assert f"state.json counts 7 {name} at version {UPDATES}, expected" in problem_of(run.folder)


def test_summary_with_another_count_than_the_state_is_found(run: MadeUpRun) -> None:
    run.train(UPDATES)
    run.end()
    change_json(run.folder / "summary.json", updates=UPDATES + 1)

    assert f"summary.json counts {UPDATES + 1} updates, expected {UPDATES}" in problem_of(run.folder)


@pytest.mark.parametrize(("versions", "said"), [([1, 2, 4, 5], "1-2, 4-5"), ([1, 2, 2, 3, 4, 5], "1-2, 2-5"), ([], "none")])
def test_rows_that_are_missing_or_there_twice_are_found(run: MadeUpRun, versions: list[int], said: str) -> None:
    run.train(UPDATES)
    run.end()
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps({"version": version}) + "\n" for version in versions))

    assert f"metrics.jsonl has rows of versions {said}, expected 1 to {UPDATES}, each once" in problem_of(run.folder)


def test_dataset_that_lacks_a_part_is_found(run: MadeUpRun) -> None:
    run.train(2)
    run.checkpoint(oldest=0)
    run.train(3)
    run.end()
    (run.folder / FOLDER / "part-00000001.parquet").unlink()

    assert "the rollouts dataset lacks batch 2" in problem_of(run.folder)


def test_part_that_left_the_journal_and_is_gone_means_lost_samples(run: MadeUpRun) -> None:
    run.train(3)
    run.checkpoint(oldest=3)
    run.train(2)
    run.end()
    (run.folder / FOLDER / "part-00000000.parquet").unlink()

    found = audit(run.folder)

    assert found.lost >= 3 * SIZE
    assert any("decided batches" in text for text in found.problems)


def test_damaged_journal_is_an_error(run: MadeUpRun) -> None:
    run.train(UPDATES)
    run.end()
    segment = run.folder / "journal" / "segment-00000000.log"
    text = bytearray(segment.read_bytes())
    text[300] ^= 1
    segment.write_bytes(bytes(text))

    with pytest.raises(JournalError):
        audit(run.folder)
