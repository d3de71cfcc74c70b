"""The live groups of a ledger, and how many of them there are by state and deadline: questions that every grant and decision asks."""

from collections import Counter
from dataclasses import dataclass

from async_rlhf.tickets import TicketState
from async_rlhf.types import ScoredGroup, Ticket


@dataclass(kw_only=True, slots=True)
class Slot:
    """One live group. Its ticket and state are changed through `LiveGroups.turn`, which counts."""

    ticket: Ticket
    state: TicketState
    lease_ends_s: float = float("inf")
    """On the clock of whoever keeps the buffer; no part of the history."""
    scored: ScoredGroup | None = None
    num_failures: int = 0
    """How often nobody could score it. Lost leases do not count: they are nobody's fault."""


class LiveGroups(dict[int, Slot]):
    """Ticket id -> slot, in order of issue. Fill and empty it with `groups[number] = slot` and `del groups[number]` alone."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: Counter[tuple[TicketState, int]] = Counter()
        """By state and deadline; few, because deadlines are at most max_staleness updates apart."""

    def __setitem__(self, number: int, slot: Slot) -> None:
        if number in self:
            del self[number]
        super().__setitem__(number, slot)
        self._count(slot, 1)

    def __delitem__(self, number: int) -> None:
        self._count(self[number], -1)
        super().__delitem__(number)

    def turn(self, number: int, state: TicketState, ticket: Ticket | None = None) -> Slot:
        """Give a group another state, and perhaps another ticket; returns its slot."""
        slot = self[number]
        self._count(slot, -1)
        slot.state, slot.ticket = state, ticket or slot.ticket
        self._count(slot, 1)
        return slot

    def number_of(self, *states: TicketState) -> int:
        """Groups in any of these states."""
        return sum(count for (state, _), count in self._counts.items() if state in states)

    def deadlines_of(self, *states: TicketState) -> Counter[int]:
        """Deadline -> groups in any of these states."""
        found: Counter[int] = Counter()
        for (state, deadline), count in self._counts.items():
            if state in states:
                found[deadline] += count
        return found

    def in_order(self) -> "LiveGroups":
        """The same groups, sorted by ticket id."""
        ordered = LiveGroups()
        for number in sorted(self):
            ordered[number] = self[number]
        return ordered

    def _count(self, slot: Slot, by: int) -> None:
        key = slot.state, slot.ticket.deadline
        self._counts[key] += by
        if not self._counts[key]:
            del self._counts[key]
