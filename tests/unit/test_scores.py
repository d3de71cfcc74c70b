"""What scores become before they are trained: penalties for cut answers, and running normalisation."""

import asyncio
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.replay_queue import ReplayQueue, WithScorer
from actors.scorer import Scorer
from async_rlhf.config import load_config
from async_rlhf.config.rewards import RewardConfig
from async_rlhf.metrics import summarize
from async_rlhf.scores import MAX_RECENT, MIN_STD, ScoreMoments, moments_from_json, penalise_cut, shape_scores
from async_rlhf.state import TrainingState, state_from_json
from async_rlhf.tickets import PutOutcome
from async_rlhf.types import Batch, FinishReason, RolloutGroup, ScoredGroup
from tests.support.samples import make_scored, make_ticket
from tests.support.tiny_policy import save_tiny_policy

NORMALIZE = RewardConfig(normalize=True)
MEDIAN = RewardConfig(missing_eos_percentile=50.0)
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH

few = settings(max_examples=30, deadline=None)
batches_of_scores = st.lists(
    st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=4), min_size=1, max_size=4), min_size=1, max_size=6
)


def cut_some(scored: ScoredGroup, *cut: int) -> ScoredGroup:
    """The group with these completions cut by the length limit."""
    rollouts = tuple(replace(r, finish_reason=LENGTH if i in cut else STOP) for i, r in enumerate(scored.group.rollouts))
    return replace(scored, group=replace(scored.group, rollouts=rollouts))


def make_batch(*scores: list[float], cut: tuple[int, ...] = ()) -> Batch:
    """One group per list; of the first, these completions are cut."""
    groups = [make_scored(make_ticket(index), scores=group) for index, group in enumerate(scores)]
    return Batch(update=0, groups=(cut_some(groups[0], *cut), *groups[1:]))


def scores_of(batch: Batch) -> list[list[float]]:
    return [scored.scores.tolist() for scored in batch.groups]


def shape_all(batches: list[Batch], reward: RewardConfig) -> tuple[list[Batch], list[ScoreMoments]]:
    """The shaped batches, and the moments before the first and after each of them."""
    shaped, moments = [], [ScoreMoments()]
    for batch in batches:
        done, after = shape_scores(batch, moments[-1], reward)
        shaped.append(done)
        moments.append(after)
    return shaped, moments


def all_scores(batches: list[Batch]) -> np.ndarray:
    return np.concatenate([scored.scores for batch in batches for scored in batch.groups]).astype(np.float64)


# Normalisation.


def test_normalised_scores_by_hand():
    """First batch 1, 3, 5, 7: mean 4, deviations -3 -1 1 3, variance (9 + 1 + 1 + 9) / 4 = 5. It is trained as it is.
    Second batch 4, 9: (4 - 4) / sqrt 5 = 0 and (9 - 4) / sqrt 5 = 2.2360680.
    Third batch, after 1 3 5 7 4 9: mean 29 / 6, sum of squares 181, variance 181 / 6 - (29 / 6)^2 = 6.8055556, std 2.6087460:
    (10 - 4.8333333) / 2.6087460 = 1.9805174.
    """
    batches = [make_batch([1.0, 3.0], [5.0, 7.0]), make_batch([4.0, 9.0]), make_batch([10.0, 10.0])]

    shaped, moments = shape_all(batches, NORMALIZE)

    assert scores_of(shaped[0]) == [[1.0, 3.0], [5.0, 7.0]]
    assert scores_of(shaped[1])[0] == pytest.approx([0.0, 2.2360680], abs=1e-6)
    assert scores_of(shaped[2])[0] == pytest.approx([1.9805174, 1.9805174], abs=1e-6)
    assert (moments[1].count, moments[1].mean, moments[1].std) == (4, 4.0, pytest.approx(5**0.5))
    assert (moments[2].count, moments[2].mean) == (6, pytest.approx(29 / 6))
    assert moments[2].sum_squares == pytest.approx(6 * 6.8055556)


