"""The task's own starting point: a tokenizer of its own texts and a small language model with random weights."""

# pyright: reportUnknownMemberType=false
# (tokenizers, transformers and torch type their methods partially.)

import re
from typing import TYPE_CHECKING, Any, cast

from async_rlhf.config.schema import ModelConfig
from async_rlhf.errors import ConfigError
from async_rlhf.tasks.arithmetic import VOCABULARY as ARITHMETIC
from async_rlhf.tasks.base import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD_TOKEN, EOS_TOKEN, UNK_TOKEN = "<pad>", "<eos>", "<unk>"
MAX_POSITIONS = 512
"""Longest sequence of a task's own model, tokens."""


def build_tokenizer(vocabulary: Vocabulary = ARITHMETIC) -> "PreTrainedTokenizerFast":
    """A tokenizer of the task's own tokens; it adds no special token by itself. Any other character becomes <unk>."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {token: token_id for token_id, token in enumerate([PAD_TOKEN, EOS_TOKEN, UNK_TOKEN, *vocabulary.tokens])}
    backend = Tokenizer(models.WordLevel(vocab=ids, unk_token=UNK_TOKEN))
    longest_first = sorted((token for token in vocabulary.tokens if len(token) > 1), key=len, reverse=True)
    cut = pre_tokenizers.Split(Regex("|".join([*map(re.escape, longest_first), r"[\s\S]"])), behavior="isolated")
    steps = [pre_tokenizers.WhitespaceSplit(), cut] if vocabulary.separator == " " else [cut]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]  # setter is untyped
    if not vocabulary.separator:
        # Without a decoder the tokens are joined by blanks.
        backend.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]  # setter is untyped
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=UNK_TOKEN,
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def build_policy(config: ModelConfig, tokenizer: "PreTrainedTokenizerBase", seed: int) -> "PreTrainedModel":
    """A model of the configured architecture and size, float32 on the CPU, its random weights decided by `seed`.

    Raises:
        ConfigError: hidden_size cannot be divided among the heads.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    # Rotary embeddings turn pairs of head channels, so a head needs an even width.
    if config.hidden_size % (2 * config.num_heads):
        raise ConfigError(
            f"model.hidden_size must be a multiple of 2 * model.num_heads, got {config.hidden_size} and {config.num_heads}; "
            f"use model.hidden_size={2 * config.num_heads * max(1, config.hidden_size // (2 * config.num_heads))}"
        )
    eos_id, pad_id = cast(int, tokenizer.eos_token_id), cast(int, tokenizer.pad_token_id)
    architecture = AutoConfig.for_model(
        dtype=torch.float32,
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=config.initializer_range,
        bos_token_id=None,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
        **_of_family(config),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cast("PreTrainedModel", AutoModelForCausalLM.from_config(architecture))
    model.generation_config = GenerationConfig(bos_token_id=None, eos_token_id=eos_id, pad_token_id=pad_id)
    return model


def _of_family(config: ModelConfig) -> dict[str, Any]:
    """What only some architectures have, by the names of their configurations."""
    head_dim = config.hidden_size // config.num_heads
    settings: dict[str, Any] = {"model_type": config.family, "tie_word_embeddings": config.tie_embeddings}
    if config.family != "gpt_neox":
        settings |= {"num_key_value_heads": config.num_heads, "head_dim": head_dim}
    if config.family in ("gemma", "gemma3"):
        settings["tie_word_embeddings"] = True
    if config.family == "gemma3":
        # A window as long as the longest sequence, so that packs can be trained.
        settings |= {"model_type": "gemma3_text", "sliding_window": MAX_POSITIONS, "query_pre_attn_scalar": head_dim}
    return settings
