"""Intervals, standard error and sign test, against arithmetic done by hand and against exact enumeration."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from async_rlhf.intervals import bootstrap_interval, mean_interval, sign_test, standard_error, wilson_interval


def test_wilson_interval_of_eight_in_ten():
    """p = 0.8, n = 10, z^2 = 3.841459, so 1 + z^2/n = 1.3841459.

    middle: 0.8 + 3.841459/20 = 0.9920729
    half:   1.959964 sqrt(0.8 * 0.2/10 + 3.841459/400) = 1.959964 sqrt(0.02560365) = 0.3136166
    low = (0.9920729 - 0.3136166)/1.3841459 = 0.490162, high = (0.9920729 + 0.3136166)/1.3841459 = 0.943318
    """
    assert wilson_interval(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)


@pytest.mark.parametrize("num", [1, 3, 500])
def test_wilson_interval_stays_inside_zero_and_one_and_mirrors(num: int) -> None:
    low, high = wilson_interval(0, num)

    assert low == pytest.approx(0.0, abs=1e-15)
    assert 0.0 < high < 1.0
    assert wilson_interval(num, num) == pytest.approx((1 - high, 1.0))


def test_bootstrap_interval_is_that_of_all_resamples() -> None:
    """Of (0, 0, 1, 5) there are 4^4 = 256 equally likely resamples; the 2.5 % and 97.5 % quantiles of their means are exact."""
    values = [0.0, 0.0, 1.0, 5.0]
    means = np.array([np.mean(drawn) for drawn in itertools.product(values, repeat=4)])
    low, high = np.quantile(means, [0.025, 0.975])

    found = bootstrap_interval(values, resamples=200_000)

    # Neighbouring means are 0.25 apart at least: a quantile that is off by one of them shows.
    assert found == pytest.approx((low, high), abs=1e-9)


def test_bootstrap_interval_covers_the_mean_of_its_distribution_nineteen_times_in_twenty() -> None:
    rng = np.random.default_rng(3)
    samples = [rng.normal(2.0, 1.0, size=60).tolist() for _ in range(400)]

    intervals = [bootstrap_interval(sample, resamples=400) for sample in samples]

    covered = sum(low <= 2.0 <= high for low, high in intervals) / len(intervals)
    assert 0.91 < covered < 0.975, "95 % less the small-sample optimism of percentiles; standard error 0.011"


def test_bootstrap_interval_is_the_same_for_the_same_values_and_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random(50).tolist()
    whole = bootstrap_interval(values)

    assert bootstrap_interval(values) == whole
    assert bootstrap_interval(values, seed=1) != whole
    monkeypatch.setattr("async_rlhf.intervals.BLOCK", 7 * 50)
    assert bootstrap_interval(values) == whole, "a stream of numbers does not know how many are drawn at once"


def test_paired_differences_have_a_narrower_interval_than_unpaired_scores() -> None:
    """Prompts differ much (0 to 10), the policies little (0.1): only pairing shows it."""
    before = np.linspace(0, 10, 200)
    after = before + np.tile([0.0, 0.2], 100)

    low, high = bootstrap_interval((after - before).tolist())

    assert 0.08 < low < 0.1 < high < 0.12
    assert bootstrap_interval(after.tolist())[0] < float(before.mean()), "unpaired, the change is lost in the prompts"


def test_mean_of_zeros_and_ones_is_a_share_and_any_other_value_makes_it_a_mean() -> None:
    assert mean_interval([1.0, 0.0, 1.0, 1.0]) == wilson_interval(3, 4)
    assert mean_interval([1.0, 0.5, 1.0, 1.0]) == bootstrap_interval([1.0, 0.5, 1.0, 1.0])


def test_standard_error_of_one_two_and_six() -> None:
    """Mean 3, squares 4 + 1 + 9 = 14, variance 14 / 2 = 7, error sqrt(7 / 3)."""
    assert standard_error([1.0, 2.0, 6.0]) == pytest.approx(math.sqrt(7 / 3))
    assert standard_error([1.0]) == math.inf


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (3, 9), (8, 8), (9, 8), (60, 41), (300, 250)])
def test_sign_test_is_twice_the_smaller_tail_of_fair_coins(wins: int, losses: int) -> None:
    num = wins + losses
    tail = sum(Fraction(math.comb(num, k), 2**num) for k in range(min(wins, losses) + 1))

    assert sign_test(wins, losses) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-9)
    assert sign_test(losses, wins) == sign_test(wins, losses)


def test_sign_test_of_three_against_nine() -> None:
    """2 (1 + 12 + 66 + 220) / 4096 = 598 / 4096."""
    assert sign_test(3, 9) == pytest.approx(598 / 4096)
