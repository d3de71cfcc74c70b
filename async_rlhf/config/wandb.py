"""Weights & Biases beside the run folder."""

from dataclasses import dataclass
from typing import Literal

from async_rlhf.config.fields import number


@dataclass(frozen=True)
class WandbConfig:
    mode: Literal["off", "offline", "online"] = "off"
    """`offline` writes into RUN/wandb, for `wandb sync` later; `online` needs a login (`wandb login`, or WANDB_API_KEY)."""
    project: str = "async-rlhf"
    entity: str = ""
    """Team or user; empty: the login's own."""
    close_s: float = number(15.0, ge=0.0, le=3600.0)
    """How long the end of a run waits for Weights & Biases to take its last rows; what is left is in RUN/wandb."""
