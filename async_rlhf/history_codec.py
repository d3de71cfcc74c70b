"""Events, and the ledger that they lead to, as journal records: JSON, and Arrow tables for scored groups."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from async_rlhf import rollout_table
from async_rlhf.errors import JournalError
from async_rlhf.events import (
    Annulled,
    Arrived,
    Decided,
    Dropped,
    Event,
    Failed,
    Granted,
    Lost,
    Refused,
    Sampled,
    SessionBegan,
    Trained,
)
from async_rlhf.ledger import BatchEntry, Ledger, Tally
from async_rlhf.live_groups import Slot
from async_rlhf.prompts import PromptCursor, SourceCursor
from async_rlhf.tickets import PutOutcome, TicketState
from async_rlhf.types import Prompt, ScoredGroup, Ticket

OPENING, CARRIED = "O", "C"
"""First records of a segment: the ledger as JSON, and the groups that wait in it."""
KEPT, TIED = "K", "T"
"""Scored groups that came in."""
_PLAIN: Mapping[str, type[Event]] = {
    "B": SessionBegan,
    "S": Sampled,
    "L": Lost,
    "R": Refused,
    "F": Failed,
    "D": Decided,
    "X": Dropped,
    "U": Trained,
}
GRANTED, ANNULLED = "G", "A"
_KIND_OF: dict[type[Event], str] = {**{cls: kind for kind, cls in _PLAIN.items()}, Granted: GRANTED, Annulled: ANNULLED}

Find = Callable[[int], ScoredGroup]
"""The scored group of a ticket, from the journal."""


def kind_of(event: Event) -> str:
    """The letter of the record that holds this event."""
    if isinstance(event, Arrived):
        return KEPT if event.outcome is PutOutcome.KEPT else TIED
    return _KIND_OF[type(event)]


def encode(event: Event) -> bytes:
    """An event other than Arrived as JSON; groups are named by their tickets, since the journal has them already."""
    match event:
        case Granted():
            fields: Any = {"tickets": [_ticket_to_json(t) for t in event.tickets], "request": event.request, "cursor": asdict(event.cursor)}
        case Annulled():
            returned = [scored.group.ticket.ticket_id for scored in event.returned]
            fields = {"version": event.version, "returned": returned, "voided": event.voided, "lost": event.lost}
        case Arrived():
            raise AssertionError("scored groups travel as tables")
        case _:
            fields = {item.name: getattr(event, item.name) for item in dataclasses.fields(event)}
    return _dump(fields)


def decode(kind: str, payload: bytes, find: Find) -> list[Event]:
    """The events of one record.

    Raises:
        JournalError: no such kind of record.
    """
    if kind in (KEPT, TIED):
        outcome = PutOutcome.KEPT if kind == KEPT else PutOutcome.TIED
        return [Arrived(scored=scored, outcome=outcome) for scored in rollout_table.decode(payload)]
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(payload).items()}
    if kind == GRANTED:
        tickets = tuple(_ticket_from_json(ticket) for ticket in fields["tickets"])
        return [Granted(tickets=tickets, request=fields["request"], cursor=_cursor_from_json(fields["cursor"]))]
    if kind == ANNULLED:
        fields["returned"] = tuple(find(ticket_id) for ticket_id in fields["returned"])
        return [Annulled(**fields)]
    if kind not in _PLAIN:
        raise JournalError(f"the journal holds a record of unknown kind {kind!r}: it was written by another release of async-rlhf")
    if "outcome" in fields:
        fields["outcome"] = PutOutcome(fields["outcome"])
    return [_PLAIN[kind](**fields)]


def ledger_to_json(ledger: Ledger) -> dict[str, Any]:
    """Everything but the content of waiting groups."""
    return json.loads(
        _dump(
            {
                "slots": [
                    {"ticket": _ticket_to_json(slot.ticket), "state": slot.state, "num_failures": slot.num_failures}
                    for slot in ledger.slots.values()
                ],
                "failed_prompts": ledger.failed_prompts,
                "batches": {str(update): asdict(entry) for update, entry in ledger.batches.items()},
                "requests": ledger.requests,
                "decided": ledger.decided,
                "lineage": ledger.lineage,
                "session": ledger.session,
                "cursor": asdict(ledger.cursor),
                # Not asdict: it makes nonsense of a Counter.
                "tally": {item.name: getattr(ledger.tally, item.name) for item in dataclasses.fields(ledger.tally)},
            }
        )
    )


def ledger_from_json(fields: Mapping[str, Any]) -> Ledger:
    """The ledger again; waiting groups get their content from the record that follows."""
    ledger = Ledger()
    for entry in fields["slots"]:
        ticket = _ticket_from_json(entry["ticket"])
        ledger.slots[ticket.ticket_id] = Slot(ticket=ticket, state=TicketState(entry["state"]), num_failures=entry["num_failures"])
    ledger.failed_prompts = dict(fields["failed_prompts"])
    for update, entry in fields["batches"].items():
        of_batch: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()}
        ledger.batches[int(update)] = BatchEntry(**of_batch)
    ledger.requests = {holder: (number, tuple(ids)) for holder, (number, ids) in fields["requests"].items()}
    ledger.decided, ledger.lineage, ledger.session = fields["decided"], fields["lineage"], fields["session"]
    ledger.cursor = _cursor_from_json(fields["cursor"])
    tally: dict[str, Any] = {name: Counter(value) if isinstance(value, dict) else value for name, value in fields["tally"].items()}
    ledger.tally = Tally(**tally)
    return ledger


def _ticket_to_json(ticket: Ticket) -> dict[str, Any]:
    prompt = ticket.prompt
    of_prompt = {"id": prompt.prompt_id, "text": prompt.text, "token_ids": prompt.token_ids.tolist(), "columns": dict(prompt.columns)}
    names = ("ticket_id", "epoch", "seed", "deadline", "attempt", "holder")
    return {**{name: getattr(ticket, name) for name in names}, "prompt": of_prompt}


def _ticket_from_json(fields: Mapping[str, Any]) -> Ticket:
    of_prompt = fields["prompt"]
    prompt = Prompt(
        prompt_id=of_prompt["id"],
        text=of_prompt["text"],
        token_ids=np.asarray(of_prompt["token_ids"], dtype=np.int32),
        columns=of_prompt["columns"],
    )
    rest: dict[str, Any] = {**fields, "prompt": prompt}
    return Ticket(**rest)


def _cursor_from_json(fields: Mapping[str, Any]) -> PromptCursor:
    sources = {name: SourceCursor(**source) for name, source in fields.get("sources", {}).items()}
    return PromptCursor(epoch=fields["epoch"], index=fields["index"], sources=sources)


def _dump(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode()
