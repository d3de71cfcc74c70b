"""The built-in tasks, and the one that reads datasets."""

from dataclasses import dataclass
from typing import Literal

from async_rlhf.config.fields import number


@dataclass(frozen=True)
class TaskConfig:
    name: Literal["arithmetic", "dataset"] = "arithmetic"
    """`dataset`: the rows of prompts.sources, with your own model.path and reward."""
    num_operands: int = number(2, ge=2, le=6)
    """arithmetic: numbers to add in one problem."""
    max_operand: int = number(99, ge=1, le=9999)
    """arithmetic: largest number in a problem."""
    held_out: int = number(500, ge=1, le=100_000)
    """Problems kept for evaluation; none of them is ever trained."""
    num_train: int = number(10_000, ge=1, le=10_000_000)
    """Problems to train on; all that are not held out, if those are fewer."""
    seed: int = number(0, ge=0, lt=2**31)
    """Seed of the train / held-out split."""
