"""PPO's clipped loss per token against a slow transcription, and the objective that feeds it; see test_ppo_critic.py for the rest."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from async_rlhf.batching import Batching, Unit, collate
from async_rlhf.config import load_config
from async_rlhf.errors import ShapeError
from async_rlhf.losses import ppo_loss
from learners.objective import Totals
from learners.ppo import PPO
from tests.support.samples import make_scored, make_ticket

all_corrections = pytest.mark.parametrize("correction", ["behavior", "none", "truncated", "masked", "decoupled"])

LOGPROBS = ("policy_logprobs", "proximal_logprobs", "behavior_logprobs")


def slow_ppo(*rows: list[Any], **settings: Any) -> float:
    """Eq. 7 of arXiv:1707.06347 with a weight for stale tokens, one token at a time; arguments as in ppo_loss."""
    policy, proximal, behavior, mask, advantages = rows
    correction, cap, e = settings["correction"], settings["correction_cap"], settings["clip_range"]
    total = 0.0
    for n, of_completion in enumerate(mask):
        for t in (t for t, real in enumerate(of_completion) if real):
            pi, prox, mu, advantage = math.exp(policy[n][t]), math.exp(proximal[n][t]), math.exp(behavior[n][t]), advantages[n][t]
            c = prox / mu
            r = pi / (mu if correction == "behavior" else prox)
            w = {"truncated": min(c, cap), "masked": c if 1 / cap <= c <= cap else 0.0, "decoupled": c}.get(correction, 1.0)
            total -= w * min(r * advantage, min(max(r, 1 - e), 1 + e) * advantage)
    return total / settings["denominator"]


def sample(num: int = 6, width: int = 5, seed: int = 0, spread: float = 0.3) -> dict[str, Tensor]:
    """Float64 log-probabilities of three nearby policies, a mask of random lengths, an advantage of either sign per token."""
    g = torch.Generator().manual_seed(seed)
    policy = -3 * torch.rand(num, width, generator=g, dtype=torch.float64)
    proximal = policy + spread * torch.randn(num, width, generator=g, dtype=torch.float64)
    behavior = proximal + spread * torch.randn(num, width, generator=g, dtype=torch.float64)
    mask = torch.arange(width)[None] < torch.randint(1, width + 1, (num, 1), generator=g)
    advantages = torch.randn(num, width, generator=g, dtype=torch.float64)
    return dict(zip((*LOGPROBS, "loss_mask", "advantages"), (policy, proximal, behavior, mask, advantages), strict=True))


def settings_of(**changes: Any) -> dict[str, Any]:
    return {"clip_range": 0.2, "correction": "truncated", "correction_cap": 1.2, "denominator": 7.0} | changes


@all_corrections
@pytest.mark.parametrize("seed", range(3))
def test_loss_is_the_formula_in_every_mode(correction: str, seed: int):
    tensors, settings = sample(seed=seed), settings_of(correction=correction)

    output = ppo_loss(**tensors, **settings)

    assert output.loss.item() == pytest.approx(slow_ppo(*(t.tolist() for t in tensors.values()), **settings), rel=1e-10)


def test_one_completion_by_hand():
    """Three tokens and a masked one, clip .2, c = 1.5, over 4 tokens.

    1: .5 / .25 = 2, A = 1, clipped 1.2; C = .25 / .125 = 2, truncated 1.5: -1.8. 2: R = .3 / .3 = 1, A = -2, C = 1: +2.
    3: R = .2 / .4 = .5, A = -1, clipped .8; C = .4 / .5 = .8: +.8 * .8 = .64. (-1.8 + 2 + .64) / 4 = .21; two of three held.
    """
    policy, proximal, behavior = torch.tensor(
        [[[0.5, 0.3, 0.2, 0.9]], [[0.25, 0.3, 0.4, 0.1]], [[0.125, 0.3, 0.5, 0.1]]], dtype=torch.float64
    ).log()
    mask, advantages = torch.tensor([[True, True, True, False]]), torch.tensor([[1.0, -2.0, -1.0, 5.0]], dtype=torch.float64)

    output = ppo_loss(policy, proximal, behavior, mask, advantages, **settings_of(correction_cap=1.5, denominator=4.0))

    assert output.loss.item() == pytest.approx(0.21, abs=1e-12)
    assert (output.metrics["policy/clip_share"].total.item(), output.metrics["policy/clip_share"].weight.item()) == (2, 3)
    assert output.metrics["correction/weight"].total.item() == pytest.approx(1.5 + 1 + 0.8, abs=1e-12)


@all_corrections
def test_on_policy_gradient_is_minus_the_advantage_of_each_token(correction: str):
    tensors = sample()
    rows, mask, advantages = tensors["policy_logprobs"], tensors["loss_mask"], tensors["advantages"]
    policy = rows.clone().requires_grad_()

    output = ppo_loss(policy, rows, rows, mask, advantages, **settings_of(correction=correction))
    output.loss.backward()

    torch.testing.assert_close(policy.grad, torch.where(mask, -advantages / 7, 0.0), rtol=1e-12, atol=1e-15)
    assert output.loss.item() == pytest.approx(-advantages[mask].sum().item() / 7, rel=1e-12)


@all_corrections
def test_gradient_is_that_of_the_loss(correction: str):
    tensors, settings = sample(num=4, width=3), settings_of(correction=correction)
    policy = tensors.pop("policy_logprobs").requires_grad_()

    assert torch.autograd.gradcheck(lambda p: ppo_loss(p, **tensors, **settings).loss, (policy,), atol=1e-8)


@all_corrections
def test_no_gradient_reaches_proximal_behavior_or_advantages(correction: str):
    tensors = {name: t if t.dtype == torch.bool else t.requires_grad_() for name, t in sample().items()}

    output = ppo_loss(**tensors, **settings_of(correction=correction))
    output.loss.backward()

    assert not any(mean.total.requires_grad for mean in output.metrics.values())
    assert tensors["policy_logprobs"].grad is not None and tensors["policy_logprobs"].grad.abs().sum() > 0
    assert all(tensors[name].grad is None for name in (*LOGPROBS[1:], "advantages"))


@all_corrections
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 7.0])
def test_known_mistake_7_masked_positions_count_nowhere_and_get_no_gradient(correction: str, garbage: float):
    """Whatever stands behind the last token, and however wide: loss, gradient, clip share and mean weight are the narrow ones."""
    tensors, settings = sample(), settings_of(correction=correction)
    clean_policy = tensors["policy_logprobs"].clone().requires_grad_()
    clean = ppo_loss(**(tensors | {"policy_logprobs": clean_policy}), **settings)
    clean.loss.backward()
    wide = {name: torch.nn.functional.pad(tensor, (0, 3)) for name, tensor in tensors.items()}
    mask = wide["loss_mask"]
    for place, name in enumerate((*LOGPROBS, "advantages")):
        wide[name] = torch.where(mask, wide[name], garbage * (-1) ** place)
    wide["policy_logprobs"].requires_grad_()

    output = ppo_loss(**wide, **settings)
    output.loss.backward()

    gradient = wide["policy_logprobs"].grad
    assert gradient is not None and clean_policy.grad is not None and not tensors["loss_mask"].all()
    assert output.loss.item() == pytest.approx(clean.loss.item(), rel=1e-12)
    torch.testing.assert_close(gradient[:, :5], clean_policy.grad, rtol=1e-12, atol=0)
    assert not gradient[~mask].any()
    for key, mean in clean.metrics.items():
        assert output.metrics[key].total.item() == pytest.approx(mean.total.item(), rel=1e-12), key
        assert output.metrics[key].weight.item() == mask.sum().item(), key


@pytest.mark.parametrize(
    ("ratio_value", "advantage", "held"),
    [(1.21, 1.0, True), (1.19, 1.0, False), (0.79, 1.0, False), (0.79, -1.0, True), (0.81, -1.0, False), (1.21, -1.0, False)],
)
def test_clip_stops_only_the_step_that_would_go_further_out(ratio_value: float, advantage: float, held: bool):
    """Where min(R A, clip(R) A) is R A the gradient of -R A with respect to log pi is -R A; where it is the clip, 0."""
    policy = torch.tensor([[math.log(ratio_value) - 1]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-1.0]], dtype=torch.float64)

    output = ppo_loss(policy, old, old, torch.tensor([[True]]), torch.full_like(old, advantage), **settings_of(denominator=1.0))
    output.loss.backward()

    assert policy.grad is not None
    assert policy.grad.item() == pytest.approx(0.0 if held else -ratio_value * advantage, abs=1e-12)
    assert output.metrics["policy/clip_share"].total.item() == float(held)


@all_corrections
@pytest.mark.parametrize("sizes", [[6], [1, 5], [2, 2, 2], [1] * 6], ids=str)
def test_any_split_of_the_completions_adds_up_to_the_whole(correction: str, sizes: list[int]):
    tensors, settings = sample(), settings_of(correction=correction)
    policy = tensors["policy_logprobs"].requires_grad_()
    expected = ppo_loss(**tensors, **settings)
    expected_gradient = torch.autograd.grad(expected.loss, policy)[0]

    outputs = [ppo_loss(*part, **settings) for part in zip(*(tensor.split(sizes) for tensor in tensors.values()), strict=True)]
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
        ppo_loss(**tensors, **settings_of())


# The objective.


def objective(*overrides: str) -> PPO:
    return PPO(load_config(overrides=["algorithm=ppo", *(f"algorithm.{override}" for override in overrides)]).config)


def estimated_units(ppo: PPO, num_groups: int = 3) -> list[Unit]:
    """Units with proximal log-probabilities and advantages, as they are after PPOCritic.estimate."""
    rng = np.random.default_rng(3)

    def rows(unit: Unit) -> Unit:
        lengths = [len(sequence.completion_ids) for sequence in unit]
        pairs = [(-3 * rng.random(length, dtype=np.float32), rng.normal(size=length).astype(np.float32)) for length in lengths]
        return tuple(replace(s, proximal_logprobs=p, advantages=a) for s, (p, a) in zip(unit, pairs, strict=True))

    return [rows(ppo.select(make_scored(make_ticket(index), scores=(1.0, 0.0)))) for index in range(num_groups)]


@pytest.mark.parametrize("scores", [(0.0, 2.0, 1.0), (1.0, 1.0), (0.5,)])
def test_every_completion_is_trained_even_of_a_tied_or_lonely_group(scores: tuple[float, ...]):
    scored = make_scored(make_ticket(), scores=scores)

    unit = objective().select(scored)

    assert [(sequence.score, sequence.weight) for sequence in unit] == [(score, 1.0) for score in scores]
    assert all(a.completion_ids is b.completion_ids for a, b in zip(unit, scored.group.rollouts, strict=True))


@pytest.mark.parametrize("batching", ["packed", "padded"])
@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        ([], {}),
        (["correction_cap=1.2"], {"correction_cap": 1.2}),
        (["correction=masked", "ppo.clip_range=0.1"], {"correction": "masked", "clip_range": 0.1}),
        (["correction=behavior"], {"correction": "behavior"}),
    ],
    ids=str,
)
def test_objective_hands_on_its_settings_and_divides_by_tokens(overrides: list[str], changes: dict[str, Any], batching: Batching):
    ppo = objective(*overrides)
    microbatch = collate(estimated_units(ppo), batching)
    policy = torch.from_numpy(-3 * np.random.default_rng(4).random(microbatch.loss_mask.shape))
    assert microbatch.proximal_logprobs is not None and microbatch.advantages is not None

    output = ppo.loss(policy, microbatch, Totals(groups=3.0, sequences=6.0, tokens=50.0))

    rows = (policy, microbatch.proximal_logprobs, microbatch.behavior_logprobs, microbatch.loss_mask, microbatch.advantages)
    settings = settings_of(correction_cap=2.0, denominator=50.0) | changes
    assert output.loss.item() == pytest.approx(slow_ppo(*(r.tolist() for r in rows), **settings), rel=1e-5)


def test_order_of_the_groups_changes_nothing():
    ppo, totals = objective(), Totals(groups=3.0, sequences=6.0, tokens=20.0)
    units = estimated_units(ppo)
    whole = collate(units, "padded")
    policy = torch.from_numpy(-3 * np.random.default_rng(4).random(whole.loss_mask.shape)).requires_grad_()

    straight = ppo.loss(policy, whole, totals).loss
    turned = ppo.loss(policy[[4, 5, 0, 1, 2, 3]], collate([units[2], units[0], units[1]], "padded"), totals).loss

    torch.testing.assert_close(turned, straight, rtol=1e-6, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, policy)[0] for loss in (straight, turned)), rtol=1e-6, atol=1e-9)


def test_loss_without_estimated_advantages_is_refused():
    ppo = objective()
    microbatch = collate([ppo.select(make_scored(make_ticket()))], "packed")

    with pytest.raises(AssertionError, match="estimate comes before the loss"):
        ppo.loss(microbatch.behavior_logprobs, microbatch, Totals(groups=1.0, sequences=2.0, tokens=9.0))


def test_known_mistake_2_stale_tokens_are_corrected_with_the_log_probabilities_of_their_sampler():
    """First step (policy = proximal), `truncated` at 2: d loss / d log pi_t = -min(C_t, 2) A_t / tokens, not -A_t / tokens."""
    ppo = objective()
    microbatch = collate(estimated_units(ppo), "padded")
    assert microbatch.proximal_logprobs is not None and microbatch.advantages is not None
    policy = microbatch.proximal_logprobs.clone().requires_grad_()

    ppo.loss(policy, microbatch, Totals(groups=3.0, sequences=6.0, tokens=10.0)).loss.backward()

    stale = (microbatch.proximal_logprobs - microbatch.behavior_logprobs).exp()
    expected = torch.where(microbatch.loss_mask, -stale.clamp(max=2) * microbatch.advantages / 10, 0.0)
    torch.testing.assert_close(policy.grad, expected, rtol=1e-5, atol=1e-7)
    assert (stale[microbatch.loss_mask] - 1).abs().median() > 0.2
