"""A trained policy as an ordinary Hugging Face folder: weights, config, tokenizer, chat template, and how it was sampled."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import logging


def save_policy(model: PreTrainedModel, weights: Mapping[str, Tensor], folder: Path, *, start: Path, temperature: float) -> None:
    """Write the policy; whoever loads the folder samples as the training did, unless they say otherwise.

    Args:
        model: of the architecture; its own weights are not written.
        weights: by the names of the plain model, tied ones once.
        start: the folder that the policy began from, which has the tokenizer.
        temperature: of the training.
    """
    model.generation_config = _generation_config(model, save_tokenizer(start, folder), temperature)
    logging.disable_progress_bar()
    model.save_pretrained(folder, state_dict=dict(weights))


def save_tokenizer(start: Path, folder: Path) -> Any:
    """Copy the tokenizer of `start`, chat template included; returns it."""
    tokenizer = cast(Any, AutoTokenizer).from_pretrained(start)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _generation_config(model: PreTrainedModel, tokenizer: Any, temperature: float) -> GenerationConfig:
    """Sampling from the whole distribution: top_k and top_p are off by name, since transformers' default is the 50 likeliest tokens."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
    )
