"""How a batch is dealt out: minibatches first, equal shards, nearly equal tokens."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_rlhf.sharding import shard_batch
from async_rlhf.types import Batch, ScoredGroup
from tests.support.samples import make_scored, make_ticket


def make_batch(num_groups: int, seed: int = 0, max_tokens: int = 40) -> Batch:
    groups = tuple(make_scored(make_ticket(index), seed=seed, max_tokens=max_tokens) for index in range(num_groups))
    return Batch(update=0, groups=groups)


def ticket_ids(groups: object) -> list[int]:
    return [scored.group.ticket.ticket_id for scored in groups]  # type: ignore[attr-defined]


splits = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 1000))


@given(splits)
def test_every_group_goes_to_one_rank_and_shards_are_equally_many(split: tuple[int, int, int, int]):
    num_ranks, num_minibatches, per_shard, seed = split
    batch = make_batch(num_ranks * num_minibatches * per_shard, seed)

    shards = shard_batch(batch, num_ranks=num_ranks, num_minibatches=num_minibatches)

    assert len(shards) == num_ranks and all(len(of_rank) == num_minibatches for of_rank in shards)
    assert all(len(groups) == per_shard for of_rank in shards for groups in of_rank)
    dealt = [scored for of_rank in shards for groups in of_rank for scored in groups]
    assert sorted(ticket_ids(dealt)) == list(range(len(batch.groups)))


@pytest.mark.parametrize("num_minibatches", [1, 2, 3])
def test_minibatches_do_not_depend_on_the_number_of_ranks(num_minibatches: int):
    batch = make_batch(24, seed=3)

    def minibatches(num_ranks: int) -> list[set[int]]:
        shards = shard_batch(batch, num_ranks=num_ranks, num_minibatches=num_minibatches)
        return [{t for of_rank in shards for t in ticket_ids(of_rank[index])} for index in range(num_minibatches)]

    assert minibatches(1) == minibatches(2) == minibatches(4)
    size = 24 // num_minibatches
    assert minibatches(1) == [set(range(start, start + size)) for start in range(0, 24, size)]


def spread(loads: list[int]) -> int:
    return max(loads) - min(loads)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_tokens_are_balanced_better_than_by_dealing_in_order(num_ranks: int):
    """Mean spread of the ranks' tokens over 50 batches: at most a quarter of what slices of the batch give."""
    ours: list[int] = []
    naive: list[int] = []
    for seed in range(50):
        batch = make_batch(16, seed)
        shards = shard_batch(batch, num_ranks=num_ranks, num_minibatches=1)
        ours.append(spread([sum(scored.group.num_tokens for scored in of_rank[0]) for of_rank in shards]))
        size = 16 // num_ranks
        tokens = [scored.group.num_tokens for scored in batch.groups]
        naive.append(spread([sum(tokens[start : start + size]) for start in range(0, 16, size)]))

    assert np.mean(ours) < 0.25 * np.mean(naive)


def test_groups_of_a_shard_keep_the_order_of_the_batch():
    shards = shard_batch(make_batch(12, seed=1), num_ranks=3, num_minibatches=2)

    for of_rank in shards:
        for groups in of_rank:
            assert ticket_ids(groups) == sorted(ticket_ids(groups))


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(AssertionError, match="a batch of 10 groups does not split into 2 minibatches on 2 ranks"):
        shard_batch(make_batch(10), num_ranks=2, num_minibatches=2)


def test_prompts_count_in_the_balance():
    """Prompts of 30 and 1 tokens, K = 2, completions of one token: 62 and 4 per group; by completions alone all would be alike."""
    groups: list[ScoredGroup] = []
    for index, prompt_tokens in enumerate((30, 30, 1, 1)):
        ticket = make_ticket(index)
        prompt = replace(ticket.prompt, token_ids=np.zeros(prompt_tokens, np.int32))
        groups.append(make_scored(replace(ticket, prompt=prompt), max_tokens=1))

    shards = shard_batch(Batch(update=0, groups=tuple(groups)), num_ranks=2, num_minibatches=1)

    assert [sum(scored.group.num_sequence_tokens for scored in of_rank[0]) for of_rank in shards] == [66, 66]
