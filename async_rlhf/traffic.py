"""When tickets and groups travel between the queue and the generators: several in a call, as what they cost on their way is the calls.

The actors go by it, and so does their model (planning/).
"""

import math

from async_rlhf.config import Config

SEATS_PER_RESERVE = 2
"""For so many completions that are sampled at once, one waits for a seat."""

GATHER_SHARE = 0.1
"""Of an update: finished groups wait so long for others to go with, shared by those who take the groups."""
MAX_GATHER_S = 1.0


def reserve(config: Config) -> int:
    """Completions that wait at a generator for one of its seats, so that none is empty while tickets are on their way.

    Two groups at least, as the next is asked for when one has gone; but no more than there may be for this generator, which would take
    them from another's empty seats, and none where installs wait until the engine has finished all that it has. The generators are those
    of the config, however many have joined since.
    """
    if config.weights.on_update == "drain":
        return 0
    size, seats = config.completions_per_prompt, config.generator.max_inflight
    share = (config.max_staleness + 1) * config.batch_groups * size // config.generator.count
    return max(0, min(max(2 * size, seats // SEATS_PER_RESERVE), share - seats))


def room(config: Config, num_completions: int) -> int:
    """Groups that a generator may have more once half of the reserve has gone, and a group's worth at least; 0 before.

    Args:
        num_completions: that it has, those that wait for a seat included. A seat is free when its completion has ended, however long
            its siblings go on.
    """
    size, kept = config.completions_per_prompt, reserve(config)
    free = config.generator.max_inflight + kept - num_completions
    return free // size if free >= max(size, kept // 2) else 0


def gather_s(config: Config, update_s: float) -> float:
    """How long a finished group waits for others, where the last update took `update_s`; inf: for all (a deterministic run's rounds).

    They go to one scorer, or reward actor, together: where a generator has several, each gets its share of what finishes.
    """
    if config.deterministic:
        return math.inf
    num_takers = max(config.scorer.count, config.reward.count) / config.generator.count
    return min(MAX_GATHER_S, GATHER_SHARE * update_s) / max(1.0, num_takers)
