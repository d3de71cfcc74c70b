"""The addition task: its split, its limits and its reward."""

import subprocess
import sys

import pytest

from async_rlhf.config.tasks import TaskConfig
from async_rlhf.errors import ConfigError, RewardError
from async_rlhf.tasks import load_task
from async_rlhf.tasks.arithmetic import score


def _texts(config: TaskConfig) -> tuple[list[str], list[str]]:
    """(training texts, held-out texts)"""
    task = load_task(config)
    return [task.problem(index).text for index in range(task.num_problems)], [problem.text for problem in task.held_out()]


def test_every_answer_is_the_sum_of_the_operands_in_the_text():
    task = load_task(TaskConfig(num_operands=3, max_operand=120, num_train=200, held_out=50))

    for problem in [*(task.problem(index) for index in range(task.num_problems)), *task.held_out()]:
        operands = [int(part) for part in problem.text.removesuffix("=").split("+")]
        assert len(operands) == 3
        assert all(0 <= operand <= 120 for operand in operands)
        assert int(problem.columns["answer"]) == sum(operands)


@pytest.mark.parametrize(
    "config",
    [TaskConfig(), TaskConfig(max_operand=9, held_out=99), TaskConfig(num_operands=6, max_operand=9999, num_train=5000)],
    ids=["default", "almost everything held out", "huge"],
)
def test_no_text_is_both_trained_and_held_out_or_appears_twice(config: TaskConfig):
    train, held_out = _texts(config)

    assert len(held_out) == config.held_out
    assert len({*train, *held_out}) == len(train) + len(held_out)


def test_small_space_is_used_up_completely():
    train, held_out = _texts(TaskConfig(max_operand=9, held_out=30))

    assert {*train, *held_out} == {f"{left}+{right}=" for left in range(10) for right in range(10)}


def test_same_config_gives_the_same_problems_and_another_seed_gives_others():
    assert _texts(TaskConfig()) == _texts(TaskConfig())
    assert _texts(TaskConfig())[1] != _texts(TaskConfig(seed=1))[1]


def test_num_train_bounds_the_training_problems_and_does_not_change_the_held_out_ones():
    few_train, few_held_out = _texts(TaskConfig(num_train=10))
    all_train, all_held_out = _texts(TaskConfig())

    assert len(few_train) == 10
    assert few_train == all_train[:10]
    assert few_held_out == all_held_out


def test_held_out_set_that_leaves_nothing_to_train_is_refused_with_the_number_that_would_fit():
    with pytest.raises(ConfigError, match=r"task\.held_out must leave .* got 500 of the 4 problems .* below 4 "):
        load_task(TaskConfig(max_operand=1, held_out=500))


@pytest.mark.parametrize("index", [-1, 9500])
def test_problem_index_outside_the_training_problems_is_refused(index: int):
    with pytest.raises(IndexError, match=rf"0\.\.9499, got {index}"):
        load_task(TaskConfig()).problem(index)


def test_max_answer_tokens_is_the_length_of_the_largest_sum():
    """99 + 99 = 198 has 3 characters, a token each; 6 * 9999 = 59994 has 5."""
    assert load_task(TaskConfig()).max_answer_tokens == 3
    assert load_task(TaskConfig(num_operands=6, max_operand=9999)).max_answer_tokens == 5


def test_score_is_one_only_for_the_exact_answer():
    completions = ["46", "46 ", "046", "4", "", "45"]
    num = len(completions)

    assert score(["12+34="] * num, completions, answer=["46"] * num, prompt_id=["x"] * num) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_score_refuses_lists_of_different_length():
    with pytest.raises(RewardError, match="got 1, 2 and 1"):
        score(["1+1="], ["2", "3"], answer=["2"])


def test_reward_path_names_the_score_function():
    assert load_task(TaskConfig()).reward == f"{score.__module__}:{score.__name__}"


def test_tasks_and_the_cache_lookup_import_neither_torch_nor_transformers():
    code = (
        "import sys; from dataclasses import replace; from async_rlhf.config.schema import Config; import async_rlhf.commands.sft; "
        "from async_rlhf.tasks import load_task; from async_rlhf.sft import cached_start; "
        "c = Config(); load_task(c.task); load_task(replace(c.task, name='mini_summary')).held_out(); cached_start(c); "
        "print(sorted({'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)

    assert done.stdout.strip() == "[]"
