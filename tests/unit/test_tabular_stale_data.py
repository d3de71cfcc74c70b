"""What each correction makes of stale data: the expected RLOO gradient over every group that another policy samples, exactly.

15 completions of 1 to 3 tokens, an end token among three; the first step of a batch, where policy = proximal and W = 1. Bias =
|E[gradient] - exact policy gradient| / |exact|. benchmarks/bias.py prints the same for 8^5 completions and is checked here.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from async_rlhf.losses import rloo_advantages, rloo_loss
from async_rlhf.losses.base import masked_sum
from benchmarks import bias
from tests.support.tabular import DOUBLE, TabularSpace, all_groups, expected_step, gradient_of, policy_gradient, tabular_space

SEEDS = [0, 1, 2]
FORMS = ["none", "behavior", "truncated", "masked", "decoupled"]


class StaleToy:
    """A policy, its reference and scores; two behavior policies, each the policy with noise on its logits."""

    def __init__(self, space: TabularSpace, seed: int, noise: float = 0.6) -> None:
        self.space, self.logits = space, space.random_logits(seed)
        self.behavior, self.other = (space.token_logprobs(self.logits + space.random_logits(seed + n, noise)) for n in (100, 200))
        self.reference = space.token_logprobs(space.random_logits(seed + 300, 0.5))
        self.scores = torch.randn(space.size, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).round(decimals=1)

    def step(
        self, sampled: Tensor, recorded: Tensor, *, num: int = 2, kl_coef: float = 0.0, cap: float = 2.0, ratio: Any = "sequence", form: Any
    ) -> Tensor:
        """[P, V] minus the expected gradient where `sampled` [S, T] drew the groups and `recorded` [S, T] is said to have done it."""
        mask = self.space.loss_mask

        def loss(policy: Tensor, rows: Tensor) -> Tensor:
            old = policy.detach()
            penalty = kl_coef * masked_sum(old - self.reference[rows], mask[rows])
            advantages = rloo_advantages((self.scores[rows] - penalty)[None])[0]
            settings: dict[str, Any] = {"ratio": ratio, "correction": form, "correction_cap": cap}
            return rloo_loss(policy, old, recorded[rows], mask[rows], advantages, clip_range=0.2, denominator=num, **settings).loss

        groups = all_groups(self.space.size, num)
        return expected_step(self.space, self.logits, groups, masked_sum(sampled, mask)[groups].sum(1).exp(), loss)

    def bias(self, sampled: Tensor, recorded: Tensor, *, kl_coef: float = 0.0, **settings: Any) -> float:
        reference = masked_sum(self.reference, self.space.loss_mask)
        exact = policy_gradient(self.space, self.logits, self.scores, kl_coef=kl_coef, reference=reference)
        step = self.step(sampled, recorded, kl_coef=kl_coef, **settings)
        return ((step - exact).norm() / exact.norm()).item()

    def stale_bias(self, **settings: Any) -> float:
        return self.bias(self.behavior, self.behavior, **settings)


@pytest.fixture(params=SEEDS)
def toy(request: pytest.FixtureRequest) -> StaleToy:
    return StaleToy(tabular_space(3, 3, end_token=0), request.param)


@pytest.mark.parametrize("num", [2, 3])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_untruncated_decoupled_weights_per_sequence_are_unbiased(toy: StaleToy, kl_coef: float, num: int):
    """E_mu[C_i (R_i - mean of siblings) grad log pi_i] = E_pi[(R_i - E_mu R) grad log pi_i]: siblings are independent, unweighted, and
    E_mu R is a constant; the return's KL penalty is that of the policy, not of the sampler.
    """
    assert toy.stale_bias(form="decoupled", kl_coef=kl_coef, num=num) < 1e-12
    assert toy.stale_bias(form="none", kl_coef=kl_coef, num=num) > 0.3


@pytest.mark.parametrize(
    "settings",
    [{"form": "truncated"}, {"form": "truncated", "ratio": "token"}, {"form": "decoupled", "ratio": "token"}],
    ids=["truncated-sequence", "truncated-token", "decoupled-token"],
)
def test_truncated_and_token_weights_lower_the_bias_but_leave_some(toy: StaleToy, settings: dict[str, Any]):
    assert 0.02 < toy.stale_bias(**settings) < 0.9 * toy.stale_bias(form="none")


def test_a_higher_cap_leaves_less_bias_and_none_where_it_cuts_nothing(toy: StaleToy):
    stale = masked_sum(toy.space.token_logprobs(toy.logits) - toy.behavior, toy.space.loss_mask).exp()

    biases = [toy.stale_bias(form="truncated", cap=cap) for cap in (1.0, 1.5, 2.0, 2.5, stale.max().item())]

    assert biases == sorted(biases, reverse=True)
    assert biases[-1] < 1e-12 < 0.01 < biases[-2]


def test_masking_discards_what_it_does_not_trust_and_is_unbiased_only_if_that_is_nothing(toy: StaleToy):
    stale = masked_sum(toy.space.token_logprobs(toy.logits) - toy.behavior, toy.space.loss_mask)

    assert toy.stale_bias(form="masked", cap=1.0) == pytest.approx(1.0, abs=1e-12)
    assert toy.stale_bias(form="masked", cap=2.0) > 0.1
    assert toy.stale_bias(form="masked", cap=stale.abs().max().exp().item() * (1 + 1e-12)) < 1e-12


def test_ratio_to_behavior_is_unbiased_while_nothing_is_clipped():
    toy = StaleToy(tabular_space(3, 3, end_token=0), 0, noise=0.02)
    log_ratio = masked_sum(toy.space.token_logprobs(toy.logits) - toy.behavior, toy.space.loss_mask)

    assert 0.01 < log_ratio.abs().max() < 0.18
    assert toy.stale_bias(form="behavior") < 1e-12
    assert toy.stale_bias(form="none") > 1e-3


def test_ratio_to_behavior_drops_what_moved_far_the_right_way_and_keeps_what_moved_far_the_wrong_way(toy: StaleToy):
    """With R = policy / behavior, A = s_i - s_j: sum over j of behavior_j A, but 0 where A > 0 and R > 1.2, or A < 0 and R < 0.8; times
    behavior_i R_i grad log pi_i = grad pi_i. This holds the policy to its sampler, and is not the policy gradient.
    """
    behavior, policy = (masked_sum(each, toy.space.loss_mask) for each in (toy.behavior, toy.space.token_logprobs(toy.logits)))
    ratios, gaps = (policy - behavior).exp()[:, None], toy.scores[:, None] - toy.scores
    kept = ~((gaps > 0) & (ratios > 1.2) | (gaps < 0) & (ratios < 0.8))
    advantages = (gaps * kept) @ behavior.exp()

    expected = gradient_of(lambda table: (toy.space.logps(table).exp() * advantages).sum(), toy.logits)

    torch.testing.assert_close(toy.step(toy.behavior, toy.behavior, form="behavior"), expected, rtol=1e-10, atol=1e-13)
    assert toy.stale_bias(form="behavior") > 0.3


def test_one_token_needs_no_sequence_ratio():
    """The token form is wrong only about which prefixes the policy would have gone to; a single token has none."""
    toy = StaleToy(tabular_space(8, 1), 0)

    assert toy.stale_bias(ratio="token", form="decoupled") < 1e-12 < 0.1 < toy.stale_bias(ratio="token", form="none")


def test_tokens_of_two_versions_need_the_log_probabilities_of_each(toy: StaleToy):
    """New weights arrived after the first token: it came from `behavior`, the rest from `other`."""
    first = torch.arange(3) < 1
    mixed = torch.where(first, toy.behavior, toy.other)
    torch.testing.assert_close(masked_sum(mixed, toy.space.loss_mask).exp().sum(), torch.ones((), dtype=DOUBLE))

    assert toy.bias(mixed, mixed, form="decoupled", kl_coef=0.1) < 1e-12
    assert toy.bias(mixed, toy.behavior, form="decoupled", kl_coef=0.1) > 0.1
    assert toy.bias(mixed, toy.other, form="decoupled", kl_coef=0.1) > 0.1


# benchmarks/bias.py


@pytest.mark.parametrize("ratio", ["sequence", "token"])
@pytest.mark.parametrize("form", FORMS)
def test_benchmark_computes_the_expectation_over_every_pair(form: Any, ratio: Any):
    toy = StaleToy(tabular_space(3, 3), 1)

    found = bias.expected_gradient(toy.logits, toy.space.tokens, toy.behavior, toy.scores, ratio, form)

    torch.testing.assert_close(found, toy.step(toy.behavior, toy.behavior, ratio=ratio, form=form), rtol=1e-10, atol=1e-13)


def test_benchmark_orders_the_corrections_as_stated():
    found = bias.measure(seed=0, noise=0.6)

    none, token, truncated = (found[name] for name in ("sequence/none", "token/decoupled", "sequence/truncated"))
    assert found["token/none"] == pytest.approx(none, rel=1e-9)
    assert found["sequence/decoupled"] < 1e-9
    assert min(token, truncated) > 0.1 and max(token, truncated) < 0.8 * none
    assert 0.3 < found["kl_nats"] < 1.5
