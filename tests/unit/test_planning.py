"""The model of the pipeline: its updates against closed forms, rates and lengths, budgets, and what it refuses."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from async_rlhf.commands.plan import Wishes, assumptions, run_plan
from async_rlhf.config import Config, to_yaml
from async_rlhf.config.algorithms import AlgorithmConfig
from async_rlhf.config.schema import GeneratorConfig, LearnerConfig, RewardConfig, ScorerConfig
from async_rlhf.errors import ConfigError
from async_rlhf.planning import cores as sharing
from async_rlhf.planning.lengths import Lengths, lognormal_lengths, measured_lengths
from async_rlhf.planning.model import calibrated_rates, predict
from async_rlhf.planning.pipeline import MAX_GENERATORS
from async_rlhf.planning.plans import Basis, compare, recommend
from async_rlhf.planning.rates import Rates, measured_rates, measured_update_s, num_trained, read_rates
from async_rlhf.rollout_parts import GroupFate, write_part
from async_rlhf.rollout_table import rows_of, to_batch
from tests.support.samples import make_scored, make_ticket

CONFIG = Config(batch_groups=8, completions_per_prompt=2, generator=GeneratorConfig(max_inflight=32), max_staleness=1)
ALGORITHMS: tuple[Literal["dpo", "bok", "rloo"], ...] = ("dpo", "bok", "rloo")
FAST = Rates(engine_step_s=0.0, engine_completion_s=1e-6, call_s=0.0)
"""Everything takes next to nothing; tests slow one stage down."""


def even(tokens: float = 10.0, *, tied: float = 0.0, prompt: float = 0.0) -> Lengths:
    """Completions of one length; every so many-th group is tied."""
    ties = np.arange(100) < 100 * tied
    return Lengths(tokens=np.full((100, 2), tokens), tied=ties, prompt_tokens=prompt)


@pytest.fixture
def free_switching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cores lose no time when processes take turns."""
    monkeypatch.setattr(sharing, "SWITCHING", 0.0)


# The pipeline


def test_a_slow_learner_alone_makes_the_period():
    """1 s of train_step, .25 s of take, push and books; the batch is always there."""
    found = predict(CONFIG, replace(FAST, step_fixed_s=1.0, take_s=0.05, export_s=0.1, book_s=0.1), even(), num_updates=10)

    assert found.update_s == pytest.approx(1.25, rel=1e-3) and found.learner_idle == pytest.approx(0.2, abs=0.01)
    assert found.generator_idle > 0.99 and found.completions_per_s == pytest.approx(16 / 1.25, rel=1e-3)


def test_slow_engines_alone_make_the_period():
    """Two engines of 100 tokens a second each, whatever their batch; 8 groups of 2 completions of 10 tokens: .8 s. Of it
    .17 s go to the canary's step, as all 16 seats are taken: twice ten groups are at the engines, of forty that may be on their way."""
    config = replace(CONFIG, max_staleness=4, generator=GeneratorConfig(count=2, max_inflight=16))
    found = predict(config, replace(FAST, engine_completion_s=0.01), even(), num_updates=20)

    assert found.update_s == pytest.approx(0.8, rel=0.02) and found.generator_idle == pytest.approx(0.2, abs=0.03)


def test_slow_scorers_make_the_period_and_more_of_them_shorten_it():
    """A token of a sequence (10 + 5) takes 10 ms: 16 completions are 2.4 s. Groups that are sampled at once are one scorer's."""
    rates = replace(FAST, score_token_s=0.01)

    one = predict(CONFIG, rates, even(prompt=5.0), num_updates=10)
    both = GeneratorConfig(count=2, max_inflight=8)
    two = predict(replace(CONFIG, generator=both, scorer=ScorerConfig(count=2)), rates, even(prompt=5.0), num_updates=10)

    assert one.update_s == pytest.approx(2.4, rel=0.05) and one.scorer_idle == pytest.approx(0.0, abs=0.05)
    assert two.update_s < 0.8 * one.update_s


