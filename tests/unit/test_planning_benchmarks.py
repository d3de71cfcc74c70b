"""benchmarks/plan.py and benchmarks/scaling.py: what they measure is what they say."""

import pytest

from async_rlhf.verdict import Bottleneck
from benchmarks.plan import RUNS, is_as_named
from benchmarks.scaling import queue_cost


@pytest.mark.parametrize(("batch_groups", "num_decisions"), [(64, 8), (768, 1)])
def test_the_cost_of_the_queue_holds_whole_batches(batch_groups: int, num_decisions: int):
    cost = queue_cost(batch_groups, journaled=False)

    assert cost.num_decisions == num_decisions and cost.grant_s > 0 and cost.put_s > 0


@pytest.mark.parametrize(
    ("name", "bottleneck", "generator_idle", "learner_idle", "expected"),
    [
        ("generation-bound", Bottleneck.GENERATION, 0.3, 0.3, True),
        ("generation-bound", Bottleneck.WAITING, 0.1, 0.6, True),
        ("generation-bound", Bottleneck.TRAINING, 0.5, 0.1, False),
        ("training-bound", Bottleneck.WAITING, 0.5, 0.1, True),
        ("training-bound", Bottleneck.BALANCED, 0.1, 0.1, False),
        ("balanced", Bottleneck.WAITING, 0.40, 0.45, True),
        ("balanced", Bottleneck.GENERATION, 0.1, 0.6, False),
        ("synchronous", Bottleneck.WAITING, 0.4, 0.6, True),
    ],
)
def test_a_regime_is_told_by_its_verdict_or_its_idle_shares(
    name: str, bottleneck: Bottleneck, generator_idle: float, learner_idle: float, expected: bool
):
    assert name in RUNS
    assert is_as_named(name, bottleneck, {"generator_idle": generator_idle, "learner_idle": learner_idle}) is expected
