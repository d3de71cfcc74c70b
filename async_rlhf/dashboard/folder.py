"""One run as its folder tells it, kept up to date at little cost: grown files are read from where the last reading ended."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from async_rlhf.dashboard.reading import Fields, Tail, number, read_object, stamp, text
from async_rlhf.dashboard.samples import NewestGroups
from async_rlhf.dashboard.settings import Settings, read_settings
from async_rlhf.dashboard.table import Table
from async_rlhf.evaluation_log import ROWS, SAMPLES
from async_rlhf.state import LIVE_PHASES, STATE_FILE

T = TypeVar("T")

MAX_INCIDENTS = 200
"""The newest are kept."""
MAX_EVALUATIONS = 5000
SILENT_AFTER_S = 60.0
"""A driver touches its heartbeat at least three times as often (commands/guard.py), and writes its state at each update."""
CONFIG, SUMMARY = "config.yaml", "summary.json"
SIGNS_OF_LIFE = ("heartbeat", STATE_FILE, "metrics.jsonl", "LOCK", CONFIG)


def is_run(folder: Path) -> bool:
    """Whether a run was begun there."""
    return (folder / CONFIG).is_file() and any((folder / name).is_file() for name in (STATE_FILE, "metrics.jsonl", "LOCK", "origin.json"))


class RunFolder:
    """Reads; never writes, and runs nothing that it reads. Not for several threads at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.table = Table()
        self.incidents: list[Fields] = []
        self.evaluations: list[Fields] = []
        self.lost_counts: dict[str, int] = {}
        """Part of the crew -> how often it was lost, over all drivers of the run."""
        self._metrics = Tail(folder, "metrics.jsonl")
        self._events = Tail(folder, "incidents.jsonl")
        self._evaluated = Tail(folder, ROWS)
        self._groups = NewestGroups(folder)
        self._known: dict[tuple[str, str], tuple[tuple[int, int, int], Any]] = {}

    def refresh(self) -> None:
        """Take in what came since the last call."""
        self._grow(self._metrics, self.table.clear, self.table.extend)
        self._grow(self._events, self._forget_incidents, self._add_incidents)
        self._grow(self._evaluated, self.evaluations.clear, self._add_evaluations)

    def cached(self, name: str, what: str, read: Callable[[], T]) -> T:
        """What was made of a file, read again when the file changed.

        Args:
            what: tells several things apart that are made of one file.
        """
        now = stamp(self.folder, name)
        before = self._known.get((name, what))
        if before is None or before[0] != now:
            before = self._known[name, what] = (now, read())
        return before[1]

    @property
    def state(self) -> Fields:
        """state.json; empty before it is written."""
        return self.cached(STATE_FILE, "", lambda: read_object(self.folder, STATE_FILE))

    @property
    def summary(self) -> Fields:
        """summary.json; empty while the run goes on, or where it was killed. An older one than the state is of an earlier driver."""
        summary = self.cached(SUMMARY, "", lambda: read_object(self.folder, SUMMARY))
        return {} if text(self.state.get("phase")) in LIVE_PHASES else summary

    @property
    def settings(self) -> Settings:
        """config.yaml, flat."""
        return self.cached(CONFIG, "", lambda: read_settings(self.folder))

    @property
    def samples(self) -> Fields:
        """samples.json."""
        return self.cached(SAMPLES, "", lambda: read_object(self.folder, SAMPLES))

    @property
    def newest_groups(self) -> Any:
        """The newest scored groups of the journal, newest first."""
        return self._groups.read()

    @property
    def samples_stamp(self) -> str:
        """Changes when the held-out samples do."""
        return str(hash(stamp(self.folder, SAMPLES)))

    @property
    def seen_s_ago(self) -> float:
        """Seconds since the run's driver last gave a sign of life."""
        newest = max(stamp(self.folder, name)[2] for name in SIGNS_OF_LIFE) / 1e9
        return max(0.0, time.time() - newest)

    @property
    def phase(self) -> str:
        """What state.json says, or `silent` where its driver gives no sign of life; `starting` before there is a state."""
        said = text(self.state.get("phase"), "starting")[:40]
        return "silent" if said in LIVE_PHASES and self.seen_s_ago > SILENT_AFTER_S else said

    @property
    def live(self) -> bool:
        """Whether a driver is at work."""
        return self.phase in LIVE_PHASES

    @property
    def started_at(self) -> float:
        """Unix seconds, for sorting: when the config was written."""
        return stamp(self.folder, CONFIG)[2] / 1e9

    def _grow(self, tail: Tail, forget: Callable[[], object], take: Callable[[list[Fields]], None]) -> None:
        while True:
            rows, anew = tail.read()
            if anew:
                forget()
            if not rows:
                return
            take(rows)

    def _forget_incidents(self) -> None:
        self.incidents.clear()
        self.lost_counts.clear()

    def _add_incidents(self, rows: list[Fields]) -> None:
        self.incidents = [*self.incidents, *rows][-MAX_INCIDENTS:]
        for row in rows:
            name = text(row.get("name"))[:100]
            if row.get("event") == "lost" and (name in self.lost_counts or len(self.lost_counts) < MAX_INCIDENTS):
                self.lost_counts[name] = self.lost_counts.get(name, 0) + 1

    def _add_evaluations(self, rows: list[Fields]) -> None:
        found = {number(row.get("version")): row for row in [*self.evaluations, *rows] if number(row.get("version")) is not None}
        self.evaluations = [found[version] for version in sorted(found, key=lambda v: v or 0.0)][-MAX_EVALUATIONS:]