def test_synchronous_training_is_the_sum_of_its_stages():
    """16 completions of 10 tokens at 100 tokens a second, 1 s of scoring or less, .5 s of training; nobody works beside another."""
    config = replace(CONFIG, max_staleness=0)
    rates = replace(FAST, engine_completion_s=0.01, score_call_s=0.2, step_fixed_s=0.5)

    found = predict(config, rates, even(), num_updates=10)

    assert found.update_s == pytest.approx(1.6 + 0.2 + 0.5, rel=0.01) and found.staleness == {0: 1.0}


def test_reward_actors_are_a_stage_of_their_own_before_the_scorers():
    """64 groups of 20 tokens, .3 s each, fill an update of one reward actor; two halve it; the .1 s of the engine and of the scorer
    are beside that. Some ten groups that gathered go in one call: only tokens cost here, and no actor gets all at once."""
    rates = replace(FAST, engine_completion_s=0.1 / 20, reward_token_s=0.3 / 20, score_token_s=0.1 / 20)
    one, two = (replace(CONFIG, max_staleness=4, batch_groups=64, reward=RewardConfig(count=count)) for count in (1, 2))
    one, two = (replace(each, generator=GeneratorConfig(max_inflight=2)) for each in (one, two))

    slow, fast = (predict(config, rates, even(), num_updates=15) for config in (one, two))

    assert (slow.update_s, fast.update_s) == (pytest.approx(64 * 0.3, rel=0.05), pytest.approx(64 * 0.15, rel=0.05))
    assert slow.reward_idle == pytest.approx(0.0, abs=0.02) and slow.scorer_idle == pytest.approx(2 / 3, abs=0.02)
    assert predict(CONFIG, rates, even(), num_updates=2).reward_idle is None


def test_stages_that_share_one_core_make_the_period_together(free_switching: None):
    """1.6 s of sampling and 1 s of training overlap on cores of their own: 1.6 s; on one core: 2.6 s."""
    config = replace(CONFIG, max_staleness=4)
    rates = replace(FAST, engine_completion_s=0.01, step_fixed_s=1.0)

    apart, together = (predict(config, rates, even(), num_updates=15, num_cores=num) for num in (2, 1))

    assert apart.update_s == pytest.approx(1.6, rel=0.03) and together.update_s == pytest.approx(2.6, rel=0.03)


def test_calls_take_core_time_from_the_stages():
    """Training of 1 s on a core of its own; on one core the calls' work comes on top, however many they are. That of five calls is
    in rates: to install, to take, to train, to publish, to book."""
    rates = replace(FAST, step_fixed_s=1.0, call_work_s=0.01)

    found = predict(CONFIG, rates, even(), num_updates=10, num_cores=1)

    assert found.calls > 10 and found.update_s > 1.0 + 0.01 * (found.calls - 5)


def test_groups_that_finish_together_cost_the_calls_of_one():
    """All groups of an update end with the same step: to grant, to submit, to collect, to note, to score, to put; and to learn of a
    version, to install it, to note it; and the learner's five."""
    found = predict(replace(CONFIG, max_staleness=0), replace(FAST, engine_completion_s=0.01), even(), num_updates=10)

    assert found.calls == 6 + 3 + 5


def test_finished_groups_wait_for_others_for_a_tenth_of_an_update():
    """An engine of four seats, always at work, asks for each of 32 groups by itself: 2 calls each. What finishes goes on at most ten times
    an update, 4 calls each, and without waiting would go nearly as often as there are groups. The version and the learner: 3 + 5."""
    config = replace(CONFIG, max_staleness=4, batch_groups=32, generator=GeneratorConfig(max_inflight=4))
    spread = lognormal_lengths(median=10, sigma=0.8, prompt_tokens=0.0, config=config)

    found = predict(config, replace(FAST, engine_completion_s=0.01), spread, num_updates=20)

    assert 4 * 5 < found.calls - (32 * 2 + 3 + 5) <= 4 * 10 and found.generator_idle < 0.02


