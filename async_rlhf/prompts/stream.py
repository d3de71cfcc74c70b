"""What a stream of prompts is, and that of a built-in task: seeded order, epochs, and a cursor from which it resumes."""

from typing import Protocol

import numpy as np

from async_rlhf.prompts.cursor import PromptCursor
from async_rlhf.prompts.encoding import Encode, encode_problem
from async_rlhf.tasks.base import Problem
from async_rlhf.types import Prompt


class PromptSource(Protocol):
    """Training problems by index."""

    @property
    def num_problems(self) -> int: ...

    def problem(self, index: int) -> Problem: ...


class PromptStream(Protocol):
    """Where a replay buffer gets its prompts."""

    @property
    def cursor(self) -> PromptCursor:
        """Where the next draw happens."""
        ...

    @property
    def exhausted(self) -> bool:
        """No prompt will ever come again."""
        ...

    def draw(self) -> tuple[Prompt, int] | None:
        """The next prompt and its epoch; None: there is none at the moment, or, when exhausted, none any more."""
        ...


class TaskStream:
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
