"""Ratios, weights, effective sample size and masked KL: what corrects stale data, and what watches it."""

import math

import pytest
import torch
from torch import Tensor

from async_rlhf.batching import TrainingSequence, collate
from async_rlhf.losses.base import MAX_LOG_RATIO, Mean, Peak, kl_metrics, masked_sum, mean_of
from async_rlhf.losses.correction import corrected_ratios, correction_metrics, mismatch_metrics
from async_rlhf.metrics import derive
from learners.collective import combine
from tests.support.samples import make_scored, make_ticket

CORRECTIONS = ["behavior", "none", "truncated", "masked", "decoupled"]
all_corrections = pytest.mark.parametrize("correction", CORRECTIONS)
both_scopes = pytest.mark.parametrize("per", ["sequence", "token"])

MASK = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])


def random_logprobs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    policy, proximal, behavior = (-2 * torch.rand(3, 3, generator=g, dtype=torch.float64) for _ in range(3))
    return policy, proximal, behavior


def value_of(part: Mean | Peak | None) -> float:
    if isinstance(part, Peak):
        return part.value.item()
    assert part is not None
    return part.total.item() / part.weight.item()


@both_scopes
@all_corrections
def test_ratio_and_weight_are_the_formula(per: str, correction: str):
    policy, proximal, behavior = random_logprobs()
    cap = 1.5

    ratios = corrected_ratios(policy, proximal, behavior, MASK, per=per, correction=correction, cap=cap)

    for n in range(3):
        tokens = [t for t in range(3) if MASK[n][t]]
        for position, entry in enumerate([tokens] if per == "sequence" else [[t] for t in tokens]):
            pi, prox, mu = (math.exp(sum(x[n][t].item() for t in entry)) for x in (policy, proximal, behavior))
            c = prox / mu
            ratio = pi / (mu if correction == "behavior" else prox)
            weight = {
                "behavior": 1.0,
                "none": 1.0,
                "truncated": min(c, cap),
                "masked": c if 1 / cap <= c <= cap else 0.0,
                "decoupled": c,
            }[correction]
            where = (n,) if per == "sequence" else (n, position)
            assert ratios.ratio[where].item() == pytest.approx(ratio, rel=1e-12)
            assert ratios.weight[where].item() == pytest.approx(weight, rel=1e-12)
            assert ratios.mask[where].item()


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        ("truncated", [0.25, 0.5, 1.0, 2.0, 2.0]),
        ("masked", [0.0, 0.5, 1.0, 2.0, 0.0]),
        ("decoupled", [0.25, 0.5, 1.0, 2.0, 4.0]),
        ("none", [1.0] * 5),
        ("behavior", [1.0] * 5),
    ],
)
def test_weights_by_hand_on_both_sides_of_the_cap(correction: str, expected: list[float]):
    """C = 1/4, 1/2, 1, 2, 4 with c = 2: truncated from above only; masked outside [1/2, 2], its ends included."""
    proximal = torch.tensor([[-2.0, -1.0, 0.0, 1.0, 2.0]], dtype=torch.float64) * math.log(2)
    # A hair inside the ends, so that rounding of exp(log 2) does not decide.
    proximal = proximal * torch.tensor([1.0, 1 - 1e-12, 1.0, 1 - 1e-12, 1.0], dtype=torch.float64)
    zero = torch.zeros(1, 5, dtype=torch.float64)

    ratios = corrected_ratios(proximal, proximal, zero, torch.ones(1, 5, dtype=torch.bool), per="token", correction=correction, cap=2.0)

    torch.testing.assert_close(ratios.weight, torch.tensor([expected], dtype=torch.float64), rtol=1e-9, atol=0)


@both_scopes
@all_corrections
def test_gradient_flows_through_the_policy_alone(per: str, correction: str):
    policy, proximal, behavior = (tensor.requires_grad_() for tensor in random_logprobs())

    ratios = corrected_ratios(policy, proximal, behavior, MASK, per=per, correction=correction, cap=2.0)

    ratios.ratio.sum().backward()

    assert not ratios.weight.requires_grad
    scope = ratios.ratio.detach() if per == "token" else ratios.ratio.detach()[:, None].expand(3, 3)
    torch.testing.assert_close(policy.grad, torch.where(MASK, scope, torch.zeros_like(scope)), rtol=1e-12, atol=0)
    assert proximal.grad is None and behavior.grad is None