def test_ties_cost_samples():
    """Half of the groups are tied and replaced: twice the work for the engines."""
    rates, config = replace(FAST, engine_completion_s=0.01), replace(CONFIG, max_staleness=4, batch_groups=32)
    plain, tied = (predict(config, rates, even(tied=share), num_updates=20).update_s for share in (0.0, 0.5))

    assert tied == pytest.approx(2 * plain, rel=0.15)


def test_passes_and_ranks_scale_the_part_of_a_step_that_is_theirs():
    rates = replace(FAST, prepare_token_s=0.001, train_token_s=0.01, optimizer_s=0.1, step_fixed_s=0.5, allreduce_s=0.3)

    assert rates.train_step_s(100, ranks=1, epochs=1, minibatches=1) == pytest.approx(0.5 + 0.1 + 1.0 + 0.1)
    assert rates.train_step_s(100, ranks=2, epochs=3, minibatches=2) == pytest.approx(0.5 + (0.1 + 3.0) / 2 + 6 * (0.1 + 0.3))


def test_one_simulated_generator_stands_for_many():
    """A fleet with as large a batch, and ranks, per generator makes an update in the same time."""
    rates = replace(FAST, engine_completion_s=0.01, train_token_s=0.001)
    few, many = (
        replace(
            CONFIG,
            batch_groups=8 * count,
            generator=GeneratorConfig(count=count, max_inflight=32),
            learner=LearnerConfig(num_ranks=count),
            scorer=ScorerConfig(count=count),
        )
        for count in (MAX_GENERATORS // 4, 8 * MAX_GENERATORS)
    )
    one, other = (predict(config, rates, even(), num_updates=5) for config in (few, many))

    assert other.update_s == pytest.approx(one.update_s, rel=0.05) and other.tokens_per_s == pytest.approx(32 * one.tokens_per_s, rel=0.1)


@settings(max_examples=12, deadline=None)
@given(
    eta=st.integers(0, 3),
    generators=st.integers(1, 3),
    groups=st.integers(1, 6),
    order=st.sampled_from(["ready", "ticket"]),
    slow=st.sampled_from(["engine_completion_s", "step_fixed_s", "score_token_s", "transfer_s", "load_s"]),
    seed=st.integers(0, 5),
)
def test_the_bound_holds_in_the_model_and_shares_are_shares(eta: int, generators: int, groups: int, order: str, slow: str, seed: int):
    config = replace(CONFIG, max_staleness=eta, batch_groups=groups, generator=GeneratorConfig(count=generators, max_inflight=6))
    config = replace(config, queue=replace(config.queue, order=order))
    spread = lognormal_lengths(median=5, sigma=1.0, prompt_tokens=1.0, config=config, seed=seed)

    found = predict(config, replace(FAST, **{slow: 0.05}), spread, num_updates=5, seed=seed)

    assert all(0 <= staleness <= eta for staleness in found.staleness) and sum(found.staleness.values()) == pytest.approx(1.0)
    for share in (found.generator_idle, found.scorer_idle, found.learner_idle):
        assert -1e-9 <= share <= 1


# Rates and lengths


def measured_rows(num: int = 14, config: Config = CONFIG) -> list[dict[str, float]]:
    """Updates of 2 s of an engine with steps of .01 s + .001 s per completion, for 1 s; .5 s of training. All have half a core for it."""
    rows: list[dict[str, float]] = []
    for number in range(num):
        completions = 10.0 + number
        rows.append(
            {
                "version": number + 3,
                "time_s": 2.0 * number,
                "queue/wait_s": 1.2,
                "train/take_s": 0.1,
                "train/step_s": 0.5,
                "train/tokens_per_s": 480.0,
                "train/prepare_s": 0.1,
                "train/forward_backward_s": 0.3,
                "train/optimizer_s": 0.05,
                "generate/idle_share": 0.5,
                "generate/step_fixed_s": 0.01,
                "generate/step_completion_s": 0.001,
                "generate/step_prompt_s": 0.002,
                "generate/work_s": 0.5,
                "generate/cpu_s": 0.7,
                "score/cpu_s": 0.1,
                "train/cpu_s": 0.25,
                "queue/cpu_s": 0.06,
                "time/driver_cpu_s": 0.04,
                "generate/tokens_per_s": completions / (0.01 + 0.001 * completions) / 2,
                "score/idle_share": 0.9,
                "score/groups_per_s": 4.0,
                "generate/groups_per_s": 4.0,
                "weights/export_s": 0.05,
                "weights/install_s": 0.3,
                "weights/pause_s": 0.1,
                "weights/canary_s": 0.05,
                "weights/transfer_s": 0.2,
            }
        )
    return rows


def test_rates_are_read_off_a_run():
    """160 tokens of completions and 80 of prompts in a batch; a scorer is busy for .2 s of an update, with 8 groups of 30 tokens."""
    rates = measured_rates(measured_rows(), CONFIG, even(prompt=5.0))

    assert (rates.engine_step_s, rates.engine_completion_s) == (pytest.approx(0.01), pytest.approx(0.001))
    assert (rates.train_token_s, rates.prepare_token_s) == (pytest.approx(0.3 / 240), pytest.approx(0.1 / 240))
    assert (rates.optimizer_s, rates.step_fixed_s) == (pytest.approx(0.05), pytest.approx(0.05))
    assert rates.score_token_s == pytest.approx(0.2 / (8 * 30))
    assert rates.engine_prompt_s == pytest.approx(0.002) and rates.call_work_s == 0.0
    assert (rates.load_s, rates.transfer_s) == (pytest.approx(0.1), pytest.approx(0.2))
    assert (rates.take_s, rates.export_s, rates.book_s) == (pytest.approx(0.1), pytest.approx(0.05), pytest.approx(0.15))


def test_rates_of_reward_actors_are_read_off_a_run():
    """One of two is busy for .4 s of an update of 2 s in which 8 groups of 20 tokens pass."""
    config = replace(CONFIG, reward=RewardConfig(count=2))
    rows = [row | {"reward/idle_share": 0.8, "score/groups_per_s": 4.0} for row in measured_rows()]
    rates = measured_rates(rows, config, even())

    assert rates.reward_token_s == pytest.approx(0.8 / (8 * 20)) and rates.reward_call_s == 0.0
    assert measured_rates(rows, CONFIG, even()).reward_token_s == 0.0


@pytest.mark.parametrize(("gap_s", "every"), [(40.0, 100), (5.0, 4)], ids=["a restart", "checkpoints"])
def test_gaps_between_updates_change_no_rate(gap_s: float, every: int):
    rows = even_rows = measured_rows(30)
    for index in range(5, len(rows), every):
        rows = [row | {"time_s": row["time_s"] + (gap_s if number >= index else 0.0)} for number, row in enumerate(rows)]

    found, expected = (measured_rates(each, CONFIG, even()) for each in (rows, even_rows))

    assert found.book_s == pytest.approx(expected.book_s) and measured_update_s(rows) == pytest.approx(2.0)
    assert found.train_token_s == pytest.approx(expected.train_token_s)


def test_updates_of_different_drivers_are_not_paired():
    rows = [row | {"session": float(number >= 10)} for number, row in enumerate(measured_rows(20))]
    rows = [row | {"time_s": row["time_s"] + (0.5 if row["session"] else 0.0)} for row in rows]

    assert measured_update_s(rows) == pytest.approx(2.0) and measured_rates(rows, CONFIG, even(prompt=5.0)).book_s == pytest.approx(0.15)


def test_passes_over_a_batch_share_its_time_and_its_tokens():
    """240 tokens were trained in .3 s, 120 of them twice; those were prepared once, in .1 s."""
    twice = replace(CONFIG, algorithm=AlgorithmConfig(epochs_per_batch=2))
    rates = measured_rates(measured_rows(), twice, even())

    assert rates.train_token_s == pytest.approx(0.3 / 240) and rates.prepare_token_s == pytest.approx(0.1 / 120)


def test_rates_on_shared_cores_are_processor_time():
    """All had half a core: half of the seconds. A scorer works .1 s for 8 groups of 30 tokens. Beside its steps (.5 s) and installs
    (.075 s) the generator's process works .125 s for 16 completions."""
    rates = measured_rates(measured_rows(), CONFIG, even(prompt=5.0), shared_cores=True)

    assert (rates.engine_step_s, rates.engine_completion_s) == (pytest.approx(0.01), pytest.approx(0.001))
    assert (rates.engine_prompt_s, rates.engine_beside_s) == (pytest.approx(0.002), pytest.approx(0.125 / 16))
    assert (rates.train_token_s, rates.optimizer_s) == (pytest.approx(0.15 / 240), pytest.approx(0.025))
    assert rates.score_token_s == pytest.approx(0.1 / (8 * 30))
    assert (rates.take_s, rates.export_s, rates.book_s) == (pytest.approx(0.05), pytest.approx(0.025), pytest.approx(0.075))
    assert (rates.load_s, rates.transfer_s) == (pytest.approx(0.05), pytest.approx(0.1))


@pytest.mark.parametrize(("key", "config"), [("queue/cpu_s", CONFIG), ("reward/cpu_s", replace(CONFIG, reward=RewardConfig(count=1)))])
def test_rates_on_shared_cores_take_processor_time_that_was_measured(key: str, config: Config):
    rows = [{name: value for name, value in row.items() if name != key} for row in measured_rows()]

    with pytest.raises(ConfigError, match=rf"{key}.* takes 8"):
        calibrated_rates(rows, config, even(), num_cores=2)


def test_on_shared_cores_a_call_takes_what_driver_and_queue_worked_for_it():
    """.1 s for an update, divided among the calls that the model makes; what switching added is taken out of all rates."""
    rates = calibrated_rates(measured_rows(), CONFIG, even(prompt=5.0), num_cores=1)
    found = predict(CONFIG, rates, even(prompt=5.0), num_updates=20, num_cores=1)

    assert rates.call_s == 0.0 and found.stretch > 1.0
    assert rates.call_work_s * found.calls * found.stretch == pytest.approx(0.1, rel=0.05)
    assert rates.engine_step_s * found.stretch == pytest.approx(0.01, rel=0.05)


def test_training_takes_the_completions_that_its_algorithm_trains():
    counts = {name: num_trained(replace(CONFIG, completions_per_prompt=6, algorithm=AlgorithmConfig(name=name))) for name in ALGORITHMS}

    assert counts == {"dpo": 2, "bok": 1, "rloo": 6}
    assert num_trained(CONFIG, tied=True) == 0  # a pair of equals teaches nothing
    assert num_trained(replace(CONFIG, completions_per_prompt=1, algorithm=AlgorithmConfig(name="rloo"))) == 1


def test_a_run_too_short_to_measure_is_refused():
    with pytest.raises(ConfigError, match=r"5 whole updates .* takes 8"):
        measured_rates(measured_rows(7), CONFIG, even())


def test_rows_without_the_keys_are_refused():
    with pytest.raises(ConfigError, match="0 whole updates"):
        measured_rates([{"version": 5.0, "time_s": 1.0}] * 20, CONFIG, even())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "must hold a mapping"),
        ("{", "cannot be read"),
        ("engine_step_s: 0.1", "no engine_completion_s"),
        ("engine_step_s: 0.1\nengine_completion_s: 0.1\nspeed: 3", "unknown speed"),
        ("engine_step_s: 0.1\nengine_completion_s: fast", "could not convert"),
        ("engine_step_s: -1\nengine_completion_s: 0.1", "engine_step_s must be a number of seconds >= 0"),
        ("engine_step_s: 0\nengine_completion_s: 0", "engine_completion_s must be a number of seconds > 0"),
        ("engine_step_s: .nan\nengine_completion_s: 1", "engine_step_s must be"),
    ],
)
def test_rates_that_are_none_are_refused(tmp_path: Path, text: str, message: str):
    (tmp_path / "rates.yaml").write_text(text)

    with pytest.raises(ConfigError, match=message):
        read_rates(tmp_path / "rates.yaml")


