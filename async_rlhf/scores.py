"""What a batch's scores become before they are trained: the percentile penalty for cut answers, and running normalisation.

Applied where a batch is formed, from the batches before it only, so that a replay of the same batches gives the same
numbers. (A fixed penalty is applied by the scorer already: ties are judged after it.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from async_rlhf.config.rewards import RewardConfig
from async_rlhf.types import Batch, FinishReason, ScoredGroup

MAX_RECENT = 1024
"""Scores that a percentile looks back on."""

MIN_STD = 1e-4
"""Scores that hardly differ are shifted, not blown up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreMoments:
    """What is remembered of the scores of all batches decided so far; part of TrainingState."""

    count: int = 0
    mean: float = 0.0
    """Of the scores as they would be normalised, penalties included."""
    sum_squares: float = 0.0
    """Of their deviations from the mean."""
    recent: tuple[float, ...] = field(default_factory=tuple[float, ...])
    """The last MAX_RECENT scores before a percentile penalty, oldest first; empty where no percentile is asked for."""

    @property
    def std(self) -> float:
        """Standard deviation of all scores; 0 before the second."""
        return (self.sum_squares / self.count) ** 0.5 if self.count > 1 else 0.0


def moments_from_json(fields: Mapping[str, Any]) -> ScoreMoments:
    """The moments again, from what `dataclasses.asdict` and JSON made of them."""
    recent: Any = tuple(fields.get("recent", ()))
    return ScoreMoments(**{**fields, "recent": recent})


def shape_scores(batch: Batch, moments: ScoreMoments, settings: RewardConfig) -> tuple[Batch, ScoreMoments]:
    """The batch as it is trained, and the moments with it included."""
    raw = np.concatenate([scored.scores for scored in batch.groups]).astype(np.float64)
    penalised = [_penalised(scored, moments.recent, settings.missing_eos_percentile) for scored in batch.groups]
    shaped = [_normalised(scores, moments) if settings.normalize else scores for scores in penalised]
    groups = tuple(
        scored if scores is scored.scores else replace(scored, scores=scores, judged_scores=scored.scores)
        for scored, scores in zip(batch.groups, shaped, strict=True)
    )
    recent = () if settings.missing_eos_percentile is None else (*moments.recent, *raw.tolist())[-MAX_RECENT:]
    return replace(batch, groups=groups), replace(_with_scores(moments, np.concatenate(penalised)), recent=recent)


def penalise_cut(scores: np.ndarray, finish_reasons: Sequence[FinishReason], penalty: float) -> np.ndarray:
    """[K] scores, `penalty` where the length limit cut the completion."""
    cut = np.array([reason == FinishReason.LENGTH for reason in finish_reasons], dtype=bool)
    return np.where(cut, np.float32(penalty), scores)


def _penalised(scored: ScoredGroup, recent: Sequence[float], percentile: float | None) -> np.ndarray:
    if percentile is None or not recent:
        return scored.scores
    reasons = [rollout.finish_reason for rollout in scored.group.rollouts]
    return penalise_cut(scored.scores, reasons, float(np.percentile(recent, percentile)))


def _normalised(scores: np.ndarray, moments: ScoreMoments) -> np.ndarray:
    if moments.count < 2:
        return scores
    scale = moments.std if moments.std > MIN_STD else 1.0
    return ((scores - moments.mean) / scale).astype(np.float32)


def _with_scores(moments: ScoreMoments, scores: np.ndarray) -> ScoreMoments:
    """Chan's parallel update of count, mean and sum of squared deviations."""
    scores = scores.astype(np.float64)
    count = moments.count + len(scores)
    delta = float(scores.mean()) - moments.mean
    return replace(
        moments,
        count=count,
        mean=moments.mean + delta * len(scores) / count,
        sum_squares=moments.sum_squares + float(((scores - scores.mean()) ** 2).sum()) + delta**2 * moments.count * len(scores) / count,
    )
