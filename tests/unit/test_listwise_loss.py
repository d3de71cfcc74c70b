"""The Plackett-Luce loss against a slow transcription and its identities, and the objective that feeds it."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from async_rlhf.batching import Batching, collate
from async_rlhf.config import load_config
from async_rlhf.errors import ShapeError
from async_rlhf.losses import dpo_loss, listwise_loss
from learners.listwise import Listwise
from learners.objective import Totals
from tests.support.samples import make_scored, make_ticket

score_rows = pytest.mark.parametrize(
    "scores",
    [
        [[3.0, 1.0, 2.0, 0.0], [0.0, 1.0, 2.0, 3.0], [-1.0, 5.0, 0.5, 0.2]],
        [[1.0, 0.0, 1.0, 0.0], [2.0, 2.0, 2.0, 1.0], [0.0, 0.0, 0.0, 1.0]],
        [[1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 1.0, 2.0], [3.0, 1.0, 2.0, 0.0]],
    ],
    ids=["ranked", "ties", "tied group"],
)


Rows = Sequence[Sequence[float]]


def slow_listwise(policy: Rows, reference: Rows, scores: Rows, beta: float) -> float:
    """App. A.3 of arXiv:2305.18290, one choice at a time; an item competes with itself and the strictly worse ones."""
    total = 0.0
    for pi, ref, s in zip(policy, reference, scores, strict=True):
        strength = [(math.exp(p) / math.exp(r)) ** beta for p, r in zip(pi, ref, strict=True)]
        for i in range(len(s)):
            total -= math.log(strength[i] / (strength[i] + sum(strength[j] for j in range(len(s)) if s[j] < s[i])))
    return total


def random_logps(num_groups: int, num: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    policy, reference = (-6 * torch.rand(num_groups, num, generator=g, dtype=torch.float64) for _ in range(2))
    return policy, reference


def tensor_of(rows: Rows) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@score_rows
@pytest.mark.parametrize("beta", [0.1, 1.5])
@pytest.mark.parametrize("seed", range(3))
def test_loss_is_the_formula(scores: list[list[float]], beta: float, seed: int):
    policy, reference = random_logps(3, 4, seed)

    output = listwise_loss(policy, reference, tensor_of(scores), beta=beta, denominator=5.0)

    assert output.loss.item() == pytest.approx(slow_listwise(policy.tolist(), reference.tolist(), scores, beta) / 5, rel=1e-12)


def test_three_completions_by_hand():
    """beta .5, policy - reference = 2 log 2, 0, 2 log 3: strengths 2, 1, 3; scores 5, 1, 3 rank them 2 > 3 > 1.

    -log(2 / 6) - log(3 / 4) - log(1 / 1) = log 4 = 1.38629436, over 2 groups .69314718. Margins over the three pairs, in logs:
    2 : 3, 2 : 1 and 3 : 1, together log(2 / 3 * 2 * 3) = log 4; two of three are positive.
    """
    policy = torch.tensor([[4.0, 1.0, 9.0]], dtype=torch.float64).log()

    output = listwise_loss(policy, torch.zeros_like(policy), tensor_of([[5.0, 1.0, 3.0]]), beta=0.5, denominator=2.0)

    assert output.loss.item() == pytest.approx(0.69314718, abs=1e-8)
    margin, accuracy = output.metrics["listwise/margin"], output.metrics["listwise/accuracy"]
    assert margin.total.item() == pytest.approx(math.log(4), abs=1e-12)
    assert (accuracy.total.item(), accuracy.weight.item(), margin.weight.item()) == (2, 3, 3)


def test_two_that_tie_for_the_best_each_compete_with_the_worse_one_only():
    """Strengths 2, 3, 1 and scores 1, 1, 0: -log(2 / 3) - log(3 / 4) - log(1) = log 2; two ranked pairs, not three."""
    policy = torch.tensor([[2.0, 3.0, 1.0]], dtype=torch.float64).log()

    output = listwise_loss(policy, torch.zeros_like(policy), tensor_of([[1.0, 1.0, 0.0]]), beta=1.0, denominator=1.0)

    assert output.loss.item() == pytest.approx(math.log(2), abs=1e-12)
    assert output.metrics["listwise/margin"].weight.item() == 2
    assert output.metrics["listwise/margin"].total.item() == pytest.approx(math.log(6), abs=1e-12)


def test_the_reference_itself_finds_all_rankings_alike_and_gets_no_pair_right():
    """policy = reference: each of the 4! rankings has probability 1 / 24; margins of 0 are no success."""
    policy, _ = random_logps(1, 4)

    output = listwise_loss(policy, policy, tensor_of([[3.0, 1.0, 2.0, 0.0]]), beta=0.7, denominator=1.0)

    assert output.loss.item() == pytest.approx(math.log(24), rel=1e-12)
    assert output.metrics["listwise/accuracy"].total.item() == 0


def test_probabilities_of_all_rankings_add_up_to_one():
    policy, reference = random_logps(1, 4)

    losses = [
        listwise_loss(policy, reference, tensor_of([ranking]), beta=0.7, denominator=1.0).loss
        for ranking in itertools.permutations([0.0, 1.0, 2.0, 3.0])
    ]

    assert torch.stack(losses).neg().exp().sum().item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_two_completions_are_sigmoid_dpo(beta: float):
    policy, reference = random_logps(5, 2)
    policy.requires_grad_()
    wins = torch.tensor([0, 1, 1, 0, 1])
    scores = torch.nn.functional.one_hot(wins, 2).double()
    pairs = [rows.gather(1, columns[:, None])[:, 0] for rows in (policy, reference) for columns in (wins, 1 - wins)]

    listwise = listwise_loss(policy, reference, scores, beta=beta, denominator=6.0)
    dpo = dpo_loss(*pairs, beta=beta, denominator=6.0)

    torch.testing.assert_close(listwise.loss, dpo.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(output.loss, policy)[0] for output in (listwise, dpo)), rtol=1e-10, atol=1e-14)
    for name in ("margin", "accuracy"):
        assert listwise.metrics[f"listwise/{name}"].total.item() == pytest.approx(dpo.metrics[f"dpo/{name}"].total.item(), rel=1e-12)


def test_known_mistake_6_a_group_of_equal_scores_costs_exactly_nothing():
    policy, reference = random_logps(3, 4)
    policy.requires_grad_()

    output = listwise_loss(policy, reference, torch.full((3, 4), 0.1), beta=0.5, denominator=3.0)
    output.loss.backward()

    assert output.loss.item() == 0.0
    assert policy.grad is not None and not policy.grad.any()
    assert output.metrics["listwise/margin"].weight.item() == 0


@score_rows
def test_gradient_is_that_of_the_loss_and_leaves_the_sum_of_a_group_alone(scores: list[list[float]]):
    """Only differences count: a common shift of all K changes nothing, so each group's gradient adds up to 0."""
    policy, reference = random_logps(3, 4)
    policy.requires_grad_()

    def loss(logps: Tensor) -> Tensor:
        return listwise_loss(logps, reference, tensor_of(scores), beta=0.7, denominator=3.0).loss

    assert torch.autograd.gradcheck(loss, (policy,), atol=1e-8)
    gradient = torch.autograd.grad(loss(policy), policy)[0]
    torch.testing.assert_close(gradient.sum(1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-14)


def test_gradient_by_hand():
    """Strengths 2, 1, 3 as above, beta .5, ranked 1st, 3rd, 2nd; d/d log pi = beta (its shares in the choices - its own choice):
    .5 (2/6 - 1) = -1/3; .5 (1/6 + 1/4 + 1 - 1) = 5/24; .5 (3/6 + 3/4 - 1) = 1/8."""
    policy = torch.tensor([[4.0, 1.0, 9.0]], dtype=torch.float64).log().requires_grad_()

    listwise_loss(policy, torch.zeros(1, 3, dtype=torch.float64), tensor_of([[5.0, 1.0, 3.0]]), beta=0.5, denominator=1.0).loss.backward()

    assert policy.grad is not None and policy.grad[0].tolist() == pytest.approx([-1 / 3, 5 / 24, 1 / 8], abs=1e-12)


def test_no_gradient_reaches_the_reference_or_the_scores():
    policy, reference, scores = (rows.requires_grad_() for rows in (*random_logps(2, 3), tensor_of([[1.0, 0.0, 2.0]] * 2)))

    output = listwise_loss(policy, reference, scores, beta=0.7, denominator=2.0)
    output.loss.backward()

    assert policy.grad is not None and policy.grad.all() and reference.grad is None and scores.grad is None
    assert not any(mean.total.requires_grad for mean in output.metrics.values())


@score_rows
def test_order_of_the_completions_and_scale_of_the_scores_change_nothing(scores: list[list[float]]):
    policy, reference = random_logps(3, 4)
    expected = listwise_loss(policy, reference, tensor_of(scores), beta=0.7, denominator=3.0)

    for order in ([3, 2, 1, 0], [1, 3, 0, 2]):
        rows = (policy[:, order], reference[:, order], 10 * tensor_of(scores)[:, order] - 7)
        output = listwise_loss(*rows, beta=0.7, denominator=3.0)
        assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-12)
        for key, mean in expected.metrics.items():
            assert output.metrics[key].total.item() == pytest.approx(mean.total.item(), rel=1e-12), key


