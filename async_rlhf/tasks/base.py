"""What a built-in task offers: problems to train on, problems held out, its reward, and what its stages learn from."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """The tokens of a task's texts, the special ones apart."""

    tokens: tuple[str, ...]
    """Each once, without blanks inside; a text is cut into the longest that fit."""
    separator: str = ""
    """What stands between two tokens of a decoded text. A blank: blanks carry no meaning, and are dropped when a text is read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """Two completions of one problem, one of them better."""

    problem: Problem
    chosen: str
    rejected: str
    margin: float
    """By how much the chosen one is better, in the task's own reward; > 0."""


class Task(Protocol):
    """A seeded source of training problems, a disjoint held-out set and a reward function.

    The column `answer` of each problem is its reference answer: what the supervised stage learns.
    """

    @property
    def num_problems(self) -> int:
        """Training problems."""
        ...

    @property
    def reward(self) -> str:
        """Import path `module:function` of the task's reward function."""
        ...

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokens of its prompts and answers, for its own start."""
        ...

    @property
    def max_answer_tokens(self) -> int:
        """Length of the longest reference answer, tokens of its own start, without the end-of-sequence token."""
        ...

    def problem(self, index: int) -> Problem:
        """Training problem `index`, 0 <= index < num_problems; the same in every call."""
        ...

    def held_out(self) -> Sequence[Problem]:
        """The problems kept for evaluation; none of them is a training problem."""
        ...


@runtime_checkable
class ExactTask(Task, Protocol):
    """Answers are right or wrong: the supervised stage stops at an accuracy, and learns some wrong ones on purpose."""

    def careless_answer(self, problem: Problem, rng: random.Random) -> str:
        """What a careless author would answer: for the part of the supervised data that is wrong on purpose."""
        ...


@runtime_checkable
class PreferenceTask(Task, Protocol):
    """Answers are better or worse: there are pairs from which a reward model learns to stand in for the reward."""

    def preferences(self, count: int) -> Iterator[Preference]:
        """`count` pairs on training problems; the same in every call, and a longer list starts with a shorter one."""
        ...
