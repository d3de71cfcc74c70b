"""A history that is closed and opened again, wherever that happens, is the one that was never closed; and what becomes of its groups.

`Recorded` is the simulation of test_replay_random_schedules with a journal under it: segments begin, old ones are exported and
dropped, history is undone, and every few steps everything is thrown away but the files.
"""

import gc
import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rlhf import history as history_module
from async_rlhf import history_codec as codec
from async_rlhf.config.rewards import RewardConfig
from async_rlhf.errors import ConfigError, JournalError
from async_rlhf.events import Annulled, Arrived, Decided, Dropped, Event, Failed, Granted, Lost, Refused, Sampled, SessionBegan, Trained
from async_rlhf.history import History
from async_rlhf.journal import Journal, read_frames
from async_rlhf.journal_frames import check_mark, segment_path
from async_rlhf.ledger import Ledger
from async_rlhf.live_groups import Slot
from async_rlhf.metrics import summarize
from async_rlhf.prompts import PromptCursor, TaskStream
from async_rlhf.replay import ReplayBuffer
from async_rlhf.rollout_parts import read_trained
from async_rlhf.rollouts import export_all, export_segment
from async_rlhf.scores import ScoreMoments, shape_scores
from async_rlhf.tickets import PutOutcome, TicketState
from async_rlhf.types import Batch, ScoredGroup
from tests.support.samples import make_scored, make_ticket, plain
from tests.unit.test_replay_random_schedules import NumberedProblems, Simulation, World, worlds

REWARD = RewardConfig(normalize=True, missing_eos_percentile=10.0)
IDENTITY = {"batch_groups": 4, "max_staleness": 1}


def ledger_of(history: History, oldest: int = 0) -> Any:
    """The whole ledger but batches before `oldest`, which may be forgotten or not."""
    fields = codec.ledger_to_json(history.ledger)
    fields["batches"] = {update: entry for update, entry in fields["batches"].items() if int(update) >= oldest}
    return fields


def waiting(history: History) -> Any:
    return plain(tuple(slot.scored for slot in history.ledger.slots.values()))


def batches(history: History, oldest: int = 0) -> Any:
    """Summaries (moments are part of them), and every batch bit for bit."""
    updates = range(oldest, history.ledger.decided)
    return [(history.summary(update), plain(history.batch(update))) for update in reversed(updates)][::-1]


