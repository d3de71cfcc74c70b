"""What is to be run, everything checked: handed from the command to whoever runs it."""

from dataclasses import dataclass
from pathlib import Path

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

    @property
    def run_id(self) -> str:
        """Names the run in its state, its summary and Ray's namespace."""
        return self.run_folder.name
