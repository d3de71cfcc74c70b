"""What a batch looks like in numbers, and how numbers of several steps become one."""

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from async_rlhf.losses.base import Mean, kl_metrics, mean_of
from async_rlhf.losses.correction import Ratios, correction_metrics, mismatch_metrics
from async_rlhf.metrics import METRICS, PART, declaration, derive, over_steps, summarize
from async_rlhf.types import Batch, FinishReason, Prompt, Rollout, RolloutGroup, ScoredGroup, VersionSpan
from tests.support.samples import make_scored, make_ticket


def make_rollout(behavior: list[float], versions: list[int], reason: FinishReason = FinishReason.STOP) -> Rollout:
    """One token per entry, each under its own version."""
    return Rollout(
        completion_ids=np.arange(3, 3 + len(behavior), dtype=np.int32),
        behavior_logprobs=np.array(behavior, dtype=np.float32),
        version_spans=tuple(VersionSpan(version=v, start=t, end=t + 1) for t, v in enumerate(versions)),
        finish_reason=reason,
    )


def hand_made_batch() -> Batch:
    """Update 5. Group 0: versions 3..5, scores 1 and 0; group 1: version 4 alone, both scores 0.5."""
    first = ScoredGroup(
        group=RolloutGroup(
            ticket=make_ticket(7),
            rollouts=(make_rollout([-1.0, -0.5], [3, 4]), make_rollout([-2.0], [5], FinishReason.LENGTH)),
        ),
        scores=np.float32([1.0, 0.0]),
        reference_logprobs=(np.float32([-1.5, -0.25]), np.float32([-1.0])),
        completions=("a", "b"),
    )
    second = ScoredGroup(
        group=RolloutGroup(ticket=make_ticket(9), rollouts=(make_rollout([-1.0] * 4, [4] * 4), make_rollout([-3.0], [4]))),
        scores=np.float32([0.5, 0.5]),
        reference_logprobs=(np.float32([-2.0] * 4), np.float32([-3.0])),
        completions=("c", "d"),
    )
    return Batch(update=5, groups=(first, second))


def test_summary_of_a_batch_by_hand():
    """KL per completion: (-1 + 1.5) + (-.5 + .25) = .25; -2 + 1 = -1; 4 * (-1 + 2) = 4; 0: mean 3.25 / 4 = .8125.
    Staleness: 5 - 3 = 2 and 5 - 4 = 1. Scores 1, 0, .5, .5: mean .5, variance (.25 + .25) / 4, std .35355339."""
    summary = summarize(hand_made_batch(), [])

    assert (summary.update, summary.num_groups, summary.num_completions, summary.num_completion_tokens) == (5, 2, 4, 8)
    assert (summary.ticket_ids, summary.prompt_ids, summary.staleness_max) == ((7, 9), ("p7", "p9"), 2)
    numbers = {key: value for key, value in summary.metrics.items() if key != "queue/batch_digest"}
    assert numbers == pytest.approx(
        {
            "reward/mean": 0.5,
            "reward/batch_mean": 0.5,
            "reward/batch_std": 0.35355339,
            "rollout/kl_k1_nats": 0.8125,
            "rollout/length_tokens": 2.0,
            "rollout/cut_share": 0.25,
            "rollout/tied_groups": 1.0,
            "queue/staleness_mean": 1.5,
            "queue/staleness_max": 2.0,
        },
        abs=1e-6,
    )


def test_reward_mean_is_over_everything_sampled_since_the_last_batch():
    """The batch's mean is .5; with three replaced ties of score 0 it is (1 + 0 + .5 + .5 + 6 * 0) / 10 = .2."""
    batch = hand_made_batch()
    sampled = [scored.scores for scored in batch.groups] + [np.zeros(2, np.float32)] * 3

    metrics = summarize(batch, sampled).metrics

    assert metrics["reward/mean"] == pytest.approx(0.2, abs=1e-7)
    assert metrics["reward/batch_mean"] == pytest.approx(0.5, abs=1e-7)


def test_known_mistake_8_prompts_completions_and_tokens_are_three_counts():
    groups = tuple(make_scored(make_ticket(index), scores=(0.0, 1.0, 2.0, 3.0)) for index in range(5))

    summary = summarize(Batch(update=0, groups=groups), [])

    assert (summary.num_groups, summary.num_completions) == (5, 20)
    assert summary.num_completion_tokens == sum(scored.group.num_tokens for scored in groups) != 20