@few
@given(batches_of_scores)
def test_moments_are_those_of_everything_seen_however_it_came_in_batches(scores: list[list[list[float]]]):
    batches = [make_batch(*groups) for groups in scores]

    _, moments = shape_all(batches, NORMALIZE)

    for number in range(1, len(batches) + 1):
        seen = all_scores(batches[:number])
        assert moments[number].count == len(seen)
        assert moments[number].mean == pytest.approx(seen.mean(), rel=1e-9, abs=1e-9)
        assert moments[number].std == pytest.approx(seen.std(), rel=1e-7, abs=1e-6)


@few
@given(batches_of_scores)
def test_scores_are_normalised_by_the_batches_before_theirs_alone(scores: list[list[list[float]]]):
    batches = [make_batch(*groups) for groups in scores]

    shaped, moments = shape_all(batches, NORMALIZE)

    assert scores_of(shaped[0]) == scores_of(batches[0])
    for batch, done, before in zip(batches[1:], shaped[1:], moments[1:-1], strict=True):
        scale = before.std if before.std > MIN_STD else 1.0
        expected = (all_scores([batch]) - before.mean) / scale
        tolerance = 1e-6 * (1e3 / scale + 1)
        np.testing.assert_allclose(all_scores([done]), expected, rtol=1e-5, atol=tolerance)


def test_later_groups_of_a_batch_do_not_change_how_its_first_is_shaped():
    before = shape_all([make_batch([1.0, 3.0])], NORMALIZE)[1][-1]

    alone, _ = shape_scores(make_batch([2.0, 6.0]), before, NORMALIZE)
    together, _ = shape_scores(make_batch([2.0, 6.0], [900.0, -900.0]), before, NORMALIZE)

    assert scores_of(together)[0] == scores_of(alone)[0]


@pytest.mark.parametrize("step", [0.0, 1e-6])
def test_scores_that_hardly_differ_are_shifted_and_not_blown_up(step: float):
    batches = [make_batch([0.5, 0.5 + step]), make_batch([0.5, 0.75])]

    shaped, _ = shape_all(batches, NORMALIZE)

    assert scores_of(shaped[1])[0] == pytest.approx([0.0, 0.25], abs=1e-5)


def test_shaped_scores_stay_float32_and_everything_else_of_a_batch_stays():
    batches = [make_batch([1.0, 3.0], cut=(0,)), make_batch([2.0, 6.0], [1.0, 0.0], cut=(1,))]

    shaped, _ = shape_all(batches, RewardConfig(normalize=True, missing_eos_percentile=10.0))

    for batch, done in zip(batches, shaped, strict=True):
        assert done.update == batch.update
        for scored, after in zip(batch.groups, done.groups, strict=True):
            assert after.scores.dtype == np.float32 and after.scores.shape == scored.scores.shape
            assert (after.group, after.reference_logprobs, after.completions) == (
                scored.group,
                scored.reference_logprobs,
                scored.completions,
            )


@few
@given(batches_of_scores)
def test_without_settings_scores_are_trained_as_they_are(scores: list[list[list[float]]]):
    batches = [make_batch(*groups, cut=(0,)) for groups in scores]

    shaped, moments = shape_all(batches, RewardConfig())

    assert [scores_of(batch) for batch in shaped] == [scores_of(batch) for batch in batches]
    assert moments[-1].recent == ()


# Penalties for what the length limit cut.


def test_a_penalty_replaces_the_scores_of_cut_completions_only():
    scores = penalise_cut(np.float32([5.0, 6.0, 7.0]), [STOP, LENGTH, STOP], -1.5)

    assert scores.dtype == np.float32
    assert scores.tolist() == [5.0, -1.5, 7.0]


