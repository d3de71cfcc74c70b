"""What is to be run, everything checked: handed from the command to whoever runs it."""

from dataclasses import dataclass
from pathlib import Path

from async_rlhf.checkpoints import Checkpoint
from async_rlhf.config import Config
from async_rlhf.errors import ConfigError
from async_rlhf.rewards import absolute_reward
from async_rlhf.tasks import load_task


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """One run."""

    config: Config
    run_folder: Path
    model_folder: Path
    """Of the initial policy, which is the reference too."""
    reward: str
    """Import path of the training reward."""
    metric: str
    """Import path of the task's own metric, for evaluations; empty: they measure the reward."""
    session: int = 0
    """Drivers that the run had before this one."""
    checkpoint: Checkpoint | None = None
    """Where the run goes on; None: at version 0."""
    undo: bool = False
    """Settings changed that the learner's updates depend on: batches after the checkpoint are not trained again as they were."""
    evaluate_start: bool = True
    """False: the start was evaluated by an earlier driver."""

    @property
    def run_id(self) -> str:
        """Names the run in its state, its summary and Ray's namespace."""
        return self.run_folder.name


def reward_and_metric(config: Config) -> tuple[str, str]:
    """Import paths of what a run is trained on, and of what its evaluations measure; empty where reward.parts do it.

    Raises:
        ConfigError: a dataset task without a reward.
    """
    own = absolute_reward(config.reward.function) if config.reward.function else ""
    if config.task.name != "dataset":
        metric = load_task(config.task).reward
        return own or metric, metric
    if not own and not config.reward.parts:
        raise ConfigError("task.name dataset has no reward of its own; give reward.function=file.py:score, or reward.parts")
    return own, own