def test_known_mistake_2_recomputed_behavior_log_probabilities_would_correct_nothing():
    """With behavior := proximal every weight is 1 whatever the data's age; with the stored ones it is the staleness."""
    policy, proximal, behavior = random_logprobs()

    mistaken = corrected_ratios(policy, proximal, proximal, MASK, per="sequence", correction="decoupled", cap=2.0)
    right = corrected_ratios(policy, proximal, behavior, MASK, per="sequence", correction="decoupled", cap=2.0)

    assert mistaken.weight.tolist() == [1.0, 1.0, 1.0]
    torch.testing.assert_close(right.weight, masked_sum(proximal - behavior, MASK).exp(), rtol=1e-12, atol=0)
    assert (right.weight - 1).abs().min() > 0.05


@both_scopes
@all_corrections
@pytest.mark.parametrize("distance", [-1e5, 1e5])
def test_ratios_of_impossible_tokens_are_capped_and_finite(per: str, correction: str, distance: float):
    proximal = torch.full((1, 2), -1.0)
    policy, behavior = (proximal + distance).requires_grad_(), proximal - distance

    ratios = corrected_ratios(policy, proximal, behavior, torch.tensor([[True, True]]), per=per, correction=correction, cap=2.0)
    ratios.ratio.sum().backward()

    expected = math.exp(math.copysign(MAX_LOG_RATIO, distance))
    torch.testing.assert_close(ratios.ratio.detach(), torch.full_like(ratios.ratio, expected), rtol=1e-5, atol=0)
    assert ratios.weight.isfinite().all()
    assert policy.grad is not None and policy.grad.isfinite().all()


def test_effective_sample_size_is_the_share_of_equal_weights_that_would_do_as_well():
    """w = 1, 1, 2, 0: (sum w)^2 / (n sum w^2) = 16 / (4 * 6) = 2/3; equal weights give 1; one of n alone 1/n."""

    def share(weights: list[float]) -> float:
        means = {"correction/weight": sum(weights) / len(weights), "correction/weight_square": sum(w * w for w in weights) / len(weights)}
        return derive(means)["correction/ess_share"]

    assert share([1.0, 1.0, 2.0, 0.0]) == pytest.approx(2 / 3, abs=1e-12)
    assert share([0.3] * 5) == pytest.approx(1.0, abs=1e-12)
    assert share([0.0, 0.0, 7.0, 0.0]) == pytest.approx(0.25, abs=1e-12)
    assert share([0.0, 0.0]) == 0.0


def test_effective_sample_size_of_a_split_batch_is_that_of_the_whole():
    _, proximal, behavior = random_logprobs()
    whole = corrected_ratios(proximal, proximal, behavior, MASK, per="token", correction="decoupled", cap=2.0)
    parts: list[dict[str, Mean]] = []
    for rows in (slice(0, 1), slice(1, 3)):
        policy, stale, mask = proximal[rows], behavior[rows], MASK[rows]
        parts.append(correction_metrics(corrected_ratios(policy, policy, stale, mask, per="token", correction="decoupled", cap=2.0)))

    summed = {
        key: sum(part[key].total.item() for part in parts) / sum(part[key].weight.item() for part in parts)
        for key in ("correction/weight", "correction/weight_square")
    }

    weights = whole.weight[MASK]
    expected = (weights.sum() ** 2 / (weights.numel() * weights.square().sum())).item()
    assert derive(summed)["correction/ess_share"] == pytest.approx(expected, rel=1e-12)


def test_known_mistake_7_means_count_unmasked_positions_only():
    """(1 + 2 + 3 + 4 + 5 + 6) / 6 = 3.5, whatever stands in the three masked places."""
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, float("nan")], [6.0, float("inf"), 99.0]])

    mean = mean_of(values, MASK)

    assert value_of(mean) == pytest.approx(3.5, abs=1e-6)
    assert mean.weight.item() == 6


