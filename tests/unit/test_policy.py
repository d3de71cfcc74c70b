"""CompletionScorer against the model's own full logits: packed, padded, and in chunks."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM, PreTrainedModel

from async_rlhf.batching import Batching, Microbatch, TrainingSequence, empty_microbatch
from async_rlhf.policy import CompletionScorer, load_policy, score_microbatch
from tests.support.scoring import (
    MIXED,
    architectures,
    assert_same_gradients,
    batchings,
    for_batching,
    gradients,
    make_microbatch,
    make_sequences,
    tiny,
    token_ids,
    weighted,
)
from tests.support.tiny_policy import with_character

CPU = torch.device("cpu")


def score(
    model: PreTrainedModel, sequences: list[TrainingSequence], batching: Batching, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    microbatch = make_microbatch(sequences, batching)
    with torch.no_grad():
        return *score_microbatch(CompletionScorer(model), microbatch, temperature, CPU), microbatch.loss_mask


def full_distribution(model: PreTrainedModel, sequence: TrainingSequence, temperature: float) -> Tensor:
    """[T, V] log-probabilities before each completion token: all logits of the one unpadded sequence."""
    with torch.no_grad():
        logits = model(input_ids=token_ids(sequence)).logits[0].double() / temperature
    return logits[len(sequence.prompt_ids) - 1 : -1].log_softmax(-1)


# Log-probabilities.


@architectures
@batchings
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_log_probabilities_are_those_of_the_full_logits(family: str, tied: bool, batching: Batching, temperature: float):
    plain, sequences = tiny(family, tied), make_sequences([(5, 4), (2, 7), (9, 1), (1, 3)])

    logprobs, entropy, mask = score(tiny(family, tied, batching), sequences, batching, temperature)

    assert not logprobs[~mask].any() and not entropy[~mask].any()
    for row, sequence in enumerate(sequences):
        expected = full_distribution(plain, sequence, temperature)
        chosen = expected[torch.arange(len(sequence.completion_ids)), torch.from_numpy(sequence.completion_ids.astype(np.int64))]
        torch.testing.assert_close(logprobs[row][mask[row]].double(), chosen, rtol=0, atol=1e-5)
        torch.testing.assert_close(entropy[row][mask[row]].double(), -(expected.exp() * expected).sum(-1), rtol=0, atol=1e-5)


@batchings
def test_temperature_changes_the_log_probabilities_and_raises_the_entropy(batching: Batching):
    model, sequences = tiny(batching=batching), make_sequences([(4, 6)])

    cold, cold_entropy, _ = score(model, sequences, batching, 0.5)
    hot, hot_entropy, _ = score(model, sequences, batching, 2.0)

    assert (hot_entropy > cold_entropy).all()
    assert (hot - cold).abs().max() > 0.1


@architectures
@batchings
def test_a_completion_scores_the_same_alone_and_in_any_company(family: str, tied: bool, batching: Batching):
    model, sequences = tiny(family, tied, batching), make_sequences(MIXED, seed=2)

    together, together_entropy, mask = score(model, sequences, batching)
    reordered, _, reordered_mask = score(model, sequences[::-1], batching)

    for row, sequence in enumerate(sequences):
        alone, alone_entropy, _ = score(model, [sequence], batching)
        torch.testing.assert_close(together[row][mask[row]], alone[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(together_entropy[row][mask[row]], alone_entropy[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(reordered[-1 - row][reordered_mask[-1 - row]], alone[0], rtol=0, atol=1e-5)


def left_padded(microbatch: Microbatch, positions: str) -> Microbatch:
    """The same rows with the padding in front; positions counted from the padding on, or from the first real token."""
    assert microbatch.attention_mask is not None
    width = microbatch.input_ids.shape[1]
    shifts = width - microbatch.attention_mask.sum(1)
    source = (torch.arange(width)[None] - shifts[:, None]) % width
    mask = microbatch.attention_mask.gather(1, source)
    return replace(
        microbatch,
        input_ids=microbatch.input_ids.gather(1, source),
        attention_mask=mask,
        position_ids=microbatch.position_ids if positions == "from the padding" else (mask.cumsum(1) - 1).clamp(min=0),
        predicted_from=torch.where(microbatch.loss_mask, microbatch.predicted_from + shifts[:, None], microbatch.predicted_from),
    )


@architectures
def test_packed_right_padded_and_left_padded_give_the_same_log_probabilities_and_gradients(family: str, tied: bool):
    """The scorer packs or pads on the right; the sampler may pad on the left. Rotary positions are relative, so all agree."""
    sequences, padded_model = make_sequences(MIXED, seed=3), tiny(family, tied)
    padded = make_microbatch(sequences, "padded")
    cases = {
        "packed": (tiny(family, tied, "packed"), make_microbatch(sequences, "packed")),
        "left, from the padding": (padded_model, left_padded(padded, "from the padding")),
        "left, from the first token": (padded_model, left_padded(padded, "from the first token")),
    }
    expected, entropy = CompletionScorer(padded_model)(padded, 1.0)
    expected_gradients = gradients(padded_model, weighted(expected))

    for model, microbatch in cases.values():
        logprobs, other_entropy = CompletionScorer(model)(microbatch, 1.0)
        torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(other_entropy, entropy, rtol=0, atol=1e-5)
        assert_same_gradients(gradients(model, weighted(logprobs)), expected_gradients)


def test_a_model_with_learned_positions_scores_packed_as_it_does_alone():
    """Rotary positions are relative, so only such a model shows that each sequence of a pack is counted from 0."""
    sizes = {"n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 2, "n_positions": 42}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = with_character(GPT2LMHeadModel(GPT2Config(vocab_size=22, bos_token_id=None, eos_token_id=1, **sizes))).eval()
    sequences = make_sequences(MIXED)
    alone = [score(for_batching(model, "padded"), [sequence], "padded")[0][0] for sequence in sequences]

    together, _, mask = score(for_batching(model, "packed"), sequences, "packed")

    for row, expected in enumerate(alone):
        torch.testing.assert_close(together[row][mask[row]], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@batchings
def test_gradient_of_a_log_probability_is_that_of_the_full_logits(batching: Batching, temperature: float):
    plain, model, sequences = tiny(), tiny(batching=batching), make_sequences([(5, 4), (3, 9)])
    full = [
        (plain(input_ids=ids).logits[0, len(s.prompt_ids) - 1 : -1] / temperature)
        .log_softmax(-1)
        .gather(-1, ids[0, len(s.prompt_ids) :, None])
        .sum()
        for s in sequences
        for ids in [token_ids(s)]
    ]

    logprobs, entropy = score_microbatch(CompletionScorer(model), make_microbatch(sequences, batching), temperature, CPU)

    assert not entropy.requires_grad
    assert_same_gradients(gradients(model, logprobs.sum()), gradients(plain, torch.stack(full).sum()))


def test_a_second_backward_through_the_head_is_refused_and_never_wrong():
    model = tiny(batching="packed")
    logprobs, _ = score_microbatch(CompletionScorer(model), make_microbatch(make_sequences([(5, 4)]), "packed"), 1.0, CPU)

    logprobs.sum().backward(retain_graph=True)

    with pytest.raises(RuntimeError, match="inplace operation"):
        logprobs.sum().backward()


@batchings
def test_entropy_of_a_uniform_policy_is_the_log_of_the_vocabulary(batching: Batching):
    model = tiny(batching=batching)
    nn.init.zeros_(model.get_output_embeddings().weight)

    logprobs, entropy, mask = score(model, make_sequences([(3, 5), (2, 2)]), batching)

    expected = float(np.log(model.config.vocab_size))
    torch.testing.assert_close(entropy[mask], torch.full_like(entropy[mask], expected), rtol=0, atol=1e-5)
    torch.testing.assert_close(logprobs[mask], torch.full_like(logprobs[mask], -expected), rtol=0, atol=1e-5)


@batchings
def test_the_empty_microbatch_goes_through_the_model_and_its_zeroed_loss_reaches_every_parameter(batching: Batching):
    """So that a rank without work takes part in the collectives of the backward pass."""
    model = tiny(batching=batching)

    logprobs, _ = CompletionScorer(model)(empty_microbatch(batching), 1.0)

    assert logprobs.isfinite().all()
    assert all(not gradient.any() for gradient in gradients(model, logprobs.sum() * 0.0).values())


# The head.


class SoftmaxRows(TorchDispatchMode):
    """Positions that each softmax over the vocabulary sees, in forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._log_softmax.default:
            self.seen.append(args[0].shape[0])
        return func(*args, **(kwargs or {}))


