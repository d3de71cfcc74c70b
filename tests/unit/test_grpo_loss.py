"""The group-normalised advantage and its clipped loss against slow transcriptions, and the objective that feeds them."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from async_rlhf.batching import Batching, Unit, collate, with_proximal
from async_rlhf.config import load_config
from async_rlhf.errors import ShapeError
from async_rlhf.losses import grpo_advantages, grpo_loss, rloo_advantages
from learners.grpo import GRPO
from learners.objective import Totals
from tests.support.samples import make_scored, make_ticket

all_corrections = pytest.mark.parametrize("correction", ["behavior", "none", "truncated", "masked", "decoupled"])
all_norms = pytest.mark.parametrize("loss_norm", ["token", "sequence", "constant"])
with_and_without_kl = pytest.mark.parametrize("kl_coef", [0.0, 0.7])

LOGPROBS = ("policy_logprobs", "proximal_logprobs", "behavior_logprobs", "reference_logprobs")


def slow_advantages(scores: list[float], normalize: bool) -> list[float]:
    """Sec. 4.1.2 of arXiv:2402.03300 with the sample standard deviation; sec. 3.2 of arXiv:2503.20783 without it."""
    mean = sum(scores) / len(scores)
    std = math.sqrt(sum((s - mean) ** 2 for s in scores) / (len(scores) - 1))
    return [(s - mean) / (std + 1e-4) if normalize else s - mean for s in scores]


def slow_grpo(*rows: list[Any], **settings: Any) -> float:
    """Eq. 3 of arXiv:2402.03300 with two clip sides (eq. 10 of arXiv:2503.14476), one token at a time; arguments as in grpo_loss."""
    *logprobs, mask, advantages = rows
    correction, cap = settings["correction"], settings["correction_cap"]
    total = 0.0
    for n, advantage in enumerate(advantages):
        tokens = [t for t in range(len(mask[n])) if mask[n][t]]
        of_completion = 0.0
        for t in tokens:
            pi, prox, mu, ref = (math.exp(of_policy[n][t]) for of_policy in logprobs)
            c = prox / mu
            r = pi / (mu if correction == "behavior" else prox)
            w = {"truncated": min(c, cap), "masked": c if 1 / cap <= c <= cap else 0.0, "decoupled": c}.get(correction, 1.0)
            clipped = min(max(r, 1 - settings["clip_low"]), 1 + settings["clip_high"])
            of_completion -= w * min(r * advantage, clipped * advantage)
            of_completion += settings["kl_coef"] * (ref / pi - math.log(ref / pi) - 1)
        total += of_completion / len(tokens) if settings["loss_norm"] == "sequence" else of_completion
    return total / settings["denominator"]


def sample(num: int = 6, width: int = 5, seed: int = 0, spread: float = 0.3) -> dict[str, Tensor]:
    """Float64 log-probabilities of four nearby policies, a mask of random lengths, advantages of both signs."""
    g = torch.Generator().manual_seed(seed)
    rows = {"policy_logprobs": -3 * torch.rand(num, width, generator=g, dtype=torch.float64)}
    for before, name in itertools.pairwise(LOGPROBS):
        rows[name] = rows[before] + spread * torch.randn(num, width, generator=g, dtype=torch.float64)
    lengths = torch.randint(1, width + 1, (num,), generator=g)
    mask = torch.arange(width)[None] < lengths[:, None]
    return rows | {"loss_mask": mask, "advantages": torch.randn(num, generator=g, dtype=torch.float64)}


def settings_of(**changes: Any) -> dict[str, Any]:
    settings = {"clip_low": 0.2, "clip_high": 0.28, "correction": "truncated", "correction_cap": 1.2}
    return settings | {"kl_coef": 0.0, "loss_norm": "token", "denominator": 7.0} | changes


# Advantages.


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("num", [2, 3, 8])
def test_advantage_is_the_distance_from_the_mean_in_sample_standard_deviations(num: int, normalize: bool):
    scores = torch.randn(5, num, generator=torch.Generator().manual_seed(num), dtype=torch.float64)

    advantages = grpo_advantages(scores, normalize=normalize)

    for row, got in zip(scores.tolist(), advantages.tolist(), strict=True):
        assert got == pytest.approx(slow_advantages(row, normalize), abs=1e-12)
        assert sum(got) == pytest.approx(0.0, abs=1e-10)


def test_advantages_by_hand():
    """Scores 3, 0, 0: mean 1, std sqrt((4 + 1 + 1) / 2) = 1.7320508; 2 / 1.7321508 = 1.15463389, -1 / 1.7321508 = -0.57731695."""
    scores = torch.tensor([[3.0, 0.0, 0.0]], dtype=torch.float64)

    assert grpo_advantages(scores, normalize=True)[0].tolist() == pytest.approx([1.15463389, -0.57731695, -0.57731695], abs=1e-7)
    assert grpo_advantages(scores, normalize=False)[0].tolist() == [2.0, -1.0, -1.0]


@pytest.mark.parametrize("num", [2, 5])
def test_unnormalised_advantage_is_that_of_leave_one_out_times_the_share_of_the_siblings(num: int):
    scores = torch.randn(4, num, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    expected = rloo_advantages(scores) * (num - 1) / num

    torch.testing.assert_close(grpo_advantages(scores, normalize=False), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", [0.1, 1.0, 1000.1])
@pytest.mark.parametrize("num", [2, 3, 8])
def test_known_mistake_6_equal_scores_have_no_advantage_at_all(num: int, score: float, normalize: bool):
    """Rounding in the mean, divided by a spread that is rounding too, would train noise: all K up, or all K down."""
    assert not grpo_advantages(torch.full((1, num), score), normalize=normalize).any()


@pytest.mark.parametrize("shape", [(3,), (3, 1), (1, 2, 2)])
def test_advantages_need_a_group(shape: tuple[int, ...]):
    with pytest.raises(ShapeError, match="a group of one has no spread"):
        grpo_advantages(torch.zeros(shape), normalize=True)


def test_advantages_carry_no_gradient():
    assert not grpo_advantages(torch.ones(2, 2, requires_grad=True), normalize=True).requires_grad


# The loss.


@with_and_without_kl
@all_norms
@all_corrections
def test_loss_is_the_formula_in_every_mode(correction: str, loss_norm: str, kl_coef: float):
    settings = settings_of(correction=correction, loss_norm=loss_norm, kl_coef=kl_coef)
    for seed in range(3):
        tensors = sample(seed=seed)

        output = grpo_loss(**tensors, **settings)

        assert output.loss.item() == pytest.approx(slow_grpo(*(t.tolist() for t in tensors.values()), **settings), rel=1e-10)


def test_one_token_by_hand():
    """policy .5, proximal .25, behavior .2, reference .25, A = 1, c = 1.1, kl .5, over 2 tokens.

    R = 2, clipped 1.28; C = 1.25, truncated 1.1; -1.1 * min(2, 1.28) = -1.408; k3 = .5 - 1 - log .5 = .19314718;
    (-1.408 + .5 * .19314718) / 2 = -.65571321.
    """
    logprobs = torch.tensor([[[0.5]], [[0.25]], [[0.2]], [[0.25]]], dtype=torch.float64).log()
    mask, advantages = torch.tensor([[True]]), torch.tensor([1.0], dtype=torch.float64)

    output = grpo_loss(*logprobs, mask, advantages, **settings_of(correction_cap=1.1, kl_coef=0.5, denominator=2.0))

    assert output.loss.item() == pytest.approx(-0.65571321, abs=1e-8)
    assert output.metrics["policy/clip_share"].total.item() == 1
    assert output.metrics["correction/weight"].total.item() == pytest.approx(1.1, abs=1e-12)


@pytest.mark.parametrize(
    ("loss_norm", "denominator", "expected"), [("token", 3.0, -5 / 3), ("sequence", 2.0, -1.0), ("constant", 8.0, -5 / 8)]
)
def test_loss_norms_by_hand(loss_norm: str, denominator: float, expected: float):
    """On policy, two tokens of A = 3 and one of A = -1: -3 - 3 + 1 = -5 over 3 tokens, or over 2 completions x 4 tokens;
    by sequence (-6 / 2 + 1 / 1) / 2 = -1."""
    rows = torch.full((2, 2), -1.0, dtype=torch.float64)
    mask, advantages = torch.tensor([[True, True], [True, False]]), torch.tensor([3.0, -1.0], dtype=torch.float64)

    output = grpo_loss(rows, rows, rows, rows, mask, advantages, **settings_of(loss_norm=loss_norm, denominator=denominator))

    assert output.loss.item() == pytest.approx(expected, abs=1e-12)


@all_corrections
def test_on_policy_gradient_is_minus_the_advantage_of_each_token(correction: str):
    tensors = sample()
    rows, mask, advantages = tensors["policy_logprobs"], tensors["loss_mask"], tensors["advantages"]
    policy = rows.clone().requires_grad_()

    output = grpo_loss(policy, rows, rows, rows, mask, advantages, **settings_of(correction=correction, kl_coef=0.9))
    output.loss.backward()

    torch.testing.assert_close(policy.grad, torch.where(mask, -advantages[:, None] / 7, 0.0), rtol=1e-12, atol=1e-15)
    assert output.loss.item() == pytest.approx(-(advantages * mask.sum(1)).sum().item() / 7, rel=1e-12)


@with_and_without_kl
@all_norms
@all_corrections
def test_gradient_is_that_of_the_loss(correction: str, loss_norm: str, kl_coef: float):
    tensors, settings = sample(num=4, width=3), settings_of(correction=correction, loss_norm=loss_norm, kl_coef=kl_coef)
    policy = tensors.pop("policy_logprobs").requires_grad_()

    assert torch.autograd.gradcheck(lambda p: grpo_loss(p, **tensors, **settings).loss, (policy,), atol=1e-8)


def test_k3_pulls_like_the_kl_from_the_reference_to_the_policy():
    """d k3 / d log pi = 1 - reference / pi, so that over all actions of pi E[k3'] = d KL(reference || pi), not d KL(pi || reference)."""
    logits = torch.tensor([0.3, -0.5, 1.0, 0.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.2, 0.9, 0.0, 0.4], dtype=torch.float64).log_softmax(-1)
    policy = logits.log_softmax(-1)
    probabilities = policy.exp().detach()
    expected = torch.autograd.grad((reference.exp() * (reference - policy)).sum(), logits, retain_graph=True)[0]
    other = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)[0]

    total = torch.zeros((), dtype=torch.float64)
    for action in range(4):
        now, ref = policy[action].reshape(1, 1), reference[action].reshape(1, 1)
        mask, nothing = torch.tensor([[True]]), torch.zeros(1, dtype=torch.float64)
        loss = grpo_loss(now, now.detach(), now.detach(), ref, mask, nothing, **settings_of(kl_coef=1.0, denominator=1.0)).loss
        torch.testing.assert_close(torch.autograd.grad(loss, now, retain_graph=True)[0], 1 - (ref - now).exp().detach(), rtol=1e-12, atol=0)
        total = total + probabilities[action] * loss

    gradient = torch.autograd.grad(total, logits)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
    assert (gradient - other).abs().max() > 0.05


