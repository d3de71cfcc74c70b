"""The reward of GSM8k: the number behind ####."""

import pytest

from async_rlhf.tasks.gsm8k import score

WORKED = "He sells 3 * 400 = 1200 apples.\n#### 1,200"


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("so 1200.\n#### 1200", 1.0),
        ("#### 1,200.0", 1.0),
        ("####1200", 1.0),
        ("#### 12\nNo:\n#### 1200", 1.0),
        ("#### 1200\n#### 12", 0.0),
        ("#### -1200", 0.0),
        ("1200", 0.0),
        ("####", 0.0),
        ("#### , ", 0.0),
        ("", 0.0),
    ],
)
def test_last_number_behind_the_mark_counts(completion: str, expected: float) -> None:
    assert score(["q"], [completion], answer=[WORKED], question=["q"]) == [expected]


def test_problem_without_a_marked_answer_is_never_right() -> None:
    assert score(["q", "q"], ["no mark", "#### 3"], answer=["no mark", "three"]) == [0.0, 0.0]