class Recorded(Simulation):
    """`every`: reopen after so many steps; 0: never."""

    def __init__(self, world: World, run_folder: Path, every: int, spoil: Callable[[History], None] = lambda history: None) -> None:
        super().__init__(world)
        self.run_folder, self.every, self.spoil = run_folder, every, spoil
        self.chance = random.Random(world.seed + 1)  # of its own: the same things happen with and without reopening
        self.num_checks = 0
        self.checkpoints: list[int] = []
        self.open()

    def open(self) -> None:
        self.journal = Journal(self.run_folder / "journal")
        self.history = History(self.journal, REWARD, IDENTITY, 0)
        ledger, before = self.history.ledger, self.buffer
        prompts = TaskStream(
            NumberedProblems(self.world.num_prompts or 1000),
            lambda text: [0],
            seed=0,
            max_epochs=1 if self.world.num_prompts else 0,
            cursor=ledger.cursor,
        )
        self.buffer = ReplayBuffer(before._rule, prompts, before._settings, ledger)

    def reopen(self) -> None:
        ends = {number: slot.lease_ends_s for number, slot in self.history.ledger.slots.items()}
        expected = ledger_of(self.history, self.oldest), waiting(self.history), batches(self.history, self.oldest)
        self.journal.close()
        self.open()
        self.spoil(self.history)
        self.history.forget_before(self.oldest)
        assert (ledger_of(self.history), waiting(self.history), batches(self.history, self.oldest)) == expected
        for number, slot in self.history.ledger.slots.items():
            slot.lease_ends_s = ends[number]  # no part of the history

    def undo(self, version: int, undone: list[ScoredGroup]) -> None:
        self.history.annul(version, newest_faithful=version)
        self.checkpoints = [checkpoint for checkpoint in self.checkpoints if checkpoint <= version]

    def check(self) -> None:
        """After each thing that happened."""
        super().check()
        self.history.flush()
        self.num_checks += 1
        happens = self.chance.random()
        if happens < 0.03:
            check_mark(self.run_folder / "journal", self.history.begin_segment())
            self.checkpoints.append(self.newest)
        elif happens < 0.05 and self.checkpoints:
            self.keep_from(self.chance.choice(self.checkpoints))
        elif happens < 0.07 and self.newest > self.oldest:
            self.buffer.mark_trained(self.chance.randrange(self.oldest, self.newest), self.chance.randrange(3))
            self.history.flush()
        if self.every and self.num_checks % self.every == 0:
            self.reopen()

    def keep_from(self, version: int) -> None:
        self.oldest = version
        self.checkpoints = [checkpoint for checkpoint in self.checkpoints if checkpoint >= version]
        for segment in self.history.forget_before(version):
            export_segment(self.run_folder, segment)
            self.history.drop_segment(segment)

    def check_history(self) -> None:
        """The dataset: the batches that were trained in the end, in order, and every group once."""
        self.journal.close()
        for _ in range(2):
            export_all(self.run_folder)
        found = list(read_trained(self.run_folder / "rollouts"))
        assert plain(found) == plain([(update, list(groups)) for update, groups in enumerate(self.batches)])
        fates = Counter[str]()
        seen = Counter[int]()
        for part in sorted((self.run_folder / "rollouts").glob("part-*")):
            for row in pq.read_table(part).to_pylist():
                if row["completion_index"] == 0:
                    seen[row["ticket_id"]] += 1
                    fates[row["fate"]] += 1
        assert set(seen.values()) <= {1}, "a group is there twice"
        counters = self.buffer.counters
        expected = {
            "trained": counters.trained,
            "dropped": sum(counters.dropped.values()),
            "tied": counters.voided.get("tied", 0),
            "lost_history": counters.voided.get("lost_history", 0),
        }
        assert fates == Counter(expected)


def lived(world: World, every: int, **options: Any) -> Recorded:
    with tempfile.TemporaryDirectory() as folder:
        simulation = Recorded(world, Path(folder), every, **options)
        simulation.run()
        return simulation


@settings(max_examples=20, deadline=None, derandomize=True)
@given(world=worlds, every=st.integers(1, 40))
def test_a_history_that_is_reopened_in_the_middle_of_everything_is_the_one_that_was_never_closed(world: World, every: int) -> None:
    """The same schedule with and without reopening: same ledger, same groups, same summaries and moments, same dataset."""
    closed, never = lived(world, every), lived(world, 0)

    assert ledger_of(closed.history) == ledger_of(never.history)
    assert plain(closed.batches) == plain(never.batches)
    for update in range(never.oldest, never.decided):
        assert closed.history.summary(update) == never.history.summary(update)


def test_the_schedules_have_everything_in_them() -> None:
    """Undone history, dropped segments, ties, failures, retraining: or the test above proves less than it says."""
    seen = Counter[str]()
    for seed in range(12):
        world = World(seed=seed, batch_groups=2 + seed % 3, max_staleness=2, order="ready", tie_share=0.2, annul_weight=seed % 2)
        simulation = lived(replace(world, num_steps=250), 0)
        counters = simulation.buffer.counters
        seen.update({name: count for name, count in counters.voided.items() if count})
        seen["undone"] += simulation.history.ledger.lineage
        seen["dropped segments"] += simulation.journal.first_segment
        seen["kept back to"] += simulation.oldest
    assert min(seen[name] for name in ("tied", "lost_history", "undone", "dropped segments", "kept back to")) >= 5, seen
    assert seen["failed"], seen


def forget_moments(history: History) -> None:
    history._moments = ScoreMoments()


def forget_pending_scores(history: History) -> None:
    history._scores = []


def forget_requests(history: History) -> None:
    history.ledger.requests.clear()


def swap_groups(history: History) -> None:
    held = [slot for slot in history.ledger.slots.values() if slot.scored is not None]
    if len(held) > 1:
        held[0].scored, held[1].scored = held[1].scored, held[0].scored


