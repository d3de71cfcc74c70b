"""What a completion is worth: one reward, or a weighted sum of several."""

from dataclasses import dataclass, field
from typing import Literal

from async_rlhf.config.fields import number

BACKOFF_JITTER = 0.5
"""A wait is drawn from (1 - this, 1 + this) times its length, so that many who failed at once do not come back at once."""


@dataclass(frozen=True)
class JudgeConfig:
    """A language model behind an OpenAI-compatible endpoint."""

    url: str = ""
    """Base address, for instance http://127.0.0.1:8000/v1."""
    model: str = ""
    """Name that the endpoint knows it by."""
    mode: Literal["pointwise", "pairwise"] = "pointwise"
    """`pointwise`: a grade for each completion; `pairwise`: each completion of a group against the others, its share of wins."""
    rubric: str = ""
    """Path of a text file: what the judge is told, with {prompt} and {completion} (pointwise), or {prompt}, {first} and {second}
    (pairwise); empty: a general one."""
    max_grade: float = number(10.0, gt=0.0, le=1e6)
    """Grades go from 0 to this; a score is grade / max_grade."""
    max_tokens: int = number(16, ge=1, le=1 << 16)
    """Length limit of the judge's answer."""
    token_env: str = ""
    """Environment variable that holds the bearer token; empty: none is sent."""
    allow_plain_http: bool = False
    """Allow http:// to another machine; else only to this one."""


@dataclass(frozen=True)
class RewardPartConfig:
    """One reward of a weighted sum."""

    kind: Literal["function", "model", "http", "judge"] = "function"
    weight: float = number(1.0, ge=-1e6, le=1e6)
    function: str = ""
    """function: see reward.function."""
    processes: int = number(0, ge=0, le=1024)
    """function: worker processes, so that a slow one blocks nobody; 0: in the scorer's own process, without deadline."""
    path: str = ""
    """model: folder of a sequence-classification model with one label; empty: `train` makes one with the settings of `reward_model`, or
    finds it in the cache."""
    max_length: int = number(0, ge=0, le=1 << 22)
    """model: longest text it reads, tokens; of longer ones the beginning is left out. 0: as many as the model has positions."""
    add_eos: bool = True
    """model: end texts that are no chat with the end-of-sequence token, as TRL's reward training does, where the tokenizer has one."""
    batch_size: int = number(32, ge=1, le=65536)
    """Completions per forward pass, per request, or per call of a function in worker processes or a coroutine."""
    url: str = ""
    """http: where batches are posted, see docs/rewards.md."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    token_env: str = ""
    """http: environment variable that holds the bearer token; empty: none is sent."""
    allow_plain_http: bool = False
    """http: allow http:// to another machine; else only to this one."""
    concurrency: int = number(8, ge=1, le=4096)
    """http, judge, asynchronous functions: calls at once."""
    deadline_s: float = number(30.0, gt=0.0, le=1e6)
    """Longest time of one attempt at a call."""
    retries: int = number(4, ge=0, le=60)
    """Further attempts after a failed one."""
    backoff_s: float = number(1.0, ge=0.0, le=1e6)
    """Wait before the first further attempt; doubles with each. A service that is away for longer ends the run."""
    max_response_mib: float = number(16.0, gt=0.0, le=1 << 20)
    """http, judge: largest answer that is read."""

    @property
    def longest_call_s(self) -> float:
        """The longest that one call may take, all its attempts and waits together, seconds."""
        waits_s = self.backoff_s * (2**self.retries - 1) * (1 + BACKOFF_JITTER)
        return self.deadline_s * (self.retries + 1) + waits_s


@dataclass(frozen=True)
class RewardConfig:
    missing_eos_penalty: float | None = number(None, ge=-1e30, le=1e30)
    """Score of a completion that the length limit cut; null: its own."""
    missing_eos_percentile: float | None = number(None, ge=0.0, le=100.0)
    """The same as a percentile of the scores of recent batches; null: its own."""
    normalize: bool = False
    """Shift and scale scores by the running mean and standard deviation of the batches before."""
    function: str = ""
    """`module:function` or `path/to/file.py:function` of `score(prompts, completions, **columns) -> list[float]`; empty: the task's own."""
    parts: dict[str, RewardPartConfig] = field(default_factory=dict[str, RewardPartConfig])
    """Name -> reward; the score is their weighted sum, and each is logged. Empty: `function` alone."""
    count: int = number(0, ge=0, le=4096)
    """Actors that compute rewards; 0: the scorers do it, beside the reference's log-probabilities."""
    num_cpus: float = number(1.0, ge=0.0, le=4096.0)
    num_gpus: float = number(0.0, ge=0.0, le=64.0)
