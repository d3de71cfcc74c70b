"""The life of a ticket: its states, what may become of its group, and the counters that account for each.

    grant -> LEASED -> (mark_scoring) SCORING -> (put) WAITING -> (decide) taken -> (mark_trained) trained
               |  ^            |                    |
               v  | grant      v fail               `-> voided: tied, failed  |  dropped: last_batch
              LOST <-----------'

Nothing is forgotten: issued == leased + scoring + waiting + taken + trained + voided + dropped, where `leased` counts the
lost ones too, which wait for a new holder.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal


class TicketState(StrEnum):
    LEASED = "leased"
    LOST = "lost"
    SCORING = "scoring"
    WAITING = "waiting"


class PutOutcome(StrEnum):
    """What became of a group that was put."""

    KEPT = "kept"
    TIED = "tied"
    """Voided: all scores equal; a fresh prompt takes its place."""
    STALE_ATTEMPT = "stale_attempt"
    """Refused: the ticket was leased again meanwhile."""
    TOO_OLD = "too_old"
    """Refused and reissued: its oldest token would break the bound at its deadline."""
    DUPLICATE = "duplicate"
    """Refused: the same group is already there, or was trained or voided."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplaySettings:
    """How the buffer behaves; the staleness bound itself is `StalenessRule`."""

    num_updates: int
    """Batches to decide; no more prompts are admitted than they need."""
    order: Literal["ready", "ticket"] = "ready"
    max_replacements_per_batch: int = 0
    """Tied groups replaced per decision; further ones stay: nothing to prefer in them."""
    max_attempts: int = 3
    """Failures of one prompt before it is voided."""
    max_failed_share: float = 0.2
    lease_s: float = 300.0
    last_batch: Literal["short", "drop"] = "short"
    batch_multiple: int = 1
    """A short last batch is cut to a multiple of this (ranks x minibatches)."""
    whole_rounds: bool = False
    """Grant only when no group is being sampled or scored, so that each round of requests is the same in every run."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class QueueCounters:
    """Where all issued groups are. Counts of groups."""

    issued: int
    leased: int
    """Held by a generator, or lost and waiting for a new holder."""
    lost: int
    """Part of `leased`."""
    scoring: int
    waiting: int
    taken: int
    trained: int
    reissued: int
    voided: Mapping[str, int]
    """Reason -> count."""
    dropped: Mapping[str, int]
    refused: Mapping[str, int]
    failed_prompts: Mapping[str, str] = field(default_factory=dict[str, str])
    """Prompt id -> why nobody could score it: the first of those voided as failed."""
    skipped_rows: Mapping[str, int] = field(default_factory=dict[str, int])
    """Reason -> rows of the prompts' sources that no prompt was made of, each time they came round."""

    @property
    def balanced(self) -> bool:
        """The counting identity."""
        live = self.leased + self.scoring + self.waiting
        return self.issued == live + self.taken + self.trained + sum(self.voided.values()) + sum(self.dropped.values())


def ticket_seed(run_seed: int, ticket_id: int) -> int:
    """A 63-bit seed that depends on the run's seed and the ticket alone (SplitMix64)."""
    mixed = (run_seed * 0x9E3779B97F4A7C15 + ticket_id + 1) * 0x9E3779B97F4A7C15 % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
    return (mixed ^ (mixed >> 31)) >> 1
