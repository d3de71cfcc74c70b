"""What an evaluation found: one completion per held-out problem, scored by the task's own metric."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One answered problem, for people to read."""

    prompt: str
    completion: str
    expected: str
    """The right answer, where the task has one; else empty."""
    score: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """The samples of one policy version."""

    version: int
    """The only version that sampled any of them."""
    temperature: float
    """0: greedy."""
    samples: tuple[Sample, ...]

    @property
    def accuracy(self) -> float:
        """Mean score; the share of right answers where the metric is 0 or 1."""
        return sum(sample.score for sample in self.samples) / len(self.samples)
