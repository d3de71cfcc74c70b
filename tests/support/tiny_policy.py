"""A tiny policy with random weights: its folder, its weights as a version, and what it says by a plain forward pass."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from async_rlhf.checksums import checksum
from async_rlhf.config.schema import ModelConfig
from async_rlhf.tasks.start import build_policy, build_tokenizer
from async_rlhf.types import TensorSpec, WeightsManifest, WeightsVersion

CANARY = (3, 9, 14, 4, 20, 7, 11, 5)


def tiny_policy(seed: int = 0) -> PreTrainedModel:
    """Two layers, hidden size 32, weights decided by `seed`."""
    config = ModelConfig(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64)
    return with_character(build_policy(config, build_tokenizer(), seed=seed)).eval()


def with_character(model: PreTrainedModel) -> PreTrainedModel:
    """Scale the matrices up: a narrow model with the usual initial weights answers every prompt almost uniformly."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return model


def save_tiny_policy(folder: Path, seed: int = 0) -> Path:
    """A Hugging Face folder with tokenizer and weights."""
    build_tokenizer().save_pretrained(folder)
    tiny_policy(seed).save_pretrained(folder)
    return folder


def logprobs_of(model: PreTrainedModel, prompt_ids: Sequence[int], completion_ids: Sequence[int], temperature: float = 1.0) -> np.ndarray:
    """[T] log-probability of each completion token, from all logits of the one sequence."""
    ids = torch.tensor([[*prompt_ids, *completion_ids]])
    with torch.no_grad():
        distribution = (model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1].double() / temperature).log_softmax(-1)
    return distribution.gather(-1, ids[0, len(prompt_ids) :, None]).squeeze(-1).numpy()


def weights_of(model: PreTrainedModel, version: int) -> WeightsVersion:
    """The model's parameters as float32, with a right canary."""
    tensors = {name: parameter.detach().clone().numpy() for name, parameter in model.named_parameters()}
    for array in tensors.values():
        array.flags.writeable = False
    specs = tuple(TensorSpec(name=name, shape=array.shape, dtype="float32", checksum=checksum(array)) for name, array in tensors.items())
    canary = tuple(float(value) for value in logprobs_of(model, CANARY[:1], CANARY[1:]))
    manifest = WeightsManifest(version=version, tensors=specs, canary_ids=CANARY, canary_logprobs=canary)
    return WeightsVersion(manifest=manifest, tensors=tensors)
