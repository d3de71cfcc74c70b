"""Predictions: the pipeline's model run with a config and its rates; and rates that fit a run."""

import math
from collections.abc import Sequence
from dataclasses import replace

from async_rlhf.config import Config
from async_rlhf.planning.lengths import Lengths
from async_rlhf.planning.pipeline import WARM_UP, PipelineModel
from async_rlhf.planning.prediction import Prediction, Scope
from async_rlhf.planning.rates import Rates, measured_calls_work_s, measured_rates, measured_update_s
from async_rlhf.stage_times import Row

NUM_UPDATES = 40
"""Updates that are measured."""
NUM_FITS = 3
"""Rounds in which calls and switching settle: more work for each call makes them fewer."""
CALLS_S = (0.0, 0.001, 0.002, 0.004, 0.007, 0.01, 0.015, 0.02, 0.03, 0.05, 0.08)
"""Tried for call_s."""


def predict(
    config: Config, rates: Rates, lengths: Lengths, *, num_updates: int = NUM_UPDATES, num_cores: float = math.inf, seed: int = 0
) -> Prediction:
    """Simulate `config` and measure `num_updates` updates of it, after WARM_UP others.

    Args:
        rates: of processes that have their cores, or GPUs, to themselves.
        num_cores: that generators, scorers and ranks share, one each when they work.
    """
    return PipelineModel(config, rates, lengths, Scope(num_updates=WARM_UP + num_updates, num_cores=num_cores, seed=seed)).run()


def calibrated_rates(rows: Sequence[Row], config: Config, lengths: Lengths, num_cores: float = math.inf) -> Rates:
    """The rates of a run, of processes that have their cores to themselves.

    Where they had: latencies between actors are not measured, so call_s takes the value of CALLS_S with which the model makes an update in
    the time that the run took for one. Where they shared cores: all rates are processor time, without what switching added to it, and a
    call takes what driver and queue worked for it, and its turn on a core; nothing is fitted to the time of an update.
    Args:
        rows: of metrics.jsonl.
        num_cores: that its processes shared.
    Raises:
        ConfigError: see measured_rates.
    """
    if num_cores < math.inf:
        return _unshared(rows, config, lengths, num_cores)
    measured, update_s = measured_rates(rows, config, lengths), measured_update_s(rows)
    tried = [replace(measured, call_s=call_s) for call_s in CALLS_S]
    made = [predict(config, rates, lengths, num_updates=NUM_UPDATES // 2).update_s for rates in tried]
    return min(zip(tried, made, strict=True), key=lambda pair: abs(pair[1] - update_s))[0]


def _unshared(rows: Sequence[Row], config: Config, lengths: Lengths, num_cores: float) -> Rates:
    measured = measured_rates(rows, config, lengths, shared_cores=True)
    calls_work_s = measured_calls_work_s(rows)
    rates = replace(measured, call_s=0.0)
    for _ in range(NUM_FITS):
        found = predict(config, rates, lengths, num_updates=NUM_UPDATES // 2, num_cores=num_cores)
        rates = replace(measured, call_s=0.0, call_work_s=calls_work_s / found.calls).scaled(1 / found.stretch)
    return rates
