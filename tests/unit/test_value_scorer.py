"""The critic: where it starts from, and what it says before each completion token."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedModel

from async_rlhf.batching import Batching, TrainingSequence
from async_rlhf.policy import ValueScorer, load_critic
from tests.support.scoring import (
    MIXED,
    architectures,
    assert_same_gradients,
    batchings,
    gradients,
    make_microbatch,
    make_sequences,
    tiny,
    token_ids,
    weighted,
)


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    tiny().save_pretrained(folder)
    return folder


def with_opinion(critic: PreTrainedModel) -> PreTrainedModel:
    """A value head that is not zero."""
    with torch.no_grad():
        critic.score.weight.copy_(torch.linspace(-1.0, 1.0, critic.score.weight.numel()).view_as(critic.score.weight))
    return critic.eval()


def values_of(critic: PreTrainedModel, sequences: list[TrainingSequence], batching: Batching) -> tuple[Tensor, Tensor]:
    microbatch = make_microbatch(sequences, batching)
    with torch.no_grad():
        (values,) = ValueScorer(critic)(microbatch)
    return values, microbatch.loss_mask


# Where it starts from.


@architectures
@batchings
def test_a_critic_made_from_a_policy_says_zero_everywhere_and_has_its_backbone(family: str, tied: bool, batching: Batching, tmp_path: Path):
    policy = tiny(family, tied)
    policy.save_pretrained(tmp_path)

    critic = load_critic(tmp_path, batching=batching)

    backbone = dict(critic.base_model.named_parameters())
    assert backbone.keys() == dict(policy.base_model.named_parameters()).keys()
    for name, expected in policy.base_model.named_parameters():
        assert torch.equal(backbone[name], expected), name
    values, mask = values_of(critic, make_sequences(MIXED), batching)
    assert values.shape == mask.shape == (5, 20)
    assert not values.any()


def test_the_first_step_of_a_head_of_zeros_moves_the_head_alone(policy_folder: Path):
    critic = load_critic(policy_folder, batching="packed")

    (values,) = ValueScorer(critic)(make_microbatch(make_sequences(MIXED), "packed"))

    moved = {name for name, gradient in gradients(critic, weighted(values)).items() if gradient.any()}
    assert moved == {"score.weight"}


@architectures
def test_a_saved_critic_says_the_same_when_it_is_loaded_again(family: str, tied: bool, tmp_path: Path):
    tiny(family, tied).save_pretrained(tmp_path / "policy")
    critic = with_opinion(load_critic(tmp_path / "policy"))
    expected, _ = values_of(critic, make_sequences(MIXED), "padded")

    critic.save_pretrained(tmp_path / "critic")
    again = load_critic(tmp_path / "critic")

    assert torch.equal(values_of(again.eval(), make_sequences(MIXED), "padded")[0], expected)
    assert expected.abs().max() > 0.1


@batchings
def test_a_reward_model_keeps_its_head_when_it_becomes_a_critic(batching: Batching, tmp_path: Path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        reward_model = LlamaForSequenceClassification(LlamaConfig(vocab_size=22, num_labels=1, pad_token_id=0, **sizes)).eval()
    reward_model.save_pretrained(tmp_path)
    (sequence,) = make_sequences([(4, 6)])

    critic = load_critic(tmp_path, batching=batching).eval()

    assert torch.equal(critic.score.weight, reward_model.score.weight)
    # What a reward model says of the first nine tokens is the value of the state before the tenth.
    with torch.no_grad():
        reward = reward_model(input_ids=token_ids(sequence)[:, :9]).logits[0, 0]
    values, _ = values_of(critic, [sequence], batching)
    assert values[0, 5].item() == pytest.approx(reward.item(), abs=1e-6) != 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_critic_in_any_dtype_answers_in_float32(dtype: torch.dtype, policy_folder: Path):
    critic = with_opinion(load_critic(policy_folder, dtype, "packed"))

    values, _ = values_of(critic, make_sequences(MIXED), "packed")

    assert {parameter.dtype for parameter in critic.parameters()} == {dtype}
    assert values.dtype == torch.float32
    exact, _ = values_of(with_opinion(load_critic(policy_folder, batching="packed")), make_sequences(MIXED), "packed")
    torch.testing.assert_close(values, exact, rtol=0, atol=1e-6 if dtype == torch.float32 else 0.15 * float(exact.abs().max()))


# What it says.


@batchings
def test_the_value_of_a_token_comes_from_the_position_before_it(batching: Batching, policy_folder: Path):
    """Head times the hidden state of the whole text at place p - 1 + t, for completion token t behind a prompt of p."""
    plain, critic = (with_opinion(load_critic(policy_folder, batching=name)) for name in ("padded", batching))
    sequences = make_sequences(MIXED)

    values, mask = values_of(critic, sequences, batching)

    assert not values[~mask].any()
    for row, sequence in enumerate(sequences):
        with torch.no_grad():
            hidden = plain.base_model(input_ids=token_ids(sequence)).last_hidden_state[0]
        expected = (hidden @ plain.score.weight[0])[len(sequence.prompt_ids) - 1 : -1]
        torch.testing.assert_close(values[row][mask[row]], expected, rtol=0, atol=1e-5)


@batchings
def test_a_value_knows_the_tokens_before_its_own_and_not_its_own(batching: Batching, policy_folder: Path):
    critic, (sequence,) = with_opinion(load_critic(policy_folder, batching=batching)), make_sequences([(4, 6)])
    before, _ = values_of(critic, [sequence], batching)
    sequence.completion_ids[2] = (sequence.completion_ids[2] + 1) % 20

    after, _ = values_of(critic, [sequence], batching)

    torch.testing.assert_close(after[0, :3], before[0, :3], rtol=0, atol=1e-6)
    assert ((after - before)[0, 3:].abs() > 1e-4).all()


def test_packed_and_padded_give_the_same_values_and_gradients(policy_folder: Path):
    packed, padded = (with_opinion(load_critic(policy_folder, batching=name)) for name in ("packed", "padded"))
    sequences = make_sequences(MIXED, seed=5)

    (ours,) = ValueScorer(packed)(make_microbatch(sequences, "packed"))
    (theirs,) = ValueScorer(padded)(make_microbatch(sequences, "padded"))

    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    ours_of, theirs_of = gradients(packed, weighted(ours)), gradients(padded, weighted(theirs))
    assert_same_gradients(ours_of, theirs_of)


@batchings
def test_a_completion_is_valued_the_same_alone_and_in_any_company(batching: Batching, policy_folder: Path):
    critic, sequences = with_opinion(load_critic(policy_folder, batching=batching)), make_sequences(MIXED, seed=6)

    together, mask = values_of(critic, sequences, batching)

    for row, sequence in enumerate(sequences):
        alone, _ = values_of(critic, [sequence], batching)
        torch.testing.assert_close(together[row][mask[row]], alone[0], rtol=0, atol=1e-5)
