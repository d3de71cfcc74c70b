"""The DPO loss against the papers' formulas, and the objective that feeds it."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from async_rlhf.batching import Batching, Microbatch, collate
from async_rlhf.config import load_config
from async_rlhf.errors import ShapeError
from async_rlhf.losses import dpo_loss
from learners.dpo import DPO
from learners.objective import Totals
from tests.support.samples import make_scored, make_ticket

variants = pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.1},
        {"beta": 2.0},
        {"beta": 0.5, "label_smoothing": 0.2},
        {"beta": 0.3, "loss": "ipo"},
        {"beta": 0.3, "loss": "hinge"},
    ],
    ids=str,
)


def slow_dpo(
    chosen: list[float],
    rejected: list[float],
    reference_chosen: list[float],
    reference_rejected: list[float],
    *,
    beta: float,
    denominator: float,
    loss: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> float:
    """Eq. 7 of arXiv:2305.18290 with conservative labels, eq. 17 of arXiv:2310.12036, SLiC's hinge; one pair at a time."""

    def log_sigmoid(x: float) -> float:
        return math.log(1 / (1 + math.exp(-x)))

    total = 0.0
    for y_w, y_l, ref_w, ref_l in zip(chosen, rejected, reference_chosen, reference_rejected, strict=True):
        h = math.log(math.exp(y_w) / math.exp(y_l)) - math.log(math.exp(ref_w) / math.exp(ref_l))
        if loss == "ipo":
            total += (h - 1 / (2 * beta)) ** 2
        elif loss == "hinge":
            total += max(0.0, 1 - beta * h)
        else:
            total += -(1 - label_smoothing) * log_sigmoid(beta * h) - label_smoothing * log_sigmoid(-beta * h)
    return total / denominator


def random_logps(num_pairs: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [-6 * torch.rand(num_pairs, generator=generator, dtype=torch.float64) for _ in range(4)]


@variants
@pytest.mark.parametrize("seed", range(3))
def test_loss_is_the_papers_formula(settings: dict[str, Any], seed: int):
    logps = random_logps(7, seed)

    output = dpo_loss(*logps, denominator=9.0, **settings)

    assert output.loss.item() == pytest.approx(slow_dpo(*(t.tolist() for t in logps), denominator=9.0, **settings), rel=1e-12)


def test_one_pair_by_hand():
    """h = (-2 + 2.5) - (-3 + 2.7) = 0.5 + 0.3 = 0.8; beta h = 0.08; -log sigmoid(0.08) = log(1 + e^-0.08) = 0.65394697;
    two groups, one of them tied: 0.65394697 / 2 = 0.32697348."""
    chosen, rejected, reference_chosen, reference_rejected = (torch.tensor([x], dtype=torch.float64) for x in (-2.0, -3.0, -2.5, -2.7))

    output = dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta=0.1, denominator=2.0)

    assert output.loss.item() == pytest.approx(0.32697348, abs=1e-8)
    assert output.metrics["dpo/margin"].total.item() == pytest.approx(0.08, abs=1e-12)
    assert output.metrics["dpo/chosen_gain_nats"].total.item() == pytest.approx(0.5, abs=1e-12)
    assert output.metrics["dpo/rejected_gain_nats"].total.item() == pytest.approx(-0.3, abs=1e-12)


def test_one_ipo_pair_by_hand():
    """h = 0.8 as above; (0.8 - 1 / (2 * 0.25))^2 = (0.8 - 2)^2 = 1.44."""
    logps = [torch.tensor([x], dtype=torch.float64) for x in (-2.0, -3.0, -2.5, -2.7)]

    assert dpo_loss(*logps, beta=0.25, denominator=1.0, loss="ipo").loss.item() == pytest.approx(1.44, abs=1e-12)


