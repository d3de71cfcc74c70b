"""What the pipeline's model says of a run, and how much of it is simulated."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Scope:
    """Of one simulation."""

    num_updates: int
    """Those before the measurement included."""
    num_cores: float = math.inf
    """That all processes share, one each when they work."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a run would settle at."""

    update_s: float
    completions_per_s: float
    """Trained ones."""
    tokens_per_s: float
    """Sampled ones, all generators."""
    generator_idle: float
    """Share of the time outside engine steps, as in generate/idle_share."""
    scorer_idle: float
    reward_idle: float | None
    """None: there are no reward actors."""
    learner_idle: float
    """Share of the time outside train_step, as in train/idle_share."""
    staleness: Mapping[int, float]
    """Staleness of a trained group -> share of the groups."""
    waiting_groups: float
    """Finished ones that wait when an update is over, as in queue/depth_groups."""
    stretch: float
    """Core time spent / work done: more than 1 where processes took turns."""
    calls: float
    """From actor to actor, per update."""

    @property
    def updates_per_h(self) -> float:
        return 3600 / self.update_s

    @property
    def staleness_mean(self) -> float:
        return sum(staleness * share for staleness, share in self.staleness.items())
