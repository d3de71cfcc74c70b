"""What a stage is asked, what it tells while it works, and what it leaves."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from async_rlhf.config.schema import Config

StageKind = Literal["sft", "reward_model", "relabel"]


def never() -> bool:
    """For a stage that nobody stops."""
    return False


@dataclass(frozen=True, kw_only=True, slots=True)
class StageJob:
    """One stage to do."""

    kind: StageKind
    config: Config
    target: Path
    """What is made, an absolute path: a model folder, or (relabel) a .parquet file."""
    cached: bool = False
    """The target is a place of the cache: if another process makes the same meanwhile, its result is taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageProgress:
    """Where a stage stands, in steps of its own kind. Made after each of them."""

    step: int
    max_steps: int
    measured: str
    """The last figures, for people; empty: none yet."""
    looked: bool
    """Something was measured at this very step."""
    elapsed_s: float
    note: str = ""
    """A line for people that belongs to no step; the other fields mean nothing then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageResult:
    """A finished stage."""

    target: Path
    lines: tuple[str, ...]
    """What came of it, for people; the first names the target."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageWatch:
    """Who looks on while a stage works."""

    on_progress: Callable[[StageProgress], None]
    stopping: Callable[[], bool] = never
    """Whether the stage shall stop, with a checkpoint, as soon as it can."""

    def note(self, text: str) -> None:
        """Say one line."""
        self.on_progress(StageProgress(step=0, max_steps=0, measured="", looked=False, elapsed_s=0.0, note=text))
