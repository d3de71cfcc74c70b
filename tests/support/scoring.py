"""Tiny models and random sequences for what a network says of completions; gradients of it, and how close two of them are."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from async_rlhf.batching import Batching, Microbatch, TrainingSequence, collate
from async_rlhf.config.schema import ModelConfig
from async_rlhf.policy import ATTENTION
from async_rlhf.tasks.start import build_policy, build_tokenizer
from tests.support.tiny_policy import with_character

MIXED = [(5, 4), (30, 12), (1, 1), (8, 20), (2, 7)]
"""Prompt and completion lengths: 44 completion tokens."""

batchings = pytest.mark.parametrize("batching", ["packed", "padded"])
architectures = pytest.mark.parametrize(
    ("family", "tied"), [("llama", False), ("llama", True), ("qwen3", False), ("qwen3", True)], ids=lambda value: str(value)
)


def tiny(family: str = "llama", tied: bool = False, batching: Batching = "padded") -> PreTrainedModel:
    config = ModelConfig(family=family, tie_embeddings=tied, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64)  # type: ignore[arg-type]
    return for_batching(with_character(build_policy(config, build_tokenizer(), seed=1)).eval(), batching)


def for_batching(model: PreTrainedModel, batching: Batching) -> PreTrainedModel:
    model.set_attn_implementation(ATTENTION[batching])
    return model


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


def make_microbatch(sequences: list[TrainingSequence], batching: Batching) -> Microbatch:
    return collate([(sequence,) for sequence in sequences], batching)


def token_ids(sequence: TrainingSequence) -> Tensor:
    """[1, L] prompt and completion."""
    return torch.from_numpy(np.concatenate([sequence.prompt_ids, sequence.completion_ids]).astype(np.int64))[None]


def weighted(values: Tensor) -> Tensor:
    """A loss in which no two tokens weigh the same."""
    return (values * torch.linspace(-1.0, 2.0, values.numel()).reshape(values.shape)).sum()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], rtol: float = 1e-5) -> None:
    """Of every parameter, relative to the largest entry of its gradient."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert expected.any(), name
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=rtol * float(expected.abs().max()), msg=lambda m, n=name: f"{n}: {m}")