@pytest.mark.parametrize("spoil", [forget_moments, forget_pending_scores, forget_requests, swap_groups])
def test_the_comparison_catches_a_history_that_loses_something(spoil: Callable[[History], None]) -> None:
    with pytest.raises((AssertionError, KeyError)):
        for seed in range(30):
            world = World(seed=seed, batch_groups=2, max_staleness=2, order="ready", tie_share=0.2, num_steps=200)
            spoilt, never = lived(world, 3, spoil=spoil), lived(world, 0)
            for update in range(never.oldest, never.decided):
                assert spoilt.history.summary(update) == never.history.summary(update)


# One thing after another.


def open_history(run_folder: Path, *, session: int = 0, identity: dict[str, int] = IDENTITY) -> tuple[Journal, History]:
    journal = Journal(run_folder / "journal")
    return journal, History(journal, REWARD, identity, session)


def grant(history: History, *numbers: int, holder: str = "g") -> None:
    tickets = tuple(make_ticket(number, holder=holder) for number in numbers)
    history.ledger.record(Granted(tickets=tickets, request=1, cursor=PromptCursor(epoch=0, index=max(numbers) + 1)))


def arrive(history: History, *numbers: int, version: int = 0, scores: tuple[float, ...] = (1.0, 0.0)) -> list[ScoredGroup]:
    groups = [make_scored(make_ticket(number, holder="g"), scores=scores, version=version) for number in numbers]
    for scored in groups:
        history.ledger.record(Arrived(scored=scored, outcome=PutOutcome.KEPT))
    return groups


def decide(history: History, update: int, *numbers: int) -> None:
    history.ledger.record(Decided(update=update, ticket_ids=numbers))


def kinds(run_folder: Path) -> str:
    return "".join(frame.kind for frame in read_frames(run_folder / "journal"))


def test_nothing_is_written_before_flush_and_all_of_it_by_flush(tmp_path: Path) -> None:
    _, history = open_history(tmp_path)
    grant(history, 0, 1)
    history.ledger.record(Sampled(ticket_ids=(0,)))
    assert kinds(tmp_path) == "O"

    history.flush()
    history.flush()

    assert kinds(tmp_path) == "OGS"


def test_groups_that_came_in_together_are_one_record_and_ties_one_of_their_own(tmp_path: Path) -> None:
    _, history = open_history(tmp_path)
    grant(history, 0, 1, 2, 3)
    arrive(history, 0, 1)
    history.ledger.record(Arrived(scored=make_scored(make_ticket(2, holder="g"), scores=(1.0, 1.0)), outcome=PutOutcome.TIED))
    arrive(history, 3)

    history.flush()

    assert kinds(tmp_path) == "OGKTK"


def test_what_could_not_be_written_is_written_by_the_next_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, history = open_history(tmp_path)
    grant(history, 0, 1)
    arrive(history, 0, 1)

    def no_space(kind: str, payload: bytes) -> None:
        raise JournalError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(journal, "append", no_space)
        with pytest.raises(JournalError, match="no space"):
            history.flush()
    history.ledger.record(Sampled(ticket_ids=()))
    history.flush()

    assert kinds(tmp_path) == "OGKS"
    journal.close()
    _, again = open_history(tmp_path)
    assert ledger_of(again) == ledger_of(history) and waiting(again) == waiting(history)


def test_a_new_session_revokes_what_was_under_way_and_the_same_one_again_does_not(tmp_path: Path) -> None:
    journal, history = open_history(tmp_path)
    grant(history, 0, 1, 2)
    history.ledger.record(Sampled(ticket_ids=(1,)))
    arrive(history, 2)
    history.flush()
    for session, states in ((0, "leased scoring waiting"), (2, "lost lost waiting"), (2, "lost lost waiting"), (1, "lost lost waiting")):
        journal.close()
        journal, history = open_history(tmp_path, session=session)
        assert " ".join(slot.state for slot in history.ledger.slots.values()) == states
    assert history.ledger.session == 2 and history.ledger.requests == {}
    assert kinds(tmp_path) == "OGSKB"


