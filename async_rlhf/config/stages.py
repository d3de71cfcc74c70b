"""The stages before reinforcement learning: supervised fine-tuning, the reward model, and preferences labelled anew."""

from dataclasses import dataclass, field
from typing import Literal

from async_rlhf.config.fields import number
from async_rlhf.config.prompts import SourceConfig


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning: of `model.path` on `sources`, or, without sources, of the built-in task's start.

    That one stops early, on purpose: reinforcement learning has to have something left to do.
    """

    target_accuracy: float = number(0.40, gt=0.0, le=1.0)
    """Task arithmetic: stop at this greedy accuracy on held-out problems. Other tasks train for `max_steps`."""
    wrong_share: float = number(0.1, ge=0.0, lt=1.0)
    """Task arithmetic: share of training answers that are given carelessly (see ExactTask.careless_answer), on purpose."""
    sources: dict[str, SourceConfig] = field(default_factory=dict[str, SourceConfig])
    """Rows to learn from, with a `completion_column`, all of them once per epoch; empty: the task's own problems."""
    held_out: int = number(200, ge=0, le=10_000_000)
    """Sources: rows, drawn by `seed`, that are never trained and on which loss and perplexity are measured."""
    epochs: float = number(1.0, gt=0.0, le=1e4)
    """Sources: passes over the rows, unless `max_steps` ends it before."""
    max_steps: int = number(3000, ge=1, le=10_000_000)
    """Optimizer steps, at most."""
    batch_size: int = number(128, ge=1, le=65536)
    """Rows per optimizer step."""
    gradient_accumulation: int = number(1, ge=1, le=65536)
    """Forward passes per optimizer step, to save memory; divides batch_size."""
    learning_rate: float = number(2e-3, gt=0.0, le=1.0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up; linear and cosine end at zero."""
    warmup_steps: int = number(20, ge=0, le=1_000_000)
    """Optimizer steps of linear warm-up; a stage that is shorter warms up all the time."""
    max_length: int = number(1024, ge=2, le=1 << 22)
    """Sources: prompt and completion together, tokens; a longer row is left out, and counted, never cut."""
    max_bad_share: float = number(0.1, ge=0.0, le=1.0)
    """Share of a source's rows that may be unusable (empty, of a wrong type, too long) before the stage stops."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; weights and moments are float32."""
    eval_every: int = number(20, ge=1, le=1_000_000)
    """Optimizer steps between two looks at the held-out rows or problems."""
    save_every: int = number(200, ge=0, le=1_000_000)
    """Optimizer steps between two checkpoints from which a killed stage goes on, at a look; 0: none."""
    seed: int = number(0, ge=0, lt=2**31)
    num_cpus: float = number(1.0, ge=0.0, le=4096.0)
    """CPUs of the actor; it computes with as many threads."""
    num_gpus: float = number(0.0, ge=0.0, le=1.0)
    """0: on the CPU."""
    cache_dir: str = ""
    """Where finished starts are kept; empty: $XDG_CACHE_HOME/async_rlhf, or ~/.cache/async_rlhf."""


@dataclass(frozen=True)
class RewardModelConfig:
    """A sequence-classification model with one label, learned from preferences (Bradley-Terry)."""

    path: str = ""
    """Model folder to start from; empty: model.path, or the task's supervised start."""
    sources: dict[str, SourceConfig] = field(default_factory=dict[str, SourceConfig])
    """Preference sets; empty: the task's own pairs, where it has any."""
    num_pairs: int = number(4000, ge=2, le=10_000_000)
    """Of the task's own pairs, where there are no sources; those held out included."""
    held_out: int = number(200, ge=1, le=10_000_000)
    """Pairs, drawn by `seed`, kept to measure the accuracy."""
    epochs: float = number(1.0, gt=0.0, le=1e4)
    batch_size: int = number(64, ge=1, le=65536)
    """Pairs per optimizer step."""
    gradient_accumulation: int = number(1, ge=1, le=65536)
    """As in sft."""
    learning_rate: float = number(1e-3, gt=0.0, le=1.0)
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """As in sft."""
    warmup_steps: int = number(10, ge=0, le=1_000_000)
    """As in sft."""
    max_length: int = number(512, ge=2, le=1 << 22)
    """Prompt and completion together, tokens; longer pairs are left out, and counted."""
    max_bad_share: float = number(0.1, ge=0.0, le=1.0)
    """As in sft."""
    use_margin: bool = False
    """Subtract the pair's margin (`margin_column`) from the difference of its scores."""
    center_coef: float = number(0.0, ge=0.0, le=100.0)
    """Weight of the squared sum of a pair's scores, which keeps them around zero (arXiv 2312.09244)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """As in sft."""
    eval_every: int = number(50, ge=1, le=1_000_000)
    """Optimizer steps between two looks at the held-out pairs."""
    save_every: int = number(200, ge=0, le=1_000_000)
    """As in sft."""
    seed: int = number(0, ge=0, lt=2**31)
    num_cpus: float = number(1.0, ge=0.0, le=4096.0)
    """As in sft."""
    num_gpus: float = number(0.0, ge=0.0, le=1.0)
    """As in sft."""
    cache_dir: str = ""
    """As sft.cache_dir."""


@dataclass(frozen=True)
class RelabelConfig:
    """A preference set whose pairs are ordered anew by `reward`."""

    sources: dict[str, SourceConfig] = field(default_factory=dict[str, SourceConfig])
    """Preference sets; empty: those of reward_model.sources."""
    ties: Literal["drop", "keep"] = "drop"
    """Pairs with equal scores: left out, or kept in their old order with margin 0; counted in any case."""
    batch_size: int = number(64, ge=1, le=65536)
    """Pairs scored at once."""
    rows_per_part: int = number(2000, ge=1, le=10_000_000)
    """Pairs after which the work is on the disk: a killed stage goes on from there."""
    max_bad_share: float = number(0.1, ge=0.0, le=1.0)
    """As in sft."""
    num_cpus: float = number(1.0, ge=0.0, le=4096.0)
    num_gpus: float = number(0.0, ge=0.0, le=1.0)
