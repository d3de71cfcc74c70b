"""Rewards per token, generalized advantages and whitening, against slow transcriptions of their sums."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from async_rlhf.errors import ShapeError
from async_rlhf.losses import generalized_advantages, token_rewards, whiten

discounts = pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.8, 1.0), (0.7, 0.0), (1.0, 0.0)])

LENGTHS = (4, 1, 5, 2)
MASK = torch.arange(5)[None] < torch.tensor(LENGTHS)[:, None]


def slow_rewards(score: float, proximal: Sequence[float], reference: Sequence[float], kl_coef: float) -> list[float]:
    """r_t of one completion, one token at a time."""
    rewards = [-kl_coef * (p - r) for p, r in zip(proximal, reference, strict=True)]
    return [*rewards[:-1], rewards[-1] + score]


def slow_gae(rewards: Sequence[float], values: Sequence[float], gamma: float, gae_lambda: float) -> list[float]:
    """Eq. 16 of arXiv:1506.02438 as its sum: A_t = sum_l (gamma lambda)^l delta_{t+l}."""
    after = [*values[1:], 0.0]
    deltas = [r + gamma * v_next - v for r, v, v_next in zip(rewards, values, after, strict=True)]
    return [sum((gamma * gae_lambda) ** step * delta for step, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


def random_rows(count: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 5, generator=g, dtype=torch.float64) for _ in range(count)]


def hidden(rows: Tensor, garbage: float, mask: Tensor = MASK) -> Tensor:
    """The rows with `garbage` where the mask is false."""
    return torch.where(mask, rows, garbage)


# Token rewards.


@pytest.mark.parametrize("seed", range(3))
def test_reward_is_the_kl_penalty_of_each_token_and_the_score_on_the_last(seed: int):
    proximal, reference, scores = random_rows(3, seed)

    rewards = token_rewards(scores[:, 0], hidden(proximal, math.nan), hidden(reference, math.inf), MASK, kl_coef=0.3)

    for n, length in enumerate(LENGTHS):
        expected = slow_rewards(scores[n, 0].item(), proximal[n, :length].tolist(), reference[n, :length].tolist(), 0.3)
        assert rewards[n, :length].tolist() == pytest.approx(expected, abs=1e-12)
        assert not rewards[n, length:].any()
        assert rewards[n].sum().item() == pytest.approx(
            scores[n, 0].item() - 0.3 * (proximal - reference)[n, :length].sum().item(), abs=1e-12
        )


def test_rewards_by_hand():
    """Score 2, kl .1: -.1 * (-1 + 1.5) = -.05; -.1 * (-2 + 1) + 2 = 2.1; the third token is masked. Without kl: 0, 2."""
    proximal, reference = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-1.5, -1.0, -9.0]])
    mask, scores = torch.tensor([[True, True, False]]), torch.tensor([2.0])

    assert token_rewards(scores, proximal, reference, mask, kl_coef=0.1)[0].tolist() == pytest.approx([-0.05, 2.1, 0.0], abs=1e-6)
    assert token_rewards(scores, proximal, reference, mask, kl_coef=0.0)[0].tolist() == [0.0, 2.0, 0.0]


def test_rewards_advantages_and_returns_carry_no_gradient():
    proximal, reference, values = (rows.requires_grad_() for rows in random_rows(3))

    rewards = token_rewards(torch.ones(4, requires_grad=True), proximal, reference, MASK, kl_coef=0.3)
    of_values = generalized_advantages(proximal, values, MASK, gamma=1.0, gae_lambda=0.95)

    assert not any(tensor.requires_grad for tensor in (rewards, *of_values))


@pytest.mark.parametrize("odd_one", range(4))
def test_rewards_of_shapes_that_would_broadcast_are_refused(odd_one: int):
    arguments = [torch.zeros(4), torch.zeros(4, 5), torch.zeros(4, 5), MASK]
    arguments[odd_one] = arguments[odd_one][:1]

    with pytest.raises(ShapeError, match="must share one shape"):
        token_rewards(*arguments, kl_coef=0.1)


# Generalized advantage estimation.


@discounts
@pytest.mark.parametrize("seed", range(3))
def test_advantage_is_the_discounted_sum_of_temporal_differences(gamma: float, gae_lambda: float, seed: int):
    rewards, values = random_rows(2, seed)

    advantages, returns = generalized_advantages(
        hidden(rewards, math.nan), hidden(values, math.inf), MASK, gamma=gamma, gae_lambda=gae_lambda
    )

    for n, length in enumerate(LENGTHS):
        expected = slow_gae(rewards[n, :length].tolist(), values[n, :length].tolist(), gamma, gae_lambda)
        assert advantages[n, :length].tolist() == pytest.approx(expected, abs=1e-12)
        assert (returns - values)[n, :length].tolist() == pytest.approx(expected, abs=1e-12)
        assert not advantages[n, length:].any() and not returns[n, length:].any()


def test_advantages_by_hand():
    """gamma .9, lambda .5, rewards 0, 0, 1, values .5, .6, .8: deltas 0 + .54 - .5 = .04, .72 - .6 = .12, 1 - .8 = .2;
    A = .04 + .45 * .21 = .1345, .12 + .45 * .2 = .21, .2; returns .6345, .81, 1."""
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64), torch.tensor([[0.5, 0.6, 0.8]], dtype=torch.float64)

    advantages, returns = generalized_advantages(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=0.9, gae_lambda=0.5)

    assert advantages[0].tolist() == pytest.approx([0.1345, 0.21, 0.2], abs=1e-12)
    assert returns[0].tolist() == pytest.approx([0.6345, 0.81, 1.0], abs=1e-12)


def test_without_discounting_the_advantage_is_the_reward_to_go_minus_the_value():
    rewards, values = (hidden(rows, 0.0) for rows in random_rows(2))

    advantages, returns = generalized_advantages(rewards, values, MASK, gamma=1.0, gae_lambda=1.0)

    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(advantages, to_go - values, rtol=0, atol=1e-12)
    torch.testing.assert_close(returns, to_go, rtol=0, atol=1e-12)


def test_with_lambda_zero_the_advantage_is_the_one_step_temporal_difference():
    rewards, values = (hidden(rows, 0.0) for rows in random_rows(2))

    advantages, _ = generalized_advantages(rewards, values, MASK, gamma=0.7, gae_lambda=0.0)

    following = torch.nn.functional.pad(values, (0, 1))[:, 1:]
    torch.testing.assert_close(advantages, rewards + 0.7 * following - values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("odd_one", range(3))
def test_advantages_of_shapes_that_would_broadcast_are_refused(odd_one: int):
    arguments = [*random_rows(2), MASK]
    arguments[odd_one] = arguments[odd_one][:1]

    with pytest.raises(ShapeError, match="must share one shape"):
        generalized_advantages(*arguments, gamma=1.0, gae_lambda=1.0)


def test_whitening_shifts_and_scales_the_unmasked_and_zeroes_the_rest():
    """(3 - 1) / 4 = .5, (-1 - 1) / 4 = -.5; a spread of 0 leaves finite zeros."""
    advantages, mask = torch.tensor([[3.0, -1.0, math.nan]]), torch.tensor([[True, True, False]])

    assert whiten(advantages, mask, mean=1.0, std=4.0)[0].tolist() == pytest.approx([0.5, -0.5, 0.0], abs=1e-6)
    assert whiten(torch.full((1, 3), 0.3), mask, mean=float(torch.tensor(0.3)), std=0.0).tolist() == [[0.0, 0.0, 0.0]]
