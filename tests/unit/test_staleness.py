"""The staleness arithmetic, and the traps of design section 3 that each broke a plausible variant of it."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rlhf.errors import StalenessError
from async_rlhf.prompts import TaskStream
from async_rlhf.replay import ReplayBuffer
from async_rlhf.staleness import StalenessRule
from async_rlhf.tasks.base import Problem
from async_rlhf.tickets import PutOutcome, ReplaySettings
from async_rlhf.types import FinishReason, Rollout, RolloutGroup, ScoredGroup, Ticket, VersionSpan


class EndlessProblems:
    num_problems = 1000

    def problem(self, index: int) -> Problem:
        return Problem(prompt_id=str(index), text=str(index))


def make_buffer(*, batch_groups: int, max_staleness: int, **settings: object) -> ReplayBuffer:
    rule = StalenessRule(batch_groups=batch_groups, max_staleness=max_staleness)
    prompts = TaskStream(EndlessProblems(), lambda text: [ord(char) for char in text], seed=0, max_epochs=0)
    return ReplayBuffer(rule, prompts, ReplaySettings(**({"num_updates": 100, "lease_s": 10.0} | settings)))


def scored(ticket: Ticket, version: int, *, tied: bool = False) -> ScoredGroup:
    """Two completions of one token each, both sampled by `version`."""
    rollout = Rollout(
        completion_ids=np.array([1], dtype=np.int32),
        behavior_logprobs=np.array([-0.5], dtype=np.float32),
        version_spans=(VersionSpan(version=version, start=0, end=1),),
        finish_reason=FinishReason.STOP,
    )
    return ScoredGroup(
        group=RolloutGroup(ticket=ticket, rollouts=(rollout, rollout)),
        scores=np.array([0.0, 0.0 if tied else 1.0], dtype=np.float32),
        reference_logprobs=(np.array([-0.5], dtype=np.float32),) * 2,
        completions=("a", "b"),
    )


def put_all(buffer: ReplayBuffer, tickets: list[Ticket], version: int) -> None:
    for ticket in tickets:
        assert buffer.put(scored(ticket, version)) is PutOutcome.KEPT


# The arithmetic


@pytest.mark.parametrize(
    ("update", "version", "inside"),
    [(5, 5, True), (5, 3, True), (5, 2, False), (5, 6, False), (0, 0, True)],
)
def test_bound_admits_exactly_the_versions_from_update_minus_eta_to_update(update: int, version: int, inside: bool) -> None:
    assert StalenessRule(batch_groups=3, max_staleness=2).holds(update=update, version=version) is inside


def test_deadline_is_the_last_update_at_which_the_bound_still_holds() -> None:
    rule = StalenessRule(batch_groups=3, max_staleness=2)
    assert rule.deadline(4) == 6
    assert rule.holds(update=rule.deadline(4), version=4)
    assert not rule.holds(update=rule.deadline(4) + 1, version=4)


@pytest.mark.parametrize(
    ("version", "decided", "live", "expected"),
    [
        (0, 0, 0, 8),  # (0 + 1 + 1) * 4 - 0
        (0, 0, 7, 1),
        (0, 0, 8, 0),
        (0, 1, 3, 1),  # (0 + 1 + 1) * 4 - (4 + 3)
        (1, 1, 3, 5),
        (0, 3, 2, 0),  # an old generator: (0 + 1 + 1) * 4 - (12 + 2) < 0
    ],
)
def test_grantable_is_the_slots_up_to_the_deadline_less_those_admitted(version: int, decided: int, live: int, expected: int) -> None:
    rule = StalenessRule(batch_groups=4, max_staleness=1)
    assert rule.num_grantable(installed_version=version, decided=decided, live=live) == expected


def test_version_above_the_batches_decided_is_an_error_that_names_both() -> None:
    rule = StalenessRule(batch_groups=4, max_staleness=1)
    with pytest.raises(StalenessError, match=r"version 3: only 2 batches"):
        rule.num_grantable(installed_version=3, decided=2, live=0)


def test_generator_that_claims_an_unborn_version_gets_nothing_and_changes_nothing() -> None:
    buffer = make_buffer(batch_groups=2, max_staleness=1)
    before = buffer.counters
    with pytest.raises(StalenessError):
        buffer.grant("g", 1, 4, 0.0)
    assert buffer.counters == before


@pytest.mark.parametrize(
    ("left", "allowed"),
    [
        ([], True),
        ([2], False),  # due now, left behind
        ([3, 3], True),
        ([3, 3, 3], False),  # update 3 trains two groups only
        ([3, 3, 4, 4], True),
        ([3, 4, 4, 4, 4], False),
        ([9] * 14, True),
        ([9] * 15, False),
    ],
)
def test_batch_is_formed_only_if_what_stays_behind_can_still_be_trained_in_time(left: list[int], allowed: bool) -> None:
    rule = StalenessRule(batch_groups=2, max_staleness=3)
    assert rule.may_decide(decided=2, left_deadlines=Counter(left)) is allowed


@settings(max_examples=150, deadline=None, derandomize=True)
@given(batch_groups=st.integers(1, 4), decided=st.integers(0, 5), left=st.lists(st.integers(0, 9), max_size=12), chosen=st.integers(0, 9))
def test_decision_test_equals_the_invariant_written_out_day_by_day(batch_groups: int, decided: int, left: list[int], chosen: int) -> None:
    """R_d <= (d - U) * B for every d >= U, and nothing overdue, counted naively."""
    rule = StalenessRule(batch_groups=batch_groups, max_staleness=9)
    naive = all(sum(day <= limit for day in left) <= (limit - decided) * batch_groups for limit in range(decided, 12))
    assert rule.may_decide(decided=decided, left_deadlines=Counter(left)) is naive
    # A lost ticket joins at `chosen` instead of at the far end: the same count with U in place of U + 1.
    fits = all(sum(day <= limit for day in left) + 1 <= (limit - decided + 1) * batch_groups for limit in range(chosen, 12))
    if chosen >= decided and all(sum(day <= limit for day in left) < (limit - decided + 1) * batch_groups for limit in range(12, 14)):
        assert rule.may_reissue(new_deadline=chosen, old_deadline=12, decided=decided, live_deadlines=Counter(left)) is fits


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    batch_groups=st.integers(1, 3),
    finished=st.lists(st.integers(2, 5), min_size=3, max_size=6),
    busy=st.lists(st.integers(2, 5), max_size=3),
)
def test_earliest_deadlines_are_a_pick_that_works_whenever_any_pick_works(batch_groups: int, finished: list[int], busy: list[int]) -> None:
    rule = StalenessRule(batch_groups=batch_groups, max_staleness=3)
    finished.sort()
    earliest = rule.may_decide(decided=2, left_deadlines=Counter(finished[batch_groups:] + busy))
    picks = itertools.combinations(range(len(finished)), batch_groups)
    left = [Counter([d for i, d in enumerate(finished) if i not in pick] + busy) for pick in picks]
    works = [rule.may_decide(decided=2, left_deadlines=deadlines) for deadlines in left]
    assert earliest is any(works)


def test_later_deadline_may_always_be_taken_and_a_past_one_never() -> None:
    rule = StalenessRule(batch_groups=1, max_staleness=2)
    full = {3: 1, 4: 1, 5: 1}
    assert rule.may_reissue(new_deadline=5, old_deadline=5, decided=3, live_deadlines=full)
    assert rule.may_reissue(new_deadline=6, old_deadline=5, decided=3, live_deadlines=full)
    assert not rule.may_reissue(new_deadline=2, old_deadline=5, decided=3, live_deadlines={5: 1})


def test_earlier_deadline_needs_room_on_every_day_up_to_the_old_one() -> None:
    rule = StalenessRule(batch_groups=1, max_staleness=3)
    assert rule.may_reissue(new_deadline=3, old_deadline=5, decided=3, live_deadlines={5: 1})
    assert not rule.may_reissue(new_deadline=3, old_deadline=5, decided=3, live_deadlines={3: 1, 5: 1})
    assert not rule.may_reissue(new_deadline=3, old_deadline=5, decided=3, live_deadlines={4: 2, 5: 1})  # day 3 has room, day 4 has not


# The traps


def test_request_for_many_gets_the_exact_room_not_one_check_for_all() -> None:
    """Trap: test `one more fits`, then grant k. With B 2 and eta 0, five groups at once would be trained up to two updates late."""
    buffer = make_buffer(batch_groups=2, max_staleness=0)
    assert len(buffer.grant("a", 0, 1, 0.0)) == 1
    assert len(buffer.grant("b", 0, 5, 0.0)) == 1
    assert buffer.grant("c", 0, 5, 0.0) == []


def test_request_larger_than_the_room_is_granted_in_part() -> None:
    """Trap: all or nothing. With B 3 and one group finished, a generator that always asks for three would wait for ever."""
    buffer = make_buffer(batch_groups=3, max_staleness=0)
    put_all(buffer, buffer.grant("a", 0, 1, 0.0), 0)
    rest = buffer.grant("b", 0, 3, 0.0)
    put_all(buffer, rest, 0)
    assert len(rest) == 2
    assert buffer.decide() is not None


def test_only_survivor_with_old_weights_gets_lost_tickets_while_there_is_room() -> None:
    """Trap: refusing every older generator. Version 0 may still train at update 1, so the one that is stuck there must help."""
    buffer = make_buffer(batch_groups=2, max_staleness=1)
    put_all(buffer, buffer.grant("stuck", 0, 2, 0.0), 0)
    buffer.decide()
    fresh = buffer.grant("fresh", 1, 2, 0.0)
    assert [ticket.deadline for ticket in fresh] == [2, 2]
    buffer.lose_holder("fresh")
    again = buffer.grant("stuck", 0, 4, 0.0)
    put_all(buffer, again, 0)
    batch = buffer.decide()
    assert [ticket.deadline for ticket in again] == [1, 1]
    assert batch is not None
    assert batch.staleness == (1, 1)


def test_old_generator_gets_a_lost_ticket_only_while_its_deadline_has_room() -> None:
    """B 1, eta 1: at update 1 the slot of deadline 1 is taken by ticket 1, so ticket 2 (deadline 2) cannot move there too."""
    buffer = make_buffer(batch_groups=1, max_staleness=1)
    first, second = buffer.grant("stuck", 0, 2, 0.0)
    put_all(buffer, [first], 0)
    buffer.decide()
    (third,) = buffer.grant("fresh", 1, 1, 0.0)
    buffer.lose_holder("fresh")
    assert (second.deadline, third.deadline) == (1, 2)
    assert buffer.grant("stuck", 0, 2, 0.0) == []
    (again,) = buffer.grant("fresh", 1, 2, 0.0)
    assert (again.ticket_id, again.attempt) == (third.ticket_id, 1)


def test_ticket_order_reissues_by_rank_not_by_deadline() -> None:
    """floor(rank / B) + U <= n: a generator at version 0 with eta 1 may redo the slots of update 1, not those of update 2."""
    buffer = make_buffer(batch_groups=1, max_staleness=1, order="ticket")
    put_all(buffer, buffer.grant("old", 0, 1, 0.0), 0)
    buffer.decide()
    lost = buffer.grant("new", 1, 2, 0.0)
    buffer.lose_holder("new")
    again = buffer.grant("old", 0, 4, 0.0)
    assert [ticket.ticket_id for ticket in again] == [lost[0].ticket_id]


@pytest.mark.parametrize("order", ["ready", "ticket"])
def test_late_result_of_a_lost_lease_is_refused_from_its_reissue_on(order: str) -> None:
    """Trap: a zombie's old result was trained too late."""
    buffer = make_buffer(batch_groups=1, max_staleness=1, order=order)
    (old,) = buffer.grant("zombie", 0, 1, 0.0)
    buffer.lose_holder("zombie")
    (new,) = buffer.grant("alive", 0, 1, 0.0)
    assert buffer.put(scored(old, 0)) is PutOutcome.STALE_ATTEMPT
    put_all(buffer, [new], 0)
    assert buffer.put(scored(old, 0)) is PutOutcome.DUPLICATE
    batch = buffer.decide()
    assert batch is not None
    assert batch.groups[0].group.ticket.holder == "alive"


