"""On-policy, the expected gradient of each policy-gradient loss is the exact gradient of E[score] - kl_coef KL(policy || reference).

SMALL has 15 completions of 1 to 3 tokens (an end token among three), so that every group of K can be enumerated: its loss, by the
functions under test, times its probability; nothing is sampled. FULL has all 8^5 completions; its groups are sampled. The group
is the whole minibatch, and its completions are the denominator: a number that is the same for every group. (Dividing by the group's
tokens, as PPO and GRPO's `token` do, is that gradient over the length where all are equally long, and a ratio estimate of it else.)
"""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from async_rlhf.losses import generalized_advantages, grpo_advantages, grpo_loss, ppo_loss, rloo_advantages, rloo_loss, token_rewards
from async_rlhf.losses.base import masked_sum
from tests.support.tabular import (
    DOUBLE,
    GroupLoss,
    TabularSpace,
    all_groups,
    expected_step,
    gradient_of,
    kl,
    optimum,
    policy_gradient,
    tabular_space,
)

CORRECTION: dict[str, Any] = {"correction": "truncated", "correction_cap": 2.0}
"""The default; without effect on-policy."""


class Toy:
    """A policy, a reference, an untrained critic and scores full of ties; the loss of a group under each algorithm."""

    def __init__(self, space: TabularSpace) -> None:
        generator, length = torch.Generator().manual_seed(3), space.tokens.shape[1]
        worth = torch.randn(length, space.vocab_size, generator=generator, dtype=DOUBLE)
        self.space = space
        self.logits = space.random_logits(1, 0.7)
        self.reference = space.token_logprobs(space.random_logits(2, 0.5))
        self.reference_logps = masked_sum(self.reference, space.loss_mask)
        self.values = space.random_logits(4)[:, 0][space.prefixes]
        self.scores = (1.5 + worth[torch.arange(length), space.tokens].sum(1)).round().clamp(0, 3)

    def step(self, num: int, loss: GroupLoss, logits: Tensor | None = None) -> Tensor:
        """[P, V] minus the expected gradient over all groups of `num`, sampled by the policy itself."""
        logits = self.logits if logits is None else logits
        groups = all_groups(self.space.size, num)
        return expected_step(self.space, logits, groups, self.space.logps(logits)[groups].sum(1).exp(), loss)

    def exact(self, kl_coef: float = 0.0) -> Tensor:
        return policy_gradient(self.space, self.logits, self.scores, kl_coef=kl_coef, reference=self.reference_logps)

    def rloo(self, policy: Tensor, rows: Tensor, *, ratio: Any, kl_coef: float = 0.0) -> Tensor:
        old, mask = policy.detach(), self.space.loss_mask[rows]
        returns = self.scores[rows] - kl_coef * masked_sum(old - self.reference[rows], mask)
        advantages = rloo_advantages(returns[None])[0]
        return rloo_loss(policy, old, old, mask, advantages, clip_range=0.2, ratio=ratio, denominator=len(rows), **CORRECTION).loss

    def grpo(self, policy: Tensor, rows: Tensor, *, normalize: bool = False, loss_norm: Any = "constant") -> Tensor:
        advantages = grpo_advantages(self.scores[rows][None], normalize=normalize)[0]
        return self.clipped_and_k3(policy, rows, advantages, kl_coef=0.0, loss_norm=loss_norm)

    def k3(self, policy: Tensor, rows: Tensor) -> Tensor:
        return self.clipped_and_k3(policy, rows, torch.zeros(len(rows), dtype=DOUBLE), kl_coef=1.0, loss_norm="constant")

    def clipped_and_k3(self, policy: Tensor, rows: Tensor, advantages: Tensor, *, kl_coef: float, loss_norm: Any) -> Tensor:
        old, mask = policy.detach(), self.space.loss_mask[rows]
        settings: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28, "kl_coef": kl_coef, "loss_norm": loss_norm, **CORRECTION}
        return grpo_loss(policy, old, old, self.reference[rows], mask, advantages, denominator=len(rows), **settings).loss

    def ppo(self, policy: Tensor, rows: Tensor, *, kl_coef: float = 0.0, gae_lambda: float = 1.0, values: Tensor | None = None) -> Tensor:
        old, mask = policy.detach(), self.space.loss_mask[rows]
        rewards = token_rewards(self.scores[rows], old, self.reference[rows], mask, kl_coef=kl_coef)
        values = (self.values if values is None else values)[rows]
        advantages, _ = generalized_advantages(rewards, values, mask, gamma=1.0, gae_lambda=gae_lambda)
        return ppo_loss(policy, old, old, mask, advantages, clip_range=0.2, denominator=len(rows), **CORRECTION).loss