def test_lengths_come_from_the_dataset_of_a_run(tmp_path: Path):
    groups = [make_scored(make_ticket(number), scores=(1.0, 1.0 if number == 0 else 0.0)) for number in range(3)]
    write_part(tmp_path / "rollouts", 0, [GroupFate(rows=each, fate="trained", update=0, position=0) for each in rows_of(to_batch(groups))])

    lengths = measured_lengths(tmp_path, CONFIG)

    assert lengths.tokens.tolist() == [[len(rollout.completion_ids) for rollout in each.group.rollouts] for each in groups]
    assert lengths.tied.tolist() == [True, False, False] and lengths.prompt_tokens == 5.0


def test_a_folder_without_samples_is_refused(tmp_path: Path):
    (tmp_path / "journal").mkdir()

    with pytest.raises(ConfigError, match="holds no sampled groups"):
        measured_lengths(tmp_path, CONFIG)


def test_a_damaged_dataset_is_refused(tmp_path: Path):
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "part-00000000.parquet").write_bytes(b"PAR1 cut")

    with pytest.raises(ConfigError, match="damaged"):
        measured_lengths(tmp_path, CONFIG)


def test_ties_grow_rarer_with_more_completions_and_more_frequent_with_fewer():
    """Half of the groups of two are tied, and of those .6 stay it with one more. Of those that are not, with one less all must be."""
    lengths = Lengths(tokens=np.ones((2, 2)), tied=np.array([True, False]), prompt_tokens=0.0, still_tied=0.6)
    rng = np.random.default_rng(0)

    tied = {num: np.mean([lengths.draw(rng, num)[1] for _ in range(4000)]) for num in (1, 2, 3, 4)}

    assert tied == {num: pytest.approx(share, abs=0.03) for num, share in {1: 0.5 / 0.6, 2: 0.5, 3: 0.3, 4: 0.18}.items()}


