"""Preference rows: a prompt, the better completion and the worse one, in any of the forms that datasets have."""

import math
from dataclasses import dataclass
from typing import Any

from async_rlhf.config.prompts import SourceConfig
from async_rlhf.stages.rows import BadRowError, Message, Row, Text, has_prompt, prompt_of, text_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two completions of one prompt."""

    prompt: Text
    """Empty text where the completions are whole texts that share no beginning."""
    chosen: Text
    rejected: Text
    margin: float | None
    """By how much the chosen one is better; None: not known."""


def pair_of(source: SourceConfig, row: Row) -> Pair:
    """The pair of a row: with a prompt of its own, or with the prompt inside both completions.

    Raises:
        BadRowError: it is none. KeyError: a column is missing.
    """
    chosen, rejected = text_of(row, source.chosen_column), text_of(row, source.rejected_column)
    if chosen == rejected:
        raise BadRowError("whose completions are equal", "")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRowError("with text on one side and chat messages on the other", "")
    margin = None if not source.margin_column else _number(row[source.margin_column], source.margin_column)
    if not isinstance(chosen, str) and not isinstance(rejected, str) and chosen[0]["role"] != "assistant":
        prompt, chosen, rejected = _split_messages(chosen, rejected)
    elif has_prompt(source, row):
        prompt = prompt_of(source, row)
    elif isinstance(chosen, str) and isinstance(rejected, str):
        prompt, chosen, rejected = _split_texts(chosen, rejected)
    else:
        raise BadRowError("with answers alone, and no prompt", "")
    return Pair(prompt=prompt, chosen=chosen, rejected=rejected, margin=margin)


def _split_messages(chosen: list[Message], rejected: list[Message]) -> tuple[Text, Text, Text]:
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))
    if not shared:
        raise BadRowError("whose two conversations share no beginning", "")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _split_texts(chosen: str, rejected: str) -> tuple[Text, Text, Text]:
    """Behind the last space or line end of what both texts begin with, so that no word is split, and each keeps something."""
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))
    end = min(shared, len(chosen) - 1, len(rejected) - 1)
    cut = max(chosen.rfind("\n", 0, end), chosen.rfind(" ", 0, end)) + 1
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _number(value: Any, column: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRowError(f"whose {column} is no finite number", repr(value))
    return float(value)
