"""The driver's books: rows, state and idle shares."""

from dataclasses import replace

import pytest

from actors.accounts import Accounts
from actors.crew import UpdateRecord
from actors.engine_loop import EngineUsage
from actors.replay_queue import Booked
from actors.weight_broadcaster import Published
from async_rlhf.config import load_config
from async_rlhf.metrics import declaration, summarize
from async_rlhf.scores import ScoreMoments
from async_rlhf.state import state_from_json
from async_rlhf.tickets import QueueCounters
from async_rlhf.types import Batch, InstallReport, StepReport
from tests.support.samples import make_scored, make_ticket

PLAIN_KEYS = {"update", "version", "session", "optimizer_steps", "time_s"}


INSTALLS = {
    "generator-0.0": InstallReport(version=1, install_s=0.2, pause_s=0.1, canary_error=1e-5, canary_s=0.02),
    "generator-1.0": InstallReport(version=0, install_s=0.4, pause_s=0.1, canary_error=3e-5, transfer_s=0.3),
}


def usage(busy_s: float, num_tokens: int = 0) -> EngineUsage:
    return EngineUsage(busy_s=busy_s, num_tokens=num_tokens, num_completions=num_tokens)


def make_record(
    update: int = 0,
    *,
    steps: int = 1,
    version: int = 0,
    train_s: float = 0.5,
    busy: dict[str, EngineUsage],
    score: float = 1.0,
    generator_s: float = 0.0,
):
    groups = tuple(make_scored(make_ticket(index), scores=(score, 0.0), version=version) for index in range(3))
    report = StepReport(
        version=update + 1,
        optimizer_steps=steps * (update + 1),
        num_tokens=200,
        train_s=train_s,
        metrics={"train/loss": 0.25, "correction/ess_share": 0.5},
        parts_s={"train/forward_backward_s": 0.4, "train/optimizer_s": 0.05},
    )
    slower = replace(report, train_s=train_s / 2, parts_s={"train/forward_backward_s": 0.1, "train/optimizer_s": 0.07})
    counters = QueueCounters(
        issued=9,
        leased=2,
        lost=1,
        scoring=1,
        waiting=3,
        taken=0,
        trained=3,
        reissued=1,
        voided={"tied": 4},
        dropped={"last_batch": 2},
        refused={"duplicate": 1},
        failed_prompts={"p7": "the judge says no"},
    )
    return UpdateRecord(
        summary=summarize(Batch(update=update, groups=groups), []),
        reports=[report, slower],
        booked=Booked(counters=counters, replay_error_nats=0.0),
        wait_s=0.125,
        published=Published(version=update + 1, export_s=0.0625, digest=7, canary_logprobs=(-1.0,), gather_s=0.05),
        usage=busy,
        installs=INSTALLS,
        take_s=0.015,
        generator_s=generator_s,
        health={"generator-0": "at work, version 1", "generator-1": "restarting"},
    )


def make_accounts(*names: str) -> Accounts:
    accounts = Accounts(config=load_config(overrides=["updates=10", f"generator.count={len(names)}"]).config, run_id="run-1")
    accounts.begin({name: usage(0.0) for name in names})
    return accounts


def set_back(accounts: Accounts, seconds: float) -> None:
    """Let `seconds` have passed since the run, and the last update, began."""
    accounts.started_s -= seconds
    accounts.last_s -= seconds


def test_every_key_of_a_row_is_declared():
    accounts = make_accounts("g")

    row = accounts.add(make_record(busy={"g": usage(0.1, 10)}), {})

    assert all(declaration(key) for key in set(row) - PLAIN_KEYS)
    assert set(row) >= PLAIN_KEYS