def test_replacement_of_a_void_is_a_new_ticket_at_the_tail_with_its_own_deadline() -> None:
    """Trap: same slot, same deadline. The replacement is sampled by newer weights and is due later."""
    buffer = make_buffer(batch_groups=1, max_staleness=1, max_replacements_per_batch=1, order="ticket")
    first, second = buffer.grant("g", 0, 2, 0.0)
    put_all(buffer, [first], 0)
    buffer.decide()
    (third,) = buffer.grant("g", 1, 1, 0.0)
    assert buffer.put(scored(second, 0, tied=True)) is PutOutcome.TIED
    (replacement,) = buffer.grant("g", 1, 5, 0.0)
    put_all(buffer, [third, replacement], 1)
    trained = [buffer.decide(), buffer.decide()]
    assert (replacement.ticket_id, replacement.deadline, second.deadline) == (3, 2, 1)
    assert [batch and batch.groups[0].group.ticket.ticket_id for batch in trained] == [third.ticket_id, replacement.ticket_id]


def test_group_older_than_its_ticket_promised_is_refused_and_goes_out_again() -> None:
    buffer = make_buffer(batch_groups=1, max_staleness=1)
    put_all(buffer, buffer.grant("g", 0, 1, 0.0), 0)
    buffer.decide()
    (ticket,) = buffer.grant("g", 1, 1, 0.0)
    assert buffer.put(scored(ticket, 0)) is PutOutcome.TOO_OLD
    (again,) = buffer.grant("g", 1, 1, 0.0)
    assert (again.ticket_id, again.attempt) == (ticket.ticket_id, 1)


