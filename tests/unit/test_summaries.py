"""What a summary is worth: judged by hand, and for any text at all."""

import itertools
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rlhf.tasks.summaries import Fact, Verdict, gold, judge, read_prompt, vocabulary, write_prompt

FACTS = [
    Fact(salience=9, statement="b2"),
    Fact(salience=0, statement="c0"),
    Fact(salience=5, statement="k3"),
    Fact(salience=1, statement="d1"),
]

STATEMENTS = [letter + digit for letter in string.ascii_lowercase for digit in string.digits]


@st.composite
def lists_of_facts(draw: st.DrawFn) -> list[Fact]:
    """One to eight facts, and up to three rumours, each of a letter of its own."""
    num_facts, num_rumours = draw(st.integers(1, 8)), draw(st.integers(0, 3))
    letters = draw(st.permutations(string.ascii_lowercase[: num_facts + num_rumours]))
    saliences = [draw(st.integers(1, 9)) for _ in range(num_facts)] + [0] * num_rumours
    return [Fact(salience=s, statement=letter + str(draw(st.integers(0, 9)))) for letter, s in zip(letters, saliences, strict=True)]


summaries = st.lists(st.sampled_from([*STATEMENTS, "??", "9:b2", "bb2"]), max_size=10).map(" ".join)


def test_prompt_lists_the_entries_in_order_and_reads_back():
    assert write_prompt(FACTS) == "9:b2 ?:c0 5:k3 1:d1 >"
    assert read_prompt("9:b2 ?:c0 5:k3 1:d1 >") == FACTS


@pytest.mark.parametrize(
    ("summary", "expected"),
    [
        ("b2 k3", 1.0),  # (9 + 5) / 14
        ("b2", 9 / 14),
        ("", 0.0),
        ("b1 k3", 0.0),  # a copy error: 5 - 5
        ("b2 c0", 4 / 14),  # a rumour: 9 - 5
        ("b2 z9", 4 / 14),  # an unknown letter
        ("b2 b2", 7 / 14),  # a repeat: 9 - 2
        ("b2 k3 d1", 11 / 14),  # beyond two statements: 9 + 5 - 3, whatever it says
        ("b2 k3 what?", 11 / 14),
        ("b1 b2", 4 / 14),  # the right value after a wrong one counts
        ("9:b2", -5 / 14),
    ],
)
def test_gold_of_two_statements_by_hand(summary: str, expected: float):
    assert gold(FACTS, summary, max_statements=2) == pytest.approx(expected)


def test_verdict_counts_each_statement_once():
    """b2 right, b2 again, k1 wrong, c0 a rumour; d1 and d1 are beyond the limit."""
    saliences = {"b2": 9, "k3": 5, "d1": 1}

    assert judge(saliences, "b2 b2 k1 c0 d1 d1", max_statements=4) == Verdict(salience=9, hallucinations=2, repeats=1, over_length=2)


@given(lists_of_facts(), st.integers(1, 6), summaries)
def test_no_summary_is_worth_more_than_that_of_the_most_salient_facts(facts: list[Fact], limit: int, summary: str):
    known = sorted((fact for fact in facts if fact.salience), key=lambda fact: -fact.salience)
    perfect = " ".join(fact.statement for fact in known[:limit])

    assert gold(facts, perfect, max_statements=limit) == pytest.approx(1.0)
    assert gold(facts, summary, max_statements=limit) <= 1.0 + 1e-12


@settings(max_examples=30)
@given(lists_of_facts().filter(lambda facts: len([fact for fact in facts if fact.salience]) <= 4), st.integers(1, 3))
def test_the_maximum_is_found_by_trying_every_selection_of_entries(facts: list[Fact], limit: int):
    words = [fact.statement for fact in facts]
    tried = [gold(facts, " ".join(chosen), max_statements=limit) for n in range(limit + 2) for chosen in itertools.permutations(words, n)]

    assert max(tried) == pytest.approx(1.0)


@given(lists_of_facts(), st.integers(1, 6), summaries, st.data())
def test_a_mistake_costs(facts: list[Fact], limit: int, summary: str, data: st.DataObject):
    """A fact's value miscopied, said once more, or anything said beyond the limit: worth less than without."""
    stated = [fact.statement for fact in facts if fact.salience][:limit]
    right = gold(facts, " ".join(stated), max_statements=limit)
    place = data.draw(st.integers(0, len(stated) - 1))
    wrong_digit = str((int(stated[place][1]) + data.draw(st.integers(1, 9))) % 10)
    miscopied = [*stated[:place], stated[place][0] + wrong_digit, *stated[place + 1 :]]

    assert gold(facts, " ".join(miscopied), max_statements=limit) < right
    assert gold(facts, " ".join([*stated, stated[place]]), max_statements=limit) < right
    assert gold(facts, " ".join([*stated, stated[place]]), max_statements=limit + 1) < gold(
        facts, " ".join(stated), max_statements=limit + 1
    )
    padded = [*stated, *["z9"] * (limit - len(stated))]
    assert gold(facts, " ".join([*padded, summary, "z9"]), max_statements=limit) < gold(facts, " ".join(padded), max_statements=limit)


@given(st.text(max_size=60), st.integers(1, 5))
def test_any_text_at_all_gets_a_finite_worth(text: str, limit: int):
    value = gold(FACTS, text, max_statements=limit)

    assert -5 * len(text.split()) <= value <= 1.0
    assert isinstance(read_prompt(text), list)


def test_vocabulary_has_a_token_for_each_statement_and_each_salience():
    """2 letters x 3 digits, ten marks with their colon, and the end of the prompt."""
    known = vocabulary(2, 3)

    assert len(known.tokens) == len(set(known.tokens)) == 2 * 3 + 10 + 1
    assert {"a0", "b2", "9:", "?:", ">"} <= set(known.tokens)
    assert "c0" not in known.tokens and "a3" not in known.tokens
