"""What a reward is, and what its answers must be."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from async_rlhf.errors import RewardError
from async_rlhf.types import JsonValue, Prompt

LARGEST_SCORE = float(np.finfo(np.float32).max)
"""Scores travel as float32, in which a larger number would become an infinity."""

MAX_SHOWN = 300
"""Characters of a prompt, a completion or an answer in a message."""

WorkerAnswer = tuple[Literal["ready", "scores", "failed", "broken", "late"], Any]
"""What a worker process says: `ready`, the function is imported; its `scores`; `failed`, it raised, and may not the next time;
`broken`, what it did, it will do again. Who waits for it says `late` when the deadline has passed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rating:
    """The scores of N completions, and what they are made of. Made by a Reward."""

    scores: np.ndarray
    """[N] float32, finite."""
    parts: Mapping[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    """Name -> [N] float32, each part before its weight; empty where there is one unnamed reward."""


class Reward(Protocol):
    """Scores completions; one caller at a time."""

    def rate(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Rating:
        """Score N completions, each of its prompt; siblings of a group have the same Prompt object, and stand together.

        Raises:
            RewardError: no score for a completion. RewardLostError: whoever should answer cannot be reached.
        """
        ...

    def close(self) -> None:
        """End processes and connections."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Texts:
    """What is scored, as a reward function sees it: N each."""

    prompts: Sequence[str]
    completions: Sequence[str]
    columns: Mapping[str, Sequence[JsonValue]]
    """Name -> one value per completion; null where the row of another source has no such column."""

    def part(self, begin: int, end: int) -> "Texts":
        """Those of index begin to end."""
        columns = {name: values[begin:end] for name, values in self.columns.items()}
        return Texts(prompts=self.prompts[begin:end], completions=self.completions[begin:end], columns=columns)


def texts_of(prompts: Sequence[Prompt], completions: Sequence[str]) -> Texts:
    """The texts of prompts and completions; see in_columns for the errors."""
    return in_columns([prompt.text for prompt in prompts], completions, [prompt.columns for prompt in prompts])


def in_columns(prompts: Sequence[str], completions: Sequence[str], rows: Sequence[Mapping[str, JsonValue]]) -> Texts:
    """Rows turned into columns.

    Raises:
        RewardError: not as many of one as of the other, a text that is none, or a column that hides the prompts or completions.
    """
    if not len(prompts) == len(completions) == len(rows):
        raise RewardError(f"a reward needs one prompt per completion, got {len(prompts)} prompts and {len(completions)} completions")
    for what, texts in (("prompt", prompts), ("completion", completions)):
        for index, text in enumerate(texts):
            if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers may be untyped
                raise RewardError(f"a reward scores texts, but {what} {index} is of type {type(text).__name__}: {shown(text)}")
    names = list(dict.fromkeys(name for row in rows for name in row))
    taken = {"prompts", "completions"} & set(names)
    if taken:
        raise RewardError(f"the column {sorted(taken)[0]!r} has the name of an argument of reward functions; rename it in the dataset")
    columns = {name: [row.get(name) for row in rows] for name in names}
    return Texts(prompts=list(prompts), completions=list(completions), columns=columns)


def checked_scores(name: str, answer: Any, texts: Texts) -> np.ndarray:
    """[N] float32: the answer, held to the contract of rewards.

    Args:
        name: of the reward, for messages.
    Raises:
        RewardError: no list, another count, or something that is no finite number; names the completion and its prompt.
    """
    if answer is None or isinstance(answer, str | bytes | Mapping):
        raise RewardError(f"{name} must return a list of numbers, got {shown(answer)}")
    try:
        scores = list(answer)
    except TypeError:
        raise RewardError(f"{name} must return a list of numbers, got {shown(answer)}") from None
    expected = len(texts.completions)
    if len(scores) != expected:
        raise RewardError(f"{name} must return one score per completion: expected {expected}, got {len(scores)}{_first(texts)}")
    numbers = [_number(score) for score in scores]
    for index, number in enumerate(numbers):
        if number is None or not abs(number) <= LARGEST_SCORE:
            raise RewardError(f"{name} must return finite numbers, got {shown(scores[index])} for {described(texts, index)}")
    return np.array(numbers, dtype=np.float32)


def described(texts: Texts, index: int) -> str:
    """Which completion of which prompt, for messages."""
    return f"completion {shown(texts.completions[index])} of prompt {shown(texts.prompts[index])}"


def shown(value: object) -> str:
    """Its repr, cut where it is long."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(text)} characters)"


def _number(score: Any) -> float | None:
    if isinstance(score, str | bytes):
        return None
    try:
        return float(score)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def _first(texts: Texts) -> str:
    return f"; the first is {described(texts, 0)}" if texts.completions else ""
