"""`async-rlhf reward-model`: train a reward model, or find it finished in the cache."""

from pathlib import Path

from rich.console import Console

from async_rlhf.commands.sft import run_sft
from async_rlhf.commands.stage import joins_a_cluster, run_stage, with_absolute_paths
from async_rlhf.config.schema import Config
from async_rlhf.stages.folder import check_target
from async_rlhf.stages.messages import StageJob
from async_rlhf.stages.reward_model import needs_start, reward_model_folder, start_of


def run_reward_model(config: Config, folder: Path | None, console: Console, *, in_process: bool = True) -> Path:
    """Make it, showing the progress, and return its folder; the task's supervised start is made first where it is needed.

    Args:
        folder: where to put it; None: into the cache, where a finished one with the same settings is used at once.
        console: a terminal gets a progress bar, anything else one line per evaluation.
        in_process: without Ray, unless there is a cluster to join or a GPU is asked for.
    Raises:
        ConfigError: the folder is taken, or settings or rows cannot work. RunError: the start failed. Interrupted: SIGINT or SIGTERM.
    """
    config = with_absolute_paths(config)
    cached = folder is None
    target = reward_model_folder(config) if folder is None else folder.resolve()
    if not cached:
        check_target(target)
    here = in_process and not joins_a_cluster() and config.reward_model.num_gpus == 0
    if needs_start(config):
        run_sft(config, None, console)
    start_of(config)
    return run_stage(StageJob(kind="reward_model", config=config, target=target, cached=cached), console, in_process=here)