def test_how_ties_go_on_is_read_off_the_scores(tmp_path: Path):
    """Scores of three completions: all equal, one apart, two apart from each other. Without one of them 3, 1 and 0 of 3 rests are tied."""
    of_groups = ((1.0, 1.0, 1.0), (1.0, 0.0, 1.0), (0.0, 1.0, 2.0))
    groups = [make_scored(make_ticket(number), scores=scores) for number, scores in enumerate(of_groups)]
    write_part(tmp_path / "rollouts", 0, [GroupFate(rows=each, fate="trained", update=0, position=0) for each in rows_of(to_batch(groups))])

    lengths = measured_lengths(tmp_path, replace(CONFIG, completions_per_prompt=3))

    assert lengths.tied.tolist() == [True, False, False] and lengths.still_tied == pytest.approx((1 / 3) / (4 / 9))


def test_larger_groups_draw_their_further_completions_among_the_siblings():
    lengths = Lengths(tokens=np.array([[3.0, 4.0]]), tied=np.array([False]), prompt_tokens=0.0)
    drawn, tied = lengths.draw(np.random.default_rng(0), 6)

    assert len(drawn) == 6 and set(drawn) <= {3.0, 4.0} and not tied
    assert lengths.draw(np.random.default_rng(0), 1)[0].tolist() == [3.0]