@both_scopes
def test_known_mistake_7_correction_metrics_do_not_count_padding(per: str):
    """Masked tokens have C = 1 after masking: counted, they would pull the mean weight to 1."""
    zero = torch.zeros(1, 4, dtype=torch.float64)
    proximal = torch.full((1, 4), math.log(1.5), dtype=torch.float64)
    mask = torch.tensor([[True, False, False, False]])

    ratios = corrected_ratios(proximal, proximal, zero, mask, per=per, correction="decoupled", cap=2.0)

    metrics = correction_metrics(ratios)
    assert value_of(metrics["correction/weight"]) == pytest.approx(1.5, rel=1e-12)
    assert value_of(metrics["correction/weight_square"]) == pytest.approx(2.25, rel=1e-12)


def test_kl_estimates_by_hand():
    """log p - log q: completion 1: .5, -.2 ; completion 2: .1 (its second token is masked).

    k1: (.3 + .1) / 2 = .2. k3 = e^-d - 1 + d per token: .5: .10653066; -.2: .02140276; .1: .00483742; sum / 2 = .06638542.
    """
    p = torch.tensor([[-1.0, -2.0], [-0.5, float("nan")]], dtype=torch.float64)
    q = torch.tensor([[-1.5, -1.8], [-0.6, 3.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False]])

    metrics = kl_metrics("policy/kl", p, q, mask)

    assert value_of(metrics["policy/kl_k1_nats"]) == pytest.approx(0.2, abs=1e-12)
    assert value_of(metrics["policy/kl_k3_nats"]) == pytest.approx(0.06638542, abs=1e-8)


def test_both_kl_estimates_average_to_the_exact_kl():
    """All four tokens of two distributions, weighted by p: E[k1] = E[k3] = sum p (log p - log q)."""
    p, q = (torch.tensor(x, dtype=torch.float64).log_softmax(-1) for x in ([0.2, 1.0, -0.3, 0.0], [0.0, -0.4, 0.9, 0.3]))
    exact = (p.exp() * (p - q)).sum().item()

    expectation = {"k1": 0.0, "k3": 0.0}
    for token in range(4):
        metrics = kl_metrics("kl", p[token].reshape(1, 1), q[token].reshape(1, 1), torch.tensor([[True]]))
        for estimate in expectation:
            expectation[estimate] += p[token].exp().item() * value_of(metrics[f"kl_{estimate}_nats"])

    assert expectation["k1"] == pytest.approx(exact, rel=1e-12)
    assert expectation["k3"] == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("prompt_tokens", [1, 5, 40])
def test_known_mistake_12_kl_per_completion_does_not_depend_on_the_prompt(prompt_tokens: int):
    scored = make_scored(make_ticket(), scores=(1.0, 0.0))
    expected = sum((r.behavior_logprobs - ref).sum() for r, ref in zip(scored.group.rollouts, scored.reference_logprobs, strict=True)) / 2
    unit = tuple(
        TrainingSequence(
            prompt_ids=torch.full((prompt_tokens,), 4, dtype=torch.int32).numpy(),
            completion_ids=rollout.completion_ids,
            behavior_logprobs=rollout.behavior_logprobs,
            reference_logprobs=reference,
            score=0.0,
        )
        for rollout, reference in zip(scored.group.rollouts, scored.reference_logprobs, strict=True)
    )
    microbatch = collate([unit], "packed")

    kl = kl_metrics("policy/kl", microbatch.behavior_logprobs, microbatch.reference_logprobs, microbatch.loss_mask)["policy/kl_k1_nats"]

    assert value_of(kl) == pytest.approx(float(expected), rel=1e-5)


def test_mismatch_by_hand():
    """log proximal - log behavior: completion 1: -.5, .3; completion 2: .1 (its second token is masked).

    C = e^-.2 = .81873075 and e^.1 = 1.10517092: mean .96195084, mean square .94586140, maximum 1.10517092.
    KL(behavior || proximal): k1 (.2 - .1) / 2 = .05; k3 = e^d - 1 - d per token: .10653066 + .04985881 + .00517092, / 2 = .08078019.
    """
    behavior = torch.tensor([[-1.0, -2.0], [-0.5, float("nan")]], dtype=torch.float64)
    proximal = torch.tensor([[-1.5, -1.7], [-0.4, 3.0]], dtype=torch.float64)

    metrics = mismatch_metrics(proximal, behavior, torch.tensor([[True, True], [True, False]]))

    expected = {"kl_k1_nats": 0.05, "kl_k3_nats": 0.08078019, "ratio_mean": 0.96195084, "ratio_square": 0.94586140, "ratio_max": 1.10517092}
    assert {key: value_of(part) for key, part in metrics.items()} == pytest.approx(
        {f"mismatch/{key}": value for key, value in expected.items()}, abs=1e-8
    )


