"""How often one policy's completions are better than another's, prompt by prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from async_rlhf.config.rewards import JudgeConfig
from async_rlhf.intervals import Interval, mean_interval, sign_test
from async_rlhf.types import Prompt

WIN, TIE, LOSS = 1.0, 0.5, 0.0


class Comparer(Protocol):
    """Says which of two completions of a prompt is better, whatever their order; may take seconds."""

    def __call__(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Sequence[float]:
        """Per prompt: 1 the first is better, 0 the second, 0.5 neither; between them where it was asked several times.

        Raises:
            RewardError: it cannot be had.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class WinRate:
    """The outcomes of N prompts, as one number."""

    share: float
    """Mean outcome: (wins + ties / 2) / N, where all outcomes are 1, 0.5 or 0."""
    interval: Interval
    """95 %: Wilson's without ties, else the bootstrap's over prompts."""
    wins: int
    ties: int
    losses: int

    @property
    def p_value(self) -> float:
        """Of the sign test: how likely so uneven a count is if both are equally good; ties left out."""
        return sign_test(self.wins, self.losses)


def by_score(own: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Outcomes where the higher score wins."""
    return [TIE if mine == other else WIN if mine > other else LOSS for mine, other in zip(own, theirs, strict=True)]


def win_rate(outcomes: Sequence[float]) -> WinRate:
    """N >= 1 outcomes from 0 to 1 summed up: above 0.5 a prompt is won, below it is lost."""
    wins, ties = sum(outcome > TIE for outcome in outcomes), outcomes.count(TIE)
    return WinRate(
        share=sum(outcomes) / len(outcomes),
        interval=mean_interval(outcomes),
        wins=wins,
        ties=ties,
        losses=len(outcomes) - wins - ties,
    )


def load_comparer(judge: JudgeConfig) -> Comparer:
    """The judge that the config describes, asked in both orders."""
    from async_rlhf.rewards import compare

    def decide(prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Sequence[float]:
        return compare(judge, prompts, first, second).tolist()

    return decide
