"""The stages before reinforcement learning: the supervised start, and the reward model."""

from dataclasses import dataclass, field

from async_rlhf.config.fields import number
from async_rlhf.config.prompts import SourceConfig


@dataclass(frozen=True)
class SFTConfig:
    """The supervised start. A built-in task's stops early, on purpose: reinforcement learning has to have something left to do."""

    target_accuracy: float = number(0.40, gt=0.0, le=1.0)
    """Stop at this greedy accuracy on held-out problems."""
    max_steps: int = number(3000, ge=1, le=1_000_000)
    batch_size: int = number(128, ge=1, le=65536)
    learning_rate: float = number(2e-3, gt=0.0, le=1.0)
    """Constant, after a short warm-up."""
    wrong_share: float = number(0.1, ge=0.0, lt=1.0)
    """Share of training answers that are given carelessly (see Task.careless_answer), on purpose."""
    eval_every: int = number(20, ge=1, le=1_000_000)
    """Optimizer steps between two looks at the held-out accuracy."""
    seed: int = number(0, ge=0, lt=2**31)
    cache_dir: str = ""
    """Where finished starts are kept; empty: $XDG_CACHE_HOME/async_rlhf, or ~/.cache/async_rlhf."""
    sources: dict[str, SourceConfig] = field(default_factory=dict[str, SourceConfig])
    """Rows to learn from, with a `completion_column`; empty: the task's own problems."""


@dataclass(frozen=True)
class RewardModelConfig:
    """A sequence-classification model with one label, learned from preferences (Bradley-Terry)."""

    path: str = ""
    """Model folder to start from; empty: model.path, or the task's supervised start."""
    sources: dict[str, SourceConfig] = field(default_factory=dict[str, SourceConfig])
    """Preference sets; empty: the task's own pairs, where it has any."""
    held_out: int = number(200, ge=1, le=10_000_000)
    """Pairs kept to measure the accuracy."""
    epochs: float = number(1.0, gt=0.0, le=1e4)
    batch_size: int = number(64, ge=1, le=65536)
    """Pairs per optimizer step."""
    learning_rate: float = number(1e-3, gt=0.0, le=1.0)
    max_length: int = number(512, ge=2, le=1 << 22)
    """Prompt and completion together, tokens; longer pairs are left out, and counted."""
    use_margin: bool = False
    """Subtract the pair's margin (`margin_column`) from the difference of its scores."""
    center_coef: float = number(0.0, ge=0.0, le=100.0)
    """Weight of the squared sum of a pair's scores, which keeps them around zero (arXiv 2312.09244)."""
    seed: int = number(0, ge=0, lt=2**31)
    cache_dir: str = ""
    """As sft.cache_dir."""
