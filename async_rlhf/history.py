"""The history of a run: a ledger, the journal that makes it durable, and the batches that may have to be trained again.

Events are collected while a call to the buffer lasts and written by `flush` before its caller is answered. Memory holds the groups
that wait and the last batch; every other one is read back from the journal. A segment begins with the whole ledger, so that the
segments before it can go once no kept checkpoint needs their batches: they become the rollouts dataset.
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from async_rlhf import history_codec as codec
from async_rlhf import rollout_table
from async_rlhf.config.rewards import RewardConfig
from async_rlhf.errors import ConfigError, JournalError
from async_rlhf.events import Annulled, Arrived, Decided, Event, SessionBegan
from async_rlhf.journal import Frame, Journal, Mark, Position
from async_rlhf.journal_frames import segment_path
from async_rlhf.ledger import Ledger
from async_rlhf.lineage import annulled
from async_rlhf.metrics import BatchSummary, summarize
from async_rlhf.scores import ScoreMoments, moments_from_json, shape_scores
from async_rlhf.tickets import TicketState
from async_rlhf.types import Batch, ScoredGroup

_CARRIED_GROUPS = 256
"""Of one record, when a segment begins: what is in memory twice, here and wherever it is read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Decision:
    summary: BatchSummary
    moments: ScoreMoments
    """Of the batches before it: what its scores were shaped by."""
    ticket_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    position: Position
    index: int
    """Of the group in its record."""


