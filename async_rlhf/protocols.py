"""Where actors and learners meet: the calls that each side may make on the other, and on the sampling engine.

The remote ones are asynchronous; behind each stands an actor, a fake in a test, or a plain object.
"""

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from async_rlhf.types import Meeting, Rollout, StepReport, WeightsManifest, WeightsVersion


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRequest:
    """Sample `num_samples` completions of one prompt."""

    request_id: str
    prompt_ids: np.ndarray
    """[P] int32"""
    num_samples: int
    seed: int
    """Completion k is sampled from a stream that depends on (seed, k) alone."""
    temperature: float
    """0: greedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Occupancy:
    """How full an engine is."""

    num_running: int
    """Completions in its batch."""
    num_waiting: int
    """Completions admitted that have no place in it yet."""
    kv_use_share: float
    """Of the key/value cache; 0 where the engine keeps none."""


class Engine(Protocol):
    """A sampling engine with continuous batching, used from one thread."""

    @property
    def num_running(self) -> int:
        """Completions admitted and not finished."""
        ...

    @property
    def occupancy(self) -> Occupancy:
        """How full it is now; cheap."""
        ...

    def add(self, request: SampleRequest) -> None:
        """Admit a request."""
        ...

    def step(self) -> list[tuple[str, tuple[Rollout, ...]]]:
        """Advance every running completion by about one token; return the requests that finished."""
        ...

    def load(self, weights: WeightsVersion) -> None:
        """Replace all weights; running completions go on under the new ones. Nothing cached under the old ones is used, but by those that
        were admitted before, under `weights.on_update: keep_cache`.
        """
        ...

    def score(self, token_ids: Sequence[int]) -> np.ndarray:
        """[len - 1] log-probability of token_ids[1:], temperature 1. May step running requests; their results are kept."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...


class ReceivingEngine(Engine, Protocol):
    """One whose workers take weights straight from the learner, as members of a group. After an error it is unusable."""

    def meet(self, meeting: Meeting) -> None:
        """Join the sender's group; that of an earlier sender is left."""
        ...

    def receive(self, manifest: WeightsManifest, noise: bool) -> None:
        """Take part in one transfer and replace all weights, as `load` does; with `noise`, visibly disturbed."""
        ...


class Caller(Protocol):
    """Some actor: a method call by name, with a deadline."""

    name: str

    def call(self, method: str, *args: Any, timeout_s: float) -> Awaitable[Any]:
        """Call and await the answer. References among `args` reach the method as their values."""
        ...


class LearnerClient(Protocol):
    """The learner group, as the train loop sees it."""

    @property
    def ranks(self) -> Sequence[Any]:
        """Its actors now, by rank."""
        ...

    @property
    def lost(self) -> Exception | None:
        """Why it has to start again, if one of the ranks was found dead; a learner that trains may say so itself before."""
        ...

    def train_step(self, update: int, shards: Sequence[Any]) -> Awaitable[Sequence[StepReport]]:
        """Train one batch; shard i (a reference) goes to rank i. One report per rank."""
        ...
