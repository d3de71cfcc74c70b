"""From the config to a reward: one of the four kinds, or a weighted sum of several."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from async_rlhf.config.rewards import RewardConfig, RewardPartConfig
from async_rlhf.errors import RewardError, RewardLostError
from async_rlhf.rewards.base import LARGEST_SCORE, Rating, Reward, shown
from async_rlhf.rewards.functions import FunctionReward, absolute_reward
from async_rlhf.rewards.http import HttpReward
from async_rlhf.rewards.judge import JudgeReward
from async_rlhf.rewards.model import ModelReward
from async_rlhf.rewards.pool import PooledFunctionReward
from async_rlhf.types import Prompt


def open_reward(config: RewardConfig, default: str) -> Reward:
    """The reward of a run, ready to rate.

    Args:
        default: import path of the function where the config names none: the task's own.
    Raises:
        ConfigError: a part cannot be there: see check_rewards.
    """
    if not config.parts:
        return FunctionReward(config.function or default, RewardPartConfig())
    weights = {name: part.weight for name, part in config.parts.items()}
    with ExitStack() as opened:
        parts: dict[str, Reward] = {}
        for name, part in config.parts.items():
            parts[name] = open_part(name, part, default)
            opened.callback(parts[name].close)
        opened.pop_all()
    return WeightedSum(parts, weights)


def open_metric(config: RewardConfig, reward: str, metric: str) -> Reward:
    """What evaluations measure: the task's own metric, or, of a task that has none, what it is trained on.

    Args:
        reward: see open_reward.
        metric: import path; empty: there is none.
    """
    return FunctionReward(metric, RewardPartConfig()) if metric else open_reward(config, reward)


def open_part(name: str, part: RewardPartConfig, default: str) -> Reward:
    """One reward by its kind; heavy imports happen here."""
    key = f"reward.parts.{name}"
    match part.kind:
        case "function" if part.processes:
            return PooledFunctionReward(part.function or default, part)
        case "function":
            return FunctionReward(part.function or default, part)
        case "model":
            return ModelReward(key, part)
        case "http":
            return HttpReward(key, part)
        case "judge":
            return JudgeReward(key, part)


def absolute_rewards(config: RewardConfig) -> RewardConfig:
    """The same with absolute paths: actors may run in another folder."""

    def absolute(path: str) -> str:
        return str(Path(path).expanduser().resolve()) if path else ""

    def of_part(part: RewardPartConfig) -> RewardPartConfig:
        judge = replace(part.judge, rubric=absolute(part.judge.rubric))
        return replace(part, function=absolute_reward(part.function), path=absolute(part.path), judge=judge)

    parts = {name: of_part(part) for name, part in config.parts.items()}
    return replace(config, function=absolute_reward(config.function), parts=parts)


class WeightedSum:
    """Several rewards, asked at the same time."""

    def __init__(self, parts: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
        self._parts = parts
        self._weights = weights
        self._threads = ThreadPoolExecutor(len(parts), thread_name_prefix="reward")

    def rate(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Rating:
        """See Reward. A part's own parts are called `NAME.PART`, and have no weight."""
        asked = {name: self._threads.submit(part.rate, prompts, completions) for name, part in self._parts.items()}
        wait(asked.values())  # all of them: no part is called again while it still works
        ratings: dict[str, Rating] = {}
        for name, answer in asked.items():
            try:
                ratings[name] = answer.result()
            except (RewardError, RewardLostError) as error:
                raise type(error)(f"reward.parts.{name}: {error}") from error
        scores = np.zeros(len(completions), dtype=np.float64)
        parts: dict[str, np.ndarray] = {}
        for name, rating in ratings.items():
            scores += self._weights[name] * rating.scores.astype(np.float64)
            parts[name] = rating.scores
            parts |= {f"{name}.{inner}": values for inner, values in rating.parts.items()}
        for index, score in enumerate(scores):
            if not abs(score) <= LARGEST_SCORE:
                raise RewardError(f"the weighted sum of {', '.join(parts)} is {score} for completion {shown(completions[index])}")
        return Rating(scores=scores.astype(np.float32), parts=parts)

    def close(self) -> None:
        """See Reward."""
        for part in self._parts.values():
            part.close()
        self._threads.shutdown()
