"""A reward model: any sequence-classification model with one label."""

# pyright: reportUnknownMemberType=false, reportPrivateImportUsage=false
# (transformers and torch type their methods partially.)

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from async_rlhf.config.rewards import RewardPartConfig
from async_rlhf.errors import ConfigError
from async_rlhf.rewards.base import Rating, checked_scores, texts_of
from async_rlhf.types import Prompt

UNLIMITED = 1 << 30
"""Tokenizers without a limit say a larger number."""


def check_reward_model(key: str, folder: Path) -> None:
    """Look at the folder's files, without loading the model.

    Raises:
        ConfigError: no sequence-classification model with one label and safetensors weights, or a tokenizer that says more
            tokens than it knows.
    """
    remedy = f"set {key} to a folder that a reward model with one label was saved to by save_pretrained"
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{key} must be a model folder, got {str(folder)!r}, which holds no config.json; {remedy}")
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"{key} {folder} holds no *.safetensors weights; {remedy}")
    try:
        settings: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architecture = str((settings.get("architectures") or ["?"])[0])
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{key}: {folder / 'config.json'} is no model's config: {error}; {remedy}") from None
    if not architecture.endswith("ForSequenceClassification"):
        raise ConfigError(f"{key} {folder} must hold a sequence-classification model, got {architecture}; {remedy}")
    num_labels = len(settings.get("id2label") or {0: 0, 1: 1})  # transformers leaves two labels, its default, out of the file
    if num_labels != 1:
        raise ConfigError(f"{key} {folder} must score a text with one label, got {num_labels}; train it with num_labels=1")
    if not (folder / "tokenizer.json").is_file():
        if not any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.model", "vocab.txt", "spiece.model")):
            raise ConfigError(f"{key} {folder} holds no tokenizer; save it there with tokenizer.save_pretrained")
        return
    from tokenizers import Tokenizer

    try:
        num_tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size(with_added_tokens=True)
    except Exception as error:  # the library knows no other kind
        raise ConfigError(f"{key}: {folder / 'tokenizer.json'} is no tokenizer: {error}; {remedy}") from error
    _check_vocabulary(key, folder, num_tokens, int(settings.get("vocab_size") or num_tokens))


class ModelReward:
    """Scores prompt and completion by one forward pass, in float32: on the GPU where the process has one.

    A chat prompt goes through the model's own chat template, as its messages and the completion as the assistant's. Longer texts
    than the model reads lose their beginning: the score is read at the end. `parts["cut"]` is 1 for each of them, else 0.
    """

    def __init__(self, key: str, part: RewardPartConfig) -> None:
        """
        Args:
            key: the part's setting, for messages.
        Raises:
            ConfigError: see check_reward_model; or weights that are not the model's.
        """
        folder = Path(part.path)
        check_reward_model(f"{key}.path", folder)
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._name = f"reward model {folder}"
        self._batch_size = part.batch_size
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, truncation_side="left")
        model, report = cast(
            tuple[Any, dict[str, Any]],
            AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            ),
        )
        missing = sorted(report["missing_keys"])
        if missing:
            raise ConfigError(f"{key}.path {folder} holds no weights for {', '.join(missing[:3])}: it was not trained as a reward model")
        _check_vocabulary(f"{key}.path", folder, len(self._tokenizer), model.get_input_embeddings().num_embeddings)
        self._model = model.eval().to(self._device)
        self._pad_id = _settle_padding(self._tokenizer, model)
        self._eos_id: int | None = self._tokenizer.eos_token_id if part.add_eos else None
        positions = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or UNLIMITED)
        readable = min(positions, int(self._tokenizer.model_max_length))
        if part.max_length > positions:
            raise ConfigError(f"{key}.max_length ({part.max_length}) is more than the {positions} positions that the model in {folder} has")
        self._max_length = part.max_length or readable

    def rate(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Rating:
        """See Reward."""
        texts = texts_of(prompts, completions)
        encoded = [self._encode(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        ids = [row for row, _ in encoded]
        scores = np.zeros(len(ids), dtype=np.float32)
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        for begin in range(0, len(order), self._batch_size):
            share = order[begin : begin + self._batch_size]
            scores[share] = self._forward([ids[index] for index in share])
        cut = np.array([was_cut for _, was_cut in encoded], dtype=np.float32)
        return Rating(scores=checked_scores(self._name, scores, texts), parts={"cut": cut})

    def close(self) -> None:
        """See Reward."""

    def _encode(self, prompt: Prompt, completion: str) -> tuple[list[int], bool]:
        """Token ids, and whether their beginning was left out."""
        messages = prompt.columns.get("messages")
        if messages and self._tokenizer.chat_template:
            said = [*cast(list[Any], messages), {"role": "assistant", "content": completion}]
            text: str = self._tokenizer.apply_chat_template(said, tokenize=False)
            ids = self._ids(text, special=False)
            return ids[-self._max_length :] or [self._pad_id], len(ids) > self._max_length
        text = prompt.text + completion
        ids = self._ids(text)
        end = [] if self._eos_id is None or ids[-1:] == [self._eos_id] else [self._eos_id]
        if len(ids) + len(end) <= self._max_length:
            return [*ids, *end] or [self._pad_id], False
        # By the tokenizer, which keeps its own first token.
        return [*self._ids(text, max_length=self._max_length - len(end)), *end], True

    def _ids(self, text: str, *, special: bool = True, max_length: int | None = None) -> list[int]:
        settings: dict[str, Any] = {"truncation": True, "max_length": max_length} if max_length else {"truncation": False}
        return self._tokenizer(text, add_special_tokens=special, verbose=False, **settings)["input_ids"]

    def _forward(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        import torch

        longest = max(map(len, ids))
        # On the right: absolute positions then begin at the text.
        padded = torch.tensor([[*row, *[self._pad_id] * (longest - len(row))] for row in ids])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
        with torch.inference_mode():
            logits = self._model(input_ids=padded.to(self._device), attention_mask=mask.to(self._device)).logits
        return logits[:, 0].float().cpu().numpy()


def _check_vocabulary(key: str, folder: Path, num_tokens: int, num_embeddings: int) -> None:
    if num_tokens > num_embeddings:
        raise ConfigError(
            f"{key} {folder}: the tokenizer has {num_tokens} tokens, but the model knows {num_embeddings}; save the tokenizer that it was "
            "trained with, or resize its embeddings and train it again"
        )


def _settle_padding(tokenizer: Any, model: Any) -> int:
    """Tokenizer and model agree on a padding token: the model reads its score at the last token that is none."""
    pad_id = tokenizer.pad_token_id
    if pad_id is None:
        pad_id = model.config.get_text_config().pad_token_id
    if pad_id is None:
        pad_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    model.config.get_text_config().pad_token_id = pad_id
    return int(pad_id)
