"""`async-rlhf sft`: make the supervised start, or find it finished in the cache; or fine-tune a model on rows of one's own."""

from pathlib import Path

from rich.console import Console

from async_rlhf.commands.stage import joins_a_cluster, run_stage, with_absolute_paths
from async_rlhf.config.schema import Config
from async_rlhf.errors import ConfigError
from async_rlhf.sft import start_folder
from async_rlhf.stages.folder import check_target
from async_rlhf.stages.messages import StageJob


def run_sft(config: Config, folder: Path | None, console: Console, *, in_process: bool = True) -> Path:
    """Make it, showing the progress, and return its folder.

    Args:
        config: task, model and sft settings.
        folder: where to put it; None: into the cache, where a finished start with the same settings is used at once.
        console: a terminal gets a progress bar, anything else one line per evaluation.
        in_process: without Ray, unless there is a cluster to join or a GPU is asked for.
    Raises:
        ConfigError: the folder is taken, or the settings or rows cannot work.
        RunError: not one held-out problem is answered right. Interrupted: SIGINT or SIGTERM.
    """
    config = with_absolute_paths(config)
    if config.sft.sources:
        from async_rlhf.stages.finetune import check_finetune

        check_finetune(config)
        if folder is None:
            raise ConfigError("a model trained on sft.sources needs a folder of its own; give --out FOLDER")
    cached = folder is None
    target = start_folder(config) if folder is None else folder.resolve()
    if not cached:
        check_target(target)
    job = StageJob(kind="sft", config=config, target=target, cached=cached)
    here = in_process and not joins_a_cluster() and config.sft.num_gpus == 0
    return run_stage(job, console, in_process=here)
