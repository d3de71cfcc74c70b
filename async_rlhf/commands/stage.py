"""Do a stage and show its progress: on Ray, as everything else, or in this very process."""

import asyncio
import os
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from async_rlhf.commands.say import say
from async_rlhf.commands.signals import interruptible, on_ray, until_signal
from async_rlhf.config.schema import Config
from async_rlhf.config.stages import RelabelConfig, RewardModelConfig, SFTConfig
from async_rlhf.hub import with_local_models
from async_rlhf.rewards import absolute_rewards
from async_rlhf.stages.messages import StageJob, StageProgress, StageResult, StageWatch
from async_rlhf.stages.perform import finished, perform

Stage = TypeVar("Stage", SFTConfig, RewardModelConfig, RelabelConfig)

NAMES = {"sft": "sft", "reward_model": "reward model", "relabel": "relabel"}


def run_stage(job: StageJob, console: Console, *, in_process: bool = False) -> Path:
    """Do the stage, or find its result in the cache, and return where it is.

    Args:
        console: a terminal gets a progress bar, anything else one line per look.
        in_process: without Ray: a laptop's first run need not wait for a second Ray.
    Raises:
        ConfigError, RewardError, RunError: as the stage says. Interrupted: SIGINT or SIGTERM; the work so far is kept.
    """
    result = finished(job)
    if result is None:
        with _show(job, console) as on_progress:
            result = _here(job, on_progress) if in_process else _on_ray(job, on_progress, console)
    for line in result.lines:
        say(console, line)
    return result.target


def with_absolute_paths(config: Config) -> Config:
    """The same with absolute paths of what is on this machine, models of the hub included: actors may run in another folder."""

    def absolute(path: str) -> str:
        return str(Path(path).expanduser().resolve()) if path and Path(path).expanduser().exists() else path

    def of_stage(stage: Stage) -> Stage:
        return replace(stage, sources={name: replace(source, path=absolute(source.path)) for name, source in stage.sources.items()})

    config = with_local_models(config)
    return replace(
        config,
        sft=of_stage(config.sft),
        reward_model=of_stage(config.reward_model),
        relabel=of_stage(config.relabel),
        reward=absolute_rewards(config.reward),
    )


def joins_a_cluster() -> bool:
    """Whether Ray is there already."""
    return bool(os.environ.get("RAY_ADDRESS"))


def _here(job: StageJob, on_progress: Callable[[StageProgress], None]) -> StageResult:
    with interruptible():
        return perform(job, StageWatch(on_progress=on_progress))


def _on_ray(job: StageJob, on_progress: Callable[[StageProgress], None], console: Console) -> StageResult:
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        with on_ray(job.config, f"{job.kind}_{os.getpid()}", lambda line: None) as cluster:
            from actors.stage import RemoteStage

            stage = RemoteStage(job, cluster, on_progress)
            return asyncio.run(until_signal(stage.perform(), stage.stop, job.config.timeouts.stop_s))
    finally:
        for signum, action in before.items():  # on_ray leaves them ignored, and `train` has more to do after a stage
            signal.signal(signum, action)


@contextmanager
def _show(job: StageJob, console: Console) -> Generator[Callable[[StageProgress], None]]:
    """A bar that counts steps in a terminal, else one line per look."""
    name = NAMES[job.kind]
    if not console.is_terminal:

        def on_progress(progress: StageProgress) -> None:
            if progress.note:
                say(console, f"{name}: {progress.note}")
            elif progress.looked:
                say(console, f"{name} step {progress.step}: {progress.measured}, {progress.elapsed_s:.0f} s")

        yield on_progress
        return
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[measured]}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        row = bar.add_task(name, total=None, measured="")

        def on_progress(progress: StageProgress) -> None:
            if progress.note:
                say(bar.console, f"{name}: {progress.note}")
            else:
                bar.update(row, total=progress.max_steps, completed=progress.step, measured=progress.measured)

        yield on_progress