def test_calls_take_what_makes_the_measured_run_come_out():
    """Rows of updates as long as the model makes them when each call takes 30 ms; from nothing but that length the 30 ms are found."""
    config, lengths = replace(CONFIG, max_staleness=0), even(prompt=5.0)
    known = replace(measured_rates(measured_rows(), config, lengths), call_s=0.03)
    update_s = predict(config, known, lengths, num_updates=20).update_s
    longer = update_s / 2.0
    shares = ("generate/tokens_per_s", "score/groups_per_s")  # as much in more time
    rows = [
        row
        | {key: row[key] / longer for key in shares}
        | {"generate/idle_share": 1 - 0.5 / longer, "score/idle_share": 1 - 0.1 / longer}
        | {"time_s": row["time_s"] * longer, "queue/wait_s": 1.2 + update_s - 2.0}
        for row in measured_rows()
    ]

    assert calibrated_rates(rows, config, lengths).call_s == 0.03


# Budgets, and the command


def test_a_budget_goes_where_the_work_is():
    """Training needs nine times as long as sampling: of ten, one generator is enough for eight ranks."""
    config = replace(CONFIG, generator=GeneratorConfig(max_inflight=32, num_gpus=1), learner=LearnerConfig(num_gpus=1))
    best, plans = recommend(
        Basis(config=config, rates=replace(FAST, engine_completion_s=0.001, train_token_s=0.009), lengths=even()), 9, "gpus"
    )

    assert (best.config.generator.count, best.config.learner.num_ranks, best.config.max_staleness) == (1, 8, 1)
    assert best in plans and best.name == "1 + 8, bound 1"


