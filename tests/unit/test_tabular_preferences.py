"""A preference loss is right when its minimiser is right: exact optima of policies whose every completion is enumerated.

FULL has all 8^5 completions; its 2^30 pairs are too many, so each completion meets two random others (as two pairs, or a triple), with
the exact probability of every label: that connects all of them, which is what a unique minimiser needs. SMALL has 15 completions of 1 to
3 tokens, an end token among three, and all pairs and triples, drawn from a fixed distribution of full support.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from async_rlhf.losses import dpo_loss, listwise_loss
from tests.support.tabular import (
    DOUBLE,
    TabularSpace,
    all_groups,
    gradient_of,
    kl,
    minimise,
    optimum,
    plackett_luce,
    policy_gradient,
    tabular_space,
)

BETA = 0.5


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A reference and scores, with groups of completions to be labelled."""

    space: TabularSpace
    reference: Tensor
    """[P, V] logits."""
    scores: Tensor
    """[S]"""
    groups: Tensor
    """[G, K] completions; each group of weight 1 / G, or ..."""
    group_probs: Tensor
    """[G] ... this."""

    @property
    def reference_logps(self) -> Tensor:
        return self.space.logps(self.reference)

    @property
    def optimum(self) -> Tensor:
        """[S] log pi*."""
        return optimum(self.reference_logps, self.scores, BETA)

    def rankings(self) -> tuple[Tensor, Tensor]:
        """[G * K!, K] each group in each order, best first, and [G * K!] its probability under Plackett-Luce(scores)."""
        orders = [self.groups[:, list(order)] for order in itertools.permutations(range(self.groups.shape[1]))]
        probs = [self.group_probs * plackett_luce(self.scores[ranked]).exp() for ranked in orders]
        return torch.cat(orders), torch.cat(probs)


@cache
def problem(name: str) -> Problem:
    """`full` or `small`, and the group size: `full-2`."""
    size, num = name.split("-")
    space = tabular_space() if size == "full" else tabular_space(3, 3, end_token=0)
    generator, length = torch.Generator().manual_seed(5), space.tokens.shape[1]
    worth = torch.randn(length, space.vocab_size, generator=generator, dtype=DOUBLE) * 0.7 / length**0.5
    scores = worth[torch.arange(length), space.tokens].sum(1) + 0.2 * torch.randn(space.size, generator=generator, dtype=DOUBLE)
    if size == "full":
        partners = [torch.randperm(space.size, generator=generator) for _ in range(2)]
        own = torch.arange(space.size)
        groups = torch.cat([torch.stack([own, p], 1) for p in partners]) if num == "2" else torch.stack([own, *partners], 1)
        probs = torch.full((len(groups),), 1 / len(groups), dtype=DOUBLE)
    else:
        groups = all_groups(space.size, int(num))
        probs = space.logps(space.random_logits(6, 0.25))[groups].sum(1).exp()
    return Problem(space=space, reference=space.random_logits(7, 0.5), scores=scores, groups=groups, group_probs=probs)


def ranking_loss(policy: Tensor, reference: Tensor, *, denominator: float = 1.0, **dpo_settings: Any) -> Tensor:
    """[] the loss under test on groups [G, K] in their labelled order, best first: DPO for pairs, else listwise.

    Listwise gets the ranks as scores, and the completions in another order.
    """
    if policy.shape[1] == 2:
        return dpo_loss(*policy.unbind(1), *reference.unbind(1), beta=BETA, denominator=denominator, **dpo_settings).loss
    ranks = torch.arange(policy.shape[1], 0, -1, dtype=DOUBLE).expand(policy.shape)
    return listwise_loss(*(each.roll(1, 1) for each in (policy, reference, ranks)), beta=BETA, denominator=denominator).loss


