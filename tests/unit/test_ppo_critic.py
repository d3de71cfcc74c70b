"""What PPO's critic adds: the clipped value loss, and advantages and returns whitened over the batch of all ranks."""

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from async_rlhf.batching import Batching, TrainingSequence, Unit, collate
from async_rlhf.config import load_config
from async_rlhf.errors import ShapeError
from async_rlhf.losses import value_loss
from learners.objective import Totals
from learners.ppo import PPO, PPOCritic
from tests.support.samples import make_scored, make_ticket

LENGTHS = (4, 1, 5, 2)
MASK = torch.arange(5)[None] < torch.tensor(LENGTHS)[:, None]


def slow_value_loss(values: list[Any], old: list[Any], returns: list[Any], mask: list[Any], clip_range: float, denominator: float) -> float:
    total = 0.0
    for n, row in enumerate(mask):
        for t in (t for t, real in enumerate(row) if real):
            near = old[n][t] + min(max(values[n][t] - old[n][t], -clip_range), clip_range)
            total += max((values[n][t] - returns[n][t]) ** 2, (near - returns[n][t]) ** 2) / 2
    return total / denominator


def random_rows(count: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 5, generator=g, dtype=torch.float64) for _ in range(count)]


def hidden(rows: Tensor, garbage: float, mask: Tensor = MASK) -> Tensor:
    """The rows with `garbage` where the mask is false."""
    return torch.where(mask, rows, garbage)


# The value loss.


@pytest.mark.parametrize("clip_range", [0.2, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_value_loss_is_the_larger_of_two_squared_errors(seed: int, clip_range: float):
    values, old, returns = random_rows(3, seed)

    loss = value_loss(values, old, returns, MASK, clip_range=clip_range, denominator=9.0).loss

    rows = (values.tolist(), old.tolist(), returns.tolist(), MASK.tolist())
    assert loss.item() == pytest.approx(slow_value_loss(*rows, clip_range, 9.0), rel=1e-12)


@pytest.mark.parametrize(
    ("value", "expected_loss", "expected_gradient", "held"),
    [(1.5, 0.32, 0.0, True), (2.5, 0.32, 0.0, True), (3.0, 0.5, 1.0, False), (1.1, 0.405, -0.9, False), (0.5, 1.125, -1.5, False)],
)
def test_value_clip_stops_the_gradient_of_a_step_already_taken(value: float, expected_loss: float, expected_gradient: float, held: bool):
    """V_old = 1, R = 2, e = .2. 1.5 and 2.5 clip to 1.2: (1.2 - 2)^2 / 2 = .32 exceeds (.5)^2 / 2; 3: 1 / 2 exceeds .32;
    1.1: inside, (-.9)^2 / 2; .5 went the wrong way: (-1.5)^2 / 2 exceeds (.8 - 2)^2 / 2. Gradient V - R or 0."""
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    old, returns = torch.tensor([[1.0]], dtype=torch.float64), torch.tensor([[2.0]], dtype=torch.float64)

    output = value_loss(values, old, returns, torch.tensor([[True]]), clip_range=0.2, denominator=1.0)
    output.loss.backward()

    assert output.loss.item() == pytest.approx(expected_loss, abs=1e-12)
    assert values.grad is not None and values.grad.item() == pytest.approx(expected_gradient, abs=1e-12)
    assert output.metrics["value/clip_share"].total.item() == float(held)


def test_gradient_of_the_value_loss_reaches_the_values_alone():
    values, old, returns = (rows.requires_grad_() for rows in random_rows(3))

    output = value_loss(values, old, returns, MASK, clip_range=0.3, denominator=9.0)
    output.loss.backward()

    assert torch.autograd.gradcheck(lambda v: value_loss(v, old, returns, MASK, clip_range=0.3, denominator=9.0).loss, (values,), atol=1e-8)
    assert old.grad is None and returns.grad is None
    assert values.grad is not None and values.grad[MASK].any() and not values.grad[~MASK].any()
    assert not any(mean.total.requires_grad for mean in output.metrics.values())


def test_value_clip_holds_nothing_inside_its_range_whatever_the_rounding():
    g = torch.Generator().manual_seed(0)
    values, old = (0.09 * (2 * torch.rand(100, 50, generator=g) - 1) for _ in range(2))
    mask = torch.ones(100, 50, dtype=torch.bool)

    output = value_loss(values, old, torch.randn(100, 50, generator=g), mask, clip_range=0.2, denominator=1.0)

    assert output.metrics["value/clip_share"].total.item() == 0


@pytest.mark.parametrize("garbage", [math.nan, math.inf, 50.0])
def test_known_mistake_7_value_metrics_and_loss_do_not_count_padding(garbage: float):
    rows = random_rows(3)
    clean = value_loss(*rows, MASK, clip_range=0.2, denominator=9.0)
    wide_mask = torch.nn.functional.pad(MASK, (0, 3))
    wide = [hidden(torch.nn.functional.pad(tensor, (0, 3)), garbage, wide_mask) for tensor in rows]

    output = value_loss(*wide, wide_mask, clip_range=0.2, denominator=9.0)

    assert output.loss.item() == pytest.approx(clean.loss.item(), rel=1e-12)
    assert clean.metrics["value/mean"].total.item() == pytest.approx(rows[0][MASK].sum().item(), rel=1e-12)
    for key, mean in clean.metrics.items():
        assert output.metrics[key].total.item() == pytest.approx(mean.total.item(), rel=1e-12), key
        assert output.metrics[key].weight.item() == mean.weight.item() == sum(LENGTHS), key


@pytest.mark.parametrize("sizes", [[1, 3], [2, 2], [1] * 4], ids=str)
def test_any_split_of_the_value_loss_adds_up_to_the_whole(sizes: list[int]):
    rows = random_rows(3)
    values = rows[0].requires_grad_()
    expected = value_loss(*rows, MASK, clip_range=0.2, denominator=9.0)

    parts = zip(*(tensor.split(sizes) for tensor in (*rows, MASK)), strict=True)
    outputs = [value_loss(*part, clip_range=0.2, denominator=9.0) for part in parts]
    total = sum(output.loss for output in outputs)

    torch.testing.assert_close(total, expected.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, values)[0] for loss in (total, expected.loss)), rtol=1e-12, atol=0)
    for key, mean in expected.metrics.items():
        assert sum(o.metrics[key].total.item() for o in outputs) == pytest.approx(mean.total.item(), rel=1e-12), key