SMALL, FULL, ONE_TOKEN = Toy(tabular_space(3, 3, end_token=0)), Toy(tabular_space()), Toy(tabular_space(8, 1))


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert expected.norm() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def error(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact|"""
    return ((found - exact).norm() / exact.norm()).item()


# Exact expectations


@pytest.mark.parametrize("num", [2, 3])
@pytest.mark.parametrize("ratio", ["sequence", "token"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_rloo_is_the_policy_gradient_of_score_minus_kl(kl_coef: float, ratio: str, num: int):
    """grad KL = sum_y grad pi (log pi - log ref) + sum_y pi grad log pi, and the second sum is grad 1 = 0: it is E[(log pi - log ref)
    grad log pi], the score-function gradient of the return's penalty, although the penalty itself is detached.
    """
    assert_same(SMALL.step(num, partial(SMALL.rloo, ratio=ratio, kl_coef=kl_coef)), SMALL.exact(kl_coef))


def test_rloo_rests_at_the_optimum_of_preference_learning():
    """kl_coef = beta: the policy that DPO ends at, pi* ~ reference exp(score / beta), has no expected gradient."""
    logits = SMALL.space.logits_with(optimum(SMALL.reference_logps, SMALL.scores, 0.4))
    loss = partial(SMALL.rloo, ratio="sequence", kl_coef=0.4)

    assert SMALL.step(2, loss, logits).norm() < 1e-12
    assert SMALL.step(2, loss).norm() > 0.1


@pytest.mark.parametrize("num", [2, 3])
def test_unnormalised_grpo_is_the_policy_gradient_times_k_minus_1_over_k(num: int):
    """s_i - mean of all K, itself included, is (K - 1)/K of the leave-one-out advantage."""
    assert_same(SMALL.step(num, SMALL.grpo), (num - 1) / num * SMALL.exact())


@pytest.mark.parametrize("settings", [{"loss_norm": "sequence"}, {"normalize": True}], ids=str)
def test_grpo_by_the_spread_or_by_each_length_is_another_direction(settings: dict[str, Any]):
    found, exact = SMALL.step(3, partial(SMALL.grpo, **settings)), SMALL.exact()

    assert error(found * (found * exact).sum() / found.norm() ** 2, exact) > 0.05


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("toy", [SMALL, FULL], ids=["small", "full"])
def test_ppo_with_lambda_1_is_the_policy_gradient_whatever_the_critic(toy: Toy, kl_coef: float):
    """V of a prefix is a baseline: E[V grad log pi(token | prefix)] = 0. Rewards of the past are dropped with the same right."""
    assert_same(toy.step(1, partial(toy.ppo, kl_coef=kl_coef)), toy.exact(kl_coef))


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5])
def test_ppo_with_a_shorter_lambda_needs_a_critic_that_is_right(gae_lambda: float):
    space, mask = SMALL.space, SMALL.space.loss_mask
    probs = space.logps(SMALL.logits).exp()[:, None].expand(mask.shape)
    mass, worth = torch.zeros(2, len(space.depths), dtype=DOUBLE)
    mass.index_add_(0, space.prefixes[mask], probs[mask])
    worth.index_add_(0, space.prefixes[mask], (probs * SMALL.scores[:, None])[mask])
    right = (worth / mass)[space.prefixes]

    assert_same(SMALL.step(1, partial(SMALL.ppo, gae_lambda=gae_lambda, values=right)), SMALL.exact())
    assert error(SMALL.step(1, partial(SMALL.ppo, gae_lambda=gae_lambda)), SMALL.exact()) > 0.1


@pytest.mark.parametrize("num", [2, 3])
def test_replacing_tied_groups_scales_the_gradient_by_the_share_of_the_others(num: int):
    """A tied group adds nothing, so the mean over the groups without ties is the whole mean / P(not tied): same direction."""
    groups = all_groups(SMALL.space.size, num)
    probs = SMALL.space.logps(SMALL.logits)[groups].sum(1).exp()
    tied = (SMALL.scores[groups] == SMALL.scores[groups[:, :1]]).all(1)
    loss = partial(SMALL.rloo, ratio="sequence")
    share = probs[~tied].sum()

    step = expected_step(SMALL.space, SMALL.logits, groups[~tied], probs[~tied] / share, loss)

    assert share < 0.9
    assert_same(step, SMALL.exact() / share)
    assert expected_step(SMALL.space, SMALL.logits, groups[tied], probs[tied], loss).norm() < 1e-15


# k3 as a loss


def test_k3_of_one_token_has_the_gradient_of_the_kl_from_the_reference_to_the_policy():
    """E_pi[grad (ref/pi - 1 - log ref/pi)] = -sum_y pi (ref/pi) grad log pi + 0 = -sum_y ref grad log pi = grad KL(ref || pi)."""

    def reverse(table: Tensor) -> Tensor:
        return kl(ONE_TOKEN.reference_logps, ONE_TOKEN.space.logps(table))

    def forward(table: Tensor) -> Tensor:
        return kl(ONE_TOKEN.space.logps(table), ONE_TOKEN.reference_logps)

    found = -ONE_TOKEN.step(1, ONE_TOKEN.k3)

    assert_same(found, gradient_of(reverse, ONE_TOKEN.logits))
    assert error(found, gradient_of(forward, ONE_TOKEN.logits)) > 0.2


def test_k3_of_several_tokens_has_it_for_each_next_token_where_the_policy_goes():
    """sum_t E[KL(ref(. | prefix) || pi(. | prefix))] over prefixes that pi visits, these visits held fixed: which is the gradient
    neither of KL(reference || policy) of whole completions, whose prefixes the reference visits, nor of KL(policy || reference).
    """
    space, reference = SMALL.space, SMALL.space.random_logits(2, 0.5).log_softmax(-1)
    visits = SMALL.space.logps(SMALL.logits).exp()[:, None] * space.loss_mask

    def next_tokens(table: Tensor) -> Tensor:
        each = (reference.exp() * (reference - table.log_softmax(-1))).sum(-1)
        return (visits * each[space.prefixes]).sum()

    found = -SMALL.step(1, SMALL.k3)

    assert_same(found, gradient_of(next_tokens, SMALL.logits))
    assert error(found, gradient_of(lambda table: kl(SMALL.reference_logps, space.logps(table)), SMALL.logits)) > 0.1
    assert error(found, gradient_of(lambda table: kl(space.logps(table), SMALL.reference_logps), SMALL.logits)) > 0.1


# Sampled groups


@pytest.mark.parametrize(
    ("loss", "factor"),
    [
        pytest.param(FULL.ppo, 1.0, id="ppo"),
        pytest.param(FULL.grpo, 0.75, id="grpo"),
        pytest.param(partial(FULL.rloo, ratio="sequence"), 1.0, id="rloo-sequence"),
        pytest.param(partial(FULL.rloo, ratio="token"), 1.0, id="rloo-token"),
    ],
)
def test_sampled_gradients_agree_with_the_exact_one_within_their_standard_error(loss: GroupLoss, factor: float):
    """8000 groups of 4, projected on 8 directions: the exact gradient, its part at each token, and two random reweightings of it.

    Each misses by at most 4 standard errors, and 4 standard errors are less than the fifth of the gradient by which a factor (K - 1)/K
    would show.
    """
    space, exact = FULL.space, FULL.exact()
    generator = torch.Generator().manual_seed(8)
    groups = torch.multinomial(space.logps(FULL.logits).exp(), 4 * 8000, replacement=True, generator=generator).reshape(-1, 4)
    directions = [exact, *(exact * (space.depths == depth)[:, None] for depth in range(5))]
    directions += [exact * torch.rand(exact.shape, generator=generator, dtype=DOUBLE) for _ in range(2)]

    policy = space.token_logprobs(FULL.logits)[groups].requires_grad_()
    torch.vmap(loss)(policy, groups).sum().backward()
    assert policy.grad is not None
    for direction in directions:
        along = jvp(space.token_logprobs, (FULL.logits,), (direction,))[1]
        steps = -(policy.grad * along[groups]).sum((1, 2))
        expected, standard_error = factor * (exact * direction).sum(), steps.std() / len(steps) ** 0.5
        assert abs(steps.mean() - expected) < 4 * standard_error < 0.2 * expected