def expected_loss(given: Problem, ranked: Tensor, probs: Tensor, **dpo_settings: Any) -> Callable[[Tensor], Tensor]:
    """Of the table: sum over labelled groups of probability times loss, the loss of each computed on its own."""
    reference = given.reference_logps[ranked]
    each = torch.vmap(lambda policy, reference: ranking_loss(policy[None], reference[None], **dpo_settings))
    return lambda table: (probs * each(given.space.logps(table)[ranked], reference)).sum()


@pytest.mark.parametrize("name", ["small-2", "full-2"])
def test_no_policy_has_more_score_minus_beta_kl_than_the_optimum(name: str):
    """E[s] - beta KL(pi || reference) = beta log Z - beta KL(pi || pi*), with Z = sum reference exp(s / beta)."""
    given = problem(name)
    log_z = torch.logsumexp(given.reference_logps + given.scores / BETA, 0)
    for seed in range(3):
        logps = given.space.logps(given.space.random_logits(seed))
        value = (logps.exp() * given.scores).sum() - BETA * kl(logps, given.reference_logps)
        torch.testing.assert_close(value, BETA * log_z - BETA * kl(logps, given.optimum), rtol=1e-10, atol=0)
    table = given.space.logits_with(given.optimum)
    assert policy_gradient(given.space, table, given.scores, kl_coef=BETA, reference=given.reference_logps).abs().max() < 1e-12
    assert kl(given.optimum, given.reference_logps) > 0.3


@pytest.mark.parametrize("name", ["small-2", "full-2", "small-3", "full-3"])
def test_expected_gradient_vanishes_at_the_optimum_and_not_elsewhere(name: str):
    """Labels drawn with P = sigmoid(s_i - s_j), rankings of three from Plackett-Luce(s)."""
    given = problem(name)
    loss = expected_loss(given, *given.rankings())
    table = given.space.logits_with(given.optimum)
    at_start = gradient_of(loss, given.reference).norm()

    assert gradient_of(loss, table).norm() < 1e-12 * at_start
    elsewhere = {
        "the reference tilted twice as far": optimum(given.reference_logps, given.scores, BETA / 2),
        "the wrong way": optimum(given.reference_logps, -given.scores, BETA),
        "without the reference": (given.scores / BETA).log_softmax(-1),
        "one completion in doubt": given.optimum + 0.1 * (torch.arange(given.space.size) == 3),
    }
    for what, logps in elsewhere.items():
        assert gradient_of(loss, given.space.logits_with(logps)).norm() > 1e-3 * at_start / given.space.size, what
    for seed in range(3):
        near = table + 0.01 * given.space.random_logits(seed)
        assert loss(near) > loss(table)
        assert (gradient_of(loss, near) * (near - table)).sum() > 0


@pytest.mark.parametrize("name", ["small-2", pytest.param("full-2", marks=pytest.mark.long), "small-3"])
def test_optimising_from_the_reference_reaches_the_optimum(name: str):
    given = problem(name)

    found = given.space.logps(minimise(given.space, expected_loss(given, *given.rankings()), given.reference, max_steps=75))

    assert kl(given.optimum, found) < 1e-5


@pytest.mark.parametrize("name", ["small-2", "small-3"])
def test_sampled_labels_miss_the_optimum_by_their_standard_error(name: str):
    """u = beta log(pi / reference) is the maximum-likelihood estimate of s: (u - s)' I (u - s) is chi-squared of 14 degrees.

    I is the Fisher information of all labels, the Hessian of the expected -log Plackett-Luce at s. Over 8 data sets the sum has
    mean 112 and standard deviation 15; 4 of these are allowed. Each score's own standard error is below 0.1, a fifth of their
    spread, and u = s / 2 (a beta wrong by 2) is told apart by far.
    """
    given, num_labels, num_sets = problem(name), 20000, 8
    ranked, probs = given.rankings()
    information = num_labels * torch.func.hessian(lambda s: -(probs * plackett_luce(s[ranked])).sum())(given.scores)
    generator = torch.Generator().manual_seed(11)
    errors: list[Tensor] = []
    for _ in range(num_sets):
        labels = ranked[torch.multinomial(probs, num_labels, replacement=True, generator=generator)]
        reference = given.reference_logps[labels]

        def loss(table: Tensor, labels: Tensor = labels, reference: Tensor = reference) -> Tensor:
            return ranking_loss(given.space.logps(table)[labels], reference, denominator=num_labels)

        table = minimise(given.space, loss, given.reference, max_steps=30)
        errors.append(BETA * (given.space.logps(table) - given.reference_logps) - given.scores)

    degrees = given.space.size - 1
    chi_squared = sum((error @ information @ error).item() for error in errors)
    assert abs(chi_squared - degrees * num_sets) < 4 * (2 * degrees * num_sets) ** 0.5
    assert torch.linalg.pinv(information).diagonal().sqrt().max() < 0.1 < given.scores.std() / 5
    assert (given.scores / 2) @ information @ (given.scores / 2) > 20 * degrees


