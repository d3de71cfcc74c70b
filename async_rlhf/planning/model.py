"""Predictions: the pipeline's model run with a config and its rates; and rates freed of what shared cores did to them."""

import math
from collections.abc import Sequence
from dataclasses import replace

from async_rlhf.config import Config
from async_rlhf.planning.lengths import Lengths
from async_rlhf.planning.pipeline import WARM_UP, PipelineModel
from async_rlhf.planning.prediction import Prediction, Scope
from async_rlhf.planning.rates import Rates, measured_rates, measured_update_s
from async_rlhf.stage_times import Row

NUM_UPDATES = 40
"""Updates that are measured."""
NUM_FITS = 4
"""Rounds in which rates_alone closes in."""
CALLS_S = (0.001, 0.002, 0.004, 0.007, 0.01, 0.015, 0.02, 0.03, 0.05, 0.08)
"""Tried for call_s."""
LEARNER_RATES = ("take_s", "step_fixed_s", "prepare_token_s", "train_token_s", "optimizer_s", "export_s", "book_s")


def predict(
    config: Config, rates: Rates, lengths: Lengths, *, num_updates: int = NUM_UPDATES, num_cores: float = math.inf, seed: int = 0
) -> Prediction:
    """Simulate `config` and measure `num_updates` updates of it, after WARM_UP others.

    Args:
        rates: of processes that have their cores, or GPUs, to themselves.
        num_cores: that generators, scorers and ranks share, one each when they work.
    """
    return PipelineModel(config, rates, lengths, Scope(num_updates=WARM_UP + num_updates, num_cores=num_cores, seed=seed)).run()


def rates_alone(measured: Rates, config: Config, lengths: Lengths, num_cores: float) -> Rates:
    """What the rates of a run whose processes shared `num_cores` would have been on cores of their own.

    Found by simulating that run: its stages are sped up until, slowed down by each other, they take what was measured.
    """
    rates = measured
    for _ in range(NUM_FITS):
        slowdown = predict(config, rates, lengths, num_updates=NUM_UPDATES // 2, num_cores=num_cores).slowdown
        engine, scorer, learner = (slowdown[stage] for stage in ("generators", "scorers", "learner"))
        rates = replace(
            measured,
            engine_step_s=measured.engine_step_s / engine,
            engine_completion_s=measured.engine_completion_s / engine,
            pause_s=measured.pause_s / engine,
            transfer_s=measured.transfer_s / engine,
            score_call_s=measured.score_call_s / scorer,
            score_token_s=measured.score_token_s / scorer,
            reward_call_s=measured.reward_call_s / slowdown.get("rewards", 1.0),
            reward_token_s=measured.reward_token_s / slowdown.get("rewards", 1.0),
            **{name: getattr(measured, name) / learner for name in LEARNER_RATES},
        )
    return rates


def calibrated_rates(rows: Sequence[Row], config: Config, lengths: Lengths, num_cores: float = math.inf) -> Rates:
    """The rates of a run, such that its own model makes an update in the time that the run took for one.

    Latencies between actors are not measured: call_s takes the value of CALLS_S that brings the model nearest.
    Args:
        rows: of metrics.jsonl.
        num_cores: that its processes shared.
    Raises:
        ConfigError: see measured_rates.
    """
    measured, update_s = measured_rates(rows, config, lengths), measured_update_s(rows)
    if num_cores < math.inf:
        measured = rates_alone(measured, config, lengths, num_cores)
    tried = [replace(measured, call_s=call_s) for call_s in CALLS_S]
    made = [predict(config, rates, lengths, num_updates=NUM_UPDATES // 2, num_cores=num_cores).update_s for rates in tried]
    return min(zip(tried, made, strict=True), key=lambda pair: abs(pair[1] - update_s))[0]
