"""The reward that labels preferences: whatever `reward` names, asked about texts."""

# pyright: reportUnknownMemberType=false
# (transformers types its methods partially.)

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from async_rlhf.config.prompts import SourceConfig
from async_rlhf.config.schema import Config
from async_rlhf.errors import ConfigError
from async_rlhf.rewards import open_reward
from async_rlhf.stages.pairs import Pair
from async_rlhf.stages.rows import Row, Text
from async_rlhf.tasks import load_task
from async_rlhf.types import Prompt


class Gold:
    """Scores completions of the rows of a preference set."""

    def __init__(self, config: Config, default: str) -> None:
        """
        Args:
            default: import path of the reward function where the config names none.
        """
        self._reward = open_reward(config.reward, default)
        self._tokenizer: Any = None
        self._model_path = config.model.path
        self._system = config.prompts.system

    def prompt_of(self, pair: Pair, row: Row, source: SourceConfig) -> Prompt:
        """The prompt of a row, with its other columns, as a reward sees it."""
        hidden = (source.prompt_column, source.chosen_column, source.rejected_column, "prompts", "completions")
        columns = {name: value for name, value in row.items() if name not in hidden}
        asked = pair.prompt
        if not isinstance(asked, str):
            if self._system and asked[0]["role"] != "system":  # as training puts it first
                asked = [{"role": "system", "content": self._system}, *asked]
            columns["messages"] = asked
        return Prompt(prompt_id="", text=self._text(asked), token_ids=np.zeros(0, dtype=np.int32), columns=columns)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        """[N] float32; see Reward.rate."""
        return self._reward.rate(prompts, completions).scores

    def close(self) -> None:
        """End what the reward holds."""
        self._reward.close()

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


def open_gold(config: Config) -> Gold:
    """The config's reward, or the task's own where it names none.

    Raises:
        ConfigError: there is none, or it cannot be there.
    """
    if not config.reward.function and not config.reward.parts and config.task.name == "dataset":
        raise ConfigError("relabel needs something to score with; set reward.function, or reward.parts.NAME.kind=model and its path")
    default = "" if config.task.name == "dataset" else load_task(config.task).reward
    return Gold(config, default)
