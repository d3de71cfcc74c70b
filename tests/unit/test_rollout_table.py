"""Groups come back from Arrow and journal payloads bit for bit; what does not fit is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from async_rlhf.errors import JournalError
from async_rlhf.journal import Journal
from async_rlhf.rollout_table import decode, decode_rows, encode, from_batch, to_batch
from async_rlhf.types import FinishReason, Prompt, Rollout, RolloutGroup, ScoredGroup, Ticket, VersionSpan
from tests.support.samples import make_scored, make_ticket, plain

INT64 = st.integers(min_value=0, max_value=2**63 - 1)
IDS = npst.arrays(np.int32, st.integers(0, 6), elements=st.integers(-(2**31), 2**31 - 1))
FLOATS = npst.arrays(np.float32, st.integers(0, 6), elements=st.floats(width=32))  # NaN, infinities and -0.0 too
SPANS = st.lists(st.builds(VersionSpan, version=INT64, start=INT64, end=INT64), max_size=3).map(tuple)
PROMPTS = st.builds(Prompt, prompt_id=st.text(), text=st.text(), token_ids=IDS, columns=st.dictionaries(st.text(), st.text(), max_size=3))
TICKETS = st.builds(
    Ticket,
    **dict.fromkeys(("ticket_id", "epoch", "seed", "deadline", "attempt"), INT64),
    prompt=PROMPTS,
    holder=st.text(),
)
ROLLOUTS = st.builds(
    Rollout, completion_ids=IDS, behavior_logprobs=FLOATS, version_spans=SPANS, finish_reason=st.sampled_from(FinishReason)
)


@st.composite
def scored_groups(draw: st.DrawFn) -> ScoredGroup:
    k = draw(st.integers(1, 4))
    return ScoredGroup(
        group=RolloutGroup(ticket=draw(TICKETS), rollouts=tuple(draw(ROLLOUTS) for _ in range(k))),
        scores=draw(npst.arrays(np.float32, k, elements=st.floats(width=32))),
        reference_logprobs=tuple(draw(FLOATS) for _ in range(k)),
        completions=tuple(draw(st.text()) for _ in range(k)),
    )


def same(left: list[ScoredGroup], right: list[ScoredGroup]) -> bool:
    return [plain(group) for group in left] == [plain(group) for group in right]


def make_groups(count: int, first: int = 0) -> list[ScoredGroup]:
    """Groups of 1 to 3 completions in turn."""
    return [make_scored(make_ticket(i), scores=[1.0, 0.5, 0.0][: i % 3 + 1], version=i) for i in range(first, first + count)]


@settings(max_examples=60, deadline=None)
@given(groups=st.lists(scored_groups(), max_size=3))
def test_groups_come_back_from_a_payload_bit_for_bit(groups: list[ScoredGroup]) -> None:
    assert same(decode(encode(groups)), groups)


def test_rows_of_a_payload_are_its_groups_in_order() -> None:
    groups = make_groups(5)

    rows = decode_rows(encode(groups))

    assert [each.ticket_id for each in rows] == [group.group.ticket.ticket_id for group in groups]
    assert same([each.unpacked() for each in rows], groups)


def test_payload_survives_the_journal(tmp_path: Path) -> None:
    groups = make_groups(5)
    journal = Journal(tmp_path)
    position = journal.append("g", encode(groups))

    assert same(decode(journal.read(position).payload), groups)
    journal.close()


def test_text_and_spans_are_what_they_were() -> None:
    spans = (VersionSpan(version=3, start=0, end=1), VersionSpan(version=4, start=1, end=3))
    group = make_groups(1)[0]
    rollout = replace(group.group.rollouts[0], version_spans=spans, finish_reason=FinishReason.LENGTH)
    prompt = Prompt(prompt_id="\u4e00", text="caf\u00e9 \U0001f600\0", token_ids=np.zeros(0, np.int32), columns={"b": "2", "a": ""})
    ticket = replace(group.group.ticket, prompt=prompt, seed=2**63 - 1)
    group = replace(group, group=RolloutGroup(ticket=ticket, rollouts=(rollout,)), completions=("\r\n\u2028",))

    [copy] = decode(encode([group]))

    assert plain(copy) == plain(group)
    assert list(copy.group.ticket.prompt.columns) == ["b", "a"], "the order of the columns"
    assert copy.group.rollouts[0].version_spans == spans


def test_decoded_arrays_own_their_memory_and_may_be_written() -> None:
    """Views would keep the whole payload alive, and torch warns of arrays that it may not write."""
    [group] = decode(encode(make_groups(1)))

    for array in (group.scores, group.group.rollouts[0].completion_ids, group.reference_logprobs[0], group.group.ticket.prompt.token_ids):
        assert array.flags.owndata
        assert array.flags.writeable


@pytest.mark.parametrize(
    "payload",
    [b"", b"GROUPS 1", b"GROUPS 1" + b"?" * 200, b"GROUPS 2" + b"\0" * 64, b"RCRD" * 50, encode(make_groups(3))[:-200]],
    ids=["empty", "no batch", "garbage", "later version", "foreign", "short"],
)
def test_payload_that_encode_did_not_write_is_an_error(payload: bytes) -> None:
    for read in (decode, decode_rows):
        with pytest.raises(JournalError, match="payload of"):
            read(payload)


@settings(max_examples=300, deadline=None)
@given(place=st.integers(0, 10**6), mask=st.integers(1, 255))
def test_flipped_payload_gives_groups_or_a_clear_error_but_no_crash(place: int, mask: int) -> None:
    """The journal's digest finds the flip before; this is what happens without one."""
    payload = bytearray(encode(make_groups(3)))
    payload[place % len(payload)] ^= mask
    try:
        decode(bytes(payload))
    except JournalError as error:
        assert "payload of" in str(error)


def test_groups_that_would_lose_something_are_refused() -> None:
    [group] = make_groups(1, first=1)
    for wrong, why in [
        (replace(group, judged_scores=group.scores), "before a batch shapes"),
        (replace(group, completions=("one",)), "per completion"),
        (replace(group, scores=group.scores.astype(np.float64)), "float32"),
        (replace(group, reference_logprobs=tuple(a.astype(np.float64) for a in group.reference_logprobs)), "float32"),
        (replace(group, group=replace(group.group, rollouts=())), "per completion"),
    ]:
        with pytest.raises(AssertionError, match=why):
            encode([wrong])


def test_rows_cut_out_of_a_group_are_refused() -> None:
    batch = to_batch(make_groups(3))
    assert batch.column("completion_index").to_pylist() == [0, 0, 1, 0, 1, 2]

    assert same(from_batch(batch.slice(1, 2)), make_groups(1, first=1))
    with pytest.raises(JournalError, match="count up from 0"):
        from_batch(batch.slice(2))
    with pytest.raises(JournalError, match="count up from 0"):
        from_batch(batch.take(pa.array([3, 5])))
