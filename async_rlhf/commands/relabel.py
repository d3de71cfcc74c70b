"""`async-rlhf relabel`: order the pairs of a preference set anew, by the config's reward."""

from pathlib import Path

from rich.console import Console

from async_rlhf.commands.stage import run_stage, with_absolute_paths
from async_rlhf.config.schema import Config
from async_rlhf.stages.messages import StageJob
from async_rlhf.stages.relabel import check_relabel


def run_relabel(config: Config, file: Path, console: Console) -> Path:
    """Do it, showing the progress, and return the file.

    Raises:
        ConfigError: the file exists, or settings or rows cannot work. RewardError: a pair cannot be scored. Interrupted: SIGINT or
            SIGTERM.
    """
    config = with_absolute_paths(config)
    check_relabel(config, file.resolve())
    return run_stage(StageJob(kind="relabel", config=config, target=file.resolve()), console)