@pytest.mark.parametrize("changed", [{"batch_groups": 8, "max_staleness": 1}, {"batch_groups": 4}, {**IDENTITY, "more": 1}])
def test_a_journal_of_another_identity_is_refused(changed: dict[str, int], tmp_path: Path) -> None:
    open_history(tmp_path)[0].close()

    with pytest.raises(ConfigError, match="written under other settings"):
        open_history(tmp_path, identity=changed)


def test_a_batch_is_shaped_by_the_batches_before_it_whenever_it_is_read(tmp_path: Path) -> None:
    """Against shape_scores and summarize over the same groups, in another order of reading, and after a restart."""
    journal, history = open_history(tmp_path)
    expected, moments = list[tuple[Any, Any]](), ScoreMoments()
    for update in range(3):
        numbers = (2 * update, 2 * update + 1)
        grant(history, *numbers)
        groups = arrive(history, *numbers, version=update, scores=(update + 0.5, -1.0, 0.25))
        decide(history, update, *numbers[::-1])
        history.flush()
        batch = Batch(update=update, groups=tuple(groups[::-1]))
        shaped, after = shape_scores(batch, moments, REWARD)
        summary = replace(summarize(batch, [scored.scores for scored in groups]), moments=after)
        expected.append((summary, plain(shaped)))
        moments = after
    for _ in range(2):
        assert [(history.summary(update), plain(history.batch(update))) for update in (1, 0, 2)] == [expected[i] for i in (1, 0, 2)]
        journal.close()
        journal, history = open_history(tmp_path)


def test_a_segment_stands_for_itself_when_those_before_it_are_gone(tmp_path: Path) -> None:
    journal, history = open_history(tmp_path)
    grant(history, 0, 1, 2)
    arrive(history, 0, 1, 2)
    decide(history, 0, 0, 1)
    history.begin_segment()
    assert history.forget_before(1) == [0]
    export_segment(tmp_path, 0)
    history.drop_segment(0)
    grant(history, 3)
    arrive(history, 3, scores=(2.0, 0.5))
    decide(history, 1, 2, 3)
    history.flush()
    expected = history.summary(1), plain(history.batch(1))
    assert kinds(tmp_path) == "OCGKD"
    journal.close()

    journal, again = open_history(tmp_path)

    assert (again.summary(1), plain(again.batch(1))) == expected
    assert again.summary(0) is None and ledger_of(again, 1) == ledger_of(history, 1)


def test_segments_are_kept_back_to_the_batches_that_may_be_trained_again(tmp_path: Path) -> None:
    """Segments begin with 0, 1, 1, 2 batches decided: version 1 needs the segment in which batch 1 was decided, and no older one."""
    _, history = open_history(tmp_path)
    for update in range(2):
        grant(history, update)
        arrive(history, update)
        decide(history, update, update)
        history.begin_segment()
        if not update:
            history.begin_segment()

    assert history.forget_before(0) == []
    assert history.forget_before(1) == [0, 1]
    assert history.summary(1) is not None and plain(history.batch(1).groups)
    assert history.forget_before(2) == [0, 1, 2]


def held(root: object) -> int:
    """Objects that it keeps alive, plain values aside."""
    seen: set[int] = set()
    rest = [root]
    while rest:
        item = rest.pop()
        if id(item) not in seen and not isinstance(item, type | ModuleType | FunctionType | int | float | str | bytes):
            seen.add(id(item))
            rest.extend(gc.get_referents(item))
    return len(seen)


def live(history: History, run_folder: Path, first: int, end: int) -> None:
    """Updates `first` to `end`: a tie, a refusal, a batch undone and decided again, a checkpoint in place of the one before."""
    for update in range(first, end):
        old, returned, tied, voided = numbers = [4 * update + i for i in range(4)]
        grant(history, *numbers)
        history.ledger.record(Sampled(ticket_ids=tuple(numbers)))
        arrive(history, old, returned)
        arrive(history, voided, version=update + 1)
        history.ledger.record(Arrived(scored=make_scored(make_ticket(tied, holder="g"), scores=(1.0, 1.0)), outcome=PutOutcome.TIED))
        history.ledger.record(Refused(ticket_id=old, outcome=PutOutcome.DUPLICATE))
        decide(history, update, old, voided)
        history.flush()
        history.annul(update, newest_faithful=update)
        decide(history, update, old, returned)
        history.ledger.record(Trained(update=update, digest=update, canary_logprobs=(0.0,)))
        history.flush()
        assert len(history.batch(update).groups) == 2
        history.begin_segment()
        for segment in history.forget_before(update):
            export_segment(run_folder, segment)
            history.drop_segment(segment)