def test_percentile_penalty_by_hand():
    """First batch 1, 2, 3, 10, the 10 cut: nothing is known yet, so it stays. Their median is (2 + 3) / 2 = 2.5: what the cut
    completion of the second batch scores. Its own 8 and 0 join: of 1 2 3 10 8 0 the median is again 2.5, of the third batch's
    cut completion; had the penalised score been remembered, or the batch's own, it would not be.
    """
    batches = [make_batch([1.0, 2.0, 3.0, 10.0], cut=(3,)), make_batch([8.0, 0.0], cut=(0,)), make_batch([9.0, 100.0], cut=(1,))]

    shaped, moments = shape_all(batches, MEDIAN)

    assert [scores_of(batch) for batch in shaped] == [[[1.0, 2.0, 3.0, 10.0]], [[2.5, 0.0]], [[9.0, 2.5]]]
    assert moments[2].recent == (1.0, 2.0, 3.0, 10.0, 8.0, 0.0)


@few
@given(
    scores=batches_of_scores,
    percentile=st.floats(0.0, 100.0),
    cut=st.sets(st.integers(0, 1)),
)
def test_penalty_is_the_percentile_of_the_last_raw_scores_of_the_batches_before(
    scores: list[list[list[float]]], percentile: float, cut: set[int]
):
    batches = [make_batch(*groups, cut=tuple(cut)) for groups in scores]

    shaped, moments = shape_all(batches, RewardConfig(missing_eos_percentile=percentile))

    for number, (batch, done) in enumerate(zip(batches, shaped, strict=True)):
        expected = [list(group) for group in scores_of(batch)]
        if number:
            penalty = float(np.float32(np.percentile(all_scores(batches[:number]), percentile)))
            expected[0] = [penalty if index in cut else score for index, score in enumerate(expected[0])]
        assert scores_of(done) == expected
    assert moments[-1].recent == tuple(all_scores(batches))