def test_a_row_by_hand():
    """Four seconds since the last update: 100 tokens / 4 s, two generators busy 3 + 1 of 8 s, the learner .5 of 4 s.

    200 tokens in .5 s; staleness 2 updates of 3 optimizer steps each.
    """
    accounts = make_accounts("a", "b")
    accounts.add(make_record(0, steps=3, busy={"a": usage(1.0, 40), "b": usage(1.0, 10)}), {})
    set_back(accounts, 4.0)
    accounts.updates = 2

    row = accounts.add(make_record(2, steps=3, busy={"a": usage(4.0, 120), "b": usage(2.0, 30)}, generator_s=8.0), {})

    expected = {
        "update": 2,
        "version": 3,
        "optimizer_steps": 9,
        "generate/tokens_per_s": 25.0,
        "generate/idle_share": 0.5,
        "generate/generators": 2.0,
        "train/tokens_per_s": 400.0,
        "train/idle_share": 0.875,
        "train/step_s": 0.5,
        "train/loss": 0.25,
        "queue/staleness_mean": 2.0,
        "queue/staleness_optimizer_steps_mean": 6.0,
        "queue/depth_groups": 3,
        "queue/leased_groups": 2,
        "queue/scoring_groups": 1,
        "queue/wait_s": 0.125,
        "train/take_s": 0.015,
        "train/forward_backward_s": 0.4,
        "train/optimizer_s": 0.07,
        "time/update_s": 4.0,
        "weights/gather_s": 0.05,
        "weights/transfer_s": 0.3,
        "weights/pause_s": 0.1,
        "weights/canary_s": 0.02,
        "weights/export_s": 0.0625,
        "weights/install_s": 0.4,
        "weights/canary_error_nats": 3e-5,
        "time_s": 4.0,
    }
    assert {key: row[key] for key in expected} == pytest.approx(expected, rel=0.02)


def test_counts_add_up_over_updates():
    accounts = make_accounts("g")
    records = [make_record(update, steps=2, version=0, busy={"g": usage(0.1)}, score=score) for update, score in ((0, 2.0), (1, 1.0))]

    for record in records:
        accounts.add(record, {})
    state = accounts.state("training")

    tokens = sum(record.summary.num_completion_tokens for record in records)
    assert (state.version, state.num_updates, state.optimizer_steps) == (2, 10, 4)
    assert (state.prompts, state.completions, state.tokens) == (6, 12, tokens)
    assert (state.reward_mean, state.best_reward_mean) == (pytest.approx(0.5), pytest.approx(1.0))
    assert state.staleness_max == 1
    assert state.queue == {"leased": 2, "scoring": 1, "waiting": 3, "taken": 0, "trained": 3}
    assert state.actors == {"generator-0": "at work, version 1", "generator-1": "restarting"}
    assert accounts.dropped == {"tied": 4, "last_batch": 2, "refused_duplicate": 1}
    assert accounts.failed_prompts == {"p7": "the judge says no"}


def test_the_state_holds_the_moments_of_the_scores_of_the_last_batch():
    accounts = make_accounts("g")
    assert accounts.state("starting").score_moments == ScoreMoments()

    for update, moments in enumerate((ScoreMoments(count=6, mean=0.5), ScoreMoments(count=12, mean=0.25, recent=(1.0,)))):
        record = make_record(update, busy={"g": usage(0.1)})
        accounts.add(replace(record, summary=replace(record.summary, moments=moments)), {})

        state = accounts.state("training")
        assert state.score_moments == moments
        assert state_from_json(state.to_json()) == state


def test_a_best_reward_below_zero_is_kept():
    accounts = make_accounts("g")

    for update, score in enumerate((-4.0, -2.0, -6.0)):
        accounts.add(make_record(update, busy={"g": usage(0.1)}, score=score), {})

    assert accounts.best_reward_mean == pytest.approx(-1.0)


def test_state_before_the_first_update_has_no_reward_and_round_trips():
    state = make_accounts("g").state("starting")

    assert (state.version, state.reward_mean, state.best_reward_mean) == (0, None, None)
    assert state_from_json(state.to_json()) == state


def test_idle_shares_of_the_run_count_from_the_first_ticket_to_the_last_update():
    """Ten seconds; generators busy 6 + 2 of 20 s before that is subtracted what they were busy with at the start."""
    accounts = Accounts(config=load_config(overrides=["generator.count=2"]).config, run_id="run-1")
    accounts.begin({"a": usage(5.0), "b": usage(1.0)}, generator_s=5.0)
    accounts.started_s -= 10.0

    accounts.add(make_record(0, train_s=2.5, busy={"a": usage(11.0), "b": usage(3.0)}, generator_s=25.0), {})

    assert accounts.generator_idle_share == pytest.approx(1 - 8 / 20, abs=0.01)
    assert accounts.learner_idle_share == pytest.approx(0.75, abs=0.01)


def test_shares_stay_between_zero_and_one_when_clocks_disagree():
    accounts = make_accounts("g")

    row = accounts.add(make_record(busy={"g": usage(1e6)}, train_s=1e6), {})

    assert (row["generate/idle_share"], row["train/idle_share"]) == (0.0, 0.0)
    assert (accounts.generator_idle_share, accounts.learner_idle_share) == (0.0, 0.0)


