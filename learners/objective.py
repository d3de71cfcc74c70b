"""What an algorithm is to the learner: which sequences of a group it trains, and its loss on a microbatch."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from async_rlhf.batching import Microbatch, Unit
from async_rlhf.config import Config
from async_rlhf.losses.base import LossOutput
from async_rlhf.types import ScoredGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """Denominators: counts over the global minibatch, all ranks and microbatches together."""

    groups: float
    """Groups, those included from which the objective selected nothing."""
    sequences: float
    """Completions selected."""
    tokens: float
    """Completion tokens selected."""


class Objective(Protocol):
    """One algorithm; a file of its own, a few lines long."""

    def select(self, scored: ScoredGroup) -> Unit:
        """The sequences of a group that must be trained together; empty where there is nothing to learn."""
        ...

    def loss(self, policy_logprobs: Tensor, microbatch: Microbatch, totals: Totals) -> LossOutput:
        """The microbatch's share of the global loss.

        Args:
            policy_logprobs: [N, T], carries the gradient.
        """
        ...


def make_objective(config: Config) -> Objective:
    """The objective that `algorithm.name` asks for."""
    from learners.dpo import DPO
    from learners.rloo import RLOO

    return {"dpo": DPO, "rloo": RLOO}[config.algorithm.name](config.algorithm)
