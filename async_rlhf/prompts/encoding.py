"""From text, or chat messages, to the token ids that the policy reads."""

# pyright: reportUnknownMemberType=false
# (transformers types its methods partially.)

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from async_rlhf.tasks.base import Problem
from async_rlhf.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encode = Callable[[str], Sequence[int]]
"""Text to token ids, as the policy reads them."""

Message = Mapping[str, object]
"""{role, content} of one turn."""


def encode_problem(problem: Problem, encode: Encode) -> Prompt:
    """A problem as the policy reads it."""
    token_ids = np.asarray(encode(problem.text), dtype=np.int32)
    return Prompt(prompt_id=problem.prompt_id, text=problem.text, token_ids=token_ids, columns=dict(problem.columns))


def load_encode(model_folder: Path) -> Encode:
    """The text-to-ids function of the folder's tokenizer.

    Reads tokenizer.json with the small `tokenizers` library where it exists: the full transformers import costs seconds.
    """
    file = model_folder / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_padding()  # the file keeps what its last user set; transformers resets both in every call, too
        tokenizer.no_truncation()
        return lambda text: tokenizer.encode(text).ids
    from transformers import AutoTokenizer

    slow = AutoTokenizer.from_pretrained(model_folder)
    return lambda text: cast(list[int], slow(text)["input_ids"])


def has_chat_template(model_folder: Path) -> bool:
    """Whether the folder's tokenizer has a chat template, in a file of its own or among its settings."""
    if (model_folder / "chat_template.jinja").is_file() or (model_folder / "chat_template.json").is_file():
        return True
    settings = model_folder / "tokenizer_config.json"
    return settings.is_file() and bool(json.loads(settings.read_text(encoding="utf-8")).get("chat_template"))


class PromptTokenizer:
    """A model folder's tokenizer: texts, and chats by its chat template. Each half is loaded when it is needed."""

    def __init__(self, model_folder: Path) -> None:
        self._folder = model_folder

    @cached_property
    def encode(self) -> Encode:
        """Text to token ids."""
        return load_encode(self._folder)

    @cached_property
    def has_chat_template(self) -> bool:
        """Whether it can read chats."""
        return has_chat_template(self._folder)

    def render(self, messages: Sequence[Message]) -> tuple[str, list[int]]:
        """A chat as the policy reads it, up to where its answer begins: text and token ids.

        The template writes every special token itself: none is added to what it wrote.
        """
        chat: Any = [dict(message) for message in messages]
        text = cast(str, self._chat.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
        return text, cast(list[int], self._chat(text, add_special_tokens=False)["input_ids"])

    @cached_property
    def _chat(self) -> "PreTrainedTokenizerBase":
        from transformers import AutoTokenizer

        return cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(self._folder))
