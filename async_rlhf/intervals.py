"""How sure an evaluation is: 95 % intervals, standard errors and a sign test."""

import math
from collections.abc import Sequence

import numpy as np

Z_95 = 1.959964
"""Standard normal quantile of a two-sided 95 % interval."""
RESAMPLES = 2000
"""Of a bootstrap: its quantiles then move by about a hundredth of the interval between two seeds."""
BLOCK = 1_000_000
"""Values drawn at once, so that many prompts need no more memory than few."""

Interval = tuple[float, float]
"""Low and high end."""


def wilson_interval(right: int, num: int) -> Interval:
    """95 % score interval of a share (Wilson 1927).

    (p + z^2/2n +- z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n), p = right / num, z = 1.96.
    """
    share, square = right / num, Z_95**2 / num
    middle, half = share + square / 2, Z_95 * (share * (1 - share) / num + square / (4 * num)) ** 0.5
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))


def bootstrap_interval(values: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """95 % percentile interval of the mean of `values` (Efron 1979): they are drawn anew, with replacement, `resamples` times.

    Paired values are resampled as pairs when `values` holds their differences.

    Args:
        values: N >= 1 numbers, one per prompt.
        seed: of the resampling: the same values give the same interval.
    """
    given, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    per_block = max(1, BLOCK // len(given))
    means: list[np.ndarray] = []
    for start in range(0, resamples, per_block):
        drawn = rng.integers(0, len(given), size=(min(per_block, resamples - start), len(given)))
        means.append(given[drawn].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def mean_interval(values: Sequence[float]) -> Interval:
    """95 % interval of a mean: Wilson's where all values are 0 or 1, so that it is a share; else the bootstrap's."""
    if all(value in (0, 1) for value in values):
        return wilson_interval(sum(value == 1 for value in values), len(values))
    return bootstrap_interval(values)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean: s / sqrt(N), s with N - 1; infinite for one value, which says nothing of its spread."""
    num = len(values)
    return float(np.std(np.asarray(values, dtype=np.float64), ddof=1)) / math.sqrt(num) if num > 1 else math.inf


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of `wins` against `losses` if both were equally likely; ties count for neither (Dixon and Mood 1946).

    min(1, 2 sum_{k <= min(wins, losses)} C(n, k) / 2^n), n = wins + losses.
    """
    num = wins + losses
    log_half = num * math.log(2)
    tail = sum(
        math.exp(math.lgamma(num + 1) - math.lgamma(k + 1) - math.lgamma(num - k + 1) - log_half) for k in range(min(wins, losses) + 1)
    )
    return min(1.0, 2 * tail)
