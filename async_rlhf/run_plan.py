"""What is to be run, everything checked: handed from the command to whoever runs it."""

from dataclasses import dataclass
from pathlib import Path

from async_rlhf.checkpoints import Checkpoint
from async_rlhf.config import Config


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
    """Import path of the task's own metric, for evaluations."""
    session: int = 0
    """Drivers that the run had before this one."""
    checkpoint: Checkpoint | None = None
    """Where the run goes on; None: at version 0."""
    undo: bool = False
    """Settings changed that the learner's updates depend on: batches after the checkpoint are not trained again as they were."""
    evaluate_start: bool = True
    """False: the start was evaluated by an earlier driver."""

    @property
    def separate_reward(self) -> bool:
        """Whether training goes by anything else than the task's own metric."""
        return bool(self.config.reward.parts) or self.reward != self.metric

    @property
    def run_id(self) -> str:
        """Names the run in its state, its summary and Ray's namespace."""
        return self.run_folder.name
