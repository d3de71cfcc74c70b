"""The replay buffer: leases prompts out, keeps finished groups, forms batches of bounded staleness.

A plain object without clocks, threads or Ray: time is an argument, waiting is the business of the actor around it
(`actors/replay_queue.py`). The rules and the proof of the bound stand in `staleness.py`, the life of a ticket in `tickets.py`.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from async_rlhf.errors import RunError
from async_rlhf.prompts import PromptStream
from async_rlhf.staleness import StalenessRule
from async_rlhf.tickets import PutOutcome, QueueCounters, ReplaySettings, TicketState, ticket_seed
from async_rlhf.types import Batch, ScoredGroup, Ticket


@dataclass(kw_only=True, slots=True)
class _Slot:
    ticket: Ticket
    state: TicketState
    lease_ends_s: float
    scored: ScoredGroup | None = None


@dataclass(kw_only=True, slots=True)
class _Tally:
    issued: int = 0
    taken: int = 0
    trained: int = 0
    reissued: int = 0
    replaced_in_batch: int = 0
    voided: Counter[str] = field(default_factory=Counter[str])
    dropped: Counter[str] = field(default_factory=Counter[str])
    refused: Counter[str] = field(default_factory=Counter[str])


class ReplayBuffer:
    """Tickets, finished groups and batch decisions under one staleness rule."""

    def __init__(self, rule: StalenessRule, prompts: PromptStream, settings: ReplaySettings) -> None:
        self._rule = rule
        self._prompts = prompts
        self._settings = settings
        self._slots: dict[int, _Slot] = {}  # live groups, in order of issue
        self._tally = _Tally()
        self._decided = 0
        self._in_training: dict[int, int] = {}  # update -> groups, until trained

    @property
    def decided(self) -> int:
        """U: batches decided so far; also the newest version that can exist."""
        return self._decided

    @property
    def finished(self) -> bool:
        """No further batch will ever be decided."""
        if self._decided >= self._settings.num_updates:
            return True
        return self._prompts.exhausted and not self._slots

    @property
    def counters(self) -> QueueCounters:
        """A snapshot of all counts."""
        states = Counter(slot.state for slot in self._slots.values())
        tally = self._tally
        return QueueCounters(
            issued=tally.issued,
            leased=states[TicketState.LEASED] + states[TicketState.LOST],
            lost=states[TicketState.LOST],
            scoring=states[TicketState.SCORING],
            waiting=states[TicketState.WAITING],
            taken=tally.taken,
            trained=tally.trained,
            reissued=tally.reissued,
            voided=dict(tally.voided),
            dropped=dict(tally.dropped),
            refused=dict(tally.refused),
        )

    def grant(self, holder: str, installed_version: int, max_tickets: int, now_s: float) -> list[Ticket]:
        """Up to `max_tickets` leases for a generator: lost tickets first, then new prompts. Possibly none.

        Raises:
            StalenessError: the version does not exist yet.
        """
        grantable = self._rule.num_grantable(installed_version=installed_version, decided=self._decided, live=len(self._slots))
        self._expire(now_s)
        busy = any(slot.state in (TicketState.LEASED, TicketState.SCORING) for slot in self._slots.values())
        if self._settings.whole_rounds and busy:
            return []
        tickets = self._reissue(holder, installed_version, max_tickets, now_s)
        admitted = self._rule.batch_groups * self._decided + len(self._slots)
        wanted = self._rule.batch_groups * self._settings.num_updates - admitted
        for _ in range(min(max_tickets - len(tickets), grantable, wanted)):
            drawn = self._prompts.draw()
            if drawn is None:
                break
            prompt, epoch = drawn
            ticket = Ticket(
                ticket_id=self._tally.issued,
                prompt=prompt,
                epoch=epoch,
                seed=ticket_seed(self._settings.seed, self._tally.issued),
                deadline=self._rule.deadline(installed_version),
                attempt=0,
                holder=holder,
            )
            self._slots[ticket.ticket_id] = _Slot(ticket=ticket, state=TicketState.LEASED, lease_ends_s=now_s + self._settings.lease_s)
            self._tally.issued += 1
            tickets.append(ticket)
        return tickets

    def mark_scoring(self, tickets: Iterable[Ticket], now_s: float) -> None:
        """The groups are sampled and with the scorer: their generator may die now without losing them."""
        for ticket in tickets:
            slot = self._slots.get(ticket.ticket_id)
            if slot is not None and slot.state is TicketState.LEASED and slot.ticket.attempt == ticket.attempt:
                slot.state = TicketState.SCORING
                slot.lease_ends_s = now_s + self._settings.lease_s

    def put(self, scored: ScoredGroup) -> PutOutcome:
        """Take a finished group in. Idempotent; never blocks on capacity, which admission alone bounds."""
        ticket = scored.group.ticket
        slot = self._slots.get(ticket.ticket_id)
        if slot is None or slot.state is TicketState.WAITING:
            return self._refuse(PutOutcome.DUPLICATE)
        if slot.ticket.attempt != ticket.attempt or slot.ticket.holder != ticket.holder or slot.state is TicketState.LOST:
            return self._refuse(PutOutcome.STALE_ATTEMPT)
        if self._rule.deadline(scored.group.oldest_version) < slot.ticket.deadline:
            slot.state = TicketState.LOST
            return self._refuse(PutOutcome.TOO_OLD)
        if scored.tied and self._tally.replaced_in_batch < self._settings.max_replacements_per_batch:
            self._tally.replaced_in_batch += 1
            self._void(ticket.ticket_id, PutOutcome.TIED)
            return PutOutcome.TIED
        slot.state, slot.scored = TicketState.WAITING, scored
        return PutOutcome.KEPT

    def fail(self, tickets: Iterable[Ticket], reason: str) -> None:
        """Sampling or scoring of these attempts failed: each goes out again, or is voided after `max_attempts`.

        Raises:
            RunError: more than `max_failed_share` of all prompts were voided as failed.
        """
        for ticket in tickets:
            slot = self._slots.get(ticket.ticket_id)
            if slot is None or slot.state is TicketState.WAITING or slot.ticket.attempt != ticket.attempt:
                continue
            slot.state = TicketState.LOST
            if ticket.attempt + 1 >= self._settings.max_attempts:
                self._void(ticket.ticket_id, f"failed: {reason}")
        self._check_failed_share(reason)

    def _check_failed_share(self, reason: str) -> None:
        failed = sum(count for why, count in self._tally.voided.items() if why.startswith("failed"))
        if failed >= 20 and failed > self._settings.max_failed_share * self._tally.issued:
            raise RunError(
                f"{failed} of {self._tally.issued} prompts failed {self._settings.max_attempts} times each, more than "
                f"queue.max_failed_share ({self._settings.max_failed_share:g}) allows; the last reason: {reason}"
            )

    def lose_holder(self, holder: str) -> int:
        """A generator is gone: its leases may go out again. Returns how many were lost."""
        lost = [slot for slot in self._slots.values() if slot.ticket.holder == holder and slot.state is TicketState.LEASED]
        for slot in lost:
            slot.state = TicketState.LOST
        return len(lost)

    def decide(self) -> Batch | None:
        """Form the next batch if the rules allow it now, else None.

        The bound is asserted here, for every token of the batch.
        """
        if self.finished:
            return None
        chosen = self._pick()
        if chosen is None:
            return None
        update = self._decided
        batch = Batch(update=update, groups=tuple(slot.scored for slot in chosen if slot.scored is not None))
        for scored in batch.groups:
            for span in (span for rollout in scored.group.rollouts for span in rollout.version_spans):
                assert self._rule.holds(update=update, version=span.version), (
                    f"staleness bound broken: update {update} would train tokens of version {span.version}, "
                    f"max_staleness {self._rule.max_staleness} (ticket {scored.group.ticket.ticket_id})"
                )
            del self._slots[scored.group.ticket.ticket_id]
        self._decided += 1
        self._tally.taken += len(batch.groups)
        self._tally.replaced_in_batch = 0
        self._in_training[update] = len(batch.groups)
        return batch

    def mark_trained(self, update: int) -> None:
        """The learner finished `update`. Idempotent."""
        num_groups = self._in_training.pop(update, 0)
        self._tally.taken -= num_groups
        self._tally.trained += num_groups

    def _pick(self) -> list[_Slot] | None:
        size = self._rule.batch_groups
        if len(self._slots) < size and self._prompts.exhausted:
            return self._pick_last()
        if self._settings.order == "ticket":
            first = list(self._slots.values())[:size]
            complete = len(first) == size and all(slot.state is TicketState.WAITING for slot in first)
            return first if complete else None
        waiting = [slot for slot in self._slots.values() if slot.state is TicketState.WAITING]
        if len(waiting) < size:
            return None
        chosen = sorted(waiting, key=lambda slot: (slot.ticket.deadline, slot.ticket.ticket_id))[:size]
        taken = {slot.ticket.ticket_id for slot in chosen}
        left = [slot.ticket.deadline for ticket_id, slot in self._slots.items() if ticket_id not in taken]
        return chosen if self._rule.may_decide(decided=self._decided, left_deadlines=left) else None

    def _pick_last(self) -> list[_Slot] | None:
        """The prompts ran out with less than a batch live: train a short batch, or drop the rest, by config."""
        rest = list(self._slots.values())
        if any(slot.state is not TicketState.WAITING for slot in rest):
            return None
        keep = len(rest) - len(rest) % self._settings.batch_multiple if self._settings.last_batch == "short" else 0
        for slot in rest[keep:]:
            del self._slots[slot.ticket.ticket_id]
            self._tally.dropped["last_batch"] += 1
        return rest[:keep] or None

    def _reissue(self, holder: str, installed_version: int, max_tickets: int, now_s: float) -> list[Ticket]:
        tickets: list[Ticket] = []
        deadline = self._rule.deadline(installed_version)
        for rank, slot in enumerate(self._slots.values()):
            if len(tickets) == max_tickets:
                break
            if slot.state is not TicketState.LOST or not self._may_reissue(rank, slot, deadline):
                continue
            slot.ticket = replace(slot.ticket, attempt=slot.ticket.attempt + 1, deadline=deadline, holder=holder)
            slot.state, slot.lease_ends_s = TicketState.LEASED, now_s + self._settings.lease_s
            self._tally.reissued += 1
            tickets.append(slot.ticket)
        return tickets

    def _may_reissue(self, rank: int, slot: _Slot, deadline: int) -> bool:
        if self._settings.order == "ticket":
            return self._decided + rank // self._rule.batch_groups <= deadline
        others = (other.ticket.deadline for other in self._slots.values())
        return self._rule.may_reissue(
            new_deadline=deadline, old_deadline=slot.ticket.deadline, decided=self._decided, live_deadlines=others
        )

    def _expire(self, now_s: float) -> None:
        for slot in self._slots.values():
            if slot.state in (TicketState.LEASED, TicketState.SCORING) and slot.lease_ends_s <= now_s:
                slot.state = TicketState.LOST

    def _void(self, ticket_id: int, reason: str) -> None:
        del self._slots[ticket_id]
        self._tally.voided[reason] += 1

    def _refuse(self, outcome: PutOutcome) -> PutOutcome:
        self._tally.refused[outcome] += 1
        return outcome