def test_one_hinge_pair_by_hand():
    """h = 0.8 as above; max(0, 1 - 0.25 * 0.8) = 0.8, over two groups 0.4; with beta 2 it is max(0, 1 - 1.6) = 0."""
    logps = [torch.tensor([x], dtype=torch.float64) for x in (-2.0, -3.0, -2.5, -2.7)]

    assert dpo_loss(*logps, beta=0.25, denominator=2.0, loss="hinge").loss.item() == pytest.approx(0.4, abs=1e-12)
    assert dpo_loss(*logps, beta=2.0, denominator=2.0, loss="hinge").loss.item() == 0.0


@variants
def test_gradient_is_that_of_the_loss(settings: dict[str, Any]):
    chosen, rejected, *reference = random_logps(4)

    assert torch.autograd.gradcheck(
        lambda c, r: dpo_loss(c, r, *reference, denominator=5.0, **settings).loss,
        (chosen.requires_grad_(), rejected.requires_grad_()),
        atol=1e-8,
    )


def test_gradient_of_a_pair_is_beta_times_the_probability_of_the_wrong_order():
    """d loss / d chosen = -beta sigmoid(-beta h) / denominator; beta h = 0.08: sigmoid(-0.08) = 0.48001066; * 0.1 / 2 = 0.02400053."""
    logps = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (-2.0, -3.0, -2.5, -2.7)]

    dpo_loss(*logps, beta=0.1, denominator=2.0).loss.backward()

    assert logps[0].grad is not None and logps[1].grad is not None
    assert logps[0].grad.item() == pytest.approx(-0.02400053, abs=1e-8)
    assert logps[1].grad.item() == pytest.approx(+0.02400053, abs=1e-8)


@variants
def test_no_gradient_reaches_the_reference(settings: dict[str, Any]):
    logps = [tensor.requires_grad_() for tensor in random_logps(3)]

    output = dpo_loss(*logps, denominator=3.0, **settings)
    output.loss.backward()

    assert not any(mean.total.requires_grad for mean in output.metrics.values())
    assert logps[0].grad is not None and logps[1].grad is not None
    assert logps[2].grad is None and logps[3].grad is None


def test_smoothed_loss_is_smallest_where_the_model_says_the_smoothed_probability():
    """sigmoid(beta h) = 1 - s, that is h = log((1 - s) / s) / beta."""
    h = math.log(0.8 / 0.2) / 0.5
    chosen = torch.tensor([h], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)

    dpo_loss(chosen, zero, zero, zero, beta=0.5, denominator=1.0, label_smoothing=0.2).loss.backward()

    assert chosen.grad is not None and chosen.grad.item() == pytest.approx(0.0, abs=1e-12)