@score_rows
@pytest.mark.parametrize("sizes", [[1, 2], [2, 1], [1, 1, 1]], ids=str)
def test_any_split_of_the_groups_adds_up_to_the_whole(scores: list[list[float]], sizes: list[int]):
    rows = (*random_logps(3, 4), tensor_of(scores))
    rows[0].requires_grad_()
    expected = listwise_loss(*rows, beta=0.7, denominator=5.0)

    parts = zip(*(tensor.split(sizes) for tensor in rows), strict=True)
    outputs = [listwise_loss(*part, beta=0.7, denominator=5.0) for part in parts]
    total = sum(output.loss for output in outputs)

    torch.testing.assert_close(total, expected.loss, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(*(torch.autograd.grad(loss, rows[0])[0] for loss in (total, expected.loss)), rtol=1e-12, atol=1e-15)
    for key, mean in expected.metrics.items():
        assert sum(o.metrics[key].total.item() for o in outputs) == pytest.approx(mean.total.item(), rel=1e-12), key
        assert sum(o.metrics[key].weight.item() for o in outputs) == mean.weight.item(), key


@pytest.mark.parametrize("distance", [-1e6, 1e6])
def test_huge_margins_stay_finite_and_linear(distance: float):
    """Two completions, -log sigmoid(beta h) -> max(0, -beta h); its slope -> -beta or 0."""
    policy = torch.tensor([[distance, 0.0]], requires_grad=True)

    output = listwise_loss(policy, torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), beta=0.1, denominator=1.0)
    output.loss.backward()

    assert output.loss.item() == pytest.approx(max(0.0, -0.1 * distance), rel=1e-6)
    assert policy.grad is not None and policy.grad[0].tolist() == pytest.approx([-0.1, 0.1] if distance < 0 else [0.0, 0.0], abs=1e-7)


