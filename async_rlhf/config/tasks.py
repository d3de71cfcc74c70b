"""The built-in tasks, and the one that reads datasets."""

from dataclasses import dataclass, field
from typing import Literal

from async_rlhf.config.fields import number


@dataclass(frozen=True)
class MiniSummaryConfig:
    """What the prompts of mini_summary list, and how carefully their author writes."""

    min_facts: int = number(6, ge=1, le=20)
    """Facts in a prompt, at least."""
    max_facts: int = number(10, ge=1, le=20)
    num_rumours: int = number(3, ge=0, le=16)
    """Entries without a salience, shuffled among the facts; stating one is a hallucination."""
    num_keys: int = number(13, ge=1, le=26)
    """Letters that name a fact or a rumour; no prompt has one twice."""
    num_values: int = number(4, ge=2, le=10)
    """Digits that a fact or a rumour may say of its letter."""
    max_salience: int = number(9, ge=1, le=9)
    """Saliences go from 1 to this, each as likely as the other."""
    max_statements: int = number(5, ge=1, le=20)
    """Statements that a summary may make; further ones cost."""
    copy_error: float = number(0.05, ge=0.0, le=1.0)
    """How often the author writes down a wrong value."""
    rumour_share: float = number(0.1, ge=0.0, le=1.0)
    """How often the author states a rumour."""


@dataclass(frozen=True)
class TaskConfig:
    name: Literal["arithmetic", "mini_summary", "dataset"] = "arithmetic"
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
    """Seed of the problems, and of the train / held-out split."""
    mini_summary: MiniSummaryConfig = field(default_factory=MiniSummaryConfig)

    @property
    def metric_name(self) -> str:
        """What evaluations measure, in a word."""
        return {"arithmetic": "accuracy", "mini_summary": "gold", "dataset": "score"}[self.name]