def test_known_mistake_12_kl_of_a_batch_does_not_depend_on_its_prompts():
    batch = hand_made_batch()

    def with_prompt(scored: ScoredGroup, length: int) -> ScoredGroup:
        prompt = Prompt(prompt_id="long", text="", token_ids=np.ones(length, dtype=np.int32))
        return replace(scored, group=replace(scored.group, ticket=replace(scored.group.ticket, prompt=prompt)))

    longer = Batch(update=5, groups=tuple(with_prompt(scored, 300) for scored in batch.groups))

    assert summarize(longer, []).metrics["rollout/kl_k1_nats"] == summarize(batch, []).metrics["rollout/kl_k1_nats"]


def test_equal_digests_mean_equal_prompts_in_equal_order():
    def digest(*ticket_ids: int, seed: int = 0) -> float:
        groups = tuple(make_scored(make_ticket(ticket_id), seed=seed) for ticket_id in ticket_ids)
        return summarize(Batch(update=0, groups=groups), []).metrics["queue/batch_digest"]

    assert digest(1, 2, 3) == digest(1, 2, 3, seed=9)
    assert len({digest(1, 2, 3), digest(1, 3, 2), digest(1, 2), digest(1, 2, 4)}) == 4


def test_every_key_of_a_summary_is_declared():
    assert all(declaration(key).reduction == "mean" for key in summarize(hand_made_batch(), []).metrics)


def test_only_declared_keys_and_named_members_of_a_family_are_declared():
    assert declaration("reward/part/helpful").reduction == "mean"
    for key in ("reward/part/", "reward/part", "reward/parts/x", "no/such"):
        with pytest.raises(KeyError):
            declaration(key)


def test_each_part_of_the_reward_is_averaged_over_the_batchs_completions():
    """Group 0: short 1, 2; group 1: short 6 and, alone, brief 8: (1 + 2 + 6 + 6) / 4 and (8 + 8) / 2."""

    def scored(index: int, **parts: list[float]) -> ScoredGroup:
        return replace(make_scored(make_ticket(index)), reward_parts={name: np.float32(values) for name, values in parts.items()})

    batch = Batch(update=0, groups=(scored(0, short=[1, 2]), scored(1, short=[6, 6], brief=[8, 8])))

    metrics = summarize(batch, []).metrics

    assert {key: value for key, value in metrics.items() if key.startswith(PART)} == {"reward/part/short": 3.75, "reward/part/brief": 8.0}


def test_a_reward_without_parts_reports_none():
    batch = Batch(update=0, groups=(replace(make_scored(make_ticket(0)), reward_parts={}),))

    assert not [key for key in summarize(batch, []).metrics if key.startswith("reward/part")]


def test_steps_are_averaged_but_of_the_learning_rate_the_last_counts():
    steps = [{"train/loss": 1.0, "train/learning_rate": 3e-4}, {"train/loss": 2.0, "train/learning_rate": 1e-4}]

    assert over_steps(steps) == {"train/loss": 1.5, "train/learning_rate": 1e-4}


def test_of_a_peak_the_largest_step_counts():
    steps = [{"mismatch/ratio_max": 1.5, "mismatch/ratio_mean": 1.0}, {"mismatch/ratio_max": 7.0, "mismatch/ratio_mean": 2.0}]

    assert over_steps([*steps, {"mismatch/ratio_max": 3.0}]) == {"mismatch/ratio_max": 7.0, "mismatch/ratio_mean": 1.5}


def test_a_step_without_a_key_does_not_count_for_it():
    """A minibatch of ties alone has no pair, so no margin; a zero in its place would be a lie."""
    assert over_steps([{"train/loss": 0.0}, {"train/loss": 2.0, "dpo/margin": 0.4}]) == {"train/loss": 1.0, "dpo/margin": 0.4}


def test_an_undeclared_metric_is_an_error():
    with pytest.raises(KeyError, match="train/surprise"):
        over_steps([{"train/surprise": 1.0}])


def test_derive_keeps_what_it_is_given():
    means = {"correction/weight": 0.5, "correction/weight_square": 0.5, "train/loss": 3.0}

    assert derive(means) == means | {"correction/ess_share": 0.5}
    assert derive({"train/loss": 3.0}) == {"train/loss": 3.0}


# Effective sample size.


def test_effective_sample_sizes_by_hand():
    """C = 1, 3: mean 2, mean square (1 + 9) / 2 = 5, share 4 / 5. w = 1, 2: mean 1.5, mean square 2.5, share 2.25 / 2.5."""
    means = {"mismatch/ratio_mean": 2.0, "mismatch/ratio_square": 5.0, "correction/weight": 1.5, "correction/weight_square": 2.5}

    assert derive(means) == means | {"mismatch/ess_share": pytest.approx(0.8), "correction/ess_share": pytest.approx(0.9)}


