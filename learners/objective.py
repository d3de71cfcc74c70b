"""What an algorithm is to the learner: which sequences of a group it trains, and its loss on a microbatch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from async_rlhf.batching import Microbatch, Unit, sequence_of
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


class ValueObjective(Protocol):
    """What an algorithm with a critic adds: targets when a batch arrives, and the critic's loss."""

    def estimate(self, units: Sequence[Unit], sum_over_ranks: Callable[[Tensor], Tensor]) -> tuple[list[Unit], dict[str, float]]:
        """This rank's share of the whole batch with advantages and returns, and global metrics.

        Args:
            units: with proximal_logprobs and values.
            sum_over_ranks: elementwise.
        """
        ...

    def loss(self, values: Tensor, microbatch: Microbatch, totals: Totals) -> LossOutput:
        """The microbatch's share of the critic's global loss.

        Args:
            values: [N, T], carries the gradient.
        """
        ...


class Objective:
    """One algorithm; a file of its own, a few lines long."""

    critic: ValueObjective | None = None
    """Not None: a critic is trained beside the policy."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def select(self, scored: ScoredGroup) -> Unit:
        """The sequences of a group that must be trained together; empty where there is nothing to learn. Here: all K."""
        return tuple(sequence_of(scored, index) for index in range(len(scored.scores)))

    def loss(self, policy_logprobs: Tensor, microbatch: Microbatch, totals: Totals) -> LossOutput:
        """The microbatch's share of the global loss.

        Args:
            policy_logprobs: [N, T], carries the gradient.
        """
        raise NotImplementedError
