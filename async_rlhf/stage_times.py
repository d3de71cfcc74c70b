"""What each stage needs for one update, from the rows of metrics.jsonl; how the stages make the period of a run stands in `verdict.py`."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Row = Mapping[str, float]

WINDOW = 20
"""Updates looked back on."""
SETTLED_VERSION = 2
"""The updates up to here fill the queue and warm the engines up: they say nothing."""
MIN_UPDATES = 3
"""With fewer the means say nothing."""
MAX_UPDATE_S = 1e9
"""Of an update: a file that says more was not written by a run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageTimes:
    """Mean seconds of one update, and what each stage needs of them; see the module's text."""

    update_s: float
    step_s: float
    """In train_step."""
    push_s: float
    """The rest of the train loop but its wait: take, publish, book."""
    sample_s: float
    """A generator's engine steps, the mean over generators."""
    pause_s: float
    """A generator's install."""
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
        return self.step_s + self.push_s

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
    spans: list[tuple[float, Row]] = []
    recent = rows[-window - 1 :]
    for before, row in itertools.pairwise(recent):
        update_s = _number(row, "time_s") - _number(before, "time_s")
        follows = _number(row, "version") == _number(before, "version") + 1 > SETTLED_VERSION
        if (
            follows
            and 0 < update_s < MAX_UPDATE_S
            and all(math.isfinite(_number(row, key)) for key in ("queue/wait_s", "train/step_s", "generate/idle_share"))
        ):
            spans.append((update_s, row))
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
    paused = pauses if all(key in row for _, row in spans for key in pauses) else ("weights/install_s",)
    generators = _number(spans[-1][1], "generate/generators")
    known = [pool for pool in ("score", "reward") if all(math.isfinite(_number(row, f"{pool}/idle_share")) for _, row in spans)]
    return StageTimes(
        update_s=update_s,
        step_s=step_s,
        push_s=max(0.0, update_s - mean("queue/wait_s") - step_s),
        sample_s=sample_s,
        pause_s=min(sum(map(mean, paused)), update_s - sample_s),
        score_s=at_work("score/idle_share") if "score" in known else 0.0,
        reward_s=at_work("reward/idle_share") if "reward" in known else 0.0,
        score_known="score" in known,
        generators=min(4096, max(1, round(generators))) if math.isfinite(generators) else None,
    )


def _number(row: Row, key: str) -> float:
    """NaN where the row has no such number."""
    value: object = row.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _bounded(value: float, most: float) -> float:
    return min(max(value, 0.0), most) if math.isfinite(value) else 0.0
