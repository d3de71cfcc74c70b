"""The leave-one-out advantage and its clipped loss against slow transcriptions, and the objective that feeds them."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from async_rlhf.batching import Batching, Unit, collate, with_proximal
from async_rlhf.config import load_config
from async_rlhf.errors import ShapeError
from async_rlhf.losses import rloo_advantages, rloo_loss
from learners.objective import Totals
from learners.rloo import RLOO
from tests.support.samples import make_scored, make_ticket

CORRECTIONS = ["behavior", "none", "truncated", "masked", "decoupled"]
both_ratios = pytest.mark.parametrize("ratio", ["sequence", "token"])
all_corrections = pytest.mark.parametrize("correction", CORRECTIONS)

Rows = list[list[float]]


def slow_rloo(
    policy: Rows,
    proximal: Rows,
    behavior: Rows,
    mask: list[list[bool]],
    advantages: list[float],
    *,
    clip_range: float,
    ratio: str,
    correction: str,
    correction_cap: float,
    denominator: float,
) -> float:
    """L = -w min(R A, clip(R) A), one ratio at a time; see losses/correction.py for R and w."""
    total = 0.0
    for n, advantage in enumerate(advantages):
        tokens = [t for t in range(len(mask[n])) if mask[n][t]]
        entries = [tokens] if ratio == "sequence" else [[t] for t in tokens]
        for entry in entries:
            pi = math.exp(sum(policy[n][t] for t in entry))
            prox = math.exp(sum(proximal[n][t] for t in entry))
            mu = math.exp(sum(behavior[n][t] for t in entry))
            c = prox / mu
            r = pi / (mu if correction == "behavior" else prox)
            held = c if 1 / correction_cap <= c <= correction_cap else 0.0
            w = {"truncated": min(c, correction_cap), "masked": held, "decoupled": c}.get(correction, 1.0)
            clipped = min(max(r, 1 - clip_range), 1 + clip_range)
            total += -w * min(r * advantage, clipped * advantage)
    return total / denominator


def sample(num: int = 6, width: int = 5, seed: int = 0, spread: float = 0.3) -> dict[str, Tensor]:
    """Float64 log-probabilities of three nearby policies, a mask of random lengths, advantages of both signs."""
    g = torch.Generator().manual_seed(seed)
    policy = -3 * torch.rand(num, width, generator=g, dtype=torch.float64)
    proximal = policy + spread * torch.randn(num, width, generator=g, dtype=torch.float64)
    behavior = proximal + spread * torch.randn(num, width, generator=g, dtype=torch.float64)
    lengths = torch.randint(1, width + 1, (num,), generator=g)
    mask = torch.arange(width)[None] < lengths[:, None]
    return {
        "policy_logprobs": policy,
        "proximal_logprobs": proximal,
        "behavior_logprobs": behavior,
        "loss_mask": mask,
        "advantages": torch.randn(num, generator=g, dtype=torch.float64),
    }


def settings_of(ratio: str = "sequence", correction: str = "truncated", **changes: Any) -> dict[str, Any]:
    return {"clip_range": 0.2, "ratio": ratio, "correction": correction, "correction_cap": 1.2, "denominator": 7.0} | changes


# Advantages.


def test_advantage_is_the_return_minus_the_mean_of_the_siblings():
    returns = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    advantages = rloo_advantages(returns)

    for row, got in zip(returns.tolist(), advantages.tolist(), strict=True):
        expected = [row[i] - sum(row[j] for j in range(4) if j != i) / 3 for i in range(4)]
        assert got == pytest.approx(expected, abs=1e-12)
        assert sum(got) == pytest.approx(0.0, abs=1e-12)


def test_advantages_by_hand():
    """Returns 3, 0, 0: 3 - (0 + 0) / 2 = 3 and 0 - (3 + 0) / 2 = -1.5."""
    assert rloo_advantages(torch.tensor([[3.0, 0.0, 0.0], [2.0, 2.0, 2.0]])).tolist() == [[3.0, -1.5, -1.5], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("shape", [(3,), (3, 1), (1, 2, 2)])
def test_advantages_need_a_sibling(shape: tuple[int, ...]):
    with pytest.raises(ShapeError, match="leave-one-out needs a sibling"):
        rloo_advantages(torch.zeros(shape))


def test_advantages_carry_no_gradient():
    assert not rloo_advantages(torch.ones(2, 2, requires_grad=True)).requires_grad


# The loss.


@both_ratios
@all_corrections
@pytest.mark.parametrize("seed", range(3))
def test_loss_is_the_formula_in_every_mode(ratio: str, correction: str, seed: int):
    tensors, settings = sample(seed=seed), settings_of(ratio, correction)

    output = rloo_loss(**tensors, **settings)

    assert output.loss.item() == pytest.approx(slow_rloo(*(t.tolist() for t in tensors.values()), **settings), rel=1e-10)


def test_one_completion_by_hand():
    """Two tokens, policy .5 * .4 = .2, proximal .25 * .5 = .125, behavior .25 * .25 = .0625, A = 2, clip .2, c = 1.5.

    R = .2 / .125 = 1.6, clipped 1.2; C = .125 / .0625 = 2, truncated 1.5; L = -1.5 * min(3.2, 2.4) = -3.6; over 4 completions -0.9.
    """
    policy, proximal, behavior = torch.tensor([[[0.5, 0.4]], [[0.25, 0.5]], [[0.25, 0.25]]], dtype=torch.float64).log()
    mask, advantages = torch.tensor([[True, True]]), torch.tensor([2.0], dtype=torch.float64)

    output = rloo_loss(policy, proximal, behavior, mask, advantages, **settings_of(correction_cap=1.5, denominator=4.0))

    assert output.loss.item() == pytest.approx(-0.9, abs=1e-12)
    assert output.metrics["policy/clip_share"].total.item() == 1
    assert output.metrics["correction/weight"].total.item() == pytest.approx(1.5, abs=1e-12)


@both_ratios
@all_corrections
def test_gradient_is_that_of_the_loss(ratio: str, correction: str):
    tensors, settings = sample(num=4, width=3), settings_of(ratio, correction)
    policy = tensors.pop("policy_logprobs").requires_grad_()

    assert torch.autograd.gradcheck(lambda p: rloo_loss(p, **tensors, **settings).loss, (policy,), atol=1e-8)


@both_ratios
@all_corrections
def test_no_gradient_reaches_proximal_behavior_or_advantages(ratio: str, correction: str):
    tensors = {name: t if t.dtype == torch.bool else t.requires_grad_() for name, t in sample().items()}

    output = rloo_loss(**tensors, **settings_of(ratio, correction))
    output.loss.backward()

    assert not any(mean.total.requires_grad for mean in output.metrics.values())
    assert tensors["policy_logprobs"].grad is not None and tensors["policy_logprobs"].grad.abs().sum() > 0
    assert all(tensors[name].grad is None for name in ("proximal_logprobs", "behavior_logprobs", "advantages"))


@both_ratios
@all_corrections
def test_masked_positions_may_hold_nan_and_get_no_gradient(ratio: str, correction: str):
    tensors, settings = sample(), settings_of(ratio, correction, clip_range=0.99)
    mask = tensors["loss_mask"]
    assert not mask.all()
    clean = rloo_loss(**tensors, **settings)
    nan = torch.tensor(float("nan"), dtype=torch.float64)
    for name in ("policy_logprobs", "proximal_logprobs", "behavior_logprobs"):
        tensors[name] = torch.where(mask, tensors[name], nan)
    tensors["policy_logprobs"].requires_grad_()

    poisoned = rloo_loss(**tensors, **settings)
    poisoned.loss.backward()

    assert poisoned.loss.item() == clean.loss.item()
    gradient = tensors["policy_logprobs"].grad
    assert gradient is not None and gradient.isfinite().all() and not gradient[~mask].any()
    for key, mean in clean.metrics.items():
        assert poisoned.metrics[key].total.item() == mean.total.item(), key


@pytest.mark.parametrize(
    ("ratio_value", "advantage", "held"),
    [(1.3, 1.0, True), (0.7, 1.0, False), (1.3, -1.0, False), (0.7, -1.0, True), (1.1, 1.0, False), (0.9, -1.0, False)],
)
@both_ratios
def test_clip_stops_only_the_step_that_would_go_further_out(ratio: str, ratio_value: float, advantage: float, held: bool):
    """Where min(R A, clip(R) A) is R A the gradient of -R A with respect to log pi is -R A; where it is the clip, 0."""
    policy = torch.tensor([[math.log(ratio_value) - 1]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-1.0]], dtype=torch.float64)

    output = rloo_loss(
        policy, old, old, torch.tensor([[True]]), torch.tensor([advantage], dtype=torch.float64), **settings_of(ratio, denominator=1.0)
    )
    output.loss.backward()

    assert policy.grad is not None
    assert policy.grad.item() == pytest.approx(0.0 if held else -ratio_value * advantage, abs=1e-12)
    assert output.metrics["policy/clip_share"].total.item() == float(held)


@both_ratios
@all_corrections
@pytest.mark.parametrize("sizes", [[6], [1, 5], [2, 2, 2], [1] * 6], ids=str)
def test_any_split_of_the_completions_adds_up_to_the_whole(ratio: str, correction: str, sizes: list[int]):
    tensors, settings = sample(), settings_of(ratio, correction)
    policy = tensors["policy_logprobs"].requires_grad_()
    expected = rloo_loss(**tensors, **settings)
    expected_gradient = torch.autograd.grad(expected.loss, policy)[0]

    parts = zip(*(tensor.split(sizes) for tensor in tensors.values()), strict=True)
    outputs = [rloo_loss(*part, **settings) for part in parts]
    total = sum(output.loss for output in outputs)

    torch.testing.assert_close(total, expected.loss, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(torch.autograd.grad(total, policy)[0], expected_gradient, rtol=1e-12, atol=1e-15)
    for key, mean in expected.metrics.items():
        assert sum(o.metrics[key].total.item() for o in outputs) == pytest.approx(mean.total.item(), rel=1e-12), key
        assert sum(o.metrics[key].weight.item() for o in outputs) == mean.weight.item(), key


@both_ratios
@all_corrections
def test_wider_padding_changes_nothing(ratio: str, correction: str):
    tensors, settings = sample(), settings_of(ratio, correction)
    wide = {name: t if t.dim() == 1 else torch.nn.functional.pad(t, (0, 4)) for name, t in tensors.items()}

    narrow_output, wide_output = rloo_loss(**tensors, **settings), rloo_loss(**wide, **settings)

    torch.testing.assert_close(wide_output.loss, narrow_output.loss, rtol=1e-12, atol=0)
    for key, mean in narrow_output.metrics.items():
        assert wide_output.metrics[key].weight.item() == mean.weight.item(), key
        assert wide_output.metrics[key].total.item() == pytest.approx(mean.total.item(), rel=1e-12), key


@pytest.mark.parametrize("name", ["policy_logprobs", "proximal_logprobs", "behavior_logprobs", "loss_mask", "advantages"])
def test_shapes_that_would_broadcast_are_refused(name: str):
    tensors = sample()
    tensors[name] = tensors[name][:1]

    with pytest.raises(ShapeError, match="must share one shape"):
        rloo_loss(**tensors, **settings_of())


def test_untruncated_sequence_correction_is_unbiased_on_stale_data():
    """Every pair of answers of a four-armed bandit, weighted by the stale policy that samples them.

    E[C_i A_i grad log pi(i)] over i, j ~ behavior is sum_i pi(i) s_i grad log pi(i): the sibling's baseline does not depend on
    i. So `decoupled` at its first step (policy = proximal) gives the exact policy gradient; `none` does not.
    """
    logits = torch.tensor([0.3, -0.5, 1.0, 0.1], dtype=torch.float64, requires_grad=True)
    behavior = torch.tensor([-0.2, 0.9, 0.0, 0.4], dtype=torch.float64).log_softmax(-1)
    scores = torch.tensor([1.0, 0.0, -2.0, 3.0], dtype=torch.float64)
    exact = torch.autograd.grad(-(logits.softmax(-1) * scores).sum(), logits)[0]

    def expected_gradient(correction: str) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for i in range(4):
            for j in range(4):
                pair = torch.tensor([i, j])
                policy = logits.log_softmax(-1)[pair][:, None]
                output = rloo_loss(
                    policy,
                    policy.detach(),
                    behavior[pair][:, None],
                    torch.ones(2, 1, dtype=torch.bool),
                    rloo_advantages(scores[pair][None])[0],
                    **settings_of("sequence", correction, denominator=2.0),
                )
                total = total + behavior[pair].sum().exp() * output.loss
        return torch.autograd.grad(total, logits)[0]

    torch.testing.assert_close(expected_gradient("decoupled"), exact, rtol=1e-10, atol=1e-12)
    assert (expected_gradient("none") - exact).abs().max() > 0.05


# The objective.


def objective(*overrides: str) -> RLOO:
    return RLOO(load_config(overrides=["algorithm=rloo", *overrides]).config)


def random_units(rloo: RLOO, num_groups: int = 3, stored: bool = True) -> list[Unit]:
    rng = np.random.default_rng(3)
    units = [rloo.select(make_scored(make_ticket(index), scores=(1.0, 0.0, index / 4))) for index in range(num_groups)]
    if stored:
        return [with_proximal(unit, [-rng.random(len(s.completion_ids), dtype=np.float32) for s in unit]) for unit in units]
    return units


def test_siblings_stay_together_in_their_order():
    scored = make_scored(make_ticket(), scores=(0.0, 2.0, 1.0))

    unit = objective().select(scored)

    assert [sequence.score for sequence in unit] == [0.0, 2.0, 1.0]
    assert all(a.completion_ids is b.completion_ids for a, b in zip(unit, scored.group.rollouts, strict=True))


@pytest.mark.parametrize("batching", ["packed", "padded"])
@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize(
    ("overrides", "settings"),
    [
        (["algorithm.correction=decoupled"], settings_of("sequence", "decoupled", denominator=9.0)),
        (["algorithm.correction_cap=1.2"], settings_of("sequence", "truncated", denominator=9.0)),
        (
            ["algorithm.correction=behavior", "algorithm.rloo.ratio=token", "algorithm.rloo.clip_range=0.13"],
            settings_of("token", "behavior", denominator=9.0, clip_range=0.13),
        ),
    ],
    ids=["decoupled", "auto", "behavior"],
)
def test_return_is_the_score_minus_the_kl_penalty_of_the_proximal_policy(
    overrides: list[str], settings: dict[str, Any], stored: bool, batching: Batching
):
    rloo = objective("algorithm.rloo.kl_coef=0.3", *overrides)
    microbatch = collate(random_units(rloo, stored=stored), batching)
    mask = microbatch.loss_mask
    policy = torch.from_numpy(-3 * np.random.default_rng(4).random(mask.shape))

    output = rloo.loss(policy, microbatch, Totals(groups=2.0, sequences=9.0, tokens=1.0))

    proximal = policy if microbatch.proximal_logprobs is None else microbatch.proximal_logprobs.double()
    advantages: list[float] = []
    for start in (0, 3, 6):
        kl = [sum((proximal - microbatch.reference_logprobs)[n][mask[n]].tolist()) for n in range(start, start + 3)]
        returns = [microbatch.scores[start + i].item() - 0.3 * kl[i] for i in range(3)]
        advantages += [returns[i] - (sum(returns) - returns[i]) / 2 for i in range(3)]
    behavior = microbatch.behavior_logprobs.double()
    expected = slow_rloo(policy.tolist(), proximal.tolist(), behavior.tolist(), mask.tolist(), advantages, **settings)
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)


def test_order_of_the_groups_changes_nothing():
    rloo = objective()
    units, totals = random_units(rloo), Totals(groups=3.0, sequences=9.0, tokens=1.0)
    whole = collate(units, "padded")
    policy = torch.from_numpy(-3 * np.random.default_rng(4).random(whole.loss_mask.shape)).requires_grad_()
    rows = torch.tensor([6, 7, 8, 0, 1, 2, 3, 4, 5])

    straight = rloo.loss(policy, whole, totals).loss
    turned = rloo.loss(policy[rows], collate([units[2], units[0], units[1]], "padded"), totals).loss

    torch.testing.assert_close(turned, straight, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(loss, policy)[0] for loss in (straight, turned)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


def test_known_mistake_2_stale_data_is_corrected_with_the_log_probabilities_of_its_sampler():
    """The batch's own behavior log-probabilities decide the ratio; recomputed ones (= the learner's) would make it 1 everywhere.

    correction `behavior`, first step: d loss / d log pi_t = -R A / N with R = exp(sum policy - behavior), not -A / N.
    """
    rloo = objective("algorithm.rloo.kl_coef=0", "algorithm.rloo.clip_range=0.999", "algorithm.correction=behavior")
    microbatch = collate([rloo.select(make_scored(make_ticket(index), scores=(1.0, 0.0))) for index in range(2)], "packed")
    mask = microbatch.loss_mask
    drift = torch.linspace(-0.6, 0.6, 4)[:, None].expand_as(mask) / mask.sum(1, keepdim=True)
    policy = (microbatch.behavior_logprobs + drift).requires_grad_()

    rloo.loss(policy, microbatch, Totals(groups=2.0, sequences=4.0, tokens=1.0)).loss.backward()

    ratios = torch.linspace(-0.6, 0.6, 4).exp()
    expected = torch.where(mask, (-ratios * torch.tensor([1.0, -1.0, 1.0, -1.0]) / 4)[:, None], torch.zeros(()))
    torch.testing.assert_close(policy.grad, expected, rtol=1e-5, atol=1e-7)
    assert (ratios - 1).abs().min() > 0.1