@with_and_without_kl
@all_corrections
def test_no_gradient_reaches_proximal_behavior_reference_or_advantages(correction: str, kl_coef: float):
    tensors = {name: t if t.dtype == torch.bool else t.requires_grad_() for name, t in sample().items()}

    output = grpo_loss(**tensors, **settings_of(correction=correction, kl_coef=kl_coef))
    output.loss.backward()

    assert not any(mean.total.requires_grad for mean in output.metrics.values())
    assert tensors["policy_logprobs"].grad is not None and tensors["policy_logprobs"].grad.abs().sum() > 0
    assert all(tensors[name].grad is None for name in (*LOGPROBS[1:], "advantages"))


@all_norms
@all_corrections
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 7.0])
def test_known_mistake_7_masked_positions_count_nowhere_and_get_no_gradient(correction: str, loss_norm: str, garbage: float):
    """Whatever stands behind the last token, and however wide: loss, gradient, clip share and mean weight are the narrow ones."""
    tensors, settings = sample(), settings_of(correction=correction, loss_norm=loss_norm, kl_coef=0.7)
    mask = tensors["loss_mask"]
    clean_policy = tensors["policy_logprobs"].clone().requires_grad_()
    clean = grpo_loss(**(tensors | {"policy_logprobs": clean_policy}), **settings)
    clean.loss.backward()
    wide = {name: torch.nn.functional.pad(t, (0, 3)) for name, t in tensors.items() if t.dim() == 2} | {"advantages": tensors["advantages"]}
    for place, name in enumerate(LOGPROBS):
        wide[name] = torch.where(wide["loss_mask"], wide[name], garbage * (-1) ** place)
    wide["policy_logprobs"].requires_grad_()

    output = grpo_loss(**wide, **settings)
    output.loss.backward()

    gradient = wide["policy_logprobs"].grad
    assert gradient is not None and clean_policy.grad is not None and not mask.all()
    assert output.loss.item() == pytest.approx(clean.loss.item(), rel=1e-12)
    torch.testing.assert_close(gradient[:, :5], clean_policy.grad, rtol=1e-12, atol=0)
    assert not gradient[~wide["loss_mask"]].any()
    for key, mean in clean.metrics.items():
        assert output.metrics[key].total.item() == pytest.approx(mean.total.item(), rel=1e-12), key
        assert output.metrics[key].weight.item() == mask.sum().item(), key


