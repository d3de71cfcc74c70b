"""Who is best and who is worst in a group, when scores may be equal."""

import numpy as np

from async_rlhf.types import ScoredGroup


def ranking(scored: ScoredGroup) -> list[int]:
    """Completions from the worst to the best. Equal scores are broken by the ticket's seed: arrival order would favour short ones."""
    lottery = np.random.default_rng(scored.group.ticket.seed).permutation(len(scored.scores))
    return [int(index) for index in np.lexsort((lottery, scored.scores))]
