"""The schedule: per optimizer step, warm at first, never zero. (Importing the module imports deepspeed: seconds.)"""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from async_rlhf.config import load_config
from async_rlhf.config.schema import LearnerConfig
from learners.engine import learning_rate_share

SCHEDULES = ["constant", "linear", "cosine"]
all_schedules = pytest.mark.parametrize("schedule", SCHEDULES)


def shares(num_steps: int, *, schedule: str, warmup: int = 0, final: float = 0.1) -> list[float]:
    settings = LearnerConfig(schedule=schedule, warmup_steps=warmup, final_learning_rate_share=final)  # type: ignore[arg-type]
    return [learning_rate_share(step, settings, num_steps) for step in range(num_steps)]


def test_linear_schedule_by_hand():
    """Warm-up 1/3, 2/3, then from 1 to .2 in four equal falls of .2."""
    assert shares(7, schedule="linear", warmup=2, final=0.2) == pytest.approx([1 / 3, 2 / 3, 1.0, 0.8, 0.6, 0.4, 0.2], abs=1e-12)


def test_cosine_schedule_by_hand():
    """.1 + .9 * (1 + cos(pi p)) / 2 at p = 0, 1/2, 1."""
    assert shares(3, schedule="cosine") == pytest.approx([1.0, 0.55, 0.1], abs=1e-12)


@given(st.sampled_from(SCHEDULES), st.integers(1, 200), st.data(), st.floats(1e-3, 1.0))
def test_rate_rises_strictly_in_the_warm_up_then_never_rises_and_is_never_zero(schedule: str, num_steps: int, data, final: float):
    warmup = data.draw(st.integers(0, num_steps // 2))

    values = shares(num_steps, schedule=schedule, warmup=warmup, final=final)

    assert all(before < after for before, after in pairwise(values[: warmup + 1]))
    assert all(before >= after - 1e-12 for before, after in pairwise(values[warmup:]))
    assert values[warmup] == pytest.approx(1.0, abs=1e-12)
    assert all(0 < value <= 1 + 1e-12 for value in values)


@all_schedules
def test_last_step_has_the_final_share(schedule: str):
    expected = 1.0 if schedule == "constant" else 0.1

    assert shares(50, schedule=schedule, warmup=5)[-1] == pytest.approx(expected, abs=1e-12)


@all_schedules
@pytest.mark.parametrize("step", [50, 51, 10_000])
def test_steps_past_the_end_keep_the_last_rate(schedule: str, step: int):
    settings = LearnerConfig(schedule=schedule, warmup_steps=5)  # type: ignore[arg-type]

    assert learning_rate_share(step, settings, 50) == pytest.approx(learning_rate_share(49, settings, 50), abs=1e-12)


@all_schedules
def test_known_mistake_1_more_minibatches_neither_lower_the_mean_rate_nor_end_at_zero(schedule: str):
    """Stepped per batch, 4 minibatches would see the first quarter of the schedule, or one that ended four times too early."""
    overrides = ["updates=40", f"learner.schedule={schedule}", "learner.warmup_steps=0"]
    means: list[float] = []
    for minibatches, epochs in ((1, 1), (4, 1), (4, 2)):
        config = load_config(
            overrides=[*overrides, f"algorithm.minibatches_per_batch={minibatches}", f"algorithm.epochs_per_batch={epochs}"]
        ).config
        assert config.optimizer_steps == 40 * minibatches * epochs
        values = [learning_rate_share(step, config.learner, config.optimizer_steps) for step in range(config.optimizer_steps)]
        assert values[0] == pytest.approx(1.0, abs=1e-12)
        assert values[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1, abs=1e-12)
        means.append(math.fsum(values) / len(values))

    assert means == pytest.approx([means[0]] * 3, abs=1e-12)


def test_a_scheduler_stepped_after_each_optimizer_step_uses_each_share_once():
    """What DeepSpeed does with it: the optimizer's rate at step i is share(i), the first and the last included."""
    settings = LearnerConfig(schedule="linear", warmup_steps=2, learning_rate=0.01)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=settings.learning_rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_share(step, settings, 6))
    used: list[float] = []

    for _ in range(6):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()

    assert used == pytest.approx([0.01 * share for share in shares(6, schedule="linear", warmup=2)], rel=1e-12)