@pytest.mark.parametrize("order", ["ready", "ticket"])
def test_everything_admitted_can_be_put_while_nothing_is_taken(order: str) -> None:
    """Trap: a put that waits for capacity, while the group that would free it waits behind it."""
    buffer = make_buffer(batch_groups=3, max_staleness=2, order=order)
    tickets = buffer.grant("g", 0, 100, 0.0)
    put_all(buffer, list(reversed(tickets)), 0)
    assert buffer.counters.waiting == (2 + 1) * 3
    assert all(buffer.decide() is not None for _ in range(3))


def test_ready_batch_waits_when_a_slow_group_is_due_and_never_drops_it() -> None:
    """B 1, eta 1: tickets 0 and 1 share the deadline 1. At update 1 the younger ticket 2 may not overtake ticket 1."""
    buffer = make_buffer(batch_groups=1, max_staleness=1)
    quick, slow = buffer.grant("g", 0, 2, 0.0)
    put_all(buffer, [quick], 0)
    assert buffer.decide() is not None
    put_all(buffer, buffer.grant("g", 1, 1, 0.0), 1)
    assert buffer.decide() is None
    put_all(buffer, [slow], 0)
    batch = buffer.decide()
    assert batch is not None
    assert batch.groups[0].group.ticket == slow


def test_known_mistake_3_synchronous_training_samples_every_batch_with_the_version_that_it_trains() -> None:
    """With eta 0 a generator that skipped one load gets no ticket: there is no batch that is one step off."""
    buffer = make_buffer(batch_groups=2, max_staleness=0)
    for update in range(4):
        assert update == 0 or buffer.grant("skipped a load", update - 1, 2, 0.0) == []
        tickets = buffer.grant("loaded", update, 2, 0.0)
        put_all(buffer, tickets, update)
        batch = buffer.decide()
        assert batch is not None and batch.staleness == (0, 0)
