"""What an engine's steps cost: a line through the last ones, in their completions and in those of them that have just joined."""

import itertools
from dataclasses import dataclass

import numpy as np

FORGET = 0.999
"""Weight of a step that one more step leaves: about the last thousand count."""
SIZE = 4
"""A step's moments are those of (1, completions, joined ones, seconds)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """Seconds of a step: fixed_s + completion_s * completions + prompt_s * those that join."""

    fixed_s: float
    completion_s: float
    prompt_s: float


@dataclass(frozen=True, slots=True)
class StepMoments:
    """Sums over steps of the products of a step's numbers, older ones fading; see SIZE."""

    sums: tuple[float, ...] = (0.0,) * (SIZE * SIZE)

    def with_step(self, num_completions: int, num_joined: int, seconds: float) -> "StepMoments":
        """And one more step."""
        step = (1.0, float(num_completions), float(num_joined), seconds)
        products = (left * right for left in step for right in step)
        return StepMoments(tuple(FORGET * before + now for before, now in zip(self.sums, products, strict=True)))

    def fitted(self) -> StepCost | None:
        """The least squares; no part is negative. None: no steps yet."""
        sums = np.array(self.sums).reshape(SIZE, SIZE)
        if not sums[0, 0]:
            return None
        best, least = np.zeros(SIZE - 1), np.inf
        parts = range(SIZE - 1)
        for chosen in (list(some) for num in range(1, SIZE) for some in itertools.combinations(parts, num)):
            found = np.zeros(SIZE - 1)
            found[chosen] = np.linalg.lstsq(sums[np.ix_(chosen, chosen)], sums[chosen, -1], rcond=1e-9)[0]
            error = float(found @ sums[:-1, :-1] @ found - 2 * found @ sums[:-1, -1])
            if (found >= 0).all() and error < least:
                best, least = found, error
        return StepCost(fixed_s=float(best[0]), completion_s=float(best[1]), prompt_s=float(best[2]))
