"""Tasks that make their own problems: no download, no dataset. See `base` for what a task is."""

from async_rlhf.config.tasks import TaskConfig
from async_rlhf.errors import ConfigError
from async_rlhf.tasks.arithmetic import ArithmeticTask
from async_rlhf.tasks.base import ExactTask, Preference, PreferenceTask, Problem, Task, Vocabulary
from async_rlhf.tasks.mini_summary import MiniSummaryTask

__all__ = ["ExactTask", "Preference", "PreferenceTask", "Problem", "Task", "Vocabulary", "load_task"]


def load_task(config: TaskConfig) -> Task:
    """The task that the config names.

    Raises:
        ConfigError: its settings leave no problem to train on.
    """
    match config.name:
        case "arithmetic":
            return ArithmeticTask(config)
        case "mini_summary":
            return MiniSummaryTask(config)
        case "dataset":
            raise ConfigError("task.name dataset makes no problems of its own; its rows are those of prompts.sources")
