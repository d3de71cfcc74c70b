"""The run's numbers for Prometheus, through Ray's metrics: set by the driver alone, from what it knows of everybody.

Ray forgets a gauge that was not set again for 20 seconds: all are set at every heartbeat. Numbers of samplers and scorers are of the
last half minute; those of updates of the last one.
"""

import asyncio
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Protocol

import ray
from ray.util.metrics import Gauge, Histogram

from actors.crew import Crew, UpdateRecord
from actors.engine_loop import EngineUsage
from actors.launch import Cluster
from actors.meters import Reading
from actors.rates import Counted, Row, WorkerSeconds, clip, idle_share, rates
from async_rlhf.config import Config
from async_rlhf.dispensable import Dispensable
from async_rlhf.exported import DROP_REASONS, EXPORTED, MAX_LABELLED, PREFIX, REFUSAL_REASONS, name_of, row_keys

HEARTBEAT_S = 5.0

WINDOW_BEATS = 6
"""Heartbeats over which live rates are taken."""

Sample = tuple[str, dict[str, str], float]
"""Name in EXPORTED, labels beside `run`, value."""


class Instruments(Protocol):
    """Where numbers go."""

    def set(self, name: str, labels: Mapping[str, str], value: float) -> None:
        """A gauge's value now."""
        ...

    def observe(self, name: str, value: float) -> None:
        """One more value of a histogram."""
        ...


class RayInstruments:
    """Ray's own; Ray must be connected."""

    def __init__(self, run_id: str) -> None:
        self._run = {"run": run_id}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}

    def set(self, name: str, labels: Mapping[str, str], value: float) -> None:
        """See Instruments."""
        if name not in self._gauges:
            declared = EXPORTED[name]
            self._gauges[name] = Gauge(name, declared.meaning, tag_keys=("run", *declared.labels))
        self._gauges[name].set(value, tags={**self._run, **labels})

    def observe(self, name: str, value: float) -> None:
        """See Instruments."""
        if name not in self._histograms:
            declared = EXPORTED[name]
            self._histograms[name] = Histogram(name, declared.meaning, boundaries=list(declared.boundaries), tag_keys=("run",))
        self._histograms[name].observe(value, tags=self._run)


def metrics_address(cluster: Cluster) -> str:
    """Where a Ray of our own, which has one node, shows its metrics; empty for a cluster that we joined: its head tells Prometheus."""
    if cluster.local_folder is None:
        return ""
    node = ray.nodes()[0]
    return f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"


class Exporter:
    """Of one run: see keep_beating."""

    def __init__(self, crew: Crew, config: Config, instruments: Instruments) -> None:
        self._crew = crew
        self._config = config
        self._instruments = instruments
        self._row: Row = {}
        self._seen: deque[tuple[float, Counted, Reading]] = deque(maxlen=WINDOW_BEATS + 1)

    def update(self, record: UpdateRecord, row: Row) -> None:
        """An update is through."""
        self._row = row
        for staleness in record.summary.staleness:
            self._instruments.observe(PREFIX + "staleness_updates", staleness)

    def beat(self, now: float) -> None:
        """Set everything.

        Args:
            now: seconds on a clock that never goes back.
        """
        crew = self._crew
        meters = crew.meters
        self._seen.append(
            (now, Counted(usage=dict(crew.usage), readings=meters.readings, generator_s=crew.roster.generator_s), meters.train.reading)
        )
        keys = set(row_keys())
        exported = {key: value for key, value in self._row.items() if key in keys or name_of(key)[1]}
        samples = [(*name_of(key), value) for key, value in {**exported, **self._live_rates()}.items()]
        for name, labels, value in [*samples, *self._standing(), *self._of_queue(), *self._of_generators()]:
            self._instruments.set(name, labels, value)

    def _live_rates(self) -> Row:
        """Those of a row that need not wait for an update."""
        (begin, before, _), (now, after, _) = self._seen[0], self._seen[-1]
        elapsed_s = now - begin
        if elapsed_s <= 0:
            return {}
        crew = self._crew
        there = WorkerSeconds(
            generators=after.generator_s - before.generator_s, scorers=elapsed_s * len(crew.scorers), rewards=elapsed_s * len(crew.rewards)
        )
        return rates(before, after, elapsed_s, there)

    def _standing(self) -> Iterator[Sample]:
        config, crew = self._config, self._crew
        yield PREFIX + "policy_version", {}, max(crew.published[0], 0)
        yield PREFIX + "target_updates", {}, config.updates
        yield PREFIX + "bound_staleness_updates", {}, config.max_staleness
        (begin, _, before), (now, _, after) = self._seen[0], self._seen[-1]
        yield PREFIX + "learner_busy_share", {}, clip((after.busy_s - before.busy_s) / max(now - begin, 1e-9))
        parts = [member.name for member in (*crew.scorers, *crew.rewards, crew.queue, crew.broadcaster)]
        for part in {*parts, "learner", *(seat.member.name for seat in crew.roster), *crew.supervisor.restarts}:
            yield PREFIX + "restarts", {"part": part}, crew.supervisor.restarts[part]

    def _of_queue(self) -> Iterator[Sample]:
        counters = self._crew.counters
        if counters is None:
            return
        for place in ("leased", "lost", "scoring", "waiting", "taken", "trained"):
            yield PREFIX + "queue_groups", {"place": place}, getattr(counters, place)
        for name, known, counted in (
            ("dropped_groups", DROP_REASONS, {**counters.voided, **counters.dropped}),
            ("refused_groups", REFUSAL_REASONS, counters.refused),
            ("skipped_rows", (), counters.skipped_rows),
        ):
            for reason, count in {**dict.fromkeys(known, 0), **counted}.items():
                yield PREFIX + name, {"reason": str(reason)}, count

    def _of_generators(self) -> Iterator[Sample]:
        crew = self._crew
        if len(crew.installs) > MAX_LABELLED:
            return
        (begin, before, _), (now, after, _) = self._seen[0], self._seen[-1]
        elapsed_s = max(now - begin, 1e-9)
        for actor, report in list(crew.installs.items()):  # of the living alone
            labels = {"generator": actor.partition(".")[0]}
            usage = after.usage.get(actor)
            if usage is not None:
                earlier = before.usage.get(actor, EngineUsage(busy_s=0.0, num_tokens=0, num_completions=0))
                yield PREFIX + "generator_idle_share", labels, idle_share({actor: earlier}, {actor: usage}, elapsed_s)
                yield PREFIX + "generator_tokens_per_s", labels, (usage.num_tokens - earlier.num_tokens) / elapsed_s
                yield PREFIX + "generator_running_requests", labels, usage.occupancy.num_running
                yield PREFIX + "generator_waiting_requests", labels, usage.occupancy.num_waiting
                yield PREFIX + "generator_kv_use_share", labels, usage.occupancy.kv_use_share
            yield PREFIX + "generator_policy_version", labels, report.version
            yield PREFIX + "generator_install_s", labels, report.install_s


async def keep_beating(exporter: Dispensable[Exporter]) -> None:
    """Set everything at every heartbeat, until that fails."""
    while exporter.works:
        exporter.do(lambda made: made.beat(time.monotonic()))
        await asyncio.sleep(HEARTBEAT_S)