# One pair, a policy of two completions: h = log(pi / reference) of the first minus that of the second. Any h can be had.

PAIR = tabular_space(2, 1)
PAIR_REFERENCE = torch.tensor([[0.4, -0.3]], dtype=DOUBLE)


def slow_loss(h: float, loss: str, beta: float, smoothing: float) -> float:
    """The papers' formulas of one labelled pair."""
    if loss == "ipo":
        return (h - 1 / (2 * beta)) ** 2
    if loss == "hinge":
        return max(0.0, 1 - beta * h)
    return (1 - smoothing) * math.log1p(math.exp(-beta * h)) + smoothing * math.log1p(math.exp(beta * h))


def minimiser(function: Callable[[float], float], low: float, high: float) -> float:
    """Of a convex function, by ternary search."""
    for _ in range(200):
        left, right = (2 * low + high) / 3, (low + 2 * high) / 3
        low, high = (low, right) if function(left) < function(right) else (left, high)
    return (low + high) / 2


def slope(h: float, prob: float, loss: str, beta: float, smoothing: float) -> float:
    """d/dh of prob L(first chosen) + (1 - prob) L(second chosen) with the loss under test."""
    logits = torch.tensor([PAIR_REFERENCE[0, 0] + h, PAIR_REFERENCE[0, 1]], dtype=DOUBLE)[None]
    reference = PAIR.logps(PAIR_REFERENCE)[:, None]

    def expected(table: Tensor) -> Tensor:
        first, second = PAIR.logps(table)[:, None]
        settings = {"beta": beta, "denominator": 1.0, "loss": loss, "label_smoothing": smoothing}
        return (
            prob * dpo_loss(first, second, *reference, **settings).loss
            + (1 - prob) * dpo_loss(second, first, *reference.flip(0), **settings).loss
        )

    gradient = gradient_of(expected, logits)[0]
    assert gradient.sum().abs() < 1e-12
    return gradient[0].item()


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("prob", [0.05, 0.3, 0.62, 0.9])
@pytest.mark.parametrize(("loss", "smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.1), ("sigmoid", 0.3), ("ipo", 0.0), ("hinge", 0.0)])
def test_each_loss_of_a_pair_turns_where_its_formula_is_least(loss: str, smoothing: float, prob: float, beta: float):
    """Closed forms, p the probability that the first is chosen:

    sigmoid: beta h = logit(q) with q = p (1 - s) + (1 - p) s; for s = 0 that is beta h = s_1 - s_2, the optimum's.
    ipo: p (h - c)^2 + (1 - p) (-h - c)^2 with c = 1 / (2 beta) has slope 2 (h - c (2p - 1)): h = (2p - 1) / (2 beta).
    hinge: slope -p beta + (1 - p) beta between the kinks at +-1/beta: h = sign(p - 1/2) / beta, whatever p.
    """
    flipped = prob * (1 - smoothing) + (1 - prob) * smoothing
    closed_form = {
        "sigmoid": math.log(flipped / (1 - flipped)) / beta,
        "ipo": (2 * prob - 1) / (2 * beta),
        "hinge": math.copysign(1, prob - 0.5) / beta,
    }[loss]
    least = minimiser(
        lambda h: prob * slow_loss(h, loss, beta, smoothing) + (1 - prob) * slow_loss(-h, loss, beta, smoothing), -50 / beta, 50 / beta
    )

    assert least * beta == pytest.approx(closed_form * beta, abs=1e-6)
    assert slope(closed_form - 1e-3 / beta, prob, loss, beta, smoothing) < 0 < slope(closed_form + 1e-3 / beta, prob, loss, beta, smoothing)
    if loss != "hinge":
        assert abs(slope(closed_form, prob, loss, beta, smoothing)) < 1e-12 / beta


def test_hinge_of_an_even_pair_is_least_anywhere_between_its_kinks():
    slopes = [slope(h, 0.5, "hinge", 0.5, 0.0) for h in (-2.1, -1.9, 0.0, 1.9, 2.1)]

    assert slopes == pytest.approx([-0.25, 0.0, 0.0, 0.0, 0.25], abs=1e-15)


def test_ipo_tilts_the_reference_by_the_win_rate_against_the_pair_distribution():
    """Theorem 1 of arXiv:2310.12036 with Psi the identity: pi ~ reference exp(P(y beats a draw from rho) / beta), not pi*.

    Over u = log(pi / reference): sum rho_i rho_j E[(+-(u_i - u_j) - c)^2] has its zero slope at u_i = 2 c P(i beats rho) + constant.
    """
    given = problem("small-2")
    loss = expected_loss(given, *given.rankings(), loss="ipo")

    found = given.space.logps(minimise(given.space, loss, given.reference, max_steps=60))

    drawn = given.space.logps(given.space.random_logits(6, 0.25)).exp()
    win_rates = torch.sigmoid(given.scores[:, None] - given.scores[None, :]) @ drawn
    assert kl(optimum(given.reference_logps, win_rates, BETA), found) < 1e-10
    assert kl(given.optimum, found) > 0.05


@pytest.mark.parametrize(("labels", "smoothing"), [("best and worst", 0.0), ("best and worst", 0.1), ("sampled", 0.0)])
def test_only_hard_best_and_worst_labels_have_no_finite_minimiser(labels: str, smoothing: float):
    """Gradient descent on the best and worst of three, doubling the number of steps: the loss keeps falling towards 0 and |h| keeps
    growing, like the logarithm of the steps. With smoothed labels, or labels that the scores make only likely, both come to rest.
    """
    given = problem("small-3" if labels == "best and worst" else "small-2")
    ranked, probs = given.rankings()
    if labels == "best and worst":
        order = given.scores[given.groups].argsort(1)
        ranked, probs = given.groups.gather(1, order[:, [-1, 0]]), given.group_probs
        ranked, probs = ranked[ranked[:, 0] != ranked[:, 1]], probs[ranked[:, 0] != ranked[:, 1]]
    pairs, index = ranked.unique(dim=0, return_inverse=True)
    weights = torch.zeros(len(pairs), dtype=DOUBLE).index_add_(0, index, probs)
    expected = expected_loss(given, pairs, weights, label_smoothing=smoothing)
    table = given.reference.clone().requires_grad_()
    losses: list[float] = []
    sizes: list[float] = []
    for step in range(1, 1025):
        loss = expected(table)
        if step & (step - 1) == 0:
            losses.append(loss.item())
            sizes.append((given.space.logps(table) - given.reference_logps)[pairs].diff(dim=1).abs().mean().item())
        with torch.no_grad():
            table -= 20.0 * torch.autograd.grad(loss, table)[0]

    growth = sizes[-1] - sizes[-2]
    if labels == "best and worst" and not smoothing:
        assert all(after < 0.9 * before for before, after in itertools.pairwise(losses))
        assert growth > 0.6 * (sizes[-2] - sizes[-3]) > 0.5
    else:
        assert abs(losses[-2] - losses[-1]) < 1e-3 * losses[-1] and growth < 0.05 * sizes[-1]