def test_a_budget_that_holds_no_run_is_refused():
    with pytest.raises(ConfigError, match=r"a budget of 2 cores does not hold a generator .* scorers and rewards 1"):
        recommend(Basis(config=CONFIG, rates=FAST, lengths=even()), 2, "cores")


@pytest.mark.parametrize(
    ("generator", "rank", "budget", "expected"),
    [(0.2, 0.4, 1, {(3, 1), (1, 2)}), (0.1, 0.3, 1, {(7, 1), (4, 2), (1, 3)}), (0.3, 0.7, 1, {(1, 1)}), (0.5, 0.5, 1, {(1, 1)})],
)
def test_shares_of_gpus_are_used_up_without_losing_a_member(generator: float, rank: float, budget: int, expected: set[tuple[int, int]]):
    """1 - .8 is a little less than .2 in binary: there is room for that generator all the same."""
    config = replace(
        CONFIG, batch_groups=12, generator=GeneratorConfig(max_inflight=32, num_gpus=generator), learner=LearnerConfig(num_gpus=rank)
    )
    _, plans = recommend(Basis(config=config, rates=FAST, lengths=even()), budget, "gpus")

    assert {(plan.config.generator.count, plan.config.learner.num_ranks) for plan in plans} == expected


def test_too_many_combinations_are_refused():
    with pytest.raises(ConfigError, match="10000 combinations"):
        compare(Basis(config=CONFIG, rates=FAST, lengths=even()), generators=range(1, 101), ranks=[1], bounds=range(100))


def plan_run(folder: Path) -> Path:
    """A run folder to plan from."""
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(CONFIG))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in measured_rows()))
    groups = [make_scored(make_ticket(number)) for number in range(3)]
    write_part(folder / "rollouts", 0, [GroupFate(rows=each, fate="trained", update=0, position=0) for each in rows_of(to_batch(groups))])
    return folder


def test_a_run_is_planned_from_its_own_rates(tmp_path: Path):
    out = io.StringIO()
    wishes = Wishes(generators="1,2", bounds="0,1", json=tmp_path / "plans.json", plot=tmp_path / "plans.svg")

    run_plan([str(plan_run(tmp_path / "run")), "algorithm.epochs_per_batch=2"], wishes, Console(file=out, width=140))

    plans = json.loads((tmp_path / "plans.json").read_text())["plans"]
    assert [(plan["generators"], plan["max_staleness"]) for plan in plans] == [(1, 0), (2, 0), (1, 1), (2, 1)]
    assert "warning: the run used no GPU" in out.getvalue()
    assert "measured in the run: 1,800 updates/h, generators idle 50%, learner idle 75%" in out.getvalue()
    assert (tmp_path / "plans.svg").read_text().count("<svg") == 1 and "recommended" not in out.getvalue()