@pytest.mark.parametrize("odd_one", range(4))
def test_value_loss_of_shapes_that_would_broadcast_is_refused(odd_one: int):
    arguments = [*random_rows(3), MASK]
    arguments[odd_one] = arguments[odd_one][:1]

    with pytest.raises(ShapeError, match="must share one shape"):
        value_loss(*arguments, clip_range=0.2, denominator=1.0)


# The critic's part of the objective.


def critic_of(*overrides: str) -> PPOCritic:
    critic = PPO(load_config(overrides=["algorithm=ppo", *(f"algorithm.ppo.{override}" for override in overrides)]).config).critic
    assert critic is not None
    return critic


def arrived_units(num_groups: int = 5, seed: int = 0, offset: float = 0.0) -> list[Unit]:
    """Units of two with random scores, proximal log-probabilities and values around `offset`, longer ones last."""
    rng = np.random.default_rng(seed)
    ppo = PPO(load_config(overrides=["algorithm=ppo"]).config)

    def arrived(index: int) -> Unit:
        scores = tuple(offset + 0.1 * rng.normal(size=2))
        unit = ppo.select(make_scored(make_ticket(index), scores=scores, max_tokens=3 + 2 * index))
        lengths = [len(sequence.completion_ids) for sequence in unit]
        rows = [(-3 * rng.random(n, dtype=np.float32), (offset + 0.1 * rng.normal(size=n)).astype(np.float32)) for n in lengths]
        return tuple(replace(s, proximal_logprobs=p, values=v) for s, (p, v) in zip(unit, rows, strict=True))

    return [arrived(index) for index in range(num_groups)]


def alone(moments: Tensor) -> Tensor:
    """sum_over_ranks of a single rank."""
    return moments