@pytest.mark.parametrize(
    ("ratio_value", "advantage", "held"),
    [(1.29, 1.0, True), (1.27, 1.0, False), (0.79, 1.0, False), (0.79, -1.0, True), (0.81, -1.0, False), (1.29, -1.0, False)],
)
def test_each_side_of_the_clip_has_its_own_width(ratio_value: float, advantage: float, held: bool):
    """clip_low .2 and clip_high .28: [.8, 1.28]; where min(R A, clip(R) A) is R A its gradient is -R A, where it is the clip 0."""
    policy = torch.tensor([[math.log(ratio_value) - 1]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-1.0]], dtype=torch.float64)

    output = grpo_loss(
        policy, old, old, old, torch.tensor([[True]]), torch.tensor([advantage], dtype=torch.float64), **settings_of(denominator=1.0)
    )
    output.loss.backward()

    assert policy.grad is not None
    assert policy.grad.item() == pytest.approx(0.0 if held else -ratio_value * advantage, abs=1e-12)
    assert output.metrics["policy/clip_share"].total.item() == float(held)


@all_norms
@pytest.mark.parametrize("sizes", [[6], [1, 5], [2, 2, 2], [1] * 6], ids=str)
def test_any_split_of_the_completions_adds_up_to_the_whole(loss_norm: str, sizes: list[int]):
    tensors, settings = sample(), settings_of(loss_norm=loss_norm, kl_coef=0.7)
    policy = tensors["policy_logprobs"].requires_grad_()
    expected = grpo_loss(**tensors, **settings)
    expected_gradient = torch.autograd.grad(expected.loss, policy)[0]

    outputs = [grpo_loss(*part, **settings) for part in zip(*(tensor.split(sizes) for tensor in tensors.values()), strict=True)]
    total = sum(output.loss for output in outputs)

    torch.testing.assert_close(total, expected.loss, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(torch.autograd.grad(total, policy)[0], expected_gradient, rtol=1e-12, atol=1e-15)
    for key, mean in expected.metrics.items():
        assert sum(o.metrics[key].total.item() for o in outputs) == pytest.approx(mean.total.item(), rel=1e-12), key
        assert sum(o.metrics[key].weight.item() for o in outputs) == mean.weight.item(), key


@pytest.mark.parametrize("name", [*LOGPROBS, "loss_mask", "advantages"])
def test_shapes_that_would_broadcast_are_refused(name: str):
    tensors = sample()
    tensors[name] = tensors[name][:1]

    with pytest.raises(ShapeError, match="must share one shape"):
        grpo_loss(**tensors, **settings_of())


# The objective.


def objective(*overrides: str) -> GRPO:
    own = (f"algorithm.{override}" for override in overrides)
    return GRPO(load_config(overrides=["algorithm=grpo", "generator.max_new_tokens=11", *own]).config)


def units_of(grpo: GRPO, *scores: tuple[float, ...], stored: bool = True) -> list[Unit]:
    rng = np.random.default_rng(3)
    units = [grpo.select(make_scored(make_ticket(index), scores=row)) for index, row in enumerate(scores)]
    if stored:
        return [with_proximal(unit, [-3 * rng.random(len(s.completion_ids), dtype=np.float32) for s in unit]) for unit in units]
    return units


@pytest.mark.parametrize(("batching", "stored"), [("packed", True), ("padded", True), ("padded", False)])
@pytest.mark.parametrize(
    ("overrides", "changes", "normalize"),
    [
        ([], {}, True),
        (["grpo.loss_norm=sequence", "correction=masked"], {"loss_norm": "sequence", "correction": "masked", "denominator": 9.0}, True),
        (["grpo.loss_norm=constant", "correction_cap=1.2"], {"loss_norm": "constant", "correction_cap": 1.2, "denominator": 99.0}, True),
        (["grpo.clip_low=0.1", "grpo.clip_high=0.4"], {"clip_low": 0.1, "clip_high": 0.4}, True),
        (["grpo.kl_coef=0.3", "correction=behavior"], {"kl_coef": 0.3, "correction": "behavior"}, True),
        (["grpo.normalize=false"], {}, False),
    ],
    ids=str,
)
def test_objective_hands_on_its_settings_and_the_denominator_of_its_norm(
    overrides: list[str], changes: dict[str, Any], normalize: bool, batching: Batching, stored: bool
):
    """Denominators: 50 tokens, 9 completions, or 9 completions x 11 new tokens = 99."""
    grpo = objective(*overrides)
    scores = [(1.0, 0.0, 0.5), (0.0, 2.0, 0.0), (1.0, 1.0, 0.0)]
    microbatch = collate(units_of(grpo, *scores, stored=stored), batching)
    policy = torch.from_numpy(-3 * np.random.default_rng(4).random(microbatch.loss_mask.shape))

    output = grpo.loss(policy, microbatch, Totals(groups=4.0, sequences=9.0, tokens=50.0))

    proximal = policy if microbatch.proximal_logprobs is None else microbatch.proximal_logprobs
    rows = (policy, proximal, microbatch.behavior_logprobs, microbatch.reference_logprobs, microbatch.loss_mask)
    advantages = [advantage for row in scores for advantage in slow_advantages(list(row), normalize)]
    settings = settings_of(correction_cap=2.0, denominator=50.0) | changes
    assert output.loss.item() == pytest.approx(slow_grpo(*(r.tolist() for r in rows), advantages, **settings), rel=1e-5)


def test_tied_group_stays_in_the_batch_and_pulls_at_nothing():
    grpo = objective()
    microbatch = collate(units_of(grpo, (1.0, 0.0, 0.0), (1.0, 1.0, 1.0)), "padded")
    policy = (microbatch.behavior_logprobs + 0.1).requires_grad_()

    grpo.loss(policy, microbatch, Totals(groups=2.0, sequences=6.0, tokens=20.0)).loss.backward()

    assert microbatch.scores.tolist() == [1, 0, 0, 1, 1, 1]
    assert policy.grad is not None and policy.grad[:3].any() and not policy.grad[3:].any()


def test_order_of_the_groups_changes_nothing():
    grpo = objective("grpo.kl_coef=0.1")
    units, totals = units_of(grpo, (1.0, 0.0), (0.5, 2.0), (0.0, 3.0)), Totals(groups=3.0, sequences=6.0, tokens=20.0)
    whole = collate(units, "padded")
    policy = torch.from_numpy(-3 * np.random.default_rng(4).random(whole.loss_mask.shape)).requires_grad_()

    straight = grpo.loss(policy, whole, totals).loss
    turned = grpo.loss(policy[[4, 5, 0, 1, 2, 3]], collate([units[2], units[0], units[1]], "padded"), totals).loss

    torch.testing.assert_close(turned, straight, rtol=1e-6, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, policy)[0] for loss in (straight, turned)), rtol=1e-6, atol=1e-9)


def test_known_mistake_2_stale_tokens_are_corrected_with_the_log_probabilities_of_their_sampler():
    """First step (proximal = policy), `truncated` at 2: d loss / d log pi_t = -min(C_t, 2) A / tokens, not -A / tokens."""
    grpo = objective("grpo.normalize=false")
    microbatch = collate(units_of(grpo, (1.0, 0.0), stored=False), "padded")
    mask = microbatch.loss_mask
    drift = torch.linspace(-0.9, 0.9, mask.numel()).reshape(mask.shape)
    policy = (microbatch.behavior_logprobs + drift).requires_grad_()

    grpo.loss(policy, microbatch, Totals(groups=1.0, sequences=2.0, tokens=10.0)).loss.backward()

    expected = torch.where(mask, -drift.exp().clamp(max=2) * torch.tensor([[0.5], [-0.5]]) / 10, 0.0)
    torch.testing.assert_close(policy.grad, expected, rtol=1e-5, atol=1e-7)
