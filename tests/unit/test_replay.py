"""What the replay buffer does with tickets and groups. The bound itself: test_staleness and test_replay_random_schedules."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from async_rlhf.errors import RewardError
from async_rlhf.prompts import TaskStream
from async_rlhf.replay import ReplayBuffer
from async_rlhf.staleness import StalenessRule
from async_rlhf.tasks.base import Problem
from async_rlhf.tickets import PutOutcome, ReplaySettings, ticket_seed
from async_rlhf.types import Batch, FinishReason, Rollout, RolloutGroup, ScoredGroup, Ticket, VersionSpan

LEASE_S = 10.0
both_orders = pytest.mark.parametrize("order", ["ready", "ticket"])


class NumberedProblems:
    def __init__(self, num_problems: int) -> None:
        self.num_problems = num_problems

    def problem(self, index: int) -> Problem:
        return Problem(prompt_id=str(index), text=str(index))


def make_buffer(*, size: int = 2, eta: int = 1, num_prompts: int = 1000, max_epochs: int = 0, **settings: Any) -> ReplayBuffer:
    prompts = TaskStream(NumberedProblems(num_prompts), lambda text: [len(text)], seed=0, max_epochs=max_epochs)
    rule = StalenessRule(batch_groups=size, max_staleness=eta)
    return ReplayBuffer(rule, prompts, ReplaySettings(**({"num_updates": 50, "lease_s": LEASE_S} | settings)))


def scored(ticket: Ticket, *versions: int, tied: bool = False) -> ScoredGroup:
    """One completion with one token per version, and its twin."""
    spans = tuple(VersionSpan(version=version, start=i, end=i + 1) for i, version in enumerate(versions or (0,)))
    rollout = Rollout(
        completion_ids=np.ones(len(spans), dtype=np.int32),
        behavior_logprobs=np.full(len(spans), -0.5, dtype=np.float32),
        version_spans=spans,
        finish_reason=FinishReason.STOP,
    )
    return ScoredGroup(
        group=RolloutGroup(ticket=ticket, rollouts=(rollout, rollout)),
        scores=np.array([0.0, 0.0 if tied else 1.0], dtype=np.float32),
        reference_logprobs=(rollout.behavior_logprobs,) * 2,
        completions=("a", "b"),
    )


def put_all(buffer: ReplayBuffer, tickets: list[Ticket], version: int = 0) -> None:
    for ticket in tickets:
        assert buffer.put(scored(ticket, version)) is PutOutcome.KEPT


def ids(batch: Batch | None) -> list[int]:
    assert batch is not None
    return [group.group.ticket.ticket_id for group in batch.groups]


# Order


def test_ready_takes_the_groups_that_finished_first() -> None:
    buffer = make_buffer(size=2, eta=1)
    tickets = buffer.grant("g", 0, 4, 0.0)
    put_all(buffer, [tickets[3], tickets[1]])
    assert ids(buffer.decide()) == [1, 3]


def test_ticket_order_waits_for_the_first_tickets_whatever_else_is_finished() -> None:
    buffer = make_buffer(size=2, eta=1, order="ticket")
    tickets = buffer.grant("g", 0, 4, 0.0)
    put_all(buffer, [tickets[3], tickets[1], tickets[2]])
    assert buffer.decide() is None
    put_all(buffer, [tickets[0]])
    assert [ids(buffer.decide()), ids(buffer.decide())] == [[0, 1], [2, 3]]


@both_orders
def test_batches_are_numbered_without_gaps_and_report_the_staleness_of_their_oldest_token(order: str) -> None:
    buffer = make_buffer(size=1, eta=1, order=order)
    first, second = buffer.grant("g", 0, 2, 0.0)
    buffer.put(scored(first, 0))
    batches = [buffer.decide()]
    buffer.put(scored(second, 0, 1))
    batches.append(buffer.decide())
    assert [(batch.update, batch.staleness) for batch in batches if batch] == [(0, (0,)), (1, (1,))]


# Voids


@both_orders
def test_tied_group_is_voided_and_a_fresh_prompt_takes_its_place(order: str) -> None:
    buffer = make_buffer(size=1, eta=0, order=order, max_replacements_per_batch=1)
    (ticket,) = buffer.grant("g", 0, 5, 0.0)
    assert buffer.put(scored(ticket, tied=True)) is PutOutcome.TIED
    (fresh,) = buffer.grant("g", 0, 5, 0.0)
    put_all(buffer, [fresh])
    assert fresh.prompt.prompt_id != ticket.prompt.prompt_id
    assert ids(buffer.decide()) == [fresh.ticket_id]
    assert buffer.counters.voided == {"tied": 1}


def test_tied_groups_above_the_cap_stay_and_the_cap_starts_anew_with_each_decision() -> None:
    buffer = make_buffer(size=1, eta=0, max_replacements_per_batch=1)
    outcomes: list[PutOutcome] = []
    for version in (0, 1):
        for _ in range(2):
            (ticket,) = buffer.grant("g", version, 5, 0.0)
            outcomes.append(buffer.put(scored(ticket, version, tied=True)))
        assert ids(buffer.decide()) == [ticket.ticket_id]
    assert outcomes == [PutOutcome.TIED, PutOutcome.KEPT] * 2


def test_ties_are_kept_when_no_replacement_is_allowed() -> None:
    buffer = make_buffer(size=1, eta=0, max_replacements_per_batch=0)
    (ticket,) = buffer.grant("g", 0, 1, 0.0)
    assert buffer.put(scored(ticket, tied=True)) is PutOutcome.KEPT


def test_failed_ticket_goes_out_again_with_the_same_seed_and_prompt_before_any_new_one() -> None:
    buffer = make_buffer(size=2, eta=1)
    tickets = buffer.grant("g", 0, 2, 0.0)
    buffer.fail([tickets[1]], "boom")
    again, fresh = buffer.grant("h", 0, 2, 0.0)
    assert (again.ticket_id, again.attempt, again.holder, again.seed) == (1, 1, "h", tickets[1].seed)
    assert again.prompt is tickets[1].prompt
    assert (fresh.ticket_id, fresh.attempt) == (2, 0)


@both_orders
def test_prompt_that_fails_max_attempts_times_is_voided_and_named_with_its_last_reason(order: str) -> None:
    buffer = make_buffer(size=1, eta=0, order=order, max_attempts=2)
    for attempt in range(2):
        (ticket,) = buffer.grant("g", 0, 1, 0.0)
        assert (ticket.ticket_id, ticket.attempt) == (0, attempt)
        buffer.fail([ticket], f"boom {attempt}")
    (fresh,) = buffer.grant("g", 0, 1, 0.0)
    assert fresh.ticket_id == 1
    assert buffer.counters.voided == {"failed": 1}
    assert buffer.counters.failed_prompts == {ticket.prompt.prompt_id: "boom 1"}


def test_attempts_that_were_lost_are_no_failures_of_their_prompt() -> None:
    """Two generators died over it, then the scorer failed twice: only the second failure voids at max_attempts 2."""
    buffer = make_buffer(size=1, eta=0, max_attempts=2)
    for holder in ("a", "b"):
        buffer.grant(holder, 0, 1, 0.0)
        buffer.lose_holder(holder)
    (third,) = buffer.grant("c", 0, 1, 0.0)
    buffer.fail([third], "boom")
    assert (third.attempt, buffer.counters.lost, buffer.counters.voided) == (2, 1, {})

    (fourth,) = buffer.grant("c", 0, 1, 0.0)
    buffer.fail([fourth], "boom")

    assert (fourth.attempt, buffer.counters.leased, buffer.counters.voided) == (3, 0, {"failed": 1})
    assert buffer.counters.balanced


def test_the_same_failure_reported_twice_counts_once_its_ticket_went_out_again() -> None:
    buffer = make_buffer(size=1, eta=0, max_attempts=2)
    (ticket,) = buffer.grant("g", 0, 1, 0.0)
    buffer.fail([ticket], "boom")
    (again,) = buffer.grant("g", 0, 1, 0.0)

    buffer.fail([ticket], "boom")

    assert (again.attempt, buffer.counters.leased, buffer.counters.voided) == (1, 1, {})


def test_only_the_first_two_hundred_failed_prompts_are_named_but_all_are_counted() -> None:
    buffer = make_buffer(size=300, eta=0, max_attempts=1, max_failed_share=1.0)
    tickets = buffer.grant("g", 0, 300, 0.0)

    buffer.fail(tickets, "boom")

    assert buffer.counters.voided == {"failed": 300} and buffer.counters.balanced
    assert list(buffer.counters.failed_prompts) == [ticket.prompt.prompt_id for ticket in tickets[:200]]


def test_failure_of_an_earlier_attempt_or_of_a_finished_group_changes_nothing() -> None:
    buffer = make_buffer(size=2, eta=1, max_attempts=2)
    first, second = buffer.grant("g", 0, 2, 0.0)
    buffer.fail([first], "boom")
    (again,) = buffer.grant("g", 0, 1, 0.0)
    put_all(buffer, [second])
    before = buffer.counters
    buffer.fail([first, second], "boom")
    assert buffer.counters == before
    assert buffer.put(scored(again)) is PutOutcome.KEPT


def test_run_stops_by_name_when_too_many_prompts_fail_for_good() -> None:
    """Share 0.5 and at least 20 failures: with 40 prompts issued the 21st failure is one too many."""
    buffer = make_buffer(size=20, eta=1, max_attempts=1, max_failed_share=0.5)
    tickets = buffer.grant("g", 0, 40, 0.0)
    buffer.fail(tickets[:20], "boom")
    with pytest.raises(RewardError, match=r"21 of 40 prompts.*max_failed_share.*boom"):
        buffer.fail(tickets[20:21], "boom")


# Leases


def test_lease_that_ran_out_goes_to_the_next_generator_that_asks() -> None:
    buffer = make_buffer(size=1, eta=0)
    (ticket,) = buffer.grant("silent", 0, 1, 0.0)
    assert buffer.grant("g", 0, 1, LEASE_S - 0.1) == []
    (again,) = buffer.grant("g", 0, 1, LEASE_S)
    assert (again.ticket_id, again.attempt, again.holder) == (0, 1, "g")
    assert buffer.put(scored(ticket)) is PutOutcome.STALE_ATTEMPT


def test_lost_holder_loses_its_leases_and_nobody_elses() -> None:
    buffer = make_buffer(size=2, eta=1)
    buffer.grant("dead", 0, 2, 0.0)
    alive = buffer.grant("alive", 0, 2, 0.0)
    assert buffer.lose_holder("dead") == 2
    assert (buffer.counters.leased, buffer.counters.lost) == (4, 2)
    put_all(buffer, alive)
    assert [ticket.ticket_id for ticket in buffer.grant("alive", 0, 9, 0.0)] == [0, 1]


@both_orders
def test_group_that_is_being_scored_outlives_its_generator(order: str) -> None:
    buffer = make_buffer(size=1, eta=0, order=order)
    (ticket,) = buffer.grant("g", 0, 1, 0.0)
    buffer.mark_scoring([ticket], 0.0)
    assert buffer.lose_holder("g") == 0
    put_all(buffer, [ticket])
    assert ids(buffer.decide()) == [0]


def test_scoring_starts_a_lease_of_its_own_which_runs_out_too() -> None:
    buffer = make_buffer(size=1, eta=0)
    (ticket,) = buffer.grant("g", 0, 1, 0.0)
    buffer.mark_scoring([ticket], LEASE_S - 1)
    assert buffer.grant("h", 0, 1, LEASE_S) == []
    assert [again.attempt for again in buffer.grant("h", 0, 1, 2 * LEASE_S - 1)] == [1]


def test_lost_group_cannot_be_marked_as_scoring_by_its_former_holder() -> None:
    buffer = make_buffer(size=1, eta=0)
    (ticket,) = buffer.grant("zombie", 0, 1, 0.0)
    buffer.lose_holder("zombie")
    buffer.mark_scoring([ticket], 0.0)
    assert (buffer.counters.scoring, buffer.counters.lost) == (0, 1)
    (again,) = buffer.grant("g", 0, 1, 0.0)
    buffer.mark_scoring([ticket], 0.0)
    assert buffer.counters.scoring == 0
    put_all(buffer, [again])


def test_result_of_another_incarnation_is_refused_even_with_the_right_attempt_number() -> None:
    buffer = make_buffer(size=1, eta=0)
    (ticket,) = buffer.grant("generator-0.1", 0, 1, 0.0)
    assert buffer.put(scored(replace(ticket, holder="generator-0.0"))) is PutOutcome.STALE_ATTEMPT
    put_all(buffer, [ticket])


def test_result_of_a_lost_lease_that_nobody_holds_yet_is_as_good_as_ever() -> None:
    buffer = make_buffer(size=2, eta=1)
    first, second = buffer.grant("dead", 0, 2, 0.0)
    buffer.lose_holder("dead")

    assert buffer.put(scored(first)) is PutOutcome.KEPT
    assert buffer.put(scored(second)) is PutOutcome.KEPT

    assert ids(buffer.decide()) == [0, 1]
    assert buffer.counters.lost == 0


def test_result_of_a_lost_lease_must_come_from_its_last_holder_and_attempt() -> None:
    buffer = make_buffer(size=1, eta=1)
    (old,) = buffer.grant("first", 0, 1, 0.0)
    buffer.lose_holder("first")
    (again,) = buffer.grant("second", 0, 1, 0.0)
    buffer.lose_holder("second")

    assert buffer.put(scored(old)) is PutOutcome.STALE_ATTEMPT
    assert buffer.put(scored(replace(again, holder="first"))) is PutOutcome.STALE_ATTEMPT
    assert buffer.put(scored(replace(again, attempt=0))) is PutOutcome.STALE_ATTEMPT
    assert buffer.put(scored(again)) is PutOutcome.KEPT


def test_result_of_a_lost_lease_that_would_come_too_old_is_refused_and_goes_out_again() -> None:
    """B 1, eta 0: at version 1 the ticket promises deadline 1; tokens of version 0 would have been due at update 0."""
    buffer = make_buffer(size=1, eta=0)
    put_all(buffer, buffer.grant("g", 0, 1, 0.0))
    buffer.decide()
    (ticket,) = buffer.grant("g", 1, 1, 0.0)
    buffer.lose_holder("g")

    assert buffer.put(scored(ticket, 0)) is PutOutcome.TOO_OLD

    assert [again.attempt for again in buffer.grant("h", 1, 1, 0.0)] == [1]


def test_tied_result_of_a_lost_lease_is_voided_like_any_other() -> None:
    buffer = make_buffer(size=1, eta=0, max_replacements_per_batch=1)
    (ticket,) = buffer.grant("dead", 0, 1, 0.0)
    buffer.lose_holder("dead")

    assert buffer.put(scored(ticket, tied=True)) is PutOutcome.TIED

    assert buffer.counters.voided == {"tied": 1} and buffer.counters.balanced


# Idempotence


def test_same_request_number_gives_the_same_tickets_and_the_next_number_new_ones() -> None:
    buffer = make_buffer(size=4, eta=0)
    first = buffer.grant("g", 0, 2, 0.0, request=1)

    assert buffer.grant("g", 0, 2, 1.0, request=1) == first
    assert buffer.grant("g", 0, 1, 1.0, request=1) == first, "whatever else the request asks for"
    assert [ticket.ticket_id for ticket in buffer.grant("g", 0, 2, 1.0, request=2)] == [2, 3]
    assert buffer.counters.issued == 4


def test_request_numbers_of_two_holders_have_nothing_to_do_with_each_other() -> None:
    buffer = make_buffer(size=4, eta=0)
    of_a = buffer.grant("a", 0, 1, 0.0, request=1)
    of_b = buffer.grant("b", 0, 1, 0.0, request=1)

    assert [of_a[0].ticket_id, of_b[0].ticket_id] == [0, 1]
    assert buffer.grant("a", 0, 1, 0.0, request=1) == of_a and buffer.grant("b", 0, 1, 0.0, request=1) == of_b


def test_request_asked_again_gives_only_what_the_holder_still_holds() -> None:
    """Of four tickets one was put, one is with the scorer, one failed and went to somebody else."""
    buffer = make_buffer(size=4, eta=0)
    put, scoring, failed, held = buffer.grant("g", 0, 4, 0.0, request=5)
    put_all(buffer, [put])
    buffer.mark_scoring([scoring], 0.0)
    buffer.fail([failed], "boom")
    assert [ticket.ticket_id for ticket in buffer.grant("h", 0, 1, 0.0, request=1)] == [failed.ticket_id]

    assert buffer.grant("g", 0, 4, 0.0, request=5) == [held]


def test_request_asked_again_after_its_lease_ran_out_gives_nothing_that_is_lost() -> None:
    buffer = make_buffer(size=1, eta=0)
    buffer.grant("g", 0, 1, 0.0, request=1)

    assert buffer.grant("g", 0, 1, LEASE_S, request=1) == []
    assert [ticket.attempt for ticket in buffer.grant("g", 0, 1, LEASE_S, request=2)] == [1]


def test_request_that_got_nothing_may_get_tickets_under_the_same_number() -> None:
    buffer = make_buffer(size=1, eta=0)
    put_all(buffer, buffer.grant("g", 0, 1, 0.0, request=1))
    assert buffer.grant("g", 0, 1, 0.0, request=2) == []
    buffer.decide()

    assert [ticket.ticket_id for ticket in buffer.grant("g", 1, 1, 0.0, request=2)] == [1]


def test_requests_without_a_number_are_never_the_same() -> None:
    buffer = make_buffer(size=2, eta=0)
    assert [buffer.grant("g", 0, 1, 0.0)[0].ticket_id for _ in range(2)] == [0, 1]


@both_orders
def test_same_group_put_twice_is_kept_once_even_after_it_was_trained_or_voided(order: str) -> None:
    buffer = make_buffer(size=1, eta=1, order=order, max_replacements_per_batch=1)
    kept, tied = buffer.grant("g", 0, 2, 0.0)
    outcomes = [buffer.put(scored(kept)), buffer.put(scored(kept))]
    outcomes += [buffer.put(scored(tied, tied=True)), buffer.put(scored(tied, tied=True)), buffer.put(scored(tied))]
    buffer.decide()
    outcomes.append(buffer.put(scored(kept)))
    buffer.mark_trained(0)
    outcomes.append(buffer.put(scored(kept)))
    duplicate = PutOutcome.DUPLICATE
    assert outcomes == [PutOutcome.KEPT, duplicate, PutOutcome.TIED, duplicate, duplicate, duplicate, duplicate]
    assert buffer.counters.refused == {"duplicate": 5}


def test_training_is_counted_once_per_update_and_unknown_updates_not_at_all() -> None:
    buffer = make_buffer(size=2, eta=0)
    put_all(buffer, buffer.grant("g", 0, 2, 0.0))
    buffer.decide()
    assert (buffer.counters.taken, buffer.counters.trained) == (2, 0)
    for update in (0, 0, 7):
        buffer.mark_trained(update)
    assert (buffer.counters.taken, buffer.counters.trained) == (0, 2)


def test_training_again_says_how_far_the_weights_are_from_those_of_the_first_time() -> None:
    """Equal digests: 0, whatever the canary. Else the largest difference: max(|-1 + 1.5|, |-2 + 1.75|) = .5 nats."""
    buffer = make_buffer(size=1, eta=0)
    put_all(buffer, buffer.grant("g", 0, 1, 0.0))
    buffer.decide()

    assert buffer.mark_trained(0, 77, (-1.5, -1.75)) == 0.0
    assert buffer.mark_trained(0, 77, (-9.0, -9.0)) == 0.0
    assert buffer.mark_trained(0, 78, (-1.0, -2.0)) == pytest.approx(0.5)
    assert buffer.mark_trained(0, 77, (-1.5, -1.75)) == pytest.approx(0.5), "the last time is what the next one is compared with"
    assert buffer.counters.trained == 1


# The end


def test_no_more_groups_are_admitted_than_the_updates_need() -> None:
    buffer = make_buffer(size=2, eta=5, num_updates=2)
    tickets = buffer.grant("g", 0, 100, 0.0)
    assert len(tickets) == 4
    put_all(buffer, tickets)
    assert [ids(buffer.decide()), ids(buffer.decide())] == [[0, 1], [2, 3]]
    assert buffer.finished
    assert (buffer.decide(), buffer.grant("g", 2, 9, 0.0)) == (None, [])


@both_orders
def test_short_last_batch_trains_what_the_prompts_left(order: str) -> None:
    buffer = make_buffer(size=2, eta=1, num_prompts=3, max_epochs=1, order=order)
    tickets = buffer.grant("g", 0, 9, 0.0)
    put_all(buffer, tickets[:2])
    assert ids(buffer.decide()) == [0, 1]
    assert buffer.decide() is None
    put_all(buffer, tickets[2:])
    assert not buffer.finished
    assert ids(buffer.decide()) == [2]
    assert buffer.finished


def test_short_last_batch_is_cut_to_a_multiple_that_the_ranks_can_share() -> None:
    buffer = make_buffer(size=8, eta=0, num_prompts=7, max_epochs=1, batch_multiple=3)
    put_all(buffer, buffer.grant("g", 0, 9, 0.0))
    assert ids(buffer.decide()) == [0, 1, 2, 3, 4, 5]
    assert buffer.counters.dropped == {"last_batch": 1}
    assert buffer.finished


@pytest.mark.parametrize("settings", [{"last_batch": "drop"}, {"batch_multiple": 4}])
def test_last_batch_that_cannot_be_trained_is_dropped_and_the_run_ends(settings: dict[str, Any]) -> None:
    buffer = make_buffer(size=4, eta=0, num_prompts=3, max_epochs=1, **settings)
    put_all(buffer, buffer.grant("g", 0, 9, 0.0))
    assert buffer.decide() is None
    assert buffer.finished
    assert buffer.counters.dropped == {"last_batch": 3}
    assert buffer.counters.balanced


def test_full_batch_at_the_very_end_of_the_prompts_is_neither_cut_nor_dropped() -> None:
    buffer = make_buffer(size=3, eta=0, num_prompts=3, max_epochs=1, last_batch="drop")
    put_all(buffer, buffer.grant("g", 0, 9, 0.0))
    assert ids(buffer.decide()) == [0, 1, 2]
    assert buffer.finished


def test_lost_ticket_of_the_last_batch_goes_out_again_although_the_prompts_ran_out() -> None:
    buffer = make_buffer(size=4, eta=0, num_prompts=2, max_epochs=1)
    put_all(buffer, buffer.grant("g", 0, 1, 0.0))
    buffer.grant("dead", 0, 1, 0.0)
    buffer.lose_holder("dead")
    assert buffer.decide() is None
    put_all(buffer, buffer.grant("g", 0, 9, 0.0))
    assert ids(buffer.decide()) == [0, 1]


# Rounds, seeds, counters


def test_whole_rounds_grant_only_when_nothing_is_under_way() -> None:
    buffer = make_buffer(size=2, eta=0, whole_rounds=True, max_replacements_per_batch=2)
    first, second = buffer.grant("g", 0, 9, 0.0)
    buffer.put(scored(first, tied=True))
    assert buffer.grant("g", 0, 9, 0.0) == []
    buffer.mark_scoring([second], 0.0)
    assert buffer.grant("g", 0, 9, 0.0) == []
    put_all(buffer, [second])
    assert [ticket.ticket_id for ticket in buffer.grant("g", 0, 9, 0.0)] == [2]


def test_whole_rounds_do_not_wait_for_a_lease_that_was_lost_or_ran_out() -> None:
    buffer = make_buffer(size=1, eta=0, whole_rounds=True)
    buffer.grant("dead", 0, 9, 0.0)
    buffer.lose_holder("dead")
    assert [ticket.attempt for ticket in buffer.grant("silent", 0, 9, 0.0)] == [1]
    assert [ticket.attempt for ticket in buffer.grant("g", 0, 9, LEASE_S)] == [2]


def test_seeds_differ_between_tickets_and_between_runs_and_fit_in_63_bits() -> None:
    seeds = [ticket_seed(run, ticket) for run in range(20) for ticket in range(500)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seed_of_a_ticket_depends_on_the_runs_seed_and_its_number_alone() -> None:
    alone = make_buffer(size=4, eta=0, seed=7).grant("g", 0, 4, 0.0)
    shared = make_buffer(size=4, eta=0, seed=7)
    apart = shared.grant("a", 0, 1, 0.0) + shared.grant("b", 0, 3, 5.0)
    assert [ticket.seed for ticket in apart] == [ticket.seed for ticket in alone] == [ticket_seed(7, i) for i in range(4)]


def test_counters_say_where_every_issued_group_is() -> None:
    """Nine groups, one in each place: trained, taken, waiting, scoring, leased, lost, tied, failed; one more waits."""
    buffer = make_buffer(size=1, eta=8, max_attempts=1, max_replacements_per_batch=1)
    trained, taken, waiting, scoring, _, tied, failed, late = buffer.grant("g", 0, 8, 0.0)
    buffer.grant("dead", 0, 1, 0.0)
    put_all(buffer, [trained])
    buffer.decide()
    buffer.mark_trained(0)
    put_all(buffer, [taken])
    buffer.decide()
    put_all(buffer, [waiting, late])
    buffer.mark_scoring([scoring], 0.0)
    buffer.put(scored(tied, tied=True))
    buffer.fail([failed], "boom")
    buffer.lose_holder("dead")
    counts = buffer.counters
    assert (counts.issued, counts.trained, counts.taken, counts.waiting, counts.scoring) == (9, 1, 1, 2, 1)
    assert (counts.leased, counts.lost, counts.voided) == (2, 1, {"tied": 1, "failed": 1})
    assert counts.balanced