@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        (Wishes(), ["used no GPU"]),
        (Wishes(shared_cores=2), []),
        (Wishes(gpus=3, shared_cores=2), ["generator.num_gpus and learner.num_gpus 0"]),
        (Wishes(gpus=3), ["one GPU each is counted", "used no GPU"]),
        (Wishes(gpus=3, rates=Path("rates.yaml")), ["one GPU each is counted"]),
    ],
)
def test_what_a_plan_assumes_is_said(tmp_path: Path, wishes: Wishes, said: list[str]):
    found = assumptions(plan_run(tmp_path / "run"), CONFIG, wishes)

    assert len(found) == len(said) and all(part in text for part, text in zip(said, found, strict=True))


def test_nothing_is_assumed_of_a_run_that_had_gpus(tmp_path: Path):
    config = replace(CONFIG, generator=replace(CONFIG.generator, num_gpus=1), learner=LearnerConfig(num_gpus=1))
    folder = plan_run(tmp_path / "run")
    (folder / "config.yaml").write_text(to_yaml(config))

    assert assumptions(folder, config, Wishes(gpus=4)) == []


def test_of_several_runs_the_rates_are_their_mean(tmp_path: Path):
    folders = [str(plan_run(tmp_path / name)) for name in ("first", "second")]
    rows = [json.loads(line) for line in (tmp_path / "second" / "metrics.jsonl").read_text().splitlines()]
    slower = [{**row, "generate/step_fixed_s": 3 * row["generate/step_fixed_s"]} for row in rows]
    (tmp_path / "second" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in slower))

    found: list[float] = []
    for words in (folders[:1], folders):
        run_plan(words, Wishes(json=tmp_path / "plans.json"), Console(file=io.StringIO()))
        found.append(json.loads((tmp_path / "plans.json").read_text())["rates"]["engine_step_s"])

    assert found[1] == pytest.approx(2 * found[0])


def test_given_rates_and_a_budget_are_enough_for_a_recommendation(tmp_path: Path):
    out = io.StringIO()
    (tmp_path / "rates.yaml").write_text("engine_step_s: 0.01\nengine_completion_s: 1.0e-4\ntrain_token_s: 1.0e-3\n")

    run_plan(["batch_groups=8"], Wishes(rates=tmp_path / "rates.yaml", median_tokens=5, cores=4), Console(file=out, width=140))

    assert "recommended: generator.count=1 learner.num_ranks=2" in out.getvalue()


@pytest.mark.parametrize(
    ("words", "wishes", "message"),
    [
        ([], Wishes(), "nothing to plan from"),
        ([], Wishes(rates=Path("r.yaml")), "give --median-tokens"),
        ([], Wishes(rates=Path("missing.yaml"), median_tokens=5), "cannot be read"),
        (["."], Wishes(), "is no run folder"),
        ([".", ".."], Wishes(), "is no run folder"),
        (["no-such-run"], Wishes(), "config file not found"),
    ],
)
def test_what_cannot_be_planned_is_refused(words: list[str], wishes: Wishes, message: str):
    with pytest.raises(ConfigError, match=message):
        run_plan(words, wishes, Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        (Wishes(generators="1,many"), "--generators must be whole numbers"),
        (Wishes(ranks="0"), "--ranks must be numbers >= 1"),
        (Wishes(ranks="3"), "must be divisible by learner.num_ranks"),
        (Wishes(gpus=4, cores=4), "choose one"),
        (Wishes(gpus=1), "does not hold a generator"),
    ],
)
def test_nonsense_wishes_are_refused(tmp_path: Path, wishes: Wishes, message: str):
    with pytest.raises(ConfigError, match=message):
        run_plan([str(plan_run(tmp_path / "run"))], wishes, Console(file=io.StringIO()))
