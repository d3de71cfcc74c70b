"""Where prompts come from, and what an evaluation asks."""

from dataclasses import dataclass, field
from typing import Literal

from async_rlhf.config.fields import number
from async_rlhf.config.rewards import JudgeConfig


@dataclass(frozen=True)
class SourceConfig:
    """One set of rows, read by the library `datasets`."""

    path: str = ""
    """Hub id; a local .parquet, .jsonl, .json, .csv or .arrow file, or a folder of such files; a folder written by `save_to_disk`;
    or `sqlite:///FILE?table=NAME` (live sources)."""
    subset: str = ""
    """Name of the hub dataset's configuration; empty: its default."""
    split: str = "train"
    """Split, with a slice where the library knows one, for instance `train[:1000]`."""
    weight: float = number(1.0, gt=0.0, le=1e9)
    """How often prompts are drawn from it, relative to the other sources."""
    prompt_column: str = "prompt"
    """Text, or chat messages: a list of {role, content}. An assistant's message at the end is the reference answer."""
    template: str = ""
    """What the policy reads: a format string over the row's columns, for instance `Question: {question}`; empty: the prompt column."""
    completion_column: str = ""
    """The reference answer: what a supervised stage learns, and what win-rates compare with; empty: there is none."""
    chosen_column: str = "chosen"
    """Preference sets: the better completion, as text or as chat messages."""
    rejected_column: str = "rejected"
    margin_column: str = ""
    """Preference sets: by how much the chosen one is better; empty: not known."""
    streaming: bool = False
    """Read as it is used: for sets larger than memory."""
    live: bool = False
    """Rows are added while the run goes on; they are picked up, and drawn before old rows come round again."""


@dataclass(frozen=True)
class PromptsConfig:
    """What the policy is asked (task dataset)."""

    sources: dict[str, SourceConfig] = field(default_factory=dict[str, SourceConfig])
    """Name -> source; drawn from by weight."""
    held_out: int = number(200, ge=0, le=10_000_000)
    """Rows at the beginning of each source that are kept for evaluations and never trained. Where `evaluation.sources` are given, and of
    live sources, none are."""
    min_tokens: int = number(1, ge=1, le=1 << 22)
    """Shorter prompts are skipped, and counted."""
    max_tokens: int = number(0, ge=0, le=1 << 22)
    """Longer prompts are skipped, and counted; 0: what generator.max_model_len leaves beside max_new_tokens."""
    chat: Literal["auto", "off"] = "auto"
    """`auto`: chat messages go through the tokenizer's chat template; `off`: they are refused."""
    system: str = ""
    """A system message put before chat prompts that have none."""
    shuffle_rows: int = number(10_000, ge=1, le=10_000_000)
    """Streaming sources are shuffled in blocks of so many rows, one of which is in memory."""
    poll_s: float = number(5.0, gt=0.0, le=1e6)
    """Seconds between two looks for new rows of a live source."""
    max_bad_share: float = number(0.1, ge=0.0, le=1.0)
    """Share of rows that may be unusable (no text, wrong type) before the run stops (looked at after 20 such rows)."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What is asked before, between and after the updates."""

    every_updates: int = number(0, ge=0, le=10_000_000)
    """Updates between two evaluations while training goes on; 0: none between."""
    num_prompts: int = number(0, ge=0, le=10_000_000)
    """Held-out prompts asked, the first ones; 0: all."""
    max_inflight: int = number(8, ge=1, le=65536)
    """Completions of an evaluation sampled at once beside the training ones, all generators together."""
    sampled: bool = False
    """Also sample at the training temperature, and estimate the KL to the reference there."""
    sources: dict[str, SourceConfig] = field(default_factory=dict[str, SourceConfig])
    """Held-out rows of their own; empty: those kept from `prompts.sources` or from the task."""
    winrate: Literal["off", "metric", "reward", "judge"] = "off"
    """Who decides which of two completions is better: a higher score of the task's metric, of the run's reward, or a judge."""
    against: str = ""
    """Model folder whose greedy completions are the opponents; empty: the references (see `completion_column`)."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
