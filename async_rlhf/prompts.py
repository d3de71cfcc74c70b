"""The stream of prompts: seeded order, epochs, and a cursor from which it resumes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from async_rlhf.tasks.base import Problem
from async_rlhf.types import Prompt

Encode = Callable[[str], Sequence[int]]
"""Text to token ids, as the policy reads them."""


class PromptSource(Protocol):
    """Training problems by index."""

    @property
    def num_problems(self) -> int: ...

    def problem(self, index: int) -> Problem: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptCursor:
    """How far the stream has been read: `index` prompts of pass `epoch`."""

    epoch: int
    index: int


class PromptStream:
    """Draws the source's problems in a fresh seeded order in each epoch.

    The order depends on (seed, epoch) alone, so a cursor is all that a resume needs.
    """

    def __init__(self, source: PromptSource, encode: Encode, *, seed: int, max_epochs: int, cursor: PromptCursor | None = None) -> None:
        """
        Args:
            source: where the problems come from; must not be empty.
            encode: text to token ids.
            seed: decides the order.
            max_epochs: passes over the source; 0: without end.
            cursor: where to go on; None: the beginning.
        """
        assert source.num_problems > 0, "a prompt source must hold at least one problem"
        self._source = source
        self._encode = encode
        self._seed = seed
        self._max_epochs = max_epochs
        self._cursor = cursor or PromptCursor(epoch=0, index=0)
        self._order = self._order_of(self._cursor.epoch)

    @property
    def cursor(self) -> PromptCursor:
        """Where the next draw happens."""
        return self._cursor

    @property
    def exhausted(self) -> bool:
        """No prompt is left."""
        return 0 < self._max_epochs <= self._cursor.epoch

    def draw(self) -> tuple[Prompt, int] | None:
        """The next prompt and its epoch, or None when `max_epochs` passes are over."""
        if self.exhausted:
            return None
        epoch, index = self._cursor.epoch, self._cursor.index
        prompt = encode_problem(self._source.problem(int(self._order[index])), self._encode)
        if index + 1 < len(self._order):
            self._cursor = PromptCursor(epoch=epoch, index=index + 1)
        else:
            self._cursor = PromptCursor(epoch=epoch + 1, index=0)
            self._order = self._order_of(epoch + 1)
        return prompt, epoch

    def _order_of(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(self._source.num_problems)


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