def rows_of_the_head(model: PreTrainedModel) -> list[int]:
    """Filled by a hook: how many positions each call of the head is given."""
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, inputs, outputs: seen.append(len(inputs[0])))
    return seen


@batchings
def test_known_mistake_11_the_head_sees_completion_positions_only(batching: Batching):
    """Prompts of 80 tokens, completions of 11: a full-vocabulary softmax over the prompts would cost eight times as much."""
    model, sequences = tiny(batching=batching), make_sequences([(30, 4), (49, 6), (1, 1)])
    seen = rows_of_the_head(model)

    with SoftmaxRows() as softmax:
        score(model, sequences, batching)

    assert (seen, softmax.seen) == ([11], [11])


@batchings
@pytest.mark.parametrize("rows", [1, 3, 43, 44, 1000])
def test_the_head_in_chunks_says_the_same_and_never_holds_more_logits_than_a_chunk(batching: Batching, rows: int):
    """44 completion tokens. Logits are float32, so `rows` of them are rows * 4 * V bytes."""
    model, microbatch = tiny(batching=batching), make_microbatch(make_sequences(MIXED, seed=4), batching)
    expected, expected_entropy = CompletionScorer(model)(microbatch, 0.7)
    expected_gradients = gradients(model, weighted(expected))

    with SoftmaxRows() as softmax:
        logprobs, entropy = CompletionScorer(model, max_logits_bytes=rows * 4 * model.config.vocab_size)(microbatch, 0.7)
        forward = list(softmax.seen)
        chunk_gradients = gradients(model, weighted(logprobs))

    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(entropy, expected_entropy, rtol=0, atol=1e-6)
    assert not entropy.requires_grad
    assert_same_gradients(chunk_gradients, expected_gradients)
    assert forward == [rows] * (44 // rows) + [44 % rows] * (44 % rows > 0)
    assert max(softmax.seen) == max(forward)


@pytest.mark.parametrize("max_logits_bytes", [1, 400, 1 << 20])
def test_the_head_is_called_once_however_many_chunks_there_are(max_logits_bytes: int):
    """Under ZeRO-3 every call gathers the weights from all ranks, whose numbers of chunks differ."""
    model, microbatch = tiny(batching="packed"), make_microbatch(make_sequences(MIXED), "packed")
    seen = rows_of_the_head(model)

    logprobs, _ = CompletionScorer(model, max_logits_bytes)(microbatch, 1.0)
    logprobs.sum().backward()

    assert seen == [44]


def test_a_chunk_holds_at_least_one_token_however_little_memory_there_is():
    with SoftmaxRows() as softmax:
        CompletionScorer(tiny(), max_logits_bytes=1)(make_microbatch(make_sequences([(2, 3)]), "padded"), 1.0)

    assert softmax.seen == [1, 1, 1]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_chunks_work_where_no_gradient_is_wanted(context: Callable[[], AbstractContextManager[None]]):
    model, microbatch = tiny(batching="packed"), make_microbatch(make_sequences(MIXED), "packed")
    expected, _ = CompletionScorer(model)(microbatch, 1.0)

    with context():
        logprobs, _ = CompletionScorer(model, max_logits_bytes=400)(microbatch, 1.0)

    torch.testing.assert_close(logprobs, expected.detach(), rtol=0, atol=1e-6)
    assert not logprobs.requires_grad


@pytest.mark.parametrize(("max_logits_bytes", "kept"), [(400, False), (1 << 20, True)], ids=["chunks", "at once"])
def test_chunks_keep_no_logits_for_the_backward_pass(max_logits_bytes: int, kept: bool):
    model, microbatch = tiny(batching="packed"), make_microbatch(make_sequences(MIXED), "packed")
    shapes: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        CompletionScorer(model, max_logits_bytes)(microbatch, 1.0)

    weights = model.get_output_embeddings().weight.shape
    assert any(shape[-1] == weights[0] and shape != weights[::-1] for shape in shapes if len(shape) == 2) is kept


@batchings
def test_a_head_with_a_bias_uses_it(batching: Batching):
    plain, model, (sequence,) = tiny(), tiny(batching=batching), make_sequences([(3, 6)])
    for one in (plain, model):
        one.get_output_embeddings().bias = nn.Parameter(torch.linspace(-2.0, 2.0, one.config.vocab_size))

    logprobs, *_ = score(model, [sequence], batching)

    expected = full_distribution(plain, sequence, 1.0).gather(-1, token_ids(sequence)[0, 3:, None]).squeeze(-1)
    torch.testing.assert_close(logprobs[0].double(), expected, rtol=0, atol=1e-5)


@architectures
def test_a_scorer_leaves_weights_and_their_names_as_they_are_saved(family: str, tied: bool, tmp_path: Path):
    untouched, model = tiny(family, tied), tiny(family, tied)

    CompletionScorer(model).model.save_pretrained(tmp_path)

    loaded = load_policy(tmp_path)
    assert {f"model.{name}" for name, _ in untouched.named_parameters()} == {n for n, _ in CompletionScorer(model).named_parameters()}
    for (name, expected), saved in zip(untouched.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(saved, expected), name


# What a model was loaded for.


def test_a_padded_microbatch_given_to_a_model_loaded_for_packed_ones_is_refused():
    """Its attention would see the padding, and every row of the batch."""
    with pytest.raises(AssertionError, match="a model loaded for packed batching got a padded microbatch"):
        score(tiny(batching="packed"), make_sequences([(2, 3)]), "padded")


def windowed(window: int, batching: Batching) -> PreTrainedModel:
    """A model with grouped-query heads, too."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = MistralForCausalLM(MistralConfig(vocab_size=22, sliding_window=window, pad_token_id=0, **sizes))
    return for_batching(with_character(model).eval(), batching)


def test_sequences_within_a_sliding_window_score_packed_as_they_do_padded():
    sequences = make_sequences([(5, 4), (3, 2), (7, 2)])

    packed, *_ = score(windowed(9, "packed"), sequences, "packed")
    padded, *_ = score(windowed(9, "padded"), sequences, "padded")

    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-5)


@batchings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_policy_holds_the_saved_weights_in_the_wanted_dtype(dtype: torch.dtype, batching: Batching, tmp_path: Path):
    model, sequences = tiny(), make_sequences(MIXED)
    model.save_pretrained(tmp_path)

    loaded = load_policy(tmp_path, dtype, batching)

    for (name, ours), theirs in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert theirs.dtype == dtype and torch.equal(theirs, ours.to(dtype)), name
    if dtype == torch.float32:
        expected, *_ = score(model, sequences, "padded")
        torch.testing.assert_close(score(loaded.eval(), sequences, batching)[0], expected, rtol=0, atol=1e-5)
