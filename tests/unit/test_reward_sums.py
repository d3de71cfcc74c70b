"""From the config to a reward: the four kinds, weighted sums, and what is refused before anything starts."""

import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from async_rlhf.config import load_config
from async_rlhf.config.rewards import RewardConfig, RewardPartConfig
from async_rlhf.errors import ConfigError, RewardError, RewardLostError
from async_rlhf.rewards import Rating, absolute_rewards, check_rewards, open_reward
from async_rlhf.rewards.sums import WeightedSum
from async_rlhf.types import Prompt
from tests.support.http_server import Reply, free_port, serving
from tests.support.reward_models import save_reward_model
from tests.support.settings import load, refusal

TASKS_OWN = "async_rlhf.tasks.arithmetic:score"
PROMPTS = [Prompt(prompt_id="p", text="1+1=", token_ids=np.zeros(0, np.int32), columns={"answer": "2"})] * 2


class Fixed:
    """Always the same scores."""

    def __init__(self, *scores: float, parts: dict[str, Any] | None = None, error: Exception | None = None) -> None:
        self.scores, self.parts, self.error = scores, parts or {}, error
        self.closed = False

    def rate(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Rating:
        if self.error is not None:
            raise self.error
        return Rating(scores=np.float32(self.scores), parts=self.parts)

    def close(self) -> None:
        self.closed = True


def summed(parts: dict[str, Fixed], weights: dict[str, float]) -> Rating:
    with closing(WeightedSum(parts, weights)) as reward:
        rating = reward.rate(PROMPTS, ["2", "3"])
    assert all(part.closed for part in parts.values())
    return rating


def test_the_score_is_the_weighted_sum_and_the_parts_are_kept_before_their_weights():
    """2 x 1 - 0.5 x 4 = 0; 2 x 3 - 0.5 x 2 = 5."""
    rating = summed({"right": Fixed(1, 3), "length": Fixed(4, 2)}, {"right": 2.0, "length": -0.5})

    assert rating.scores.tolist() == [0.0, 5.0] and rating.scores.dtype == np.float32
    assert {name: values.tolist() for name, values in rating.parts.items()} == {"right": [1, 3], "length": [4, 2]}


def test_a_parts_own_parts_have_no_weight():
    rating = summed({"model": Fixed(1, 3, parts={"cut": np.float32([0, 1])})}, {"model": 1.0})

    assert rating.scores.tolist() == [1.0, 3.0] and rating.parts["model.cut"].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("kind", [RewardError, RewardLostError])
def test_a_part_that_fails_is_named_and_the_kind_of_its_error_stays(kind: type[Exception]):
    with pytest.raises(kind, match=r"^reward.parts.judge: no grade$"):
        summed({"right": Fixed(1, 3), "judge": Fixed(error=kind("no grade"))}, {"right": 1.0, "judge": 1.0})


def test_a_sum_that_is_not_finite_in_float32_is_refused():
    with pytest.raises(RewardError, match=r"weighted sum of right is .* for completion '3'"):
        summed({"right": Fixed(1, 3e38)}, {"right": 100.0})


def test_parts_are_asked_at_the_same_time():
    both = threading.Barrier(2, timeout=20)

    class Meeting(Fixed):
        def rate(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Rating:
            both.wait()
            return super().rate(prompts, completions)

    assert summed({"a": Meeting(1, 1), "b": Meeting(2, 2)}, {"a": 1.0, "b": 1.0}).scores.tolist() == [3, 3]


# From the config.


def test_without_parts_there_is_one_unnamed_function():
    with closing(open_reward(RewardConfig(), TASKS_OWN)) as reward:
        rating = reward.rate(PROMPTS, ["2", "3"])

    assert rating.scores.tolist() == [1.0, 0.0] and not rating.parts


def test_reward_function_is_the_shorthand(tmp_path: Path):
    (tmp_path / "mine.py").write_text("async def score(prompts, completions, **columns):\n    return [len(c) for c in completions]\n")

    with closing(open_reward(RewardConfig(function=f"{tmp_path / 'mine.py'}:score"), TASKS_OWN)) as reward:
        assert reward.rate(PROMPTS, ["2", "333"]).scores.tolist() == [1, 3]


def test_coroutines_are_called_in_batches_several_at_once_each_with_its_deadline(tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "import asyncio\nnow, most = 0, 0\n"
        "async def score(prompts, completions, **columns):\n"
        "    global now, most\n    now += 1\n    most = max(most, now)\n"
        "    await asyncio.sleep(60 if 'slow' in completions else 0.02)\n    now -= 1\n"
        "    return [float(most)] * len(completions)\n"
    )
    part = RewardPartConfig(
        function=f"{tmp_path / 'mine.py'}:score", batch_size=2, concurrency=3, deadline_s=0.3, retries=1, backoff_s=0.01
    )

    with closing(open_reward(RewardConfig(parts={"mine": part}), "")) as reward:
        assert reward.rate(PROMPTS * 6, ["x"] * 12).scores.max() == 3.0
        with pytest.raises(RewardError, match=r"reward.parts.mine: .*:score failed 2 time.*no answer within 0.3 s"):
            reward.rate(PROMPTS, ["slow", "x"])


def test_all_four_kinds_make_one_sum(tmp_path: Path):
    model = save_reward_model(tmp_path / "model")
    chat = Reply({"choices": [{"message": {"content": "5"}}]})
    with serving(lambda request: chat if "chat" in request.path else Reply({"scores": [1.0, 2.0]})) as served:
        loaded = load_config(
            overrides=[
                "reward.parts.right.weight=2",
                "reward.parts.pooled.processes=1",
                *("reward.parts.model.kind=model", f"reward.parts.model.path={model}", "reward.parts.model.weight=0.25"),
                *("reward.parts.remote.kind=http", f"reward.parts.remote.url={served.url}/score", "reward.parts.remote.weight=-1"),
                *("reward.parts.judge.kind=judge", f"reward.parts.judge.judge.url={served.url}/v1", "reward.parts.judge.judge.model=wise"),
            ]
        ).config.reward
        with closing(open_reward(loaded, TASKS_OWN)) as reward:
            rating = reward.rate(PROMPTS, ["2", "3"])

    parts = rating.parts
    assert list(parts) == ["right", "pooled", "model", "model.cut", "remote", "judge"]
    assert parts["right"].tolist() == parts["pooled"].tolist() == [1, 0]
    assert (parts["remote"].tolist(), parts["judge"].tolist()) == ([1, 2], [0.5, 0.5])
    expected = 2 * parts["right"] + parts["pooled"] + 0.25 * parts["model"] - parts["remote"] + parts["judge"]
    np.testing.assert_allclose(rating.scores, expected, rtol=1e-6)


def test_a_part_that_cannot_be_opened_closes_those_before_it(tmp_path: Path):
    import psutil

    parts = {"pooled": RewardPartConfig(processes=1), "model": RewardPartConfig(kind="model", path=str(tmp_path))}

    with pytest.raises(ConfigError, match=r"reward.parts.model.path must be a model folder"):
        open_reward(RewardConfig(parts=parts), TASKS_OWN)

    assert not [child for child in psutil.Process().children() if "async_rlhf.rewards.worker" in child.cmdline()]


def test_relative_paths_become_absolute_before_actors_in_other_folders_read_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    loaded = load("reward.parts.a.function=mine.py:score", "reward.parts.b.kind=model", "reward.parts.b.path=model").reward
    loaded = absolute_rewards(loaded)

    assert loaded.parts["a"].function == f"{tmp_path}/mine.py:score" and loaded.parts["b"].path == f"{tmp_path}/model"
    assert absolute_rewards(loaded) == loaded
    assert absolute_rewards(RewardConfig(function="module:score")) == RewardConfig(function="module:score")
    assert loaded.parts["b"].judge.rubric == "" and loaded.parts["b"].function == ""


# Before a run.


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (RewardPartConfig(function="no.such.module:score"), "does not import"),
        (RewardPartConfig(kind="model", path="/no/such"), r"reward.parts.x.path must be a model folder, got '/no/such'"),
        (RewardPartConfig(kind="http"), r"reward.parts.x.url must say where"),
        (RewardPartConfig(kind="judge"), r"reward.parts.x.judge.url must be set"),
    ],
)
def test_a_part_that_cannot_work_is_refused_by_name(part: RewardPartConfig, words: str):
    with pytest.raises(ConfigError, match=words):
        check_rewards(RewardConfig(parts={"x": part}), TASKS_OWN)


