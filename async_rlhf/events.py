"""What happens to groups, as facts: the history of a replay buffer, and the records of its journal.

A Ledger is what its events made of it and nothing else, so that a journal of them is all that a recovery needs.
"""

from dataclasses import dataclass

from async_rlhf.prompts import PromptCursor
from async_rlhf.tickets import PutOutcome
from async_rlhf.types import ScoredGroup, Ticket


@dataclass(frozen=True, kw_only=True, slots=True)
class Granted:
    """Leases went out: new tickets (attempt 0) and lost ones."""

    tickets: tuple[Ticket, ...]
    request: int
    """The holder's number of this request: asked again, it gets the same tickets."""
    cursor: PromptCursor
    """Of the prompt stream, after these were drawn, without the files that earlier ones list: see PromptCursor.since."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """These groups are with a scorer: their generator may die now without losing them."""

    ticket_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lost:
    """Nobody works on these leases any more; they wait for a new holder."""

    ticket_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrived:
    """A scored group came in and was kept, or, tied, was voided."""

    scored: ScoredGroup
    outcome: PutOutcome


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """A put was turned away; one that is too old loses its lease."""

    ticket_id: int
    outcome: PutOutcome


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed:
    """Nobody could score this group; it is to be sampled and scored again, or, for good, its prompt is voided."""

    ticket_id: int
    reason: str
    for_good: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Decided:
    """Batch `update` is these groups, in this order."""

    update: int
    ticket_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Dropped:
    """The prompts ran out with these groups too few for a batch."""

    ticket_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """The learner finished `update`; its weights have this digest."""

    update: int
    digest: int
    canary_logprobs: tuple[float, ...]
    """Of the canary text under these weights, nats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Annulled:
    """The lineage rises: batches from `version` on are undone, because the learner will not train them again as they were."""

    version: int
    returned: tuple[ScoredGroup, ...]
    """Groups of the undone batches, free for another one."""
    voided: tuple[int, ...]
    """Tickets of scored groups with a token that a policy beyond `version` sampled: that policy no longer exists."""
    lost: tuple[int, ...]
    """Leases revoked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionBegan:
    """Another driver took the run over: everything that was under way died with the one before."""

    session: int
    lost: tuple[int, ...]


Event = SessionBegan | Granted | Sampled | Lost | Arrived | Refused | Failed | Decided | Dropped | Trained | Annulled
