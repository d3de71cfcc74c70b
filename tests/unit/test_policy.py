"""CompletionScorer against the model's own full logits."""

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from async_rlhf.batching import TrainingSequence, collate
from async_rlhf.config.schema import ModelConfig
from async_rlhf.policy import CompletionScorer, load_policy, score_microbatch
from async_rlhf.tasks.start import build_policy, build_tokenizer

CPU = torch.device("cpu")

architectures = pytest.mark.parametrize(
    ("family", "tied"), [("llama", False), ("llama", True), ("qwen3", False), ("qwen3", True)], ids=lambda value: str(value)
)


def tiny(family: str = "llama", tied: bool = False) -> PreTrainedModel:
    config = ModelConfig(family=family, tie_embeddings=tied, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64)  # type: ignore[arg-type]
    return build_policy(config, build_tokenizer(), seed=1).eval()


def make_sequences(sizes: list[tuple[int, int]], vocab_size: int = 20, seed: int = 0) -> list[TrainingSequence]:
    rng = np.random.default_rng(seed)
    return [
        TrainingSequence(
            prompt_ids=rng.integers(0, vocab_size, p, dtype=np.int32),
            completion_ids=rng.integers(0, vocab_size, t, dtype=np.int32),
            behavior_logprobs=np.zeros(t, np.float32),
            reference_logprobs=np.zeros(t, np.float32),
            score=0.0,
        )
        for p, t in sizes
    ]


def score(model: PreTrainedModel, sequences: list[TrainingSequence], temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    microbatch = collate([(sequence,) for sequence in sequences])
    with torch.no_grad():
        return *score_microbatch(CompletionScorer(model), microbatch, temperature, CPU), microbatch.loss_mask


def full_distribution(model: PreTrainedModel, sequence: TrainingSequence, temperature: float) -> Tensor:
    """[T, V] log-probabilities before each completion token: all logits of the one unpadded sequence."""
    ids = torch.from_numpy(np.concatenate([sequence.prompt_ids, sequence.completion_ids]).astype(np.int64))[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].double() / temperature
    return logits[len(sequence.prompt_ids) - 1 : -1].log_softmax(-1)


@architectures
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_log_probabilities_are_those_of_the_full_logits(family: str, tied: bool, temperature: float):
    model, sequences = tiny(family, tied), make_sequences([(5, 4), (2, 7), (9, 1), (1, 3)])

    logprobs, entropy, mask = score(model, sequences, temperature)

    for row, sequence in enumerate(sequences):
        expected = full_distribution(model, sequence, temperature)
        chosen = expected[torch.arange(len(sequence.completion_ids)), torch.from_numpy(sequence.completion_ids.astype(np.int64))]
        torch.testing.assert_close(logprobs[row][mask[row]].double(), chosen, rtol=0, atol=1e-5)
        torch.testing.assert_close(entropy[row][mask[row]].double(), -(expected.exp() * expected).sum(-1), rtol=0, atol=1e-5)


def test_temperature_changes_the_log_probabilities_and_raises_the_entropy():
    model, sequences = tiny(), make_sequences([(4, 6)])

    cold, cold_entropy, _ = score(model, sequences, 0.5)
    hot, hot_entropy, _ = score(model, sequences, 2.0)

    assert (hot_entropy > cold_entropy).all()
    assert (hot - cold).abs().max() > 0.1


@architectures
def test_a_completion_scores_the_same_alone_and_in_any_company(family: str, tied: bool):
    model, sequences = tiny(family, tied), make_sequences([(5, 4), (30, 12), (1, 1), (8, 20)], seed=2)

    together, together_entropy, mask = score(model, sequences)
    reordered, _, reordered_mask = score(model, sequences[::-1])

    for row, sequence in enumerate(sequences):
        alone, alone_entropy, _ = score(model, [sequence])
        torch.testing.assert_close(together[row][mask[row]], alone[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(together_entropy[row][mask[row]], alone_entropy[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(reordered[-1 - row][reordered_mask[-1 - row]], alone[0], rtol=0, atol=1e-5)


def test_padding_on_the_left_gives_the_same_log_probabilities():
    """The scorer pads on the right; the sampler may pad on the left. Rotary positions are relative, so both agree."""
    model, (sequence,) = tiny(), make_sequences([(5, 4)])
    right = collate([(sequence,)])
    width = 3
    mask = torch.cat([torch.zeros(1, width, dtype=torch.long), right.attention_mask], 1)
    ids = torch.cat([torch.zeros(1, width, dtype=torch.long), right.input_ids], 1)

    with torch.no_grad():
        expected, _ = score_microbatch(CompletionScorer(model), right, 1.0, CPU)
        shifted, _ = CompletionScorer(model)(ids, mask, right.completion_positions + width, right.completion_ids, 1.0)

    torch.testing.assert_close(shifted, expected, rtol=0, atol=1e-5)


def test_gradient_of_a_log_probability_is_that_of_the_full_logits():
    model, (sequence,) = tiny(), make_sequences([(5, 4)])
    parameters = list(model.parameters())
    ids = torch.from_numpy(np.concatenate([sequence.prompt_ids, sequence.completion_ids]).astype(np.int64))[None]
    full = model(input_ids=ids).logits[0, 4:-1].log_softmax(-1).gather(-1, ids[0, 5:, None]).sum()
    expected = torch.autograd.grad(full, parameters)

    logprobs, entropy = score_microbatch(CompletionScorer(model), collate([(sequence,)]), 1.0, CPU)
    got = torch.autograd.grad(logprobs.sum(), parameters)

    assert not entropy.requires_grad
    for name, ours, theirs in zip([name for name, _ in model.named_parameters()], got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_entropy_of_a_uniform_policy_is_the_log_of_the_vocabulary():
    model = tiny()
    torch.nn.init.zeros_(model.get_output_embeddings().weight)

    logprobs, entropy, _ = score(model, make_sequences([(3, 5)]))

    expected = float(np.log(model.config.vocab_size))
    torch.testing.assert_close(entropy, torch.full_like(entropy, expected), rtol=0, atol=1e-5)
    torch.testing.assert_close(logprobs, torch.full_like(logprobs, -expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_policy_holds_the_saved_weights_in_the_wanted_dtype(dtype: torch.dtype, tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)

    loaded = load_policy(tmp_path, dtype)

    for (name, ours), theirs in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert theirs.dtype == dtype and torch.equal(theirs, ours.to(dtype)), name
