"""From a batch to what each learner rank trains: minibatches first, then shards.

A minibatch (one optimizer step) must not depend on the number of ranks, so the batch is cut into minibatches before each of
them is dealt out.
"""

from collections.abc import Sequence

from async_rlhf.types import Batch, ScoredGroup


def shard_batch(batch: Batch, *, num_ranks: int, num_minibatches: int) -> tuple[tuple[tuple[ScoredGroup, ...], ...], ...]:
    """Split a batch into minibatches, each minibatch into shards of equal group count and nearly equal tokens.

    The minibatches do not depend on the number of ranks. Returns [rank][minibatch] -> groups.
    """
    size = len(batch.groups) // num_minibatches
    assert size * num_minibatches == len(batch.groups) and size % num_ranks == 0, (
        f"a batch of {len(batch.groups)} groups does not split into {num_minibatches} minibatches on {num_ranks} ranks"
    )
    minibatches = [batch.groups[start : start + size] for start in range(0, len(batch.groups), size)]
    split = [_balance(minibatch, num_ranks) for minibatch in minibatches]
    return tuple(tuple(shards[rank] for shards in split) for rank in range(num_ranks))


def _balance(groups: Sequence[ScoredGroup], num_ranks: int) -> list[tuple[ScoredGroup, ...]]:
    """Longest first, each to the rank with the fewest tokens that still has room; the original order within a rank."""
    room, tokens = [len(groups) // num_ranks] * num_ranks, [0] * num_ranks
    chosen: list[list[int]] = [[] for _ in range(num_ranks)]
    sizes = [scored.group.num_sequence_tokens for scored in groups]
    for index in sorted(range(len(groups)), key=lambda i: (-sizes[i], i)):
        rank = min((r for r in range(num_ranks) if room[r]), key=lambda r: tokens[r])
        chosen[rank].append(index)
        room[rank] -= 1
        tokens[rank] += sizes[index]
    return [tuple(groups[index] for index in sorted(indices)) for indices in chosen]
