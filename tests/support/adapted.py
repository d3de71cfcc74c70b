"""Versions of a policy with adapters, as a learner publishes them."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from async_rlhf.adapters import add_adapters, published, trained_parameters
from async_rlhf.config.lora import LoraConfig
from async_rlhf.policy import CompletionScorer, load_policy
from async_rlhf.snapshot import choose_canary, make_snapshot, score_canary
from async_rlhf.types import WeightsVersion


def adapted_policy(folder: Path, lora: LoraConfig, version: int) -> PreTrainedModel:
    """The folder's model with fresh adapters at version 0, with others at each later one."""
    model = load_policy(folder).eval()
    add_adapters(model, lora, seed=0)
    source = torch.Generator().manual_seed(version)
    with torch.no_grad():
        for _, parameter in trained_parameters(model):
            if version:
                parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.2)
    return model


def adapted_version(folder: Path, lora: LoraConfig, version: int) -> WeightsVersion:
    """What the generators get of it."""
    model = adapted_policy(folder, lora, version)
    parts = [(part.name, part.merged().detach()) for part in published(model, lora)]
    canary = choose_canary(int(model.config.vocab_size))
    logprobs = score_canary(CompletionScorer(model), canary, torch.device("cpu"), "padded")
    return make_snapshot(parts, version=version, dtype="float32", canary_ids=canary, canary_logprobs=logprobs)
