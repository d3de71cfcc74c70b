"""Reward functions: imported by path, called in batches, and held to their contract."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from async_rlhf.errors import ConfigError, RewardError
from async_rlhf.types import JsonValue

RewardFunction = Callable[..., Sequence[float]]
"""`score(prompts, completions, **columns) -> list[float]`: one score per completion; each column is a list, too."""

LARGEST_SCORE = float(np.finfo(np.float32).max)


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
    """The same reward path with an absolute file name: actors may run in another folder."""
    file, separator, function = path.rpartition(":")
    return f"{Path(file).resolve()}:{function}" if separator and file.endswith(".py") else path


def call_reward(
    function: RewardFunction, prompts: Sequence[str], completions: Sequence[str], columns: Sequence[Mapping[str, JsonValue]]
) -> np.ndarray:
    """Score completions, and check the answer.

    Args:
        prompts, completions, columns: N each; a column that a row lacks is None there.
    Returns:
        [N] float32 finite scores.
    Raises:
        RewardError: the function raised, or answered with another count, with something that is no number, NaN or infinity.
    """
    name = f"{getattr(function, '__module__', '?')}:{getattr(function, '__name__', '?')}"
    names = list(dict.fromkeys(name for row in columns for name in row))  # rows of several sources need not have the same
    try:
        answer: Any = function(list(prompts), list(completions), **{key: [row.get(key) for row in columns] for key in names})
        scores = [float(score) for score in answer]
    except Exception as error:
        raise RewardError(f"reward function {name} failed: {type(error).__name__}: {error}") from error
    if len(scores) != len(completions):
        raise RewardError(f"reward function {name} must return one score per completion: expected {len(completions)}, got {len(scores)}")
    # Scores travel as float32, in which a number beyond 3.4e38 would become an infinity.
    for index, score in enumerate(scores):
        if not abs(score) <= LARGEST_SCORE:
            raise RewardError(
                f"reward function {name} must return finite numbers, got {score} for completion {completions[index]!r} of prompt "
                f"{prompts[index]!r}"
            )
    return np.array(scores, dtype=np.float32)


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
