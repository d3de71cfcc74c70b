"""What a batch looks like in numbers, and how numbers of several steps become one."""

from dataclasses import replace

import numpy as np
import pytest

from async_rlhf.metrics import METRICS, derive, over_steps, summarize
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
    assert set(summarize(hand_made_batch(), []).metrics) <= set(METRICS)


def test_steps_are_averaged_but_of_the_learning_rate_the_last_counts():
    steps = [{"train/loss": 1.0, "train/learning_rate": 3e-4}, {"train/loss": 2.0, "train/learning_rate": 1e-4}]

    assert over_steps(steps) == {"train/loss": 1.5, "train/learning_rate": 1e-4}


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


def test_keys_are_stage_slash_quantity_and_every_one_says_what_it_means():
    for key, metric in METRICS.items():
        stage, _, quantity = key.partition("/")
        assert stage.isidentifier() and quantity.isidentifier(), key
        assert metric.meaning.isascii() and len(metric.meaning) > 5, key