def test_ipo_pulls_back_a_margin_that_is_too_large():
    """The minimum is at h = 1 / (2 beta) = 2: below it the gradient lifts the chosen one, above it lowers it."""
    chosen = torch.tensor([1.9, 2.0, 2.1], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(3, dtype=torch.float64)

    dpo_loss(chosen, zero, zero, zero, beta=0.25, denominator=1.0, loss="ipo").loss.backward()

    torch.testing.assert_close(chosen.grad, torch.tensor([-0.2, 0.0, 0.2], dtype=torch.float64), rtol=0, atol=1e-12)


def test_hinge_lets_go_of_a_margin_that_is_large_enough():
    """beta h = 0.95, 1.05 around the hinge at 1: slope -beta / denominator = -0.25 / 2 before it, nothing behind it."""
    chosen = torch.tensor([3.8, 4.2], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(2, dtype=torch.float64)

    dpo_loss(chosen, zero, zero, zero, beta=0.25, denominator=2.0, loss="hinge").loss.backward()

    torch.testing.assert_close(chosen.grad, torch.tensor([-0.125, 0.0], dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("h", [-1e6, 1e6])
def test_huge_margins_stay_finite_and_linear(h: float):
    """-log sigmoid(beta h) -> max(0, -beta h); its slope -> -beta or 0."""
    chosen = torch.tensor([h], requires_grad=True)
    zero = torch.zeros(1)

    output = dpo_loss(chosen, zero, zero, zero, beta=0.1, denominator=1.0)
    output.loss.backward()

    assert output.loss.item() == pytest.approx(max(0.0, -0.1 * h), rel=1e-6)
    assert chosen.grad is not None and chosen.grad.item() == pytest.approx(-0.1 if h < 0 else 0.0, abs=1e-7)


@variants
@pytest.mark.parametrize("sizes", [[6], [1, 5], [2, 0, 4], [1] * 6], ids=str)
def test_any_split_of_the_pairs_adds_up_to_the_whole(settings: dict[str, Any], sizes: list[int]):
    whole = [tensor.requires_grad_() for tensor in random_logps(6)]
    expected = dpo_loss(*whole, denominator=8.0, **settings)
    expected_gradient = torch.autograd.grad(expected.loss, whole[0])[0]

    outputs = [dpo_loss(*part, denominator=8.0, **settings) for part in zip(*(tensor.split(sizes) for tensor in whole), strict=True)]
    total = sum(output.loss for output in outputs)

    torch.testing.assert_close(total, expected.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(total, whole[0])[0], expected_gradient, rtol=1e-12, atol=0)
    for key, mean in expected.metrics.items():
        parts = [output.metrics[key] for output in outputs]
        assert sum(part.total.item() for part in parts) == pytest.approx(mean.total.item(), rel=1e-12)
        assert sum(part.weight.item() for part in parts) == mean.weight.item() == 6


def test_accuracy_counts_only_margins_above_zero():
    chosen, zero = torch.tensor([1.0, 0.0, -1.0, 2.0]), torch.zeros(4)

    accuracy = dpo_loss(chosen, zero, zero, zero, beta=0.1, denominator=4.0).metrics["dpo/accuracy"]

    assert accuracy.total.item() / accuracy.weight.item() == 0.5


@pytest.mark.parametrize("odd_one", range(4))
def test_shapes_that_would_broadcast_are_refused(odd_one: int):
    logps = random_logps(2)
    logps[odd_one] = logps[odd_one][:1]

    with pytest.raises(ShapeError, match="must share one shape"):
        dpo_loss(*logps, beta=0.1, denominator=2.0)


# The objective: what it takes from a group.


def objective(**settings: Any) -> DPO:
    return DPO(load_config(overrides=["algorithm=dpo", *(f"algorithm.dpo.{key}={value}" for key, value in settings.items())]).config)


def microbatch_of(dpo: DPO, *scores: tuple[float, ...]) -> Microbatch:
    units = [dpo.select(make_scored(make_ticket(index, seed=index), scores=row)) for index, row in enumerate(scores)]
    return collate([unit for unit in units if unit], "packed")


def test_pair_is_the_best_and_the_worst_of_the_group():
    scored = make_scored(make_ticket(), scores=(0.2, 0.9, -1.0, 0.5))

    chosen, rejected = objective().select(scored)

    assert (chosen.score, rejected.score) == (pytest.approx(0.9), pytest.approx(-1.0))
    assert chosen.completion_ids is scored.group.rollouts[1].completion_ids
    assert rejected.reference_logprobs is scored.reference_logprobs[2]


@pytest.mark.parametrize(("place", "scores"), [(0, (1.0, 0.0, 1.0, 1.0)), (1, (0.0, 1.0, 0.0, 0.0))], ids=["best", "worst"])
def test_equal_scores_are_broken_by_the_seed_and_not_by_their_order(place: int, scores: tuple[float, ...]):
    dpo = objective()

    def pick(seed: int) -> int:
        scored = make_scored(make_ticket(seed=seed), scores=scores)
        picked = dpo.select(scored)[place]
        return next(k for k, rollout in enumerate(scored.group.rollouts) if rollout.completion_ids is picked.completion_ids)

    picks = [pick(seed) for seed in range(300)]

    assert picks == [pick(seed) for seed in range(300)]
    # 300 draws of 1/3: 100 +- 8.2 each; five standard deviations.
    assert all(abs(picks.count(k) - 100) < 41 for k in (0, 2, 3)) and 1 not in picks


def test_known_mistake_6_a_tied_group_gives_no_pair_but_counts_in_the_denominator():
    """Three groups, one of them tied: the two pairs' losses are divided by 3."""
    dpo = objective(beta=0.1)
    microbatch = microbatch_of(dpo, (1.0, 0.0), (0.5, 0.5), (0.0, 1.0))
    policy = microbatch.reference_logprobs.clone()

    output = dpo.loss(policy, microbatch, Totals(groups=3.0, sequences=4.0, tokens=1.0))

    assert dpo.select(make_scored(make_ticket(), scores=(0.5, 0.5))) == ()
    assert microbatch.loss_mask.shape[0] == 4
    # policy = reference: h = 0, each pair costs log 2.
    assert output.loss.item() == pytest.approx(2 * math.log(2) / 3, rel=1e-6)
    assert output.metrics["dpo/margin"].weight.item() == 2


@variants
@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_objective_sums_the_log_probabilities_of_each_completion(settings: dict[str, Any], batching: Batching):
    dpo = objective(**settings)
    groups = [make_scored(make_ticket(index), scores=(0.0, 1.0), seed=5) for index in range(3)]
    microbatch = collate([dpo.select(scored) for scored in groups], batching)
    policy = torch.linspace(-3, 0, microbatch.loss_mask.numel()).reshape(microbatch.loss_mask.shape)

    output = dpo.loss(policy, microbatch, Totals(groups=4.0, sequences=6.0, tokens=1.0))

    sums = [sum(row[: int(mask.sum())]) for row, mask in zip(policy.double().tolist(), microbatch.loss_mask, strict=True)]
    reference = [[float(np.sum(scored.reference_logprobs[k], dtype=np.float64)) for scored in groups] for k in (1, 0)]
    expected = slow_dpo(sums[0::2], sums[1::2], *reference, denominator=4.0, **settings)
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)


def test_order_of_the_groups_changes_nothing():
    dpo, totals = objective(), Totals(groups=3.0, sequences=6.0, tokens=1.0)
    units = [dpo.select(make_scored(make_ticket(index), scores=(0.0, 1.0))) for index in range(3)]
    whole = collate(units, "padded")
    policy = torch.linspace(-3, 0, whole.loss_mask.numel(), dtype=torch.float64).reshape(whole.loss_mask.shape).requires_grad_()

    straight = dpo.loss(policy, whole, totals).loss
    turned = dpo.loss(policy[[4, 5, 0, 1, 2, 3]], collate([units[2], units[0], units[1]], "padded"), totals).loss

    torch.testing.assert_close(turned, straight, rtol=1e-6, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, policy)[0] for loss in (straight, turned)), rtol=1e-6, atol=1e-9)


def test_masked_positions_may_hold_nan_and_get_no_gradient():
    dpo = objective()
    microbatch = microbatch_of(dpo, (1.0, 0.0), (0.0, 1.0), (1.0, 0.0))
    assert not microbatch.loss_mask.all()
    clean = torch.where(microbatch.loss_mask, torch.full(microbatch.loss_mask.shape, -1.5), torch.zeros(()))
    totals = Totals(groups=3.0, sequences=6.0, tokens=1.0)
    poisoned = torch.where(microbatch.loss_mask, clean, torch.tensor(float("nan"))).requires_grad_()

    output = dpo.loss(poisoned, microbatch, totals)
    output.loss.backward()

    assert output.loss.item() == dpo.loss(clean, microbatch, totals).loss.item()
    assert poisoned.grad is not None
    assert torch.equal(poisoned.grad != 0, microbatch.loss_mask)
