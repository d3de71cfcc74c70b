"""The replay buffer: leases prompts out, keeps finished groups, forms batches of bounded staleness.

A plain object without clocks, threads or Ray: time is an argument, waiting is the business of the actor around it
(`actors/replay_queue.py`). It decides and records; where every group is stands in its Ledger. The rules and the proof of the
bound stand in `staleness.py`, the life of a ticket in `tickets.py`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import islice

from async_rlhf.errors import RewardError
from async_rlhf.events import Arrived, Decided, Dropped, Failed, Granted, Lost, Refused, Sampled, Trained
from async_rlhf.ledger import FAILED, Ledger
from async_rlhf.live_groups import Slot
from async_rlhf.prompts import PromptStream
from async_rlhf.staleness import StalenessRule
from async_rlhf.tickets import PutOutcome, QueueCounters, ReplaySettings, TicketState, ticket_seed
from async_rlhf.types import Batch, ScoredGroup, Ticket

BUSY = (TicketState.LEASED, TicketState.SCORING)
"""Whose leases may expire."""

MIN_FAILURES = 20
"""Prompts that must have failed before their share ends the run."""


class ReplayBuffer:
    """Tickets, finished groups and batch decisions under one staleness rule."""

    def __init__(self, rule: StalenessRule, prompts: PromptStream, settings: ReplaySettings, ledger: Ledger | None = None) -> None:
        """
        Args:
            prompts: stands where the ledger's cursor stands.
            ledger: what happened so far; None: nothing.
        """
        self._rule = rule
        self._prompts = prompts
        self._settings = settings
        self.ledger = ledger or Ledger()
        self._first_expiry_s = float("-inf")
        """No lease ends before; -inf: not known."""

    @property
    def decided(self) -> int:
        """U: batches decided so far; also the newest version that can exist."""
        return self.ledger.decided

    @property
    def finished(self) -> bool:
        """No further batch will ever be decided."""
        if self.decided >= self._settings.num_updates:
            return True
        return self._prompts.exhausted and not self.ledger.slots

    @property
    def counters(self) -> QueueCounters:
        """A snapshot of all counts."""
        return self.ledger.counters

    def grant(self, holder: str, installed_version: int, max_tickets: int, now_s: float, request: int = -1) -> list[Ticket]:
        """Up to `max_tickets` leases for a generator: lost tickets first, then new prompts. Possibly none.

        Args:
            request: numbers the holder's requests; the same number again gives the same tickets, as far as it still holds them.
        Raises:
            StalenessError: the version does not exist yet.
        """
        slots = self.ledger.slots
        grantable = self._rule.num_grantable(installed_version=installed_version, decided=self.decided, live=len(slots))
        self._expire(now_s)
        number, granted = self.ledger.requests.get(holder, (-1, ()))
        if number == request >= 0:
            return [slots[i].ticket for i in granted if i in slots and self._is_held(slots[i], holder)]
        if self._settings.whole_rounds and slots.number_of(*BUSY):
            return []
        tickets = self._reissuable(holder, installed_version, max_tickets)
        first_new = self.ledger.tally.issued - len(tickets)
        wanted = self._rule.batch_groups * (self._settings.num_updates - self.decided) - len(slots)
        for _ in range(min(max_tickets - len(tickets), grantable, wanted)):
            drawn = self._prompts.draw()
            if drawn is None:
                break
            prompt, epoch = drawn
            ticket_id = first_new + len(tickets)
            tickets.append(
                Ticket(
                    ticket_id=ticket_id,
                    prompt=prompt,
                    epoch=epoch,
                    seed=ticket_seed(self._settings.seed, ticket_id),
                    deadline=self._rule.deadline(installed_version),
                    attempt=0,
                    holder=holder,
                )
            )
        if tickets:
            self.ledger.record(Granted(tickets=tuple(tickets), request=request, cursor=self._prompts.cursor.since(self.ledger.cursor)))
        self._lease((ticket.ticket_id for ticket in tickets), now_s)
        return tickets

    def mark_scoring(self, tickets: Iterable[Ticket], now_s: float) -> None:
        """The groups are sampled and with the scorer: their generator may die now without losing them."""
        sampled = [ticket.ticket_id for ticket in tickets if self._state_of(ticket) is TicketState.LEASED]
        if sampled:
            self.ledger.record(Sampled(ticket_ids=tuple(sampled)))
        self._lease(sampled, now_s)

    def put(self, scored: ScoredGroup) -> PutOutcome:
        """Take a finished group in. Idempotent; never blocks on capacity, which admission alone bounds."""
        outcome = self._judge(scored)
        if outcome in (PutOutcome.KEPT, PutOutcome.TIED):
            self.ledger.record(Arrived(scored=scored, outcome=outcome))
        else:
            self.ledger.record(Refused(ticket_id=scored.group.ticket.ticket_id, outcome=outcome))
        return outcome

    def fail(self, tickets: Iterable[Ticket], reason: str) -> None:
        """Nobody could score these: each goes out again, or is voided at its `max_attempts`-th failure.

        Raises:
            RewardError: more than `max_failed_share` of all prompts were voided for that.
        """
        for ticket in tickets:
            if self._state_of(ticket) in (None, TicketState.WAITING, TicketState.LOST):
                continue  # LOST: reported before
            last = self.ledger.slots[ticket.ticket_id].num_failures + 1 >= self._settings.max_attempts
            self.ledger.record(Failed(ticket_id=ticket.ticket_id, reason=reason, for_good=last))
        self._check_failed_share(reason)

    def lose_holder(self, holder: str) -> int:
        """A generator is gone: its leases may go out again. Returns how many were lost."""
        lost = tuple(number for number, slot in self.ledger.slots.items() if self._is_held(slot, holder))
        if lost:
            self.ledger.record(Lost(ticket_ids=lost))
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
        update = self.decided
        batch = Batch(update=update, groups=tuple(slot.scored for slot in chosen if slot.scored is not None))
        for scored in batch.groups:
            for span in (span for rollout in scored.group.rollouts for span in rollout.version_spans):
                assert self._rule.holds(update=update, version=span.version), (
                    f"staleness bound broken: update {update} would train tokens of version {span.version}, "
                    f"max_staleness {self._rule.max_staleness} (ticket {scored.group.ticket.ticket_id})"
                )
        self.ledger.record(Decided(update=update, ticket_ids=tuple(slot.ticket.ticket_id for slot in chosen)))
        return batch

    def mark_trained(self, update: int, digest: int = 0, canary_logprobs: tuple[float, ...] = ()) -> float:
        """The learner finished `update`, which led to weights of this digest, under which the canary text has these log-probabilities.

        Idempotent.
        Returns:
            How far these weights are from those that the update led to before: 0 where it was not trained before, or led to the very
            same ones; else the largest difference of the canary's log-probabilities, nats.
        """
        entry = self.ledger.batches.get(update)
        if entry is None:
            return 0.0
        if entry.trained and entry.digest == digest:
            return 0.0
        before = entry.canary_logprobs if entry.trained else canary_logprobs
        self.ledger.record(Trained(update=update, digest=digest, canary_logprobs=canary_logprobs))
        return max((abs(now - then) for now, then in zip(canary_logprobs, before, strict=True)), default=0.0)

    def _judge(self, scored: ScoredGroup) -> PutOutcome:
        ticket = scored.group.ticket
        slot = self.ledger.slots.get(ticket.ticket_id)
        if slot is None or slot.state is TicketState.WAITING:
            return PutOutcome.DUPLICATE
        if slot.ticket.attempt != ticket.attempt or slot.ticket.holder != ticket.holder:
            return PutOutcome.STALE_ATTEMPT
        # A lost lease that nobody holds yet: its result is as good as ever, if the deadline below allows.
        if self._rule.deadline(scored.group.oldest_version) < slot.ticket.deadline:
            return PutOutcome.TOO_OLD
        room = self._settings.max_replacements_per_batch - self.ledger.tally.replaced_in_batch
        return PutOutcome.TIED if scored.tied and room > 0 else PutOutcome.KEPT

    def _check_failed_share(self, reason: str) -> None:
        tally = self.ledger.tally
        failed = tally.voided[FAILED]
        if failed >= MIN_FAILURES and failed > self._settings.max_failed_share * tally.issued:
            raise RewardError(
                f"{failed} of {tally.issued} prompts failed (each {self._settings.max_attempts} times: queue.max_attempts), more than "
                f"queue.max_failed_share ({self._settings.max_failed_share:g}) allows; the last reason: {reason}"
            )

    def _pick(self) -> list[Slot] | None:
        size, slots = self._rule.batch_groups, self.ledger.slots
        if len(slots) < size and self._prompts.exhausted:
            return self._pick_last()
        if self._settings.order == "ticket":
            first = list(islice(slots.values(), size))
            complete = len(first) == size and all(slot.state is TicketState.WAITING for slot in first)
            return first if complete else None
        finished = slots.deadlines_of(TicketState.WAITING)
        if finished.total() < size:
            return None
        left = slots.deadlines_of(*TicketState)
        left.subtract(_earliest(finished, size))
        if not self._rule.may_decide(decided=self.decided, left_deadlines=left):
            return None
        waiting = [slot for slot in slots.values() if slot.state is TicketState.WAITING]
        return sorted(waiting, key=lambda slot: (slot.ticket.deadline, slot.ticket.ticket_id))[:size]

    def _pick_last(self) -> list[Slot] | None:
        """The prompts ran out with less than a batch live: train a short batch, or drop the rest, by config."""
        rest = list(self.ledger.slots.values())
        if any(slot.state is not TicketState.WAITING for slot in rest):
            return None
        keep = len(rest) - len(rest) % self._settings.batch_multiple if self._settings.last_batch == "short" else 0
        if rest[keep:]:
            self.ledger.record(Dropped(ticket_ids=tuple(slot.ticket.ticket_id for slot in rest[keep:])))
        return rest[:keep] or None

    def _reissuable(self, holder: str, installed_version: int, max_tickets: int) -> list[Ticket]:
        """Lost tickets as `holder` would get them now. Each that goes out counts in the test of the next."""
        tickets: list[Ticket] = []
        if not self.ledger.slots.number_of(TicketState.LOST):
            return tickets
        deadline = self._rule.deadline(installed_version)
        deadlines = self.ledger.slots.deadlines_of(*TicketState)
        for rank, slot in enumerate(self.ledger.slots.values()):
            if len(tickets) == max_tickets:
                break
            if slot.state is TicketState.LOST and self._may_reissue(rank, slot, deadline, deadlines):
                deadlines.subtract([slot.ticket.deadline])
                deadlines.update([deadline])
                tickets.append(replace(slot.ticket, attempt=slot.ticket.attempt + 1, deadline=deadline, holder=holder))
        return tickets

    def _may_reissue(self, rank: int, slot: Slot, deadline: int, live_deadlines: Mapping[int, int]) -> bool:
        if self._settings.order == "ticket":
            return self.decided + rank // self._rule.batch_groups <= deadline
        return self._rule.may_reissue(
            new_deadline=deadline, old_deadline=slot.ticket.deadline, decided=self.decided, live_deadlines=live_deadlines
        )

    def _expire(self, now_s: float) -> None:
        if now_s < self._first_expiry_s:
            return
        busy = {number: slot.lease_ends_s for number, slot in self.ledger.slots.items() if slot.state in BUSY}
        late = tuple(number for number, ends_s in busy.items() if ends_s <= now_s)
        if late:
            self.ledger.record(Lost(ticket_ids=late))
        self._first_expiry_s = min((ends_s for ends_s in busy.values() if ends_s > now_s), default=float("inf"))

    def _lease(self, ticket_ids: Iterable[int], now_s: float) -> None:
        ends_s = now_s + self._settings.lease_s
        for ticket_id in ticket_ids:
            self.ledger.slots[ticket_id].lease_ends_s = ends_s
            self._first_expiry_s = min(self._first_expiry_s, ends_s)

    def _state_of(self, ticket: Ticket) -> TicketState | None:
        """State of the group of this very attempt; None: it is not live, or was leased again."""
        slot = self.ledger.slots.get(ticket.ticket_id)
        return slot.state if slot is not None and slot.ticket.attempt == ticket.attempt else None

    def _is_held(self, slot: Slot, holder: str) -> bool:
        return slot.ticket.holder == holder and slot.state is TicketState.LEASED


def _earliest(deadlines: Mapping[int, int], size: int) -> dict[int, int]:
    """Of groups with these deadlines (deadline -> groups), the `size` that are due first."""
    taken: dict[int, int] = {}
    for deadline in sorted(deadlines):
        taken[deadline] = min(deadlines[deadline], size)
        size -= taken[deadline]
    return taken