def test_shapes_that_do_not_make_rankings_are_refused():
    rows = [*random_logps(2, 3), torch.zeros(2, 3)]
    for odd_one in range(3):
        wrong = [row[:1] if place == odd_one else row for place, row in enumerate(rows)]
        with pytest.raises(ShapeError, match="must share one shape"):
            listwise_loss(*wrong, beta=0.1, denominator=1.0)
    for shape in ((3,), (3, 1), (1, 2, 2)):
        with pytest.raises(ShapeError, match="a ranking needs two items"):
            listwise_loss(*(torch.zeros(shape) for _ in range(3)), beta=0.1, denominator=1.0)


# The objective.


def objective(beta: float = 0.7) -> Listwise:
    return Listwise(load_config(overrides=["algorithm=listwise", f"algorithm.listwise.beta={beta}"]).config)


def test_all_completions_are_trained_in_their_order():
    scored = make_scored(make_ticket(), scores=(0.0, 2.0, 2.0))

    unit = objective().select(scored)

    assert [(sequence.score, sequence.weight) for sequence in unit] == [(0.0, 1.0), (2.0, 1.0), (2.0, 1.0)]
    assert all(a.completion_ids is b.completion_ids for a, b in zip(unit, scored.group.rollouts, strict=True))


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_known_mistake_6_a_tied_group_is_not_trained_but_counts_in_the_denominator(batching: Batching):
    """Three groups, the second tied: the losses of two, on summed log-probabilities, are divided by 3."""
    listwise = objective()
    groups = [make_scored(make_ticket(k), scores=s) for k, s in enumerate([(0.0, 2.0, 1.0), (0.1, 0.1, 0.1), (1.0, 1.0, 0.0)])]
    units = [listwise.select(scored) for scored in groups]
    microbatch = collate([unit for unit in units if unit], batching)
    mask = microbatch.loss_mask
    policy = torch.from_numpy(-3 * np.random.default_rng(4).random(mask.shape))
    hidden = torch.where(mask, policy, math.nan).requires_grad_()

    output = listwise.loss(hidden, microbatch, Totals(groups=3.0, sequences=6.0, tokens=1.0))
    output.loss.backward()

    assert [len(unit) for unit in units] == [3, 0, 3]
    sums = [sum(row[: int(real.sum())]) for row, real in zip(policy.tolist(), mask, strict=True)]
    references = [[float(np.sum(row, dtype=np.float64)) for row in groups[k].reference_logprobs] for k in (0, 2)]
    expected = slow_listwise([sums[:3], sums[3:]], references, [(0.0, 2.0, 1.0), (1.0, 1.0, 0.0)], 0.7) / 3
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    assert hidden.grad is not None and torch.equal(hidden.grad != 0, mask)


def test_order_of_the_groups_changes_nothing():
    listwise, totals = objective(), Totals(groups=3.0, sequences=6.0, tokens=1.0)
    units = [listwise.select(make_scored(make_ticket(index), scores=(0.0, 1.0))) for index in range(3)]
    whole = collate(units, "padded")
    policy = torch.from_numpy(-3 * np.random.default_rng(4).random(whole.loss_mask.shape)).requires_grad_()

    straight = listwise.loss(policy, whole, totals).loss
    turned = listwise.loss(policy[[4, 5, 0, 1, 2, 3]], collate([units[2], units[0], units[1]], "padded"), totals).loss

    torch.testing.assert_close(turned, straight, rtol=1e-6, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, policy)[0] for loss in (straight, turned)), rtol=1e-6, atol=1e-9)