def test_weights_that_are_all_zero_have_no_effective_sample():
    """`masked` can refuse every completion of a minibatch."""
    assert derive({"correction/weight": 0.0, "correction/weight_square": 0.0})["correction/ess_share"] == 0.0


def value(mean: Mean) -> float:
    return float(mean.total / mean.weight)


@settings(deadline=None)
@given(st.lists(st.tuples(st.just(0.0) | st.floats(2**-10, 20.0, width=32), st.booleans()), min_size=1, max_size=12))
def test_the_share_of_the_correction_is_the_effective_sample_size_of_its_weights(entries: list[tuple[float, bool]]):
    """(sum w)^2 / (n sum w^2) over the entries that count."""
    weights, mask = (torch.tensor(column) for column in zip(*entries, strict=True))
    counted = weights[mask].double().numpy()
    assume(counted.any())

    share = derive({key: value(mean) for key, mean in correction_metrics(Ratios(weights, weights, mask)).items()})["correction/ess_share"]

    assert share == pytest.approx(counted.sum() ** 2 / (len(counted) * (counted**2).sum()), rel=1e-4)


def test_the_share_of_the_mismatch_is_the_effective_sample_size_of_whole_completions():
    """log C = .5 + .5 = 1 and -1, the third token masked: C = e and 1 / e, largest e."""
    proximal = torch.tensor([[-1.0, -1.0, -9.0], [-2.0, -1.0, -1.0]])
    behavior = torch.tensor([[-1.5, -1.5, -1.0], [-1.5, -1.0, -0.5]])
    mask = torch.tensor([[True, True, False], [True, True, True]])

    found = mismatch_metrics(proximal, behavior, mask)
    means = {key: value(part) for key, part in found.items() if isinstance(part, Mean)}

    c = np.exp([1.0, -1.0])
    assert derive(means)["mismatch/ess_share"] == pytest.approx(c.sum() ** 2 / (2 * (c**2).sum()), rel=1e-6)
    assert means["mismatch/ratio_mean"] == pytest.approx(c.mean(), rel=1e-6)
    peak = found["mismatch/ratio_max"]
    assert not isinstance(peak, Mean) and float(peak.value) == pytest.approx(np.e, rel=1e-6)


# Declarations.


def test_a_metric_is_reduced_by_its_maximum_exactly_where_losses_report_a_peak():
    ones, mask = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    ratios = Ratios(ones, ones, mask)

    found = mismatch_metrics(ones, ones, mask) | correction_metrics(ratios) | kl_metrics("policy/kl", ones, ones, mask)
    found["policy/entropy_nats"] = mean_of(ones, mask)

    peaks = {key for key, part in found.items() if not isinstance(part, Mean)}
    assert peaks == {key for key, metric in METRICS.items() if metric.reduction == "max"}
    assert set(found) <= set(METRICS)


STAGES = {key.partition("/")[0] for key in METRICS}


def metric_keys_in(file: Path) -> set[str]:
    """String constants that look like `stage/quantity`, whole ones only: the pieces of f-strings are left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    pieces = {id(piece) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for piece in node.values}
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in pieces]
    words = {text for text in texts if isinstance(text, str) and text.count("/") == 1 and text.replace("/", "").isidentifier()}
    return {word for word in words if word.partition("/")[0] in STAGES}


def test_every_key_that_the_source_names_is_declared():
    root = Path(__file__).resolve().parents[2]
    files = [file for package in ("async_rlhf", "actors", "learners") for file in sorted((root / package).rglob("*.py"))]

    named = {key for file in files if file.name != "metrics.py" for key in metric_keys_in(file)}

    prefixes = {"mismatch/kl", "policy/kl"}  # kl_metrics adds `_k1_nats` and `_k3_nats`
    assert named - set(METRICS) == prefixes
    assert {"value/return_mean", "dpo/margin", "correction/weight", "queue/wait_s"} <= named


def test_the_keys_that_are_put_together_are_declared():
    """loss, grad_norm and learning_rate of the policy under `train`, of the critic under `value`."""
    for stage in ("train", "value"):
        for quantity in ("loss", "grad_norm", "learning_rate"):
            assert METRICS[f"{stage}/{quantity}"].reduction == ("last" if quantity == "learning_rate" else "mean")
    for name in ("mismatch/kl", "policy/kl"):
        assert {f"{name}_k1_nats", f"{name}_k3_nats"} <= set(METRICS)


def test_keys_are_stage_slash_quantity_and_every_one_says_what_it_means():
    for key, metric in METRICS.items():
        stage, _, quantity = key.partition("/")
        assert stage.isidentifier() and quantity.isidentifier(), key
        assert metric.meaning.isascii() and len(metric.meaning) > 5, key
