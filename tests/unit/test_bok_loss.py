"""Best-of-K's likelihood against a slow transcription, and the objective that picks the best."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from async_rlhf.batching import Batching, collate
from async_rlhf.config import load_config
from async_rlhf.errors import ShapeError
from async_rlhf.losses import bok_loss
from learners.bok import BoK
from learners.objective import Totals
from tests.support.samples import make_scored, make_ticket


def slow_bok(policy: list[Any], mask: list[Any], weights: list[float], denominator: float) -> float:
    """Alg. 1 of arXiv:2304.06767: maximum likelihood on the best answers, one token at a time."""
    total = 0.0
    for n, weight in enumerate(weights):
        for t in (t for t, real in enumerate(mask[n]) if real):
            total -= weight * policy[n][t]
    return total / denominator


def sample(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """[6, 5] float64 log-probabilities, a mask of random lengths, weights 1 and 0."""
    g = torch.Generator().manual_seed(seed)
    policy = -3 * torch.rand(6, 5, generator=g, dtype=torch.float64)
    mask = torch.arange(5)[None] < torch.randint(1, 6, (6, 1), generator=g)
    return policy, mask, torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
def test_loss_is_the_formula(seed: int):
    rows = sample(seed)

    assert bok_loss(*rows, denominator=13.0).loss.item() == pytest.approx(slow_bok(*(r.tolist() for r in rows), 13.0), rel=1e-12)


def test_three_completions_by_hand():
    """-(log .5 + log .25) = log 8 of the first, log 2 of the second, nothing of the third, which is tied; over 2 + 1 + 3 tokens:
    (2.07944154 + .69314718) / 6 = .46209812. A trained completion costs log 16 / 2 = 1.38629436 on average."""
    policy = torch.tensor([[0.5, 0.25, 0.9], [0.5, 0.1, 0.1], [0.1, 0.1, 0.1]], dtype=torch.float64).log()
    mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])

    output = bok_loss(policy, mask, torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64), denominator=6.0)

    assert output.loss.item() == pytest.approx(0.46209812, abs=1e-8)
    nll = output.metrics["bok/nll_nats"]
    assert nll.weight.item() == 2 and nll.total.item() / 2 == pytest.approx(1.38629436, abs=1e-8)


def test_every_trained_token_pulls_alike_and_no_other_one_at_all():
    policy, mask, weights = sample()
    policy.requires_grad_()
    weights.requires_grad_()

    output = bok_loss(policy, mask, weights, denominator=13.0)
    gradient = torch.autograd.grad(output.loss, policy)[0]

    expected = torch.where(mask & (weights > 0)[:, None], -1 / 13, 0.0).double()
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)
    assert torch.autograd.gradcheck(lambda p: bok_loss(p, mask, weights.detach(), denominator=13.0).loss, (policy,), atol=1e-8)
    assert not output.metrics["bok/nll_nats"].total.requires_grad


@pytest.mark.parametrize("garbage", [math.nan, -math.inf, 7.0])
def test_known_mistake_7_masked_positions_count_nowhere_and_get_no_gradient(garbage: float):
    policy, mask, weights = sample()
    clean = bok_loss(policy, mask, weights, denominator=13.0)
    wide_mask = torch.nn.functional.pad(mask, (0, 3))
    wide = torch.where(wide_mask, torch.nn.functional.pad(policy, (0, 3)), garbage).requires_grad_()

    output = bok_loss(wide, wide_mask, weights, denominator=13.0)
    output.loss.backward()

    assert output.loss.item() == pytest.approx(clean.loss.item(), rel=1e-12)
    assert output.metrics["bok/nll_nats"].total.item() == pytest.approx(clean.metrics["bok/nll_nats"].total.item(), rel=1e-12)
    assert wide.grad is not None and torch.equal(wide.grad != 0, wide_mask & (weights > 0)[:, None])


@pytest.mark.parametrize("sizes", [[6], [1, 5], [2, 2, 2], [1] * 6], ids=str)
def test_any_split_of_the_completions_adds_up_to_the_whole(sizes: list[int]):
    rows = sample()
    rows[0].requires_grad_()
    expected = bok_loss(*rows, denominator=13.0)

    outputs = [bok_loss(*part, denominator=13.0) for part in zip(*(tensor.split(sizes) for tensor in rows), strict=True)]
    total = sum(output.loss for output in outputs)

    torch.testing.assert_close(total, expected.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, rows[0])[0] for loss in (total, expected.loss)), rtol=1e-12, atol=0)
    parts = [output.metrics["bok/nll_nats"] for output in outputs]
    assert sum(part.total.item() for part in parts) == pytest.approx(expected.metrics["bok/nll_nats"].total.item(), rel=1e-12)
    assert sum(part.weight.item() for part in parts) == 4


def test_shapes_that_would_broadcast_are_refused():
    policy, mask, weights = sample()

    with pytest.raises(ShapeError, match="must share one shape"):
        bok_loss(policy, mask[:1], weights, denominator=1.0)
    for wrong in (weights[:1], weights[:, None]):
        with pytest.raises(ShapeError, match=r"weights must be \[6\]"):
            bok_loss(policy, mask, wrong, denominator=1.0)


# The objective.


def objective() -> BoK:
    return BoK(load_config(overrides=["algorithm=bok"]).config)


@pytest.mark.parametrize("best", range(4))
def test_the_best_alone_is_trained(best: int):
    scores = [0.3, -1.0, 0.5, 0.1]
    scores[best] = 0.7
    scored = make_scored(make_ticket(), scores=scores)

    (sequence,) = objective().select(scored)

    assert sequence.completion_ids is scored.group.rollouts[best].completion_ids
    assert (sequence.score, sequence.weight) == (pytest.approx(0.7), 1.0)


@pytest.mark.parametrize(
    ("scores", "candidates"), [((1.0, 0.0, 1.0, 1.0), (0, 2, 3)), ((0.5, 0.5, 0.5), (0, 1, 2))], ids=["best equal", "all equal"]
)
def test_equal_best_scores_are_broken_by_the_seed_and_not_by_their_order(scores: tuple[float, ...], candidates: tuple[int, ...]):
    bok = objective()

    def pick(seed: int) -> int:
        scored = make_scored(make_ticket(seed=seed), scores=scores)
        (best,) = bok.select(scored)
        return next(k for k, rollout in enumerate(scored.group.rollouts) if rollout.completion_ids is best.completion_ids)

    picks = [pick(seed) for seed in range(300)]

    assert picks == [pick(seed) for seed in range(300)]
    # 300 draws of 1/3: 100 +- 8.2 each; five standard deviations.
    assert all(abs(picks.count(k) - 100) < 41 for k in candidates) and set(picks) == set(candidates)


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_known_mistake_6_a_tied_group_teaches_nothing_but_its_tokens_stay_in_the_denominator(batching: Batching):
    """Three groups, the second tied: its best is in the batch with weight 0, so that Totals counts its tokens."""
    bok = objective()
    score_rows = [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]
    units = [bok.select(make_scored(make_ticket(index), scores=scores)) for index, scores in enumerate(score_rows)]
    microbatch = collate(units, batching)
    policy = torch.from_numpy(-3 * np.random.default_rng(4).random(microbatch.loss_mask.shape)).requires_grad_()

    output = bok.loss(policy, microbatch, Totals(groups=3.0, sequences=4.0, tokens=17.0))
    output.loss.backward()

    lengths = [len(sequence.completion_ids) for (sequence,) in units]
    assert microbatch.weights.tolist() == [1.0, 0.0, 1.0] and microbatch.loss_mask.sum(1).tolist() == lengths
    expected = slow_bok(policy.tolist(), microbatch.loss_mask.tolist(), [1.0, 0.0, 1.0], 17.0)
    assert output.loss.item() == pytest.approx(expected, rel=1e-6)
    assert policy.grad is not None and not policy.grad[1].any() and policy.grad[0].any() and policy.grad[2].any()
    assert output.metrics["bok/nll_nats"].weight.item() == 2


def test_order_of_the_groups_changes_nothing():
    bok, totals = objective(), Totals(groups=3.0, sequences=3.0, tokens=17.0)
    units = [bok.select(make_scored(make_ticket(index), scores=(0.0, 1.0))) for index in range(3)]
    whole = collate(units, "padded")
    policy = torch.from_numpy(-3 * np.random.default_rng(4).random(whole.loss_mask.shape)).requires_grad_()

    straight = bok.loss(policy, whole, totals).loss
    turned = bok.loss(policy[[2, 0, 1]], collate([units[2], units[0], units[1]], "padded"), totals).loss

    torch.testing.assert_close(turned, straight, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, policy)[0] for loss in (straight, turned)), rtol=1e-12, atol=0)
