"""What an engine's steps cost: fits of constructed steps."""

import pytest

from actors.step_cost import StepCost, StepMoments


def fitted(steps: list[tuple[int, int]], cost: StepCost) -> StepCost | None:
    """The fit of steps of (completions, of these joined) that cost exactly so much."""
    moments = StepMoments()
    for completions, joined in steps:
        moments = moments.with_step(completions, joined, cost.fixed_s + cost.completion_s * completions + cost.prompt_s * joined)
    return moments.fitted()


@pytest.mark.parametrize("cost", [(0.01, 0.001, 0.004), (0.0, 0.001, 0.0), (0.02, 0.0, 0.003)])
def test_the_cost_of_steps_is_found_from_the_steps(cost: tuple[float, float, float]):
    fixed, completion, prompt = cost
    expected = StepCost(fixed_s=fixed, completion_s=completion, prompt_s=prompt)
    found = fitted([(1 + 7 * number % 50, number % 4) for number in range(100)], expected)

    assert found is not None
    assert (found.fixed_s, found.completion_s, found.prompt_s) == tuple(pytest.approx(part, abs=1e-8) for part in cost)


def test_steps_that_were_all_alike_cost_what_they_cost():
    found = fitted([(8, 0)] * 20, StepCost(fixed_s=0.01, completion_s=0.001, prompt_s=0.0))

    assert found is not None and found.fixed_s + 8 * found.completion_s == pytest.approx(0.018)


def test_no_part_of_a_step_costs_less_than_nothing():
    found = fitted([(number, number % 3) for number in range(1, 30)], StepCost(fixed_s=-0.01, completion_s=0.01, prompt_s=0.0))

    assert found is not None and min(found.fixed_s, found.completion_s, found.prompt_s) >= 0


def test_without_steps_nothing_is_known():
    assert StepMoments().fitted() is None


def test_what_steps_cost_long_ago_is_forgotten():
    moments = StepMoments()
    for seconds in (1.0, 0.01):
        for number in range(5000):
            moments = moments.with_step(number % 9, 0, seconds)

    found = moments.fitted()

    assert found is not None and found.fixed_s == pytest.approx(0.01, rel=0.7)
