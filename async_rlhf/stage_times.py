"""What each stage needs for one update, from the rows of metrics.jsonl; how the stages make the period of a run stands in `verdict.py`."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Row = Mapping[str, float]

WINDOW = 20
"""Updates looked back on."""
SETTLED_VERSION = 2
"""The updates up to here fill the queue and warm the engines up: they say nothing."""
MIN_UPDATES = 3
"""With fewer the means say nothing."""
UNUSUAL_SHARE = 0.5
"""Of a median update, spent on nothing that the stages do, beyond what is usual: a checkpoint, or a learner that began anew."""
PUSH = ("train/take_s", "weights/export_s")
MAX_UPDATE_S = 1e9
"""Of an update: a file that says more was not written by a run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageTimes:
    """Mean seconds of one update, and what each stage needs of them; see the module's text."""

    update_s: float
    step_s: float
    """In train_step."""
    push_s: float
    """Shards to the ranks, weights to the broadcaster; where these were not measured, all of the loop but its wait and train_step."""
    sample_s: float
    """A generator's engine steps, the mean over generators."""
    pause_s: float
    """A generator's install."""
    canary_s: float = 0.0
    """Of it, the step with the canary, in which what runs is read anew (`weights.on_update: keep`); 0 where not measured."""
    other_s: float = 0.0
    """Of the train loop besides: books, what waits for installs (on_update: drain), a checkpoint after every update."""
    score_s: float = 0.0
    """A scorer's calls; 0 where not measured."""
    reward_s: float = 0.0
    score_known: bool = False
    generators: int | None = None
    """That took part in the last update; None where that was not written down."""

    @property
    def generation_s(self) -> float:
        return self.sample_s + self.pause_s

    @property
    def learning_s(self) -> float:
        return self.step_s + self.push_s + self.other_s

    @property
    def rating_s(self) -> float:
        """The slower one of the two pools that rate."""
        return max(self.score_s, self.reward_s)

    @property
    def generators_idle(self) -> float:
        """Share of the time; installs count as idle."""
        return self.share(self.update_s - self.sample_s)

    @property
    def learner_idle(self) -> float:
        """Share of the time outside train_step."""
        return self.share(self.update_s - self.step_s)

    def share(self, seconds: float) -> float:
        """Of the time of an update, in [0, 1]."""
        return min(1.0, max(0.0, seconds / self.update_s))

    def period_s(self, *, overlapping: bool) -> float:
        """The shortest time of an update with these stages: of the longest where they overlap, else of all together."""
        if overlapping:
            return max(self.generation_s, self.score_s, self.reward_s, self.learning_s)
        return self.generation_s + self.score_s + self.reward_s + self.learning_s


def stage_times(rows: Sequence[Row], window: int = WINDOW) -> StageTimes | None:
    """Means over the last `window` settled updates; None: there are fewer than MIN_UPDATES, or the rows lack what it takes."""
    spans = settled(rows[-window - 1 :])
    if len(spans) < MIN_UPDATES:
        return None
    total_s = sum(update_s for update_s, _ in spans)
    num = len(spans)

    def mean(key: str) -> float:
        return sum(_bounded(_number(row, key), update_s) for update_s, row in spans) / num

    def at_work(key: str) -> float:
        return sum((1 - _bounded(_number(row, key), 1.0)) * update_s for update_s, row in spans) / num

    update_s, sample_s, step_s = total_s / num, at_work("generate/idle_share"), mean("train/step_s")
    pauses = ("weights/pause_s", "weights/canary_s")
    apart = all(key in row for _, row in spans for key in pauses)
    pause_s = min(sum(map(mean, pauses if apart else ("weights/install_s",))), update_s - sample_s)
    generators = _number(spans[-1][1], "generate/generators")
    beside_s = max(0.0, update_s - mean("queue/wait_s") - step_s)
    timed = all(math.isfinite(_number(row, key)) for _, row in spans for key in PUSH)
    push_s = min(beside_s, sum(map(mean, PUSH))) if timed else beside_s
    known = [pool for pool in ("score", "reward") if all(math.isfinite(_number(row, f"{pool}/idle_share")) for _, row in spans)]
    return StageTimes(
        update_s=update_s,
        step_s=step_s,
        push_s=push_s,
        sample_s=sample_s,
        pause_s=pause_s,
        canary_s=min(mean("weights/canary_s"), pause_s) if apart else 0.0,
        other_s=beside_s - push_s,
        score_s=at_work("score/idle_share") if "score" in known else 0.0,
        reward_s=at_work("reward/idle_share") if "reward" in known else 0.0,
        score_known="score" in known,
        generators=min(4096, max(1, round(generators))) if math.isfinite(generators) else None,
    )


def settled(rows: Sequence[Row]) -> list[tuple[float, Row]]:
    """Seconds and row of each update that is like those to come.

    Left out are the first ones; those that do not follow the row before them, in version and driver; those in which much more than
    usual went to nothing that the stages do (UNUSUAL_SHARE); and those that took twice the median while an actor was lost.
    """
    spans: list[tuple[float, Row]] = []
    lost: list[bool] = []
    for before, row in itertools.pairwise(rows):
        seconds = _number(row, "time_s") - _number(before, "time_s")
        follows = _number(row, "version") == _number(before, "version") + 1 > SETTLED_VERSION
        known = all(math.isfinite(_number(row, key)) for key in ("queue/wait_s", "train/step_s", "generate/idle_share"))
        if follows and before.get("session") == row.get("session") and 0 < seconds < MAX_UPDATE_S and known:
            spans.append((seconds, row))
            lost.append(before.get("supervision/restarts") != row.get("supervision/restarts"))
    if not spans:
        return []
    usual_s = statistics.median(seconds for seconds, _ in spans)
    others = [_other_s(seconds, row) for seconds, row in spans]
    most_s = statistics.median(others) + UNUSUAL_SHARE * usual_s
    return [
        span
        for span, other_s, someone in zip(spans, others, lost, strict=True)
        if other_s <= most_s and not (someone and span[0] > 2 * usual_s)
    ]


def _other_s(seconds: float, row: Row) -> float:
    """Of an update, what neither the wait nor a stage of the train loop took."""
    return seconds - sum(_bounded(_number(row, key), seconds) for key in ("queue/wait_s", "train/step_s", *PUSH))


def _number(row: Row, key: str) -> float:
    """NaN where the row has no such number."""
    value: object = row.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _bounded(value: float, most: float) -> float:
    return min(max(value, 0.0), most) if math.isfinite(value) else 0.0
