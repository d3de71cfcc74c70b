"""Live groups are counted as they change."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from async_rlhf.live_groups import LiveGroups, Slot
from async_rlhf.tickets import TicketState
from tests.support.samples import make_ticket

STATES = list(TicketState)
CHANGE = st.tuples(
    st.sampled_from(["put", "turn", "reissue", "delete", "sort"]), st.integers(0, 5), st.sampled_from(STATES), st.integers(0, 3)
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(changes=st.lists(CHANGE, max_size=30))
def test_counts_are_those_of_the_groups_whatever_happens_to_them(changes: list[tuple[str, int, TicketState, int]]) -> None:
    groups = LiveGroups()
    for what, number, state, deadline in changes:
        if what == "put":
            groups[number] = Slot(ticket=make_ticket(number, deadline=deadline), state=state)
        elif what == "sort":
            groups = groups.in_order()
            assert list(groups) == sorted(groups)
        elif number not in groups:
            continue
        elif what == "delete":
            del groups[number]
        else:
            groups.turn(number, state, make_ticket(number, deadline=deadline) if what == "reissue" else None)
        for some in ([state], STATES):
            deadlines = [slot.ticket.deadline for slot in groups.values() if slot.state in some]
            assert groups.number_of(*some) == len(deadlines)
            assert groups.deadlines_of(*some) == Counter(deadlines)
