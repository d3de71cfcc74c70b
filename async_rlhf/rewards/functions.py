"""Reward functions: imported by path, called in batches, and held to their contract."""

import asyncio
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from async_rlhf.config.rewards import RewardPartConfig
from async_rlhf.errors import ConfigError, RewardError
from async_rlhf.rewards.attempts import BackgroundLoop, TryAgainError, in_order, insist
from async_rlhf.rewards.base import Rating, Texts, checked_scores, in_columns, texts_of
from async_rlhf.types import JsonValue, Prompt

RewardFunction = Callable[..., "Sequence[float] | Coroutine[Any, Any, Sequence[float]]"]
"""`score(prompts, completions, **columns) -> list[float]`, or the same as a coroutine: one score per completion."""


def load_reward(path: str) -> RewardFunction:
    """Import `module:function`, or `path/to/file.py:function`.

    Raises:
        ConfigError: the path has the wrong form, does not import, or names nothing that can be called.
    """
    module_name, separator, function_name = path.rpartition(":")
    if not separator or not module_name or not function_name:
        raise ConfigError(f"reward.function must look like module:function or file.py:function, got {path!r}")
    try:
        module = _import_file(Path(module_name)) if module_name.endswith(".py") else importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(f"reward.function {path!r} does not import: {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        known = ", ".join(name for name in vars(module) if callable(getattr(module, name)) and not name.startswith("_"))
        raise ConfigError(f"reward.function {path!r}: {module_name} has no function {function_name!r}; it has: {known or 'none'}")
    return cast(RewardFunction, function)


def absolute_reward(path: str) -> str:
    """The same reward path with an absolute file name: actors may run in another folder. Nothing stays nothing."""
    file, separator, function = path.rpartition(":")
    return f"{Path(file).resolve()}:{function}" if separator and file.endswith(".py") else path


def call_reward(
    function: RewardFunction, prompts: Sequence[str], completions: Sequence[str], columns: Sequence[Mapping[str, JsonValue]]
) -> np.ndarray:
    """Score completions, and check the answer.

    Args:
        prompts, completions, columns: N each.
    Returns:
        [N] float32 finite scores.
    Raises:
        RewardError: the function raised, or answered with another count, with something that is no number, NaN or infinity.
    """
    texts = in_columns(prompts, completions, columns)
    name = reward_name(function)
    try:
        answer = call_with(function, texts)
        answer = asyncio.run(answer) if inspect.iscoroutine(answer) else answer
        # Numbers that are made while they are read may raise, too.
        answer = list(cast("Sequence[Any]", answer)) if hasattr(answer, "__next__") else answer
    except Exception as error:
        raise RewardError(f"{name} failed: {type(error).__name__}: {error}") from error
    return checked_scores(name, answer, texts)


def call_with(function: RewardFunction, texts: Texts) -> Any:
    """What the function answers, or its coroutine."""
    return function(list(texts.prompts), list(texts.completions), **{name: list(values) for name, values in texts.columns.items()})


def reward_name(function: RewardFunction) -> str:
    """For messages."""
    return f"reward function {getattr(function, '__module__', '?')}:{getattr(function, '__name__', '?')}"


class FunctionReward:
    """A function in this process: a plain one is called at once with everything, a coroutine several times at once."""

    def __init__(self, path: str, settings: RewardPartConfig) -> None:
        """
        Raises:
            ConfigError: see load_reward.
        """
        self._function = load_reward(path)
        self._settings = settings
        self._loop = BackgroundLoop() if inspect.iscoroutinefunction(self._function) else None

    def rate(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> Rating:
        """See Reward."""
        if self._loop is not None:
            return Rating(scores=self._loop.run(self._gather(texts_of(prompts, completions))))
        return Rating(scores=call_reward(self._function, [p.text for p in prompts], completions, [p.columns for p in prompts]))

    def close(self) -> None:
        """See Reward."""
        if self._loop is not None:
            self._loop.close()

    async def _gather(self, texts: Texts) -> np.ndarray:
        size = self._settings.batch_size
        parts = [texts.part(begin, begin + size) for begin in range(0, len(texts.completions), size)]
        scores = await in_order(parts, self._score, self._settings.concurrency)
        return np.concatenate([np.empty(0, np.float32), *scores])

    async def _score(self, texts: Texts) -> np.ndarray:
        name = reward_name(self._function)

        async def call(attempt: int) -> Any:
            del attempt
            try:
                return await call_with(self._function, texts)
            except Exception as error:
                raise TryAgainError(f"{type(error).__name__}: {error}") from error

        return checked_scores(name, await insist(call, self._settings, name), texts)


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    name = f"reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, f"{path} is not a Python file"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def zeros(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[JsonValue]) -> list[float]:
    """0 for each completion: where nobody wants to know."""
    del prompts, columns
    return [0.0] * len(completions)
