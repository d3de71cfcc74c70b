"""Tasks that make their own problems: no download, no dataset. See `base` for what a task is."""

from async_rlhf.config.tasks import TaskConfig
from async_rlhf.errors import ConfigError
from async_rlhf.tasks.arithmetic import ArithmeticTask
from async_rlhf.tasks.base import Problem, Task

__all__ = ["Problem", "Task", "load_task"]


def load_task(config: TaskConfig) -> Task:
    """The task that the config names.

    Raises:
        ConfigError: its settings leave no problem to train on.
    """
    match config.name:
        case "arithmetic":
            return ArithmeticTask(config)
        case "dataset":
            raise ConfigError("task.name dataset makes no problems of its own; its rows are those of prompts.sources")