def test_a_percentile_looks_back_on_the_last_scores_only():
    """MAX_RECENT - 1 zeros and a one push out whatever came first."""
    first = make_batch([-1000.0] * 8)
    rest = make_batch(*[[0.0] * 8] * (MAX_RECENT // 8 - 1), [0.0] * 7 + [1.0])

    shaped, moments = shape_all([first, rest, make_batch([5.0, 6.0], cut=(0,))], RewardConfig(missing_eos_percentile=0.0))

    assert moments[2].recent == (0.0,) * (MAX_RECENT - 1) + (1.0,)
    assert scores_of(shaped[2]) == [[0.0, 6.0]]


def test_what_is_normalised_are_the_scores_after_the_penalty():
    """First batch 0, 4. Second: 9 is cut, so it scores the median 2, and 6 stays: normalised by mean 2, std 2: 0 and 2.
    Remembered are 0, 4, 2, 6: mean 3, variance (9 + 1 + 1 + 9) / 4 = 5.
    """
    batches = [make_batch([0.0, 4.0]), make_batch([9.0, 6.0], cut=(0,))]

    shaped, moments = shape_all(batches, RewardConfig(normalize=True, missing_eos_percentile=50.0))

    assert scores_of(shaped[1]) == [[0.0, 2.0]]
    assert (moments[2].mean, moments[2].std) == (pytest.approx(3.0), pytest.approx(5**0.5))
    assert moments[2].recent == (0.0, 4.0, 9.0, 6.0)


# Replays and checkpoints.


@few
@given(scores=batches_of_scores, stop=st.integers(0, 6))
def test_the_same_batches_after_a_restart_give_the_same_scores_bit_by_bit(scores: list[list[list[float]]], stop: int):
    """The moments went through the JSON of a checkpoint in between."""
    reward = RewardConfig(normalize=True, missing_eos_percentile=30.0)
    batches = [make_batch(*groups, cut=(0,)) for groups in scores]
    shaped, moments = shape_all(batches, reward)
    stop = min(stop, len(batches))

    restored = state_from_json(make_state(moments[stop]).to_json()).score_moments
    for batch, expected in zip(batches[stop:], shaped[stop:], strict=True):
        again, restored = shape_scores(batch, restored, reward)
        for ours, theirs in zip(again.groups, expected.groups, strict=True):
            assert ours.scores.tobytes() == theirs.scores.tobytes()

    assert restored == moments[-1]


def make_state(moments: ScoreMoments) -> TrainingState:
    counts = {"version": 3, "num_updates": 80, "optimizer_steps": 6, "prompts": 24, "completions": 48, "tokens": 211, "seed": 7}
    return TrainingState(run_id="quick-1", phase="training", score_moments=moments, **counts)


@few
@given(batches_of_scores)
def test_moments_come_back_from_a_training_state_as_they_were(scores: list[list[list[float]]]):
    _, moments = shape_all([make_batch(*groups) for groups in scores], MEDIAN)
    state = make_state(moments[-1])

    assert state_from_json(state.to_json()) == state
    assert moments_from_json(json.loads(json.dumps(asdict(moments[-1])))) == moments[-1]


def test_a_state_without_moments_begins_anew():
    fields = json.loads(make_state(ScoreMoments()).to_json())
    del fields["score_moments"]

    assert state_from_json(json.dumps(fields)).score_moments == ScoreMoments()


# Where both are wired in.

REWARD = """
def one(prompts, completions, **columns):
    return [1.0] * len(completions)
def count(prompts, completions, **columns):
    return [float(number) for number in range(len(completions))]
"""


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_policy(tmp_path_factory.mktemp("policy"))
    (folder / "reward.py").write_text(REWARD, encoding="ascii")
    return folder


def score_groups(folder: Path, function: str, *overrides: str, cuts: tuple[tuple[int, ...], ...]) -> list[ScoredGroup]:
    config = load_config(overrides=list(overrides)).config
    path = f"{folder / 'reward.py'}:{function}"
    groups: list[RolloutGroup] = [cut_some(make_scored(make_ticket(index)), *cut).group for index, cut in enumerate(cuts)]
    count, scored = Scorer(config, str(folder), path, path).score(groups)
    assert count == len(groups)
    return scored


def test_a_scorer_asked_for_one_group_scores_it_as_it_does_among_all(policy_folder: Path):
    """Other groups are not even looked at: theirs may be what breaks the reward function."""
    path = f"{policy_folder / 'reward.py'}:count"
    scorer = Scorer(load_config().config, str(policy_folder), path, path)
    groups = [make_scored(make_ticket(index)).group for index in range(3)]
    _, among_all = scorer.score(groups)

    for index in range(3):
        count, (alone,) = scorer.score(groups, index)

        assert count == 1 and alone.group is groups[index] and alone.completions == among_all[index].completions
        for ours, theirs in zip(alone.reference_logprobs, among_all[index].reference_logprobs, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_a_fixed_penalty_decides_ties(policy_folder: Path):
    """Every completion scores 1 but the cut ones: one of the first group, both of the second, none of the third."""
    first, second, third = score_groups(policy_folder, "one", "reward.missing_eos_penalty=-1", cuts=((1,), (0, 1), ()))

    assert [scored.scores.tolist() for scored in (first, second, third)] == [[1.0, -1.0], [-1.0, -1.0], [1.0, 1.0]]
    assert [scored.tied for scored in (first, second, third)] == [False, True, True]
    assert first.scores.dtype == np.float32


def test_two_cut_completions_of_unlike_scores_tie_under_a_fixed_penalty(policy_folder: Path):
    (penalised,) = score_groups(policy_folder, "count", "reward.missing_eos_penalty=0.5", cuts=((0, 1),))
    (plain,) = score_groups(policy_folder, "count", cuts=((0, 1),))

    assert (penalised.scores.tolist(), penalised.tied) == ([0.5, 0.5], True)
    assert (plain.scores.tolist(), plain.tied) == ([0.0, 1.0], False)


def test_a_penalty_of_zero_is_a_penalty(policy_folder: Path):
    (scored,) = score_groups(policy_folder, "one", "reward.missing_eos_penalty=0", cuts=((0,),))

    assert scored.scores.tolist() == [0.0, 1.0]


def test_a_percentile_leaves_the_scorers_scores_and_so_the_ties_alone(policy_folder: Path):
    (scored,) = score_groups(policy_folder, "count", "reward.missing_eos_percentile=10", cuts=((0, 1),))

    assert (scored.scores.tolist(), scored.tied) == ([0.0, 1.0], False)


async def decide(queue: ReplayQueue, update: int, scores: list[tuple[float, float]]) -> tuple[list[list[float]], ScoreMoments, float]:
    """Shaped scores of the batch that the queue deals out, the moments and the mean reward that it reports."""
    tickets = await queue.tickets("generator-0.0", update, update, 2, 0.0)
    assert tickets is not None and len(tickets) == 2
    groups = [make_scored(ticket, version=update, scores=pair) for ticket, pair in zip(tickets, scores, strict=True)]
    await queue.note(WithScorer(tickets=tuple(tickets)))
    assert await queue.put(groups) == [PutOutcome.KEPT] * 2
    summary = (await queue.next_batch(update, 0.0)).summary
    assert summary is not None
    taken, (minibatch,) = await queue.take(update, 0)
    assert taken == update
    await queue.trained(update, 0, ())
    shaped = {scored.group.ticket.ticket_id: scored.scores.tolist() for scored in minibatch}
    return [shaped[ticket_id] for ticket_id in sorted(shaped)], summary.moments, summary.metrics["reward/batch_mean"]


def test_the_queue_deals_out_shaped_scores_and_reports_raw_ones_with_their_moments(policy_folder: Path, tmp_path: Path):
    """First batch 0, 2, 4, 6: mean 3, variance (9 + 1 + 1 + 9) / 4 = 5. Second 3, 8, 3, 3: (8 - 3) / sqrt 5 = 2.2360680."""
    overrides = ["updates=2", "batch_groups=2", "max_staleness=0", "reward.normalize=true", "queue.ties=keep"]

    async def two_updates() -> None:
        queue = ReplayQueue(load_config(overrides=overrides).config, str(policy_folder), str(tmp_path), 0)
        first, moments, mean = await decide(queue, 0, [(0.0, 2.0), (4.0, 6.0)])
        assert (first, mean) == ([[0.0, 2.0], [4.0, 6.0]], 3.0)
        assert (moments.count, moments.mean, moments.std) == (4, 3.0, pytest.approx(5**0.5))

        second, moments, mean = await decide(queue, 1, [(3.0, 8.0), (3.0, 3.0)])
        assert second == [pytest.approx([0.0, 2.2360680]), [0.0, 0.0]]
        assert (mean, moments.count) == (4.25, 8)

    asyncio.run(asyncio.wait_for(two_updates(), 30))


def test_a_summary_without_shaping_has_empty_moments():
    assert summarize(make_batch([1.0, 0.0]), []).moments == ScoreMoments()


def test_ties_are_judged_before_a_percentile_shapes_the_scores():
    """A group of equal scores is not made a preference by the penalty of its cut completion, nor a preference a tie."""
    tied = cut_some(make_scored(make_ticket(0), scores=(0.0, 0.0)), 1)
    untied = cut_some(make_scored(make_ticket(1), scores=(1.0, 2.0)), 0, 1)
    moments = ScoreMoments(count=2, mean=-3.0, recent=(-3.0, -3.0))

    shaped, _ = shape_scores(Batch(update=1, groups=(tied, untied)), moments, MEDIAN)

    assert [scored.scores.tolist() for scored in shaped.groups] == [[0.0, -3.0], [-3.0, -3.0]]
    assert [scored.tied for scored in shaped.groups] == [True, False]
