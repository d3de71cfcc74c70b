"""Groups between processes: the same on the other side, in two buffers."""

import pickle
from dataclasses import replace

import numpy as np
import pytest

from async_rlhf.parcel import Parcel
from async_rlhf.types import ScoredGroup
from tests.support.samples import make_scored, make_ticket, plain


def make_groups() -> list[ScoredGroup]:
    """Groups of one to three completions of ragged lengths; the second was shaped, the third has no parts of its reward."""
    groups = [
        make_scored(make_ticket(number, attempt=number), scores=(1.0, 0.5, -2.0)[: number + 1], version=number) for number in range(3)
    ]
    groups[1] = replace(groups[1], judged_scores=groups[1].scores, scores=groups[1].scores * np.float32(2))
    groups[2] = replace(groups[2], reward_parts={})
    return groups


def test_groups_are_the_same_bit_for_bit_on_the_other_side() -> None:
    groups = make_groups()

    again = pickle.loads(pickle.dumps(Parcel(groups)))

    assert isinstance(again, Parcel)
    assert plain(list(again)) == plain(groups)


def test_all_arrays_travel_in_two_buffers_and_arrive_as_views_of_them() -> None:
    buffers: list[pickle.PickleBuffer] = []
    packed = pickle.dumps(Parcel(make_groups() * 20), protocol=5, buffer_callback=buffers.append)

    assert len(buffers) == 2
    ids, floats = (np.frombuffer(buffer.raw(), dtype=np.uint8) for buffer in buffers)
    again = pickle.loads(packed, buffers=buffers)
    assert all(np.shares_memory(rollout.completion_ids, ids) for scored in again for rollout in scored.group.rollouts)
    assert all(np.shares_memory(scored.scores, floats) for scored in again)


def test_an_empty_parcel_is_one_on_the_other_side() -> None:
    assert pickle.loads(pickle.dumps(Parcel())) == ()


@pytest.mark.parametrize("wrong", ["dtype", "length"])
def test_groups_unlike_the_contract_travel_as_they_are(wrong: str) -> None:
    """Whoever takes them refuses them by name; packed, they would become others."""
    scored = make_scored(make_ticket(0), scores=(1.0, 0.0))
    first = scored.reference_logprobs[0]
    odd = first.astype(np.float64) if wrong == "dtype" else np.append(first, np.float32(0))
    groups = [replace(scored, reference_logprobs=(odd, *scored.reference_logprobs[1:]))]

    assert plain(list(pickle.loads(pickle.dumps(Parcel(groups))))) == plain(groups)
