"""The texts of mini_summary: what a prompt lists, what a summary states, and what that is worth.

A prompt lists entries of a salience and a statement, for instance `9:b2 ?:c0 5:k3 >`: the fact that b is 2, of salience 9; the rumour
that c is 0; the fact that k is 3, of salience 5. A summary states some of them: `b2 k3`.
"""

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from async_rlhf.tasks.base import Vocabulary

RUMOUR, SALIENCES, COLON, END_OF_PROMPT = "?", "123456789", ":", ">"
"""`?` stands in the place of a rumour's salience."""
HALLUCINATION_COST = 5.0
"""Of a statement that no fact supports, in salience: the mean of what a right one brings, so that a guess at even odds gains nothing."""
REPEAT_COST = 2.0
"""Of a fact stated again."""
OVER_LENGTH_COST = 3.0
"""Of each statement beyond the allowed number, whatever it says."""

_ENTRY = re.compile(r"([1-9?]):([a-z][0-9])")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """One thing to know."""

    salience: int
    """From 1; 0: a rumour, which is no fact."""
    statement: str
    """A letter, and the digit that it is said to be."""

    def entry(self) -> str:
        """As it stands in a prompt."""
        return f"{self.salience or RUMOUR}{COLON}{self.statement}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a summary's statements are."""

    salience: int
    """Of the facts stated, each counted once."""
    hallucinations: int
    """Statements that no fact of the prompt supports: wrong values, rumours, unknown letters, other text."""
    repeats: int
    over_length: int
    """Statements beyond the allowed number; they count nowhere else."""


def vocabulary(num_keys: int, num_values: int) -> Vocabulary:
    """The words of prompts and summaries: each statement is one token, each salience with its colon another."""
    statements = [key + value for key in string.ascii_lowercase[:num_keys] for value in string.digits[:num_values]]
    return Vocabulary(tokens=(END_OF_PROMPT, *(mark + COLON for mark in RUMOUR + SALIENCES), *statements), separator=" ")


def write_prompt(facts: Sequence[Fact]) -> str:
    """The prompt that lists them in this order."""
    return " ".join([*(fact.entry() for fact in facts), END_OF_PROMPT])


def read_prompt(prompt: str) -> list[Fact]:
    """The facts and rumours that a prompt lists, in its order; other text is passed over."""
    found = (_ENTRY.fullmatch(word) for word in prompt.split())
    return [Fact(salience=0 if match[1] == RUMOUR else int(match[1]), statement=match[2]) for match in found if match is not None]


def judge(saliences: Mapping[str, int], summary: str, *, max_statements: int) -> Verdict:
    """Compare a summary, any text at all, with the facts.

    Args:
        saliences: statement of each fact -> its salience.
        summary: statements between blanks; each other word counts as a wrong statement.
        max_statements: those after so many are beyond the allowed number.
    """
    words = summary.split()
    stated: set[str] = set()
    hallucinations = repeats = 0
    for word in words[:max_statements]:
        if word not in saliences:
            hallucinations += 1
        elif word in stated:
            repeats += 1
        stated.add(word)
    return Verdict(
        salience=sum(saliences.get(word, 0) for word in stated),
        hallucinations=hallucinations,
        repeats=repeats,
        over_length=max(0, len(words) - max_statements),
    )


def gold(facts: Sequence[Fact], summary: str, *, max_statements: int) -> float:
    """What a summary is worth: at most 1, for the `max_statements` most salient facts and nothing else; 0 for an empty one.

    (salience - 5 hallucinations - 2 repeats - 3 over-length) / (salience of the `max_statements` most salient facts)

    Args:
        facts: of the prompt; rumours among them count as none. At least one is a fact.
    """
    saliences = {fact.statement: fact.salience for fact in facts if fact.salience}
    best = sum(sorted(saliences.values(), reverse=True)[:max_statements])
    assert best > 0, "a prompt must list at least one fact"
    verdict = judge(saliences, summary, max_statements=max_statements)
    cost = HALLUCINATION_COST * verdict.hallucinations + REPEAT_COST * verdict.repeats + OVER_LENGTH_COST * verdict.over_length
    return (verdict.salience - cost) / best
