"""What a built-in task offers: problems to train on, problems held out, and its reward."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from async_rlhf.types import JsonValue


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One problem, as text. Made by a Task, turned into a Prompt by the tokenizer."""

    prompt_id: str
    """Stable name inside the task."""
    text: str
    """What the policy reads."""
    columns: Mapping[str, JsonValue] = field(default_factory=dict[str, JsonValue])
    """Further columns, handed to the reward function by name."""


class Task(Protocol):
    """A seeded source of training problems, a disjoint held-out set and a reward function."""

    @property
    def num_problems(self) -> int:
        """Training problems."""
        ...

    @property
    def reward(self) -> str:
        """Import path `module:function` of the task's reward function."""
        ...

    @property
    def max_answer_chars(self) -> int:
        """Length of the longest right answer, characters."""
        ...

    def problem(self, index: int) -> Problem:
        """Training problem `index`, 0 <= index < num_problems; the same in every call."""
        ...

    def held_out(self) -> Sequence[Problem]:
        """The problems kept for evaluation; none of them is a training problem."""
        ...

    def careless_answer(self, problem: Problem, rng: random.Random) -> str:
        """What a careless author would answer: for the part of the supervised data that is wrong on purpose."""
        ...
