"""The preference pairs that a built-in task makes itself."""

from collections.abc import Iterator
from typing import Any

from async_rlhf.config.schema import Config
from async_rlhf.errors import ConfigError
from async_rlhf.stages.pairs import Pair
from async_rlhf.tasks import load_task


def task_pairs(config: Config) -> Iterator[Pair]:
    """`reward_model.num_pairs` pairs of the task.

    Raises:
        ConfigError: it has none.
    """
    task: Any = load_task(config.task)
    if not hasattr(task, "preferences"):
        raise ConfigError(f"the task {config.task.name} has no preference pairs of its own; give reward_model.sources")
    for preference in task.preferences(config.reward_model.num_pairs):
        yield Pair(prompt=preference.problem.text, chosen=preference.chosen, rejected=preference.rejected, margin=float(preference.margin))
