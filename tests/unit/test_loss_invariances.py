"""The same groups give the same loss and gradient, whatever way they are split, laid out and ordered: fp32, 1e-5 relative."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from async_rlhf.batching import Batching, Microbatch, TrainingSequence, Unit, collate, split_units, with_proximal
from async_rlhf.config import load_config
from async_rlhf.policy import CompletionScorer, ValueScorer, load_critic, load_policy
from async_rlhf.types import ScoredGroup
from learners.algorithms import ALGORITHMS, make_objective
from learners.objective import Objective, Totals
from tests.support.samples import make_scored, make_ticket
from tests.support.tiny_policy import save_tiny_policy

each_algorithm = pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
SCORES = [(1, 0, 0, 2), (0, 0, 0, 0), (0, 1, 0, 0), (1, 1, 1, 0), (0.5, -1, 2, 2), (3, 1, 0, -2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


def make_groups() -> list[ScoredGroup]:
    """Ragged groups, one of them tied; completions of 1 to 12 tokens."""
    return [make_scored(make_ticket(i, seed=i), scores=scores, max_tokens=12, seed=3) for i, scores in enumerate(SCORES)]


def make_units(objective: Objective, groups: Sequence[ScoredGroup]) -> list[Unit]:
    """Selected, with proximal log-probabilities and values near to the behavior's, as on a batch's arrival."""
    units: list[Unit] = []
    for scored in groups:
        rng = np.random.default_rng([7, scored.group.ticket.ticket_id])
        unit = objective.select(scored)
        rows = [s.behavior_logprobs + 0.3 * rng.standard_normal(len(s.completion_ids), dtype=np.float32) for s in unit]
        unit = tuple(replace(s, values=rng.standard_normal(len(s.completion_ids), dtype=np.float32)) for s in unit)
        if unit:
            units.append(with_proximal(unit, rows))
    return units if objective.critic is None else objective.critic.estimate(units, lambda values: values)[0]


def totals_of(groups: Sequence[ScoredGroup], units: Sequence[Unit]) -> Totals:
    sequences = [sequence for unit in units for sequence in unit]
    return Totals(groups=len(groups), sequences=len(sequences), tokens=sum(len(s.completion_ids) for s in sequences))


Gradients = dict[str, Tensor]
Shares = Sequence[Sequence[Unit]]


def loss_and_gradients(
    folder: Path,
    objective: Objective,
    shares: Shares,
    totals: Totals,
    batching: Batching = "padded",
    change: Callable[[Microbatch], Microbatch] = lambda microbatch: microbatch,
) -> tuple[float, Gradients]:
    """The sums over all shares, of the policy's loss and of the critic's."""
    scorers: list[tuple[str, torch.nn.Module]] = [("policy", CompletionScorer(load_policy(folder, batching=batching)))]
    if objective.critic is not None:
        critic = load_critic(folder, batching=batching)
        torch.nn.init.normal_(critic.score.weight, generator=torch.Generator().manual_seed(5))  # type: ignore[union-attr]
        scorers.append(("critic", ValueScorer(critic)))
    total, gradients = 0.0, {}
    for name, scorer in scorers:
        for share in shares:
            microbatch = change(collate(share, batching))
            if name == "policy":
                loss = objective.loss(scorer(microbatch, 0.9)[0], microbatch, totals).loss
            else:
                assert objective.critic is not None
                loss = objective.critic.loss(scorer(microbatch)[0], microbatch, totals).loss
            loss.backward()
            total += loss.item()
        gradients |= {f"{name}.{key}": parameter.grad for key, parameter in scorer.named_parameters() if parameter.grad is not None}
    return total, gradients


def assert_same(got: tuple[float, Gradients], expected: tuple[float, Gradients]) -> None:
    """Each gradient within 1e-5 of the largest entry of its network's."""
    assert got[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    assert got[1].keys() == expected[1].keys()
    for network in ("policy", "critic"):
        keys = [key for key in expected[1] if key.startswith(network)]
        if not keys:
            continue
        scale = max(float(expected[1][key].abs().max()) for key in keys)
        assert scale > 1e-4, "no gradient to compare"
        for key in keys:
            torch.testing.assert_close(got[1][key], expected[1][key], rtol=0, atol=1e-5 * scale, msg=lambda text, key=key: f"{key}: {text}")


def setting(algorithm: str) -> tuple[Objective, list[ScoredGroup], list[Unit], Totals]:
    config = load_config(overrides=[f"algorithm={algorithm}", "completions_per_prompt=4"]).config
    objective, groups = make_objective(config), make_groups()
    units = make_units(objective, groups)
    return objective, groups, units, totals_of(groups, units)


def pad_left(microbatch: Microbatch) -> Microbatch:
    """The same sequences with their padding on the left."""
    assert microbatch.attention_mask is not None
    width = microbatch.input_ids.shape[1]
    shift = width - microbatch.attention_mask.sum(1)
    ids, mask = (
        torch.stack([row.roll(int(by)) for row, by in zip(rows, shift, strict=True)])
        for rows in (microbatch.input_ids, microbatch.attention_mask)
    )
    positions = (torch.arange(width) - shift[:, None]).clamp(min=0)
    moved = torch.where(microbatch.loss_mask, microbatch.predicted_from + shift[:, None], microbatch.predicted_from)
    return replace(microbatch, input_ids=ids, attention_mask=mask, position_ids=positions, predicted_from=moved)


@each_algorithm
@pytest.mark.parametrize("batching", ["packed", "padded"])
@pytest.mark.parametrize("max_tokens", [20, 100])
def test_any_split_into_microbatches_packed_or_padded(folder: Path, algorithm: str, batching: Batching, max_tokens: int) -> None:
    objective, _, units, totals = setting(algorithm)
    expected = loss_and_gradients(folder, objective, [units], totals)
    shares = [[units[index] for index in share] for share in split_units(units, max_tokens, batching)]
    assert len(shares) > 1 or max_tokens == 100

    assert_same(loss_and_gradients(folder, objective, shares, totals, batching), expected)


@each_algorithm
def test_padding_on_the_left(folder: Path, algorithm: str) -> None:
    objective, _, units, totals = setting(algorithm)
    expected = loss_and_gradients(folder, objective, [units], totals)

    assert_same(loss_and_gradients(folder, objective, [units], totals, change=pad_left), expected)


@each_algorithm
def test_any_order_of_the_groups(folder: Path, algorithm: str) -> None:
    objective, groups, units, totals = setting(algorithm)
    expected = loss_and_gradients(folder, objective, [units], totals, "packed")
    shuffled = make_units(objective, [groups[index] for index in (4, 0, 5, 2, 1, 3)])

    assert_same(loss_and_gradients(folder, objective, [shuffled], totals, "packed"), expected)


@pytest.mark.parametrize(
    ("algorithm", "reads"), [("ppo", True), ("rloo", True), ("grpo", True), ("dpo", False), ("listwise", False), ("bok", False)]
)
def test_only_the_losses_with_ratios_read_the_recorded_log_probabilities(folder: Path, algorithm: str, reads: bool) -> None:
    """Half of each completion's tokens come from another version: what was recorded for them is all that a loss sees of it."""
    objective, _, units, totals = setting(algorithm)

    def half_from_another(logprobs: np.ndarray) -> np.ndarray:
        return np.where(np.arange(len(logprobs)) < (len(logprobs) + 1) // 2, logprobs - np.float32(0.2), logprobs)

    mixed = [tuple(replace(s, behavior_logprobs=half_from_another(s.behavior_logprobs)) for s in unit) for unit in units]

    loss, _ = loss_and_gradients(folder, objective, [units], totals)
    other, _ = loss_and_gradients(folder, objective, [mixed], totals)

    assert (abs(loss - other) > 1e-4) == reads


def test_an_average_of_averages_would_fail_here(folder: Path) -> None:
    """The check can fail: a share's own token count as denominator gives another loss on ragged microbatches."""
    objective, _, units, totals = setting("grpo")
    expected, _ = loss_and_gradients(folder, objective, [units], totals)
    mistaken = 0.0
    for unit in units:
        own = replace(totals, tokens=sum(len(s.completion_ids) for s in unit))
        mistaken += loss_and_gradients(folder, objective, [[unit]], own)[0] / len(units)

    assert mistaken != pytest.approx(expected, rel=1e-3)


def test_the_sequences_of_the_test_are_ragged() -> None:
    sequences: list[TrainingSequence] = [s for unit in setting("rloo")[2] for s in unit]
    assert len({s.num_tokens for s in sequences}) > 4
