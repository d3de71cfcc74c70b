"""A reward function in worker processes: deadlines, deaths, retries."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from async_rlhf.config.rewards import RewardPartConfig
from async_rlhf.errors import ConfigError, RewardError, RewardLostError
from async_rlhf.rewards.pool import PooledFunctionReward
from async_rlhf.types import Prompt

pytestmark = pytest.mark.timeout(60)

SOURCE = """
import os, time
from pathlib import Path

HERE = Path(__file__).parent
(HERE / f"imported-{os.getpid()}").touch()


def score(prompts, completions, **columns):
    for completion in completions:
        word, _, rest = completion.partition(" ")
        if word == "sleep":
            time.sleep(float(rest))
        if word == "die" and not (HERE / "died").exists():
            (HERE / "died").touch()
            os._exit(7)
        if word == "raise" and not (HERE / rest).exists():
            (HERE / rest).touch()
            raise ValueError("not this time")
        if word == "raise-always":
            raise ValueError("never")
        if word == "nan":
            return [float("nan")] * len(completions)
    print("what a function prints does not disturb anybody")
    return [os.getpid() if c == "pid" else len(c) + len(p) for p, c in zip(prompts, completions)]


async def later(prompts, completions, **columns):
    return [len(c) for c in completions]
"""


def prompts_of(num: int) -> list[Prompt]:
    return [Prompt(prompt_id="p", text="ab", token_ids=np.zeros(0, np.int32), columns={"answer": str(i)}) for i in range(num)]


@pytest.fixture
def function(tmp_path: Path) -> str:
    (tmp_path / "reward.py").write_text(SOURCE)
    return f"{tmp_path / 'reward.py'}:score"


@pytest.fixture
def pool(function: str) -> Iterator[PooledFunctionReward]:
    reward = PooledFunctionReward(function, RewardPartConfig(processes=2, deadline_s=1.5, retries=1, backoff_s=0.01))
    yield reward
    reward.close()


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children() if "async_rlhf.rewards.worker" in child.cmdline()}


def test_completions_are_shared_among_the_processes_and_scored_in_order(pool: PooledFunctionReward, tmp_path: Path):
    rating = pool.rate(prompts_of(5), ["a", "", "ccc", "dd", "a"])
    pids = pool.rate(prompts_of(4), ["pid", "sleep 0.1", "pid", "sleep 0.1"]).scores

    assert rating.scores.tolist() == [3, 2, 5, 4, 3] and rating.scores.dtype == np.float32
    assert {int(pids[0]), int(pids[2])} == children() and os.getpid() not in children()
    assert len(list(tmp_path.glob("imported-*"))) == 2, "each process imports the function once"


def test_a_call_longer_than_its_deadline_is_ended_and_its_process_replaced(pool: PooledFunctionReward):
    before, began = children(), time.monotonic()

    with pytest.raises(
        RewardError, match=r"reward.py:score for completion 'sleep 60' of prompt 'ab' failed 2 time.*no answer within 1.5 s"
    ):
        pool.rate(prompts_of(1), ["sleep 60"])

    assert time.monotonic() - began < 20
    assert len(before - children()) == 1, "the process that hung is gone"
    assert pool.rate(prompts_of(4), ["a", "b", "c", "d"]).scores.tolist() == [3] * 4
    assert len(children()) == 2


def test_a_function_that_answers_nothing_any_more_ends_the_run_and_a_slow_completion_does_not(function: str):
    reward = PooledFunctionReward(function, RewardPartConfig(processes=1, deadline_s=0.1, retries=0))
    try:
        for completion, error in (("sleep 9", RewardError), ("sleep 9", RewardError), ("a", None), ("sleep 9", RewardError)):
            if error is None:
                reward.rate(prompts_of(1), [completion])
            else:
                with pytest.raises(error):
                    reward.rate(prompts_of(1), [completion])
        with pytest.raises(RewardError):
            reward.rate(prompts_of(1), ["sleep 9"])
        with pytest.raises(RewardLostError, match="3 calls in a row got no answer"):
            reward.rate(prompts_of(1), ["sleep 9"])
    finally:
        reward.close()


def test_a_process_that_dies_is_replaced_and_the_call_made_again(pool: PooledFunctionReward):
    assert pool.rate(prompts_of(2), ["die", "a"]).scores.tolist() == [5, 3]
    assert len(children()) == 2


def test_a_function_that_raises_once_is_called_again(pool: PooledFunctionReward):
    assert pool.rate(prompts_of(1), ["raise once"]).scores.tolist() == [12]


def test_a_function_that_always_raises_is_given_up_by_name_and_the_pool_goes_on(pool: PooledFunctionReward):
    with pytest.raises(RewardError, match=r"'raise-always' of prompt 'ab' failed 2 time\(s\) in a row, at last: ValueError: never"):
        pool.rate(prompts_of(1), ["raise-always"])
    assert pool.rate(prompts_of(1), ["a"]).scores.tolist() == [3]


def test_a_score_that_is_no_number_is_not_asked_for_again(pool: PooledFunctionReward):
    with pytest.raises(RewardError, match=r"must return finite numbers, got nan for completion 'nan' of prompt 'ab'"):
        pool.rate(prompts_of(1), ["nan"])


def test_a_slow_completion_does_not_hold_up_the_others_calls(function: str):
    reward = PooledFunctionReward(function, RewardPartConfig(processes=2, batch_size=1, deadline_s=20))
    try:
        began = time.monotonic()
        reward.rate(prompts_of(7), ["sleep 0.9"] + ["sleep 0.15"] * 6)
        assert time.monotonic() - began < 1.7, "6 x 0.15 s beside 0.9 s"
    finally:
        reward.close()


def test_closing_ends_all_processes_even_busy_ones(function: str, tmp_path: Path):
    reward = PooledFunctionReward(function, RewardPartConfig(processes=2))
    assert len(children()) == 2
    with ThreadPoolExecutor(1) as thread:
        busy = thread.submit(reward.rate, prompts_of(1), ["sleep 60"])
        time.sleep(0.3)

        reward.close()

        assert not children()
        assert isinstance(busy.exception(), RewardError)


def test_a_worker_ends_when_its_owner_is_gone_while_it_is_busy(function: str):
    reward = PooledFunctionReward(function, RewardPartConfig(processes=1))
    (pid,) = children()
    worker = reward._idle.get()
    worker._connection.send(
        __import__("async_rlhf.rewards.base", fromlist=["x"]).Texts(prompts=["p"], completions=["sleep 60"], columns={})
    )
    time.sleep(0.3)

    worker._connection.close()  # what the end of the owner's process does

    assert worker._process.wait(5) == 0 and not psutil.pid_exists(pid)
    reward._threads.shutdown()


def test_coroutines_run_in_processes_too(function: str):
    reward = PooledFunctionReward(function.replace(":score", ":later"), RewardPartConfig(processes=1))
    try:
        assert reward.rate(prompts_of(2), ["a", "bb"]).scores.tolist() == [1, 2]
    finally:
        reward.close()


def test_a_function_that_the_processes_cannot_import_is_refused(tmp_path: Path):
    (tmp_path / "reward.py").write_text("raise RuntimeError('needs a key')\n")

    with pytest.raises(ConfigError, match=r"did not start: .*needs a key"):
        PooledFunctionReward(f"{tmp_path / 'reward.py'}:score", RewardPartConfig(processes=2))

    assert not children()
