"""Tiny reward models: random weights, the task's character tokenizer, an ordinary Hugging Face folder."""

from pathlib import Path
from typing import Any

import torch

from async_rlhf.tasks.start import build_tokenizer

CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }};{% endfor %}"
"""Renders `u:...;a:...;`."""


def save_reward_model(
    folder: Path, *, seed: int = 0, num_labels: int = 1, chat: bool = False, vocab_size: int = 0, positions: int = 64, pad: bool = True
) -> Path:
    """A Llama of two narrow layers with a head of `num_labels`; `vocab_size` 0: the tokenizer's."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 1 << 40
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    if not pad:
        tokenizer.pad_token = None  # type: ignore[assignment]
    config = LlamaConfig(
        vocab_size=vocab_size or len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=positions,
        num_labels=num_labels,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)  # else every text scores almost the same
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