def test_a_run_without_updates_has_idle_shares():
    accounts = make_accounts("g")

    assert (accounts.generator_idle_share, accounts.learner_idle_share) == (1.0, 1.0)


def test_restarts_of_all_parts_are_one_number_in_a_row_and_by_part_in_the_state():
    accounts = make_accounts("g")

    row = accounts.add(make_record(busy={"g": usage(0.1)}), {"generator-0": 2, "replay_queue": 1})

    assert row["supervision/restarts"] == 3
    assert accounts.state("training").restarts == {"generator-0": 2, "replay_queue": 1}


def test_what_a_dead_generator_did_still_counts_and_its_successor_begins_at_zero():
    """Four seconds, one generator's place: g.0 made 40 tokens in 1 s and died, g.1 made 60 in 1 s: 25 tokens/s, idle 1/2."""
    accounts = make_accounts("g.0")
    set_back(accounts, 4.0)

    row = accounts.add(make_record(busy={"g.0": usage(1.0, 40), "g.1": usage(1.0, 60)}, generator_s=4.0), {})

    assert row["generate/tokens_per_s"] == pytest.approx(25.0, rel=0.02)
    assert row["generate/idle_share"] == pytest.approx(0.5, abs=0.01)


def test_the_idle_share_counts_the_seconds_that_generators_were_there_not_how_many_the_config_names():
    """The config names one. Ten seconds, in the second half of which another one was there: busy 9 of 15 s, 1.5 on the mean."""
    accounts = make_accounts("a")
    set_back(accounts, 10.0)

    row = accounts.add(make_record(busy={"a": usage(6.0), "b": usage(3.0)}, generator_s=15.0), {})

    assert row["generate/idle_share"] == pytest.approx(0.4, abs=0.01) and row["generate/generators"] == pytest.approx(1.5, rel=0.02)
    assert accounts.generator_idle_share == pytest.approx(0.4, abs=0.01)


def test_an_update_without_any_living_install_has_a_row():
    """All generators may be dead at that moment."""
    accounts = make_accounts("g")

    row = accounts.add(replace(make_record(busy={}), installs={}), {})

    assert (row["weights/install_s"], row["weights/canary_error_nats"]) == (0.0, 0.0)


def test_accounts_of_a_learner_that_fell_back_book_the_same_updates_again_as_if_nothing_had_happened():
    """Updates 0 to 3, a checkpoint after the second; then 2 and 3 once more."""
    whole, broken = make_accounts("g"), make_accounts("g")
    records = [make_record(update, steps=2, busy={"g": usage(0.1)}, score=score) for update, score in enumerate((2.0, 4.0, 9.0, 1.0))]
    for record in records:
        whole.add(record, {})
    for record in records[:2]:
        broken.add(record, {})
    checkpoint = state_from_json(broken.state("training").to_json())
    broken.add(records[2], {})

    broken.restore(checkpoint)

    keys = ("version", "optimizer_steps", "prompts", "completions", "tokens", "staleness_max", "reward_mean", "best_reward_mean")
    assert {key: getattr(broken.state("training"), key) for key in keys} == {key: getattr(checkpoint, key) for key in keys}
    for record in records[2:]:
        broken.add(record, {})
    assert {key: getattr(broken.state("training"), key) for key in keys} == {key: getattr(whole.state("training"), key) for key in keys}
    assert broken.score_moments == whole.score_moments


def test_the_clock_of_a_resumed_run_goes_on_where_the_driver_before_stopped():
    accounts = Accounts(config=load_config(overrides=["updates=10"]).config, run_id="run-1", session=1, earlier_s=100.0)
    accounts.begin({"g": usage(0.0)})
    set_back(accounts, 10.0)

    row = accounts.add(make_record(busy={"g": usage(0.1)}), {})

    state = accounts.state("training")
    assert row["time_s"] == pytest.approx(110.0, abs=0.5) and state.elapsed_s == pytest.approx(110.0, abs=0.5)
    assert state.session == 1


def test_the_state_names_the_newest_checkpoint():
    accounts = make_accounts("g")
    assert accounts.state("training").checkpoint is None

    accounts.checkpoint = 7

    assert accounts.state("training").checkpoint == 7


def test_the_state_says_what_was_dropped_and_why():
    accounts = make_accounts("g")

    accounts.add(make_record(busy={"g": usage(0.1)}), {})

    assert accounts.state("training").dropped == {"tied": 4, "last_batch": 2, "refused_duplicate": 1}
