"""The driver's books: what a run did so far, as one row per update, as a TrainingState, and as totals at the end."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from actors.engine_loop import EngineUsage
from actors.meters import Readings
from actors.rates import Counted, Row, WorkerSeconds, clip, idle_share, processor_rates, rates, train_rates, weight_rates
from async_rlhf.config import Config
from async_rlhf.scores import ScoreMoments
from async_rlhf.state import TrainingState
from async_rlhf.tickets import QueueCounters

if TYPE_CHECKING:
    from actors.crew import UpdateRecord


@dataclass
class Accounts:
    """Cumulative counts from the first ticket to the last update."""

    config: Config
    run_id: str
    session: int = 0
    earlier_s: float = 0.0
    """Of earlier drivers, from the first ticket on."""
    started_s: float = field(default_factory=time.perf_counter)
    last_s: float = field(default_factory=time.perf_counter)
    updates: int = 0
    optimizer_steps: int = 0
    prompts: int = 0
    completions: int = 0
    tokens: int = 0
    staleness_max: int = 0
    train_s: float = 0.0
    reward_mean: float | None = None
    best_reward_mean: float | None = None
    first: Counted = field(default_factory=Counted)
    last: Counted = field(default_factory=Counted)
    """At the start, and at the last update."""
    queue: Mapping[str, int] = field(default_factory=dict[str, int])
    dropped: Mapping[str, int] = field(default_factory=dict[str, int])
    failed_prompts: Mapping[str, str] = field(default_factory=dict[str, str])
    skipped_rows: Mapping[str, int] = field(default_factory=dict[str, int])
    score_moments: ScoreMoments = field(default_factory=ScoreMoments)
    health: Mapping[str, str] = field(default_factory=dict[str, str])
    restarts: Mapping[str, int] = field(default_factory=dict[str, int])
    checkpoint: int | None = None

    def begin(self, usage: Mapping[str, EngineUsage], readings: Readings | None = None, generator_s: float = 0.0) -> None:
        """The first ticket is about to go out: shares and rates count from here.

        Args:
            generator_s: see UpdateRecord.
        """
        self.started_s = self.last_s = time.perf_counter()
        self.first = self.last = Counted(usage=dict(usage), readings=readings or Readings(), generator_s=generator_s)

    def restore(self, state: TrainingState) -> None:
        """Go back, or ahead, to what was booked at `state`; the clock goes on."""
        self.updates = state.version
        self.optimizer_steps = state.optimizer_steps
        self.prompts, self.completions, self.tokens = state.prompts, state.completions, state.tokens
        self.staleness_max = state.staleness_max
        self.reward_mean, self.best_reward_mean = state.reward_mean, state.best_reward_mean
        self.score_moments = state.score_moments

    def add(self, record: "UpdateRecord", restarts: Mapping[str, int]) -> Row:
        """Book one update; returns its row.

        Args:
            restarts: of each part of the crew, so far.
        """
        now = time.perf_counter()
        self.restarts = dict(restarts)
        row = self._row(record, elapsed_s=max(now - self.last_s, 1e-9), now=now)
        summary, report, counters = record.summary, record.reports[0], record.counters
        self.updates += 1
        self.optimizer_steps = report.optimizer_steps
        self.prompts += summary.num_groups
        self.completions += summary.num_completions
        self.tokens += summary.num_completion_tokens
        self.staleness_max = max(self.staleness_max, summary.staleness_max)
        self.train_s += record.train_s
        self.reward_mean = summary.metrics["reward/mean"]
        self.best_reward_mean = max(self.reward_mean, self.best_reward_mean if self.best_reward_mean is not None else self.reward_mean)
        self.score_moments = summary.moments
        self.last_s, self.last = now, _counted(record)
        self.count(counters)
        self.health = dict(record.health)
        return row

    def count(self, counters: QueueCounters) -> None:
        """Where the groups are, and what became of those that are not trained."""
        self.queue = {
            "leased": counters.leased,
            "scoring": counters.scoring,
            "waiting": counters.waiting,
            "taken": counters.taken,
            "trained": counters.trained,
        }
        self.dropped = {**counters.voided, **counters.dropped, **{f"refused_{why}": n for why, n in counters.refused.items()}}
        self.failed_prompts = counters.failed_prompts
        self.skipped_rows = counters.skipped_rows

    def state(self, phase: str) -> TrainingState:
        """Where the run stands now."""
        return TrainingState(
            run_id=self.run_id,
            phase=phase,
            version=self.updates,
            num_updates=self.config.updates,
            optimizer_steps=self.optimizer_steps,
            prompts=self.prompts,
            completions=self.completions,
            tokens=self.tokens,
            seed=self.config.seed,
            reward_mean=self.reward_mean,
            best_reward_mean=self.best_reward_mean,
            staleness_max=self.staleness_max,
            elapsed_s=self.elapsed_s,
            session=self.session,
            restarts=dict(self.restarts),
            checkpoint=self.checkpoint,
            weights_version=self.updates,
            queue=dict(self.queue),
            dropped=dict(self.dropped),
            score_moments=self.score_moments,
            actors=dict(self.health),
            updated_at=time.time(),
        )

    @property
    def elapsed_s(self) -> float:
        """From the first ticket to the last update, over all drivers."""
        return self.earlier_s + self.last_s - self.started_s

    @property
    def generator_idle_share(self) -> float:
        """Share of their time from the first ticket to the last update that the generators did not spend in engine steps."""
        return idle_share(self.first.usage, self.last.usage, self.last.generator_s - self.first.generator_s)

    @property
    def learner_idle_share(self) -> float:
        """Share of the same time in which the learner did not train."""
        return clip(1 - self.train_s / max(self.last_s - self.started_s, 1e-9))

    def _row(self, record: "UpdateRecord", *, elapsed_s: float, now: float) -> Row:
        summary, report, counters = record.summary, record.reports[0], record.counters
        steps_per_update = report.optimizer_steps / (self.updates + 1)
        now_counted = _counted(record)
        there = WorkerSeconds(
            generators=now_counted.generator_s - self.last.generator_s,
            scorers=elapsed_s * self.config.scorer.count,
            rewards=elapsed_s * self.config.reward.count,
        )
        return {
            "update": summary.update,
            "version": report.version,
            "session": self.session,
            "optimizer_steps": report.optimizer_steps,
            "time_s": self.earlier_s + now - self.started_s,
            **summary.metrics,
            **report.metrics,
            "queue/staleness_optimizer_steps_mean": summary.metrics["queue/staleness_mean"] * steps_per_update,
            "queue/depth_groups": counters.waiting,
            "queue/leased_groups": counters.leased,
            "queue/scoring_groups": counters.scoring,
            "queue/wait_s": record.wait_s,
            **rates(self.last, now_counted, elapsed_s, there),
            "generate/generators": there.generators / elapsed_s,
            **train_rates(record, elapsed_s),
            **weight_rates(record),
            **processor_rates(self.last, now_counted),
            "time/update_s": elapsed_s,
            "supervision/restarts": sum(self.restarts.values()),
        }


def _counted(record: "UpdateRecord") -> Counted:
    return Counted(usage=dict(record.usage), readings=record.readings, generator_s=record.generator_s, processor=record.processor)