def test_a_service_that_is_not_there_is_refused_before_the_run():
    part = RewardPartConfig(kind="http", url=f"http://127.0.0.1:{free_port()}/score")
    with pytest.raises(ConfigError, match=r"reward.parts.x.url: .* does not answer"):
        check_rewards(RewardConfig(parts={"x": part}), TASKS_OWN)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["reward.function=a:b", "reward.parts.x.weight=2"], ("reward.function (a:b) and reward.parts (x)", "make the function a part")),
        (["reward.parts.x.url=http://127.0.0.1/"], ("reward.parts.x.url belongs to kind http", "set reward.parts.x.kind=http")),
        (["reward.parts.x.path=m"], ("reward.parts.x.path belongs to kind model", "kind is function")),
        (["reward.parts.x.kind=http", "reward.parts.x.processes=2"], ("reward.parts.x.processes belongs to kind function",)),
        (["reward.parts.x.judge.model=m"], ("reward.parts.x.judge belongs to kind judge",)),
        (["reward.parts.x/y.weight=1"], ("name of a reward part must be letters, digits", "'x/y'")),
        (
            ["reward.parts.x.kind=http", "reward.parts.x.deadline_s=90", "timeouts.score_s=300"],
            ("one call of reward.parts.x may take 472.5 s", "timeouts.score_s (300)", "raise timeouts.score_s"),
        ),
        (["reward.parts.x.kind=judge", "timeouts.score_s=100"], ("one call of reward.parts.x may take 172.5 s",)),
        (["reward.parts.x.processes=1", "reward.parts.x.retries=9"], ("one call of reward.parts.x may take",)),
        (
            ["algorithm=ppo", "completions_per_prompt=1", "reward.parts.x.kind=judge", "reward.parts.x.judge.mode=pairwise"],
            ("mode pairwise compares the completions of a prompt", "use pointwise"),
        ),
        (["reward.parts.x.weight=2e6"], ("reward.parts.x.weight must be", "<= 1e+06")),
    ],
)
def test_settings_that_contradict_are_refused_with_the_remedy(overrides: list[str], words: tuple[str, ...]):
    message = refusal(*overrides)
    assert all(word in message for word in words), message


def test_a_function_in_the_scorer_has_no_deadline_to_contradict():
    load("reward.parts.x.deadline_s=1000")