def test_what_a_history_holds_does_not_grow_with_what_went_through_it(tmp_path: Path) -> None:
    _, history = open_history(tmp_path)
    live(history, tmp_path, 0, 5)
    before = held(history)

    live(history, tmp_path, 5, 25)

    assert held(history) == before
    assert len(list((tmp_path / "journal").glob("segment-*"))) == 2


def test_groups_that_wait_are_carried_into_a_segment_however_many_they_are(tmp_path: Path) -> None:
    numbers = range(2 * history_module._CARRIED_GROUPS + 1)
    journal, history = open_history(tmp_path)
    grant(history, *numbers)
    groups = arrive(history, *numbers)
    decide(history, 0, 0)
    history.begin_segment()
    for segment in history.forget_before(1):
        history.drop_segment(segment)
    assert kinds(tmp_path) == "OCC"  # one was decided
    journal.close()

    journal, again = open_history(tmp_path)
    decide(again, 1, *numbers[1:])
    again.flush()

    assert plain(again._read_groups(numbers[1:])) == plain(tuple(groups[1:]))
    journal.close()


@pytest.mark.parametrize("num_left", range(4), ids=["nothing", "the ledger", "one group", "two groups"])
def test_a_segment_of_whose_beginning_a_crash_left_this_stands_for_itself(
    num_left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_module, "_CARRIED_GROUPS", 1)
    journal, history = open_history(tmp_path)
    grant(history, 0, 1, 2)
    groups = arrive(history, 0, 1, 2)
    history.begin_segment()
    journal.close()
    first_lost = [frame for frame in read_frames(tmp_path / "journal") if frame.position.segment == 1][num_left]
    os.truncate(segment_path(tmp_path / "journal", 1), first_lost.position.offset)

    journal, history = open_history(tmp_path)
    decide(history, 0, 0, 1, 2)
    history.flush()
    assert history.forget_before(0) == [0]
    history.drop_segment(0)
    journal.close()

    journal, again = open_history(tmp_path)
    assert plain(again._read_groups((0, 1, 2))) == plain(tuple(groups))
    export_segment(tmp_path, 1)
    assert [plain(batch) for _, batch in read_trained(tmp_path / "rollouts")] == [plain(groups)]
    journal.close()


def test_undoing_takes_summaries_and_moments_back_and_a_second_batch_of_that_number_is_another_one(tmp_path: Path) -> None:
    journal, history = open_history(tmp_path)
    for update in range(3):
        grant(history, 2 * update, 2 * update + 1)
        arrive(history, 2 * update, 2 * update + 1, version=update, scores=(update + 0.5, 0.0))
        decide(history, update, 2 * update, 2 * update + 1)
    history.flush()
    first = history.summary(1)

    history.annul(1, newest_faithful=1)

    assert (history.summary(1), history.summary(2)) == (None, None)
    assert sorted(history.ledger.slots) == [2, 3], "groups of version 2 are void, those of version 1 free again"
    decide(history, 1, 3, 2)
    history.flush()
    again = history.summary(1)
    assert first is not None and again is not None
    assert again.moments == first.moments and again.ticket_ids == (3, 2)
    expected = plain(history.batch(1))
    journal.close()
    journal, reopened = open_history(tmp_path)
    assert reopened.summary(1) == again and plain(reopened.batch(1)) == expected
    assert ledger_of(reopened) == ledger_of(history) and reopened.ledger.lineage == 1