def on_ranks(critic: PPOCritic, shares: Sequence[Sequence[Unit]]) -> list[tuple[list[Unit], dict[str, float]]]:
    """What each rank's estimate returns where sum_over_ranks really adds what all of them give."""
    given: list[Tensor] = []

    def note(moments: Tensor) -> Tensor:
        given.append(moments)
        return moments

    for share in shares:
        critic.estimate(share, note)
    assert len(given) == len(shares), "each rank sums exactly once, or the others wait for ever"
    total = torch.stack(given).sum(0)
    return [critic.estimate(share, lambda moments: total) for share in shares]


def tokens(units: Sequence[Unit], name: str) -> np.ndarray:
    """A field of all completion tokens behind one another, float64."""
    return np.concatenate([getattr(sequence, name) for unit in units for sequence in unit]).astype(np.float64)


def slow_advantages(sequence: TrainingSequence, kl_coef: float, gamma: float, gae_lambda: float) -> list[float]:
    """Rewards and eq. 16 of arXiv:1506.02438 backwards, one token at a time."""
    assert sequence.proximal_logprobs is not None and sequence.values is not None
    advantages: list[float] = []
    reward, next_value, next_advantage = sequence.score, 0.0, 0.0
    rows = (sequence.proximal_logprobs.tolist(), sequence.reference_logprobs.tolist(), sequence.values.tolist())
    for proximal, reference, value in reversed(list(zip(*rows, strict=True))):
        reward -= kl_coef * (proximal - reference)
        next_advantage = reward + gamma * next_value - value + gamma * gae_lambda * next_advantage
        advantages.insert(0, next_advantage)
        reward, next_value = 0.0, value
    return advantages