def test_mismatch_ratio_is_one_in_expectation_and_its_kl_the_exact_one():
    """All four tokens of the behavior distribution, weighted by it: E[C] = 1, E[k1] = E[k3] = KL(behavior || proximal)."""
    proximal, behavior = (torch.tensor(x, dtype=torch.float64).log_softmax(-1) for x in ([0.2, 1.0, -0.3, 0.0], [0.0, -0.4, 0.9, 0.3]))
    exact = (behavior.exp() * (behavior - proximal)).sum().item()

    of_tokens = [mismatch_metrics(proximal[t].reshape(1, 1), behavior[t].reshape(1, 1), torch.tensor([[True]])) for t in range(4)]
    means = {key: sum(b * value_of(m[key]) for b, m in zip(behavior.exp().tolist(), of_tokens, strict=True)) for key in of_tokens[0]}

    assert means["mismatch/ratio_mean"] == pytest.approx(1.0, rel=1e-12)
    assert means["mismatch/kl_k1_nats"] == pytest.approx(exact, rel=1e-12)
    assert means["mismatch/kl_k3_nats"] == pytest.approx(exact, rel=1e-12)


def test_mismatch_of_a_split_batch_is_that_of_the_whole():
    _, proximal, behavior = random_logprobs()
    whole = mismatch_metrics(proximal.requires_grad_(), behavior, MASK)

    parts: dict[str, Mean | Peak] = {}
    for rows in (slice(0, 1), slice(1, 3)):
        of_rows = mismatch_metrics(proximal[rows], behavior[rows], MASK[rows])
        parts |= {key: combine(parts.get(key), part) for key, part in of_rows.items()}

    ratios = masked_sum(proximal.detach() - behavior, MASK).exp()
    means = {key: value_of(part) for key, part in parts.items()}
    assert means == pytest.approx({key: value_of(part) for key, part in whole.items()}, rel=1e-12)
    assert means["mismatch/ratio_max"] == pytest.approx(ratios.max().item(), rel=1e-12)
    assert derive(means)["mismatch/ess_share"] == pytest.approx((ratios.sum() ** 2 / (3 * ratios.square().sum())).item(), rel=1e-12)
    assert not any((part.value if isinstance(part, Peak) else part.total).requires_grad for part in whole.values())


@pytest.mark.parametrize("distance", [-1e5, 1e5])
def test_mismatch_of_impossible_tokens_is_finite(distance: float):
    behavior = torch.full((1, 2), -1.0)

    metrics = mismatch_metrics(behavior + distance, behavior, torch.tensor([[True, True]]))

    assert all(math.isfinite(value_of(part)) for part in metrics.values())
    assert value_of(metrics["mismatch/ratio_max"]) == pytest.approx(math.exp(math.copysign(MAX_LOG_RATIO, distance)), rel=1e-5)


def test_parts_of_a_peak_combine_to_the_larger_and_parts_of_a_mean_to_their_weighted_mean():
    """max(-2, -3) = max(-3, -2) = -2; (1 + 5) / (1 + 3) = 1.5, not the mean of 1 and 5 / 3."""
    low, high = Peak(torch.tensor(-3.0)), Peak(torch.tensor(-2.0))
    one, three = Mean(torch.tensor(1.0), torch.tensor(1.0)), Mean(torch.tensor(5.0), torch.tensor(3.0))

    assert value_of(combine(low, high)) == value_of(combine(high, low)) == -2.0
    assert value_of(combine(one, three)) == 1.5
    assert combine(None, high) is high and combine(None, one) is one


def test_masked_sum_keeps_nan_out_of_value_and_gradient():
    values = torch.tensor([[1.0, float("nan"), 2.0]], requires_grad=True)

    total = masked_sum(values, torch.tensor([[True, False, True]]))
    total.sum().backward()

    assert total.tolist() == [3.0]
    assert values.grad is not None and values.grad.tolist() == [[1.0, 0.0, 1.0]]