def test_a_segment_that_does_not_follow_from_the_one_before_it_is_refused(tmp_path: Path) -> None:
    """As when files of two runs were mixed, each of them whole."""
    journal, history = open_history(tmp_path)
    grant(history, 0)
    history.flush()
    journal.rotate()
    opening = {"identity": IDENTITY, "ledger": codec.ledger_to_json(Ledger()), "moments": {}, "scores": []}
    journal.append(codec.OPENING, json.dumps(opening).encode())
    journal.close()

    with pytest.raises(JournalError, match="segment 1 of the journal begins with another state than the events before it led to"):
        open_history(tmp_path)


def test_a_record_of_another_release_is_refused_by_its_kind(tmp_path: Path) -> None:
    journal, _ = open_history(tmp_path)
    journal.append("z", b"{}")
    journal.close()

    with pytest.raises(JournalError, match="unknown kind 'z'"):
        open_history(tmp_path)


# Records.

TICKETS = (make_ticket(3, attempt=2, holder="generator-0.1", seed=2**62 + 1), make_ticket(4))
EVENTS: list[Event] = [
    SessionBegan(session=3, lost=(1, 2)),
    SessionBegan(session=1, lost=()),
    Granted(tickets=TICKETS, request=7, cursor=PromptCursor(epoch=2, index=5)),
    Sampled(ticket_ids=(4,)),
    Lost(ticket_ids=(1, 2, 3)),
    *(Refused(ticket_id=5, outcome=outcome) for outcome in PutOutcome),
    Failed(ticket_id=2, reason='no "score"\n\u00fc', for_good=True),
    Failed(ticket_id=2, reason="", for_good=False),
    Decided(update=4, ticket_ids=(9, 8)),
    Dropped(ticket_ids=(1,)),
    Trained(update=4, digest=2**32 - 1, canary_logprobs=(-0.1, -1e-7)),
    Trained(update=0, digest=0, canary_logprobs=()),
    Annulled(version=2, returned=(make_scored(TICKETS[0]),), voided=(5,), lost=(6,)),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_comes_back_from_its_record_as_it_was(event: Event) -> None:
    groups = {scored.group.ticket.ticket_id: scored for scored in getattr(event, "returned", ())}

    (again,) = codec.decode(codec.kind_of(event), codec.encode(event), groups.__getitem__)

    assert plain(again) == plain(event)


def test_every_kind_of_event_has_a_letter_of_its_own() -> None:
    scored = make_scored(TICKETS[0])
    arrivals = [Arrived(scored=scored, outcome=PutOutcome.KEPT), Arrived(scored=scored, outcome=PutOutcome.TIED)]
    letters = {(type(event), codec.kind_of(event)) for event in [*EVENTS, *arrivals]}
    assert len(letters) == len({letter for _, letter in letters}) == 12
    assert not {letter for _, letter in letters} & {codec.OPENING, codec.CARRIED}


def test_a_ledger_comes_back_from_json_but_for_the_content_of_its_groups() -> None:
    ledger = Ledger()
    for number, state in enumerate(TicketState):
        ledger.slots[number] = Slot(ticket=make_ticket(number), state=state, num_failures=number)
    ledger.requests = {"g": (4, (1, 2)), "h": (-1, ())}
    ledger.decided, ledger.lineage, ledger.session, ledger.cursor = 7, 2, 3, PromptCursor(epoch=1, index=9)
    ledger.failed_prompts = {"p": "why"}
    ledger.tally.voided["tied"] = 3
    ledger.tally.refused[PutOutcome.TOO_OLD] = 1
    ledger.apply(Decided(update=7, ticket_ids=()))
    ledger.apply(Trained(update=7, digest=5, canary_logprobs=(-0.5,)))

    again = codec.ledger_from_json(json.loads(json.dumps(codec.ledger_to_json(ledger))))

    assert codec.ledger_to_json(again) == codec.ledger_to_json(ledger)
    assert again.counters == ledger.counters and again.requests == ledger.requests and again.batches == ledger.batches
    assert [plain(slot.ticket) for slot in again.slots.values()] == [plain(slot.ticket) for slot in ledger.slots.values()]
    assert [(slot.state, slot.num_failures) for slot in again.slots.values()] == [(state, i) for i, state in enumerate(TicketState)]
    assert again.slots[0].ticket.prompt.token_ids.dtype == np.int32
