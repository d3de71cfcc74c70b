"""The ledger: where every issued group is, as its events say. No rules: those stand in `replay.py`."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from async_rlhf.events import Annulled, Arrived, Decided, Dropped, Event, Failed, Granted, Lost, Refused, Sampled, SessionBegan, Trained
from async_rlhf.live_groups import LiveGroups, Slot
from async_rlhf.prompts import PromptCursor
from async_rlhf.tickets import PutOutcome, QueueCounters, TicketState

FAILED = "failed"
"""Why a prompt is voided that nobody can score."""

MAX_NAMED = 200
"""Failed prompts that are remembered by name; all of them are counted."""

LOST_HISTORY = "lost_history"
"""Why a scored group is voided whose policy is no longer part of the run."""


@dataclass(kw_only=True, slots=True)
class Tally:
    """Counts of groups since the first ticket."""

    issued: int = 0
    taken: int = 0
    trained: int = 0
    reissued: int = 0
    replaced_in_batch: int = 0
    """Tied groups replaced since the last decision."""
    voided: Counter[str] = field(default_factory=Counter[str])
    dropped: Counter[str] = field(default_factory=Counter[str])
    refused: Counter[str] = field(default_factory=Counter[str])


@dataclass(kw_only=True, slots=True)
class BatchEntry:
    """One decided batch that may have to be trained again."""

    ticket_ids: tuple[int, ...]
    trained: bool = False
    digest: int | None = None
    """Of the weights that it led to; None before it was trained."""
    canary_logprobs: tuple[float, ...] = ()


class Ledger:
    """Live groups in order of issue, decided batches, and all counts."""

    def __init__(self) -> None:
        self.slots = LiveGroups()
        self.batches: dict[int, BatchEntry] = {}
        """By update, as far back as the oldest kept checkpoint."""
        self.requests: dict[str, tuple[int, tuple[int, ...]]] = {}
        """Holder -> number and ticket ids of its last granted request."""
        self.decided = 0
        self.lineage = 0
        """How often history was undone; see lineage.py."""
        self.session = 0
        """Drivers that the run had before this one."""
        self.failed_prompts: dict[str, str] = {}
        """Prompt id -> why it was voided as failed; the first MAX_NAMED of them."""
        self.cursor = PromptCursor(epoch=0, index=0)
        self.tally = Tally()
        self.on_event: Callable[[Event], None] = lambda event: None
        """Called with each event before it takes effect."""

    @property
    def counters(self) -> QueueCounters:
        """A snapshot of all counts."""
        slots, tally = self.slots, self.tally
        return QueueCounters(
            issued=tally.issued,
            leased=slots.number_of(TicketState.LEASED, TicketState.LOST),
            lost=slots.number_of(TicketState.LOST),
            scoring=slots.number_of(TicketState.SCORING),
            waiting=slots.number_of(TicketState.WAITING),
            taken=tally.taken,
            trained=tally.trained,
            reissued=tally.reissued,
            voided=dict(tally.voided),
            failed_prompts=dict(self.failed_prompts),
            dropped=dict(tally.dropped),
            refused=dict(tally.refused),
            skipped_rows=self.cursor.skipped,
        )

    def record(self, event: Event) -> None:
        """Tell whoever listens, then apply."""
        self.on_event(event)
        self.apply(event)

    def apply(self, event: Event) -> None:
        """Let an event take effect."""
        match event:
            case SessionBegan():
                self.session = event.session
                self.requests = {}
                self._set_state(event.lost, TicketState.LOST)
            case Granted():
                self._grant(event)
            case Sampled():
                self._set_state(event.ticket_ids, TicketState.SCORING)
            case Lost():
                self._set_state(event.ticket_ids, TicketState.LOST)
            case Arrived(scored=scored, outcome=PutOutcome.KEPT):
                self.slots.turn(scored.group.ticket.ticket_id, TicketState.WAITING).scored = scored
            case Arrived():
                self.tally.replaced_in_batch += 1
                self._void(event.scored.group.ticket.ticket_id, event.outcome)
            case Refused():
                self.tally.refused[event.outcome] += 1
                if event.outcome is PutOutcome.TOO_OLD:
                    self._set_state((event.ticket_id,), TicketState.LOST)
            case Failed():
                self._fail(event)
            case Decided():
                self._decide(event)
            case Dropped():
                for ticket_id in event.ticket_ids:
                    del self.slots[ticket_id]
                    self.tally.dropped["last_batch"] += 1
            case Trained():
                self._train(event)
            case Annulled():
                self._annul(event)

    def forget_before(self, update: int) -> None:
        """Batches before `update` will never be trained again."""
        self.batches = {number: entry for number, entry in self.batches.items() if number >= update}

    def _grant(self, event: Granted) -> None:
        for ticket in event.tickets:
            if ticket.ticket_id not in self.slots:
                self.slots[ticket.ticket_id] = Slot(ticket=ticket, state=TicketState.LEASED)
                self.tally.issued += 1
            else:
                self.slots.turn(ticket.ticket_id, TicketState.LEASED, ticket)
                self.tally.reissued += 1
        self.cursor = event.cursor.onto(self.cursor)
        self.requests[event.tickets[0].holder] = (event.request, tuple(ticket.ticket_id for ticket in event.tickets))

    def _fail(self, event: Failed) -> None:
        slot = self.slots.turn(event.ticket_id, TicketState.LOST)
        slot.num_failures += 1
        if event.for_good:
            if len(self.failed_prompts) < MAX_NAMED:
                self.failed_prompts[slot.ticket.prompt.prompt_id] = event.reason
            self._void(event.ticket_id, FAILED)

    def _decide(self, event: Decided) -> None:
        for ticket_id in event.ticket_ids:
            del self.slots[ticket_id]
        self.batches[event.update] = BatchEntry(ticket_ids=event.ticket_ids)
        self.decided = event.update + 1
        self.tally.taken += len(event.ticket_ids)
        self.tally.replaced_in_batch = 0

    def _train(self, event: Trained) -> None:
        entry = self.batches[event.update]
        if not entry.trained:
            self.tally.taken -= len(entry.ticket_ids)
            self.tally.trained += len(entry.ticket_ids)
        entry.trained, entry.digest, entry.canary_logprobs = True, event.digest, event.canary_logprobs

    def _annul(self, event: Annulled) -> None:
        for update in range(event.version, self.decided):
            entry = self.batches.pop(update)
            if entry.trained:
                self.tally.trained -= len(entry.ticket_ids)
            else:
                self.tally.taken -= len(entry.ticket_ids)
        self.tally.voided[LOST_HISTORY] += len(event.voided)
        for ticket_id in event.voided:
            if ticket_id in self.slots:  # else it is of an undone batch
                del self.slots[ticket_id]
        for ticket_id in event.lost:  # whoever held it may still bring what the undone policies sampled
            self.slots.turn(ticket_id, TicketState.LOST, replace(self.slots[ticket_id].ticket, holder=""))
        for scored in event.returned:
            ticket = scored.group.ticket
            self.slots[ticket.ticket_id] = Slot(ticket=ticket, state=TicketState.WAITING, scored=scored)
        self.slots = self.slots.in_order()
        self.decided = event.version
        self.tally.replaced_in_batch = 0
        self.lineage += 1

    def _set_state(self, ticket_ids: tuple[int, ...], state: TicketState) -> None:
        for ticket_id in ticket_ids:
            self.slots.turn(ticket_id, state)

    def _void(self, ticket_id: int, reason: str) -> None:
        del self.slots[ticket_id]
        self.tally.voided[reason] += 1
