"""Where every ticket of a run is, by its journal and by its dataset: booked anew, without the ledger that wrote them."""

import json
import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from async_rlhf import history_codec as codec
from async_rlhf import rollout_table
from async_rlhf.events import Arrived, Decided, Dropped, Event, Failed, Granted, Trained
from async_rlhf.journal import Frame
from async_rlhf.ledger import FAILED, LOST_HISTORY
from async_rlhf.rollout_parts import TRAINED
from async_rlhf.tickets import PutOutcome, TicketState
from async_rlhf.types import Rollout, ScoredGroup

MAX_NAMED = 8
"""Numbers that one problem lists."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A scored group, without its content."""

    num_completions: int
    num_tokens: int
    oldest: int
    """Version of its oldest token."""
    newest: int
    ordered: bool
    """Each token has one version, and versions never fall along a completion."""
    digest: int
    """Of its tokens, their log-probabilities and its scores."""


@dataclass(kw_only=True)
class Dataset:
    """Parts of the rollouts dataset."""

    batches: dict[int, dict[int, int]] = field(default_factory=dict[int, dict[int, int]])
    """Update -> position -> ticket."""
    samples: dict[int, Sample] = field(default_factory=dict[int, Sample])
    ended: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    """(ticket, fate) of each group that was not trained."""
    problems: list[str] = field(default_factory=list[str])

    def read(self, path: Path) -> None:
        """Add one part."""
        table = pq.read_table(path).combine_chunks()
        if not table.num_rows:
            return
        rows: pa.RecordBatch = table.to_batches()[0]
        first = pa.array([index == 0 for index in rows.column("completion_index").to_pylist()])
        fates = [rows.filter(first).column(name).to_pylist() for name in ("fate", "update", "position")]
        for scored, fate, update, position in zip(rollout_table.from_batch(rows), *fates, strict=True):
            number = scored.group.ticket.ticket_id
            if fate != TRAINED:
                self.ended.append((number, fate))
                continue
            self.samples[number] = sample_of(scored)
            if position in self.batches.setdefault(update, {}):
                self.problems.append(f"{path.name} holds group {position} of update {update} again, expected it once")
            self.batches[update][position] = number