@pytest.mark.parametrize("whitened", [True, False])
def test_estimate_is_the_slow_one_over_all_tokens(whitened: bool):
    """Population moments over tokens: whitened advantages have mean 0 and standard deviation 1; returns are never whitened."""
    units = arrived_units()
    critic = critic_of("kl_coef=0.3", "gamma=0.9", "gae_lambda=0.6", f"whiten_advantages={str(whitened).lower()}")

    estimated, metrics = critic.estimate(units, alone)

    raw = np.array([a for unit in units for sequence in unit for a in slow_advantages(sequence, 0.3, 0.9, 0.6)])
    returns = raw + tokens(units, "values")
    expected = (raw - raw.mean()) / raw.std() if whitened else raw
    np.testing.assert_allclose(tokens(estimated, "advantages"), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(tokens(estimated, "returns"), returns, rtol=0, atol=1e-5)
    explained = 1 - np.var(raw) / np.var(returns)
    wanted = {"value/advantage_std": raw.std(), "value/return_mean": returns.mean(), "value/return_std": returns.std()}
    assert metrics == pytest.approx({**wanted, "value/explained_variance": explained}, rel=1e-5)


@pytest.mark.parametrize("whitened", [True, False])
@pytest.mark.parametrize("cut", [1, 3, 0])
def test_known_mistake_7_whitening_and_metrics_are_those_of_the_global_batch(whitened: bool, cut: int):
    """Two ranks with other numbers of units, tokens and padding (one of them idle where cut = 0) say what one rank says of all."""
    units = arrived_units()
    critic = critic_of(f"whiten_advantages={str(whitened).lower()}")
    of_all, metrics = critic.estimate(units, alone)

    (first, metrics_of_first), (second, metrics_of_second) = on_ranks(critic, [units[:cut], units[cut:]])

    assert (len(first), len(second)) == (cut, 5 - cut)
    for name in ("advantages", "returns"):
        np.testing.assert_allclose(tokens([*first, *second], name), tokens(of_all, name), rtol=0, atol=1e-6)
    assert metrics_of_first == pytest.approx(metrics, rel=1e-9) and metrics_of_second == metrics_of_first


def test_estimate_keeps_the_units_and_gives_each_sequence_its_own_tokens():
    units = arrived_units()

    estimated, _ = critic_of().estimate(units, alone)

    for unit, result in zip(units, estimated, strict=True):
        for before, after in zip(unit, result, strict=True):
            assert after.advantages is not None and after.returns is not None
            assert len(after.advantages) == len(after.returns) == len(before.completion_ids)
            other = {field.name for field in fields(before)} - {"advantages", "returns"}
            assert all(getattr(after, name) is getattr(before, name) for name in other)


@pytest.mark.parametrize(("factor", "constant", "expected"), [(1.0, 0.0, 1.0), (0.0, 0.5, 0.0), (-1.0, 0.0, -3.0), (1.0, 7.0, 1.0)])
def test_explained_variance_is_one_for_a_critic_that_knows_and_zero_for_a_constant(factor: float, constant: float, expected: float):
    """gamma = lambda = 1, kl 0: the return of each token is the score s. V = s: 1; constant: 0; -s: 1 - Var(2 s) / Var(s) = -3."""
    units = [
        tuple(replace(s, values=np.full(len(s.completion_ids), factor * s.score + constant, dtype=np.float32)) for s in unit)
        for unit in arrived_units()
    ]

    _, metrics = critic_of("kl_coef=0", "gae_lambda=1.0").estimate(units, alone)

    assert metrics["value/explained_variance"] == pytest.approx(expected, abs=1e-5)


def test_explained_variance_is_zero_where_all_returns_are_equal():
    units = [tuple(replace(s, score=1.0, values=np.full(len(s.completion_ids), 0.5, dtype=np.float32)) for s in u) for u in arrived_units()]

    estimated, metrics = critic_of("kl_coef=0", "gae_lambda=1.0").estimate(units, alone)

    assert set(tokens(estimated, "returns")) == {1.0} and set(tokens(estimated, "advantages")) == {0.0}
    assert metrics["value/explained_variance"] == metrics["value/return_std"] == metrics["value/advantage_std"] == 0.0


def test_scores_far_from_zero_spoil_neither_whitening_nor_metrics():
    """A reward model's scores may lie at 1000 +- .1: squares rounded to 24 bits would drown the variance of .01."""
    units = arrived_units(offset=1000.0)

    estimated, metrics = critic_of("kl_coef=0").estimate(units, alone)

    returns, values = tokens(estimated, "returns"), tokens(units, "values")
    assert metrics["value/return_std"] == pytest.approx(returns.std(), rel=1e-4)
    assert metrics["value/explained_variance"] == pytest.approx(1 - np.var(returns - values) / np.var(returns), abs=1e-3)


def test_estimate_needs_the_critics_values():
    units = [tuple(replace(sequence, values=None) for sequence in unit) for unit in arrived_units()]

    with pytest.raises(AssertionError, match="proximal and values come before the advantages"):
        critic_of().estimate(units, alone)


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_critics_loss_is_weighted_and_divided_by_tokens(batching: Batching):
    critic = critic_of("vf_coef=0.3", "value_clip_range=0.05")
    microbatch = collate(critic.estimate(arrived_units(), alone)[0], batching)
    assert microbatch.values is not None and microbatch.returns is not None
    values = torch.from_numpy(np.random.default_rng(4).normal(size=microbatch.loss_mask.shape))

    output = critic.loss(values, microbatch, Totals(groups=3.0, sequences=10.0, tokens=50.0))

    rows = (values.tolist(), microbatch.values.tolist(), microbatch.returns.tolist(), microbatch.loss_mask.tolist())
    assert output.loss.item() == pytest.approx(0.3 * slow_value_loss(*rows, 0.05, 50.0), rel=1e-6)
    assert set(output.metrics) == {"value/mean", "value/clip_share"}


def test_advantages_that_differ_by_rounding_alone_are_whitened_to_nothing():
    """All scores 1000, lambda 1, a critic that knows nothing: every advantage is 1000 but for rounding, and none is better."""
    units = [
        tuple(replace(s, score=1000.0, values=(1e-4 * np.arange(len(s.completion_ids))).astype(np.float32)) for s in unit)
        for unit in arrived_units()
    ]

    done, metrics = critic_of("kl_coef=0", "gae_lambda=1").estimate(units, alone)

    assert metrics["value/advantage_std"] == 0.0
    assert not tokens(done, "advantages").any()
