"""Reward functions: found by path, called with columns, held to their contract."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from async_rlhf.errors import ConfigError, RewardError
from async_rlhf.rewards import call_reward, load_reward
from async_rlhf.tasks import arithmetic

COLUMNS = [{"answer": "2", "kind": "sum"}, {"answer": "7", "kind": "sum"}]


def call(function: Any, columns: Sequence[dict[str, str]] = COLUMNS) -> np.ndarray:
    return call_reward(function, ["1+1=", "3+4="], ["2", "8"], columns)


def answering(answer: object) -> Any:
    def score(prompts: list[str], completions: list[str], **columns: list[str]) -> object:
        return answer

    return score


# Finding it.


def test_a_function_is_imported_by_module():
    assert load_reward("async_rlhf.tasks.arithmetic:score") is arithmetic.score


def test_a_function_is_imported_from_a_file(tmp_path: Path):
    file = tmp_path / "my_reward.py"
    file.write_text("OFFSET = 10\n\ndef lengths(prompts, completions):\n    return [OFFSET + len(c) for c in completions]\n")

    function = load_reward(f"{file}:lengths")

    assert function(["p"], ["abc"]) == [13]


def test_two_files_of_the_same_name_stay_two_functions(tmp_path: Path):
    for name, value in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "reward.py").write_text(f"VALUE = {value}\ndef score(prompts, completions): return [VALUE]\n")

    first, second = (load_reward(f"{tmp_path / name / 'reward.py'}:score") for name in ("a", "b"))

    assert (first([""], [""]), second([""], [""])) == ([1], [2])


@pytest.mark.parametrize("path", ["", "score", ":score", "module:", "a/file.py"])
def test_a_path_of_the_wrong_form_is_refused(path: str):
    with pytest.raises(ConfigError, match="must look like module:function"):
        load_reward(path)


@pytest.mark.parametrize("path", ["no_such_module_at_all:score", "no/such/file.py:score"])
def test_a_missing_module_is_refused_by_name(path: str):
    with pytest.raises(ConfigError, match=f"{path}.*does not import.*no_such_module_at_all|no such file"):
        load_reward(path)


def test_a_file_that_fails_to_import_is_refused_with_its_error(tmp_path: Path):
    (tmp_path / "broken.py").write_text("import json\nraise RuntimeError('needs a key')\n")

    with pytest.raises(ConfigError, match="does not import: RuntimeError: needs a key"):
        load_reward(f"{tmp_path / 'broken.py'}:score")


def test_a_missing_function_is_refused_and_the_others_are_named():
    with pytest.raises(ConfigError, match=r"no function 'scores'; it has: .*\bscore\b"):
        load_reward("async_rlhf.tasks.arithmetic:scores")


def test_a_name_that_cannot_be_called_is_refused(tmp_path: Path):
    (tmp_path / "constant.py").write_text("score = 1.0\n")

    with pytest.raises(ConfigError, match="has no function 'score'; it has: none"):
        load_reward(f"{tmp_path / 'constant.py'}:score")


# Calling it.


def test_prompts_completions_and_columns_are_handed_over_as_lists():
    seen: dict[str, Any] = {}

    def score(prompts: list[str], completions: list[str], **columns: list[str]) -> list[float]:
        seen.update(prompts=prompts, completions=completions, **columns)
        return [0.5, 1.0]

    scores = call(score)

    assert seen == {"prompts": ["1+1=", "3+4="], "completions": ["2", "8"], "answer": ["2", "7"], "kind": ["sum", "sum"]}
    assert scores.dtype == np.float32 and scores.tolist() == [0.5, 1.0]


def test_the_tasks_own_reward_compares_with_the_answer_column():
    assert call(arithmetic.score).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("answer", [(1, 2), np.array([1.0, 2.0]), [True, 2], iter([1.0, 2.0])], ids=lambda answer: type(answer).__name__)
def test_any_sequence_of_numbers_will_do(answer: object):
    assert call(answering(answer)).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("answer", [[], [1.0], [1.0, 2.0, 3.0]], ids=repr)
def test_a_wrong_count_is_refused(answer: list[float]):
    with pytest.raises(RewardError, match=f"expected 2, got {len(answer)}"):
        call(answering(answer))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e39, -1e300])
def test_a_score_that_is_not_finite_in_float32_is_refused_with_its_completion(bad: float):
    with pytest.raises(RewardError, match=r"finite numbers, got .* for completion '8' of prompt '3\+4='"):
        call(answering([1.0, bad]))


def test_the_largest_float32_is_a_score():
    largest = float(np.finfo(np.float32).max)

    assert call(answering([largest, -largest])).tolist() == [largest, -largest]


@pytest.mark.parametrize("answer", [None, 3.0, "12", {"a": 1.0, "b": 2.0}], ids=repr)
def test_an_answer_that_is_no_list_is_refused(answer: object):
    with pytest.raises(RewardError, match=r"test_rewards:score must return a list of numbers, got"):
        call(answering(answer))


@pytest.mark.parametrize("bad", [None, "good", "1.0", [1.0], {}, 10**400], ids=lambda bad: repr(bad)[:9])
def test_a_score_that_is_no_number_is_refused_with_its_completion(bad: object):
    with pytest.raises(RewardError, match=r"test_rewards:score must return finite numbers, got .* for completion '8' of prompt '3\+4='"):
        call(answering([1.0, bad]))


@pytest.mark.parametrize("bad", [None, 3, b"8", ["8"]], ids=repr)
def test_a_completion_that_is_no_text_is_refused(bad: Any):
    with pytest.raises(RewardError, match=r"scores texts, but completion 1 is of type"):
        call_reward(answering([1.0, 1.0]), ["1+1=", "3+4="], ["2", bad], COLUMNS)


def test_as_many_prompts_as_completions_are_needed():
    with pytest.raises(RewardError, match="got 1 prompts and 2 completions"):
        call_reward(answering([1.0, 1.0]), ["1+1="], ["2", "8"], COLUMNS)


def test_a_column_named_like_an_argument_is_refused():
    with pytest.raises(RewardError, match="column 'completions' has the name of an argument"):
        call(answering([1.0, 1.0]), [{"completions": "2"}, {"completions": "7"}])


def test_a_coroutine_is_a_reward_too():
    async def score(prompts: list[str], completions: list[str], **columns: list[str]) -> list[float]:
        return [float(answer) for answer in columns["answer"]]

    assert call(score).tolist() == [2.0, 7.0]


def test_an_error_in_the_function_names_the_function_and_the_error():
    def score(prompts: list[str], completions: list[str], **columns: list[str]) -> list[float]:
        raise KeyError("judge is offline")

    with pytest.raises(RewardError, match=r"reward function .*test_rewards:score failed: KeyError: 'judge is offline'"):
        call(score)


def test_a_column_that_the_row_of_another_source_lacks_is_none_there():
    seen: dict[str, Any] = {}

    def score(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        seen.update(columns)
        return [0.0, 0.0]

    call(score, [{"answer": "2"}, {"label": "b"}])

    assert seen == {"answer": ["2", None], "label": [None, "b"]}


def test_nothing_to_score_needs_no_columns():
    assert call_reward(answering([]), [], [], []).shape == (0,)
