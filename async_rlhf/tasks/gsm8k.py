"""The reward of GSM8k: is the number behind `####` the right one? The problems come from a dataset; see conf/task/gsm8k.yaml."""

import re
from collections.abc import Sequence

from async_rlhf.types import JsonValue

ANSWER = re.compile(r"####\s*(-?[\d,]*\.?\d+)")


def score(prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[str], **columns: Sequence[JsonValue]) -> list[float]:
    """1.0 for a completion whose last `#### NUMBER` is the worked answer's, as a number, else 0.0.

    Args:
        prompts: one text per completion; not needed for the judgement.
        answer: the dataset's worked answers, which end in `#### NUMBER`.
        columns: further columns; not needed.
    """
    del prompts, columns
    return [float(_number(completion) == _number(worked) is not None) for completion, worked in zip(completions, answer, strict=True)]


def _number(text: str) -> float | None:
    """The last answer in the text; None: there is none."""
    found = ANSWER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