class History:
    """One run's past. Whoever changes the ledger calls `flush` before anybody learns of it."""

    def __init__(self, journal: Journal, reward: RewardConfig, identity: Mapping[str, object], session: int) -> None:
        """Begin a history, or take the one in the journal up.

        Args:
            reward: how a batch's scores are shaped.
            identity: settings that may not change as long as the journal lives.
            session: of this driver; a higher one than the journal's revokes every lease.
        Raises:
            JournalError: the journal is damaged. ConfigError: it was written under another identity.
        """
        self._journal = journal
        self._reward = reward
        self._identity = dict(identity)
        self.ledger = Ledger()
        self._moments = ScoreMoments()
        self._scores: list[np.ndarray] = []
        """Of every group that came in since the last decision."""
        self._decisions: dict[int, _Decision] = {}
        self._places: dict[int, _Place] = {}
        self._openings: dict[int, int] = {}
        """Segment that stands for itself -> batches decided when it began."""
        self._unbegun: list[Callable[[], object]] = []
        """What is still to be done before the last segment stands for itself. No event is written before that."""
        self._eventful = -1
        """Recovered so far: the last segment with an event in it."""
        self._last: Batch | None = None
        self._outbox: list[Event] = []
        for frame in journal.frames():
            self._recover(frame)
        last = journal.end.segment
        self._begin(journal.rotate() if self._eventful == last and last not in self._openings else last)
        self.ledger.on_event = self._on_event
        if session > self.ledger.session:
            busy = tuple(number for number, slot in self.ledger.slots.items() if slot.state is not TicketState.WAITING)
            self.ledger.record(SessionBegan(session=session, lost=busy))
        self.flush()

    @property
    def end(self) -> Mark:
        """How far the journal goes."""
        return self._journal.end

    def flush(self, *, durable: bool = False) -> None:
        """Write what happened; with `durable`, down to the disk.

        Raises:
            JournalError: there is no room for it.
        """
        while self._unbegun:
            self._unbegun[0]()
            del self._unbegun[0]  # only now, as below
        while self._outbox:
            kind = codec.kind_of(self._outbox[0])
            if kind in (codec.KEPT, codec.TIED):
                _, group = next(itertools.groupby(self._outbox, codec.kind_of))
                same = list(group)
                self._append_groups(kind, [event.scored for event in same if isinstance(event, Arrived)])
            else:
                same = self._outbox[:1]
                self._journal.append(kind, codec.encode(same[0]))
            del self._outbox[: len(same)]  # only now: what could not be written is still to be written
        if durable:
            self._journal.sync()

    def summary(self, update: int) -> BatchSummary | None:
        """Batch `update` in numbers; None: not decided, or no longer kept."""
        decision = self._decisions.get(update)
        return None if decision is None else decision.summary

    def batch(self, update: int) -> Batch:
        """Batch `update` as it is trained, scores shaped; the same whenever it is asked for."""
        if self._last is None or self._last.update != update:
            decision = self._decisions[update]
            groups = self._read_groups(decision.ticket_ids)
            self._last, _ = shape_scores(Batch(update=update, groups=groups), decision.moments, self._reward)
        return self._last

    def annul(self, version: int, newest_faithful: int) -> None:
        """Undo batches `version` and later; see lineage.py."""
        self.flush()
        undone = [ticket_id for update in range(version, self.ledger.decided) for ticket_id in self._decisions[update].ticket_ids]
        event = annulled(self.ledger, version, self._read_groups(undone), newest_faithful)
        if event.returned:  # once more, so that this segment stands for itself
            self._append_groups(codec.CARRIED, event.returned)
        self.ledger.record(event)
        self.flush(durable=True)

    def begin_segment(self) -> Mark:
        """Begin a segment that stands for itself; returns where: what a checkpoint stores. What is before it is on the disk.

        Raises:
            JournalError: there is no room for it. As soon as there is, the next `flush` goes on with it.
        """
        self.flush()
        segment = self._journal.rotate()
        mark = self._journal.end
        self._begin(segment)
        self.flush()
        return mark

    def forget_before(self, version: int) -> list[int]:
        """No kept checkpoint is older than `version`. Returns the segments that nobody needs any more."""
        self.ledger.forget_before(version)
        for update in [update for update in self._decisions if update < version]:
            for ticket_id in self._decisions.pop(update).ticket_ids:
                self._places.pop(ticket_id, None)
        needed = max(segment for segment, decided in self._openings.items() if decided <= version)
        return list(range(self._journal.first_segment, needed))

    def drop_segment(self, segment: int) -> None:
        """Delete a segment that forget_before named. One that the next refers to, because that does not stand for itself, goes with it.

        May run in a thread of its own, beside everything but begin_segment and forget_before.
        """
        if segment + 1 in self._openings:
            self._journal.drop_before(segment + 1)
            for begun in [begun for begun in tuple(self._openings) if begun <= segment]:
                del self._openings[begun]

    def _on_event(self, event: Event) -> None:
        self._observe(event)
        self._outbox.append(event)

    def _observe(self, event: Event) -> None:
        """Before an event takes effect: what the history keeps of it beside the ledger."""
        match event:
            case Arrived():
                self._scores.append(event.scored.scores)
            case Decided():
                slots = self.ledger.slots
                groups = tuple(scored for number in event.ticket_ids if (scored := slots[number].scored) is not None)
                batch, before = Batch(update=event.update, groups=groups), self._moments
                self._last, self._moments = shape_scores(batch, before, self._reward)
                summary = replace(summarize(batch, self._scores), moments=self._moments)
                self._decisions[event.update] = _Decision(summary=summary, moments=before, ticket_ids=event.ticket_ids)
                self._scores = []
            case Annulled(version=version):
                if version in self._decisions:
                    self._moments = self._decisions[version].moments
                self._decisions = {update: decision for update, decision in self._decisions.items() if update < version}
                self._scores, self._last = [], None
                for number in event.voided:
                    self._places.pop(number, None)
            case _:
                pass

    def _recover(self, frame: Frame) -> None:
        segment = frame.position.segment
        if frame.kind == codec.OPENING:
            opening = json.loads(frame.payload)
            if opening["identity"] != self._identity:
                raise ConfigError(_other_identity(opening["identity"], self._identity))
            if not self._openings:
                self.ledger = codec.ledger_from_json(opening["ledger"])
                self._moments = moments_from_json(opening["moments"])
                self._scores = [np.asarray(scores, dtype=np.float32) for scores in opening["scores"]]
            elif not _same_state(opening["ledger"], codec.ledger_to_json(self.ledger)):
                raise JournalError(f"segment {segment} of the journal begins with another state than the events before it led to")
            if segment > self._eventful:  # else what is before it in the segment does not stand for itself
                self._openings[segment] = self.ledger.decided
        elif frame.kind == codec.CARRIED:
            for index, scored in enumerate(rollout_table.decode(frame.payload)):
                number = scored.group.ticket.ticket_id
                if number in self.ledger.slots:
                    self.ledger.slots[number].scored = scored
                self._places[number] = _Place(position=frame.position, index=index)
        else:
            if segment > self._eventful:
                self._eventful = segment
                self._check_beginning(segment)
            for index, event in enumerate(codec.decode(frame.kind, frame.payload, self._find)):
                if isinstance(event, Arrived) and frame.kind == codec.KEPT:
                    self._places[event.scored.group.ticket.ticket_id] = _Place(position=frame.position, index=index)
                self._observe(event)
                self.ledger.apply(event)

    def _check_beginning(self, segment: int) -> None:
        """Before its first event: does it stand for itself? Earlier releases went on when there had been no room for all of that."""
        if self._elsewhere(segment):
            self._openings.pop(segment, None)
        if not self._openings:
            path, before = (segment_path(self._journal.folder, index) for index in (segment, segment - 1))
            raise JournalError(
                f"{path} does not begin with all that it refers to, and the segment before it is gone: restore {before.name}, "
                "or resume from a copy of the run"
            )

    def _elsewhere(self, segment: int) -> list[int]:
        """Tickets whose groups wait, but are not in this segment."""
        waiting = [number for number, slot in self.ledger.slots.items() if slot.state is TicketState.WAITING]
        return [number for number in waiting if number not in self._places or self._places[number].position.segment != segment]

    def _begin(self, segment: int) -> None:
        """Leave to `flush` what makes a segment stand for itself, as far as it is not there: a crash may have left the beginning of it."""
        if segment not in self._openings:
            self._unbegun.append(partial(self._journal.append, codec.OPENING, self._opening()))
        elsewhere = [scored for number in self._elsewhere(segment) if (scored := self.ledger.slots[number].scored) is not None]
        for first in range(0, len(elsewhere), _CARRIED_GROUPS):
            self._unbegun.append(partial(self._append_groups, codec.CARRIED, elsewhere[first : first + _CARRIED_GROUPS]))
        self._unbegun.append(partial(self._openings.setdefault, segment, self.ledger.decided))

    def _opening(self) -> bytes:
        opening = {
            "identity": self._identity,
            "ledger": codec.ledger_to_json(self.ledger),
            "moments": asdict(self._moments),
            "scores": [scores.tolist() for scores in self._scores],
        }
        return json.dumps(opening, separators=(",", ":")).encode()

    def _append_groups(self, kind: str, groups: Sequence[ScoredGroup]) -> None:
        position = self._journal.append(kind, rollout_table.encode(groups))
        for index, scored in enumerate(groups if kind != codec.TIED else ()):
            self._places[scored.group.ticket.ticket_id] = _Place(position=position, index=index)

    def _find(self, ticket_id: int) -> ScoredGroup:
        return self._read_groups([ticket_id])[0]

    def _read_groups(self, ticket_ids: Sequence[int]) -> tuple[ScoredGroup, ...]:
        places = [self._places[number] for number in ticket_ids]
        records: dict[Position, list[ScoredGroup]] = {}
        for position in sorted({place.position for place in places}):
            records[position] = rollout_table.decode(self._journal.read(position).payload)
        return tuple(records[place.position][place.index] for place in places)


def _same_state(written: Mapping[str, Any], reached: Mapping[str, Any]) -> bool:
    """Whether two ledgers are the same, batches aside that one of them had forgotten: forgetting is no event.

    Either may hold more of them: a queue that was restarted remembers again what its predecessor had forgotten.
    """
    oldest = max(min(map(int, ledger["batches"]), default=ledger["decided"]) for ledger in (written, reached))
    old, new = (
        {**ledger, "batches": {update: entry for update, entry in ledger["batches"].items() if int(update) >= oldest}}
        for ledger in (written, reached)
    )
    return old == new


def _other_identity(written: Mapping[str, Any], asked: Mapping[str, object]) -> str:
    changed = ", ".join(f"{key} {written.get(key)} -> {asked.get(key)}" for key in written if written.get(key) != asked.get(key))
    return f"the journal was written under other settings, which may not change while it lives: {changed}; undo the change"
