"""benchmarks/overlap.py and sync_vs_async.py: what is read from a run, and what it is held against."""

import math
from typing import Any

import pytest

from async_rlhf.config import load_config
from benchmarks import overlap, sync_vs_async
from benchmarks.overlap import Measured, StageTimes
from benchmarks.stages import score


def run_of(seconds: list[float], evaluations: list[tuple[int, int, float]] | None = None) -> Measured:
    """A run whose updates took so long, from the first ticket on; (version_min, version_max, accuracy) of its evaluations."""
    rows: list[dict[str, Any]] = [
        {"version": number, "time_s": sum(seconds[:number]), "rollout/length_tokens": 50.0} for number in range(1, len(seconds) + 1)
    ]
    found = [{"version_min": low, "version_max": high, "evaluate/score": of} for low, high, of in evaluations or []]
    return Measured(cpu_s={}, rows=rows, all_rows=rows, evaluations=found)


def test_an_update_takes_the_mean_of_those_after_the_first_row():
    run = run_of([9.0, 1.0, 2.0, 3.0, 4.0])

    assert run.update_s == pytest.approx(2.5)
    assert run.blocks_s(2) == pytest.approx([1.5, 3.5])


def test_an_efficiencys_spread_has_the_ideals_and_the_blocks_in_it():
    run = run_of([9.0, 1.0, 2.0, 3.0, 4.0])
    parts = {"train_s": 1.0, "gather_s": 0.0, "score_s": 0.0}
    # Of completions as long as the run's, and of those twice as long.
    ideals = [StageTimes(generate_s=1.6, length_tokens=50.0, **parts), StageTimes(generate_s=4.8, length_tokens=100.0, **parts)]

    found = overlap.efficiency(ideals, run)

    assert found.median == pytest.approx(3.2 * 50 / 75 / 2.5)
    assert found.low == pytest.approx(1.6 / 4.0)  # the shorter ideal over the last third
    assert found.high == pytest.approx(2.4 / 1.0)


@pytest.mark.parametrize(
    ("parts", "ideal_s", "free_s"),
    [((5.0, 1.0, 0.0, 1.0), 5.0, 5.0), ((2.0, 2.0, 0.5, 0.5), 3.0, 2.5), ((1.0, 3.0, 0.0, 1.0), 4.0, 3.0)],
    ids=["generation", "the scorer moves", "training"],
)
def test_the_ideal_is_the_longer_side_and_a_free_scorer_helps_the_other_one(parts: tuple[float, ...], ideal_s: float, free_s: float):
    generate_s, train_s, gather_s, score_s = parts
    times = StageTimes(generate_s=generate_s, train_s=train_s, gather_s=gather_s, score_s=score_s, length_tokens=50.0)

    assert (times.ideal_s, times.free_ideal_s) == (ideal_s, free_s)
    assert overlap.mean_of([times, times]) == times


def test_the_time_to_an_accuracy_lies_on_a_line_between_two_evaluations_at_the_versions_that_were_asked():
    run = run_of([10.0] * 30, [(0, 0, 0.4), (10, 12, 0.5), (20, 22, 0.7)])

    # Versions 11 and 21 have 0.5 and 0.7: 0.6 is reached at version 16.
    assert sync_vs_async.reached(0.6, run) == (pytest.approx(16.0), pytest.approx(160.0))
    assert all(map(math.isnan, sync_vs_async.reached(0.9, run)))


def test_one_lucky_evaluation_is_no_accuracy():
    """The 0.7 and the 0.5 after it make two of 0.6."""
    assert sync_vs_async.isotonic([0.4, 0.7, 0.5, 0.65, 0.9]) == pytest.approx([0.4, 0.6, 0.6, 0.65, 0.9])
    assert sync_vs_async.isotonic([3.0, 2.0, 1.0]) == pytest.approx([2.0] * 3)

    run = run_of([10.0] * 40, [(0, 0, 0.4), (10, 10, 0.7), (20, 20, 0.5), (30, 30, 0.8)])
    assert sync_vs_async.reached(0.7, run) == (pytest.approx(25.0), pytest.approx(250.0))


def test_the_stand_ins_reward_has_no_ties():
    texts = [f"w{first}w{second}" for first in range(40) for second in range(40)]
    scores = score(["p"] * len(texts), texts)

    assert len(set(scores)) == len(texts) and all(0 <= each < 1 for each in scores)


@pytest.mark.parametrize("name", overlap.REGIMES)
@pytest.mark.parametrize("eta", overlap.STALENESS)
def test_every_regime_is_a_config(name: str, eta: int):
    load_config(["conf/quickstart.yaml"], [*overlap.COMMON, *overlap.REGIMES[name], f"max_staleness={eta}"])


@pytest.mark.parametrize("name", sync_vs_async.VARIANTS)
def test_every_variant_is_a_config(name: str):
    load_config(["conf/quickstart.yaml"], [*sync_vs_async.COMMON, *sync_vs_async.VARIANTS[name], *sync_vs_async.EVALUATIONS])
