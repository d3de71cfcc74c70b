"""A new lineage: undo batches that the learner cannot, or shall not, train again as they were.

Needed when a run goes on from version c although batches c, c + 1, ... were decided, and training them again would not give the
versions that sampled what waits now: other settings, another seed, a replay that did not come out the same.

The bound stays proven. With U batches decided before and c after, returned groups and live ones obey R_d <= (d - c + 1) * B:
of the groups due by d, those of an undone batch u have u <= d, because no group is trained after its deadline, so they are at
most (min(d, U - 1) - c + 1) * B; the others are at most max(0, d - U + 1) * B by the invariant that held before.
"""

from collections.abc import Sequence

from async_rlhf.events import Annulled
from async_rlhf.ledger import Ledger
from async_rlhf.tickets import TicketState
from async_rlhf.types import ScoredGroup


def annulled(ledger: Ledger, version: int, undone: Sequence[ScoredGroup], newest_faithful: int) -> Annulled:
    """Back to the moment before batch `version` was decided, with every sample whose policy is still part of the run: as an event.

    Args:
        undone: the groups of batches `version` and later.
        newest_faithful: the newest version that is still what it was: `version`, or the one before if its training came out otherwise.
    """
    assert 0 <= version <= ledger.decided, f"version {version} does not exist: {ledger.decided} batches are decided"
    missing = [update for update in range(version, ledger.decided) if update not in ledger.batches]
    assert not missing, f"batches {missing} are no longer kept"
    waiting = [slot.scored for slot in ledger.slots.values() if slot.scored is not None]
    leased = tuple(number for number, slot in ledger.slots.items() if slot.state is not TicketState.WAITING)
    voided = tuple(scored.group.ticket.ticket_id for scored in (*undone, *waiting) if newest_version(scored) > newest_faithful)
    returned = tuple(scored for scored in undone if newest_version(scored) <= newest_faithful)
    return Annulled(version=version, returned=returned, voided=voided, lost=leased)


def newest_version(scored: ScoredGroup) -> int:
    """The newest policy that sampled any token of the group."""
    return max(span.version for rollout in scored.group.rollouts for span in rollout.version_spans)
