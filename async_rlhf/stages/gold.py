"""The reward that labels preferences: whatever `reward` names, asked about texts."""

# pyright: reportUnknownMemberType=false
# (transformers types its methods partially.)

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from async_rlhf.config.prompts import SourceConfig
from async_rlhf.config.schema import Config
from async_rlhf.errors import ConfigError
from async_rlhf.rewards import call_reward, load_reward
from async_rlhf.stages.pairs import Pair
from async_rlhf.stages.rows import Row, Text
from async_rlhf.tasks import load_task
from async_rlhf.types import Prompt


class Gold(Protocol):
    """Scores completions of the rows of a preference set."""

    def prompt_of(self, pair: Pair, row: Row, source: SourceConfig) -> Prompt:
        """The prompt of a row, with its other columns, as a reward sees it."""
        ...

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        """[N] float32; see Reward.rate."""
        ...

    def close(self) -> None:
        """End what the reward holds."""
        ...


def open_gold(config: Config) -> Gold:
    """The config's reward, or the task's own where it names none.

    Raises:
        ConfigError: there is none, or it cannot be there.
    """
    if not config.reward.function and not config.reward.parts and config.task.name == "dataset":
        raise ConfigError("relabel needs something to score with; set reward.function, or reward.parts.NAME.kind=model and its path")
    default = "" if config.task.name == "dataset" else load_task(config.task).reward
    return _RewardGold(config, default)


class _RewardGold:
    def __init__(self, config: Config, default: str) -> None:
        self._function = load_reward(config.reward.function or default)
        self._tokenizer: Any = None
        self._model_path = config.model.path

    def prompt_of(self, pair: Pair, row: Row, source: SourceConfig) -> Prompt:
        """See Gold."""
        hidden = (source.prompt_column, source.chosen_column, source.rejected_column, "prompts", "completions")
        columns = {name: value for name, value in row.items() if name not in hidden}
        if not isinstance(pair.prompt, str):
            columns["messages"] = pair.prompt
        return Prompt(prompt_id="", text=self._text(pair.prompt), token_ids=np.zeros(0, dtype=np.int32), columns=columns)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        """See Gold."""
        return call_reward(self._function, [prompt.text for prompt in prompts], completions, [prompt.columns for prompt in prompts])

    def close(self) -> None:
        """See Gold."""

    def _text(self, prompt: Text) -> str:
        """A chat as the policy reads it, where the policy is known; else what was said last."""
        if isinstance(prompt, str):
            return prompt
        if not self._model_path:
            return prompt[-1]["content"]
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(Path(self._model_path).expanduser().resolve())
        return self._tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
