"""A reward function in worker processes: deadlines, deaths, retries."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil
import pytest

from async_rlhf.config.rewards import RewardPartConfig
from async_rlhf.errors import ConfigError, RewardError, RewardLostError
from async_rlhf.rewards.base import Texts
from async_rlhf.rewards.pool import PooledFunctionReward
from async_rlhf.types import Prompt
from tests.support.pacing import eventually

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
        if word == "touch":
            (HERE / rest).touch()
        while word == "await" and not all((HERE / name).exists() for name in rest.split()):
            time.sleep(0.01)
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


@pytest.fixture(scope="module")
def function(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("reward")
    (folder / "reward.py").write_text(SOURCE)
    return f"{folder / 'reward.py'}:score"


@pytest.fixture(scope="module")
def pool(function: str) -> Iterator[PooledFunctionReward]:
    reward = PooledFunctionReward(function, RewardPartConfig(processes=2, deadline_s=0.8, retries=1, backoff_s=0.01))
    yield reward
    reward.close()


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children() if "async_rlhf.rewards.worker" in " ".join(_command(child))}


def _command(child: psutil.Process) -> list[str]:
    try:
        return child.cmdline()
    except psutil.Error:  # it ended just now
        return []


def test_completions_are_shared_among_the_processes_and_scored_in_order(pool: PooledFunctionReward, function: str):
    rating = pool.rate(prompts_of(5), ["a", "", "ccc", "dd", "a"])
    pids = pool.rate(prompts_of(4), ["pid", "sleep 0.1", "pid", "sleep 0.1"]).scores

    assert rating.scores.tolist() == [3, 2, 5, 4, 3] and rating.scores.dtype == np.float32
    assert {int(pids[0]), int(pids[2])} == children() and os.getpid() not in children()
    assert len(list(Path(function).parent.glob("imported-*"))) == 2, "each process imports the function once"


def test_a_call_longer_than_its_deadline_is_ended_and_its_process_replaced(pool: PooledFunctionReward):
    before, began = children(), time.monotonic()

    with pytest.raises(
        RewardError, match=r"reward.py:score for completion 'sleep 60' of prompt 'ab' failed 2 time.*no answer within 0.8 s"
    ):
        pool.rate(prompts_of(1), ["sleep 60"])

    assert time.monotonic() - began < 20
    assert len(before - children()) == 1, "the process that hung is gone"
    assert pool.rate(prompts_of(4), ["a", "b", "c", "d"]).scores.tolist() == [3] * 4
    assert len(children()) == 2


def test_a_function_that_answers_nothing_any_more_ends_the_run_and_a_slow_completion_does_not(
    function: str, monkeypatch: pytest.MonkeyPatch
):
    strict = RewardPartConfig(processes=1, deadline_s=0.1, retries=0)
    reward = PooledFunctionReward(function, strict)
    try:
        for completion in ("sleep 9", "a", "sleep 9", "sleep 9"):
            monkeypatch.setattr(reward, "_settings", replace(strict, deadline_s=20.0) if completion == "a" else strict)
            with nullcontext() if completion == "a" else pytest.raises(RewardError):
                reward.rate(prompts_of(1), [completion])
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
    """It waits for all of them."""
    reward = PooledFunctionReward(function, RewardPartConfig(processes=2, batch_size=1, deadline_s=20, retries=0))
    others = [f"other-{index}" for index in range(6)]
    try:
        reward.rate(prompts_of(7), [f"await {' '.join(others)}", *(f"touch {name}" for name in others)])
    finally:
        reward.close()


def test_closing_ends_all_processes_even_busy_ones(function: str, monkeypatch: pytest.MonkeyPatch):
    """Whoever waits for a busy one ends it, too, at the same time: its connection is closed once."""

    def close_slowly(connection: Connection) -> None:
        descriptor = connection.fileno()
        time.sleep(0.1)
        os.close(descriptor)

    before = children()
    reward = PooledFunctionReward(function, RewardPartConfig(processes=2))
    assert len(children() - before) == 2
    with ThreadPoolExecutor(1) as thread:
        busy = thread.submit(reward.rate, prompts_of(4), ["touch busy-0", "sleep 60", "touch busy-1", "sleep 60"])
        eventually(lambda: all(Path(function).with_name(f"busy-{index}").exists() for index in range(2)))
        monkeypatch.setattr(Connection, "_close", close_slowly)

        reward.close()

        assert children() <= before
        assert isinstance(busy.exception(), RewardError)


def test_a_worker_ends_when_its_owner_is_gone_while_it_is_busy(function: str):
    before = children()
    reward = PooledFunctionReward(function, RewardPartConfig(processes=1))
    (pid,) = children() - before
    worker = reward._idle.get()
    worker._connection.send(Texts(prompts=["p"], completions=["sleep 60"], columns={}))
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
    before = children()

    with pytest.raises(ConfigError, match=r"did not start: .*needs a key"):
        PooledFunctionReward(f"{tmp_path / 'reward.py'}:score", RewardPartConfig(processes=2))

    assert children() <= before