@dataclass(kw_only=True)
class Books:
    """Where every ticket is after the events read so far."""

    batches: list[tuple[int, ...]] = field(default_factory=list[tuple[int, ...]])
    """Decided, by update, and not undone."""
    num_trained: int = 0
    """How many of them were."""
    live: dict[int, bool] = field(default_factory=dict[int, bool])
    """Ticket -> whether its sample was acknowledged."""
    ended: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    """(ticket, reason) of each one that was voided or dropped."""
    samples: dict[int, Sample] = field(default_factory=dict[int, Sample])
    """Acknowledged, by ticket."""
    issued: int = 0
    problems: list[str] = field(default_factory=list[str])
    lost: set[int] = field(default_factory=set[int])
    duplicated: set[int] = field(default_factory=set[int])
    _attempts: dict[int, int] = field(default_factory=dict[int, int])
    _drawn: dict[tuple[int, str], int] = field(default_factory=dict[tuple[int, str], int])

    def begin(self, before: Dataset) -> None:
        """What left the journal is what the dataset holds."""
        self.batches = [tuple(before.batches[update].values()) for update in sorted(before.batches)]
        self.samples, self.ended = dict(before.samples), list(before.ended)

    def read(self, frame: Frame) -> None:
        """Book one record."""
        if frame.kind == codec.OPENING:
            self._open(json.loads(frame.payload)["ledger"], frame.position.segment)
        elif frame.kind == codec.CARRIED:
            for scored in rollout_table.decode(frame.payload):
                self._keep(scored, "carried on")
        elif frame.kind == codec.ANNULLED:
            fields = json.loads(frame.payload)
            self._annul(fields["version"], fields["returned"], fields["voided"])
        else:
            for event in codec.decode(frame.kind, frame.payload, _none_to_find):
                self._book(event)

    def _book(self, event: Event) -> None:
        match event:
            case Granted():
                self._grant(event)
            case Arrived():
                self._arrive(event)
            case Failed(for_good=True):
                self._end(event.ticket_id, FAILED)
            case Dropped():
                for number in event.ticket_ids:
                    self._end(number, "dropped")
            case Decided():
                self._decide(event)
            case Trained():
                if not event.update <= self.num_trained or event.update >= len(self.batches):
                    self.problems.append(
                        f"update {event.update} was trained, expected at most {self.num_trained} of the {len(self.batches)} decided batches"
                    )
                self.num_trained = max(self.num_trained, event.update + 1)
            case _:
                pass  # who holds a lease makes no difference

    def _open(self, ledger: Mapping[str, Any], segment: int) -> None:
        tally, decided = ledger["tally"], ledger["decided"]
        slots = {slot["ticket"]["ticket_id"]: slot for slot in ledger["slots"]}
        waiting = {number: slot["state"] == TicketState.WAITING for number, slot in slots.items()}
        if not self.issued and tally["issued"]:  # the first segment that is still there
            untrained = [int(update) for update, entry in ledger["batches"].items() if not entry["trained"]]
            self.issued, self.live, self.num_trained = tally["issued"], waiting, min([decided, *untrained])
            self._attempts = {number: slot["ticket"]["attempt"] for number, slot in slots.items()}
            self._name_failed(tally["voided"])
        for what, said, reached in (
            ("issued tickets", tally["issued"], self.issued),
            ("decided batches", decided, len(self.batches)),
            ("live tickets", sorted(waiting.items()), sorted(self.live.items())),
        ):
            if said != reached:
                self.problems.append(f"segment {segment} begins with other {what} than before: {said}, expected {reached}")

    def _name_failed(self, voided: Mapping[str, int]) -> None:
        """A prompt that failed has no sample, and is in no part: of those that left the journal only their number is known."""
        placed = {*self.live, *(number for batch in self.batches for number in batch), *(number for number, _ in self.ended)}
        nowhere = sorted(set(range(self.issued)) - placed)
        self.ended += [(number, FAILED) for number in nowhere[: voided.get(FAILED, 0)]]

    def _grant(self, event: Granted) -> None:
        for ticket in event.tickets:
            number, prompt = ticket.ticket_id, (ticket.epoch, ticket.prompt.prompt_id)
            known = number in self.live
            expected = (number, self._attempts[number] + 1) if known else (self.issued, 0)
            if (number, ticket.attempt) != expected or self.live.get(number):
                self.problems.append(
                    f"ticket {number} was issued as attempt {ticket.attempt}, expected ticket and attempt {expected}, without a sample"
                )
            if self._drawn.setdefault(prompt, number) != number:
                self.duplicated.add(number)
                self.problems.append(
                    f"prompt {prompt[1]} of epoch {prompt[0]} is ticket {number}, expected it once: as {self._drawn[prompt]}"
                )
            self.issued = max(self.issued, number + 1)
            self.live[number], self._attempts[number] = False, ticket.attempt

    def _arrive(self, event: Arrived) -> None:
        ticket = event.scored.group.ticket
        number, expected = ticket.ticket_id, self._attempts.get(ticket.ticket_id)
        if number not in self.live or ticket.attempt != expected:
            self.problems.append(f"ticket {number} was answered by attempt {ticket.attempt}, expected a live one of attempt {expected}")
        if event.outcome is PutOutcome.KEPT:
            self._keep(event.scored, "answered again")
            self.live[number] = True
        else:
            self._end(number, str(event.outcome))

    def _keep(self, scored: ScoredGroup, how: str) -> None:
        number, sample = scored.group.ticket.ticket_id, sample_of(scored)
        if self.samples.setdefault(number, sample) != sample:
            self.problems.append(f"ticket {number} was {how} with another sample, expected the one that was acknowledged")

    def _end(self, number: int, reason: str) -> None:
        if self.live.pop(number, None) is None:
            self.problems.append(f"ticket {number} ended ({reason}) without being live, expected each to end once")
        self.ended.append((number, reason))

    def _decide(self, event: Decided) -> None:
        if event.update != len(self.batches):
            self.problems.append(f"batch {event.update} was decided, expected batch {len(self.batches)}")
        strangers = [number for number in event.ticket_ids if not self.live.pop(number, False)]
        if strangers:
            self.problems.append(f"batch {event.update} holds {some(strangers)}, expected only live tickets with a sample")
        self.batches.append(event.ticket_ids)

    def _annul(self, version: int, returned: Collection[int], voided: Collection[int]) -> None:
        undone = [number for batch in self.batches[version:] for number in batch]
        del self.batches[version:]
        self.num_trained = min(self.num_trained, version)
        self.live |= dict.fromkeys(undone, True)
        nowhere = set(undone) - set(returned) - set(voided)
        self.lost |= nowhere
        if nowhere:
            self.problems.append(f"the batches from {version} on were undone without {some(nowhere)}, expected all to return or be voided")
        for number in voided:
            self._end(number, LOST_HISTORY)


def sample_of(scored: ScoredGroup) -> Sample:
    """What the books keep of a group."""
    rollouts, digest = scored.group.rollouts, zlib.crc32(scored.scores.tobytes())
    for rollout in rollouts:
        digest = zlib.crc32(rollout.behavior_logprobs.tobytes(), zlib.crc32(rollout.completion_ids.tobytes(), digest))
    versions = [span.version for rollout in rollouts for span in rollout.version_spans]
    return Sample(
        num_completions=len(rollouts),
        num_tokens=scored.group.num_tokens,
        oldest=min(versions, default=0),
        newest=max(versions, default=0),
        ordered=all(_is_ordered(rollout) for rollout in rollouts),
        digest=digest,
    )


def some(numbers: Iterable[int]) -> str:
    """Numbers for a sentence, the first few of many."""
    named = sorted(numbers)
    return ", ".join(map(str, named[:MAX_NAMED])) + (f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else "")


def _is_ordered(rollout: Rollout) -> bool:
    end, version = 0, -1
    for span in rollout.version_spans:
        if span.start != end or span.end <= span.start or span.version < version:
            return False
        end, version = span.end, span.version
    return end == len(rollout.completion_ids)


def _none_to_find(ticket_id: int) -> ScoredGroup:
    raise AssertionError(f"only an undone batch names groups that came in earlier, got ticket {ticket_id}")
