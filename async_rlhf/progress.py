"""What a person sees while a run goes on: a live panel in a terminal, one line per update elsewhere (a job's log)."""

import time
from collections.abc import Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from async_rlhf.state import TrainingState

Row = Mapping[str, float]

VERDICT_EVERY = 20
"""Updates between two verdicts in a log."""


class Progress:
    """Shows stages and updates on a console. Use as a context manager."""

    def __init__(self, console: Console, num_updates: int) -> None:
        self._console = console
        self._num_updates = num_updates
        self._started_s = time.perf_counter()
        self._live: Live | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def stage(self, text: str) -> None:
        """One line with the seconds since the start."""
        self._console.print(f"[{time.perf_counter() - self._started_s:6.1f} s] {text}", markup=False, highlight=False, soft_wrap=True)

    def update(self, row: Row, state: TrainingState, verdict: str = "") -> None:
        """An update is through. In a log the verdict stands below every VERDICT_EVERY-th one."""
        if not self._console.is_terminal:
            self.stage(describe(row, self._num_updates))
            if verdict and row["version"] % VERDICT_EVERY == 0:
                self.stage(f"verdict: {verdict}")
            return
        if self._live is None:
            self._live = Live(console=self._console, refresh_per_second=4)
            self._live.start()
        self._live.update(self._panel(row, state, verdict))

    def _panel(self, row: Row, state: TrainingState, verdict: str) -> Group:
        table = Table.grid(padding=(0, 2))
        for cells in (
            ("update", f"{state.version} / {self._num_updates}", "ETA", _duration(eta_s(row, self._num_updates))),
            ("reward", f"{row['reward/mean']:.3f}", "KL to start", f"{row['rollout/kl_k1_nats']:.3f} nats"),
            ("staleness", f"{row['queue/staleness_mean']:.2f} mean, {row['queue/staleness_max']:.0f} max", "queue", _depth(row)),
            ("generators", f"{row['generate/tokens_per_s']:,.0f} tokens/s", "idle", f"{row['generate/idle_share']:.0%}"),
            ("learner", f"{row['train/tokens_per_s']:,.0f} tokens/s", "idle", f"{row['train/idle_share']:.0%}"),
        ):
            table.add_row(*(Text(cell, style="bold" if index % 2 == 0 else "") for index, cell in enumerate(cells)))
        bar = ProgressBar(total=self._num_updates, completed=state.version, width=60)
        return Group(table, bar, *([Text(verdict, style="italic")] if verdict else []))


def describe(row: Row, num_updates: int) -> str:
    """One update in one line."""
    return (
        f"update {row['version']:.0f}/{num_updates} reward {row['reward/mean']:.3f} kl {row['rollout/kl_k1_nats']:.3f} "
        f"staleness {row['queue/staleness_mean']:.2f}/{row['queue/staleness_max']:.0f} queue {row['queue/depth_groups']:.0f} "
        f"generator {row['generate/tokens_per_s']:.0f} tok/s idle {row['generate/idle_share']:.0%} "
        f"learner {row['train/tokens_per_s']:.0f} tok/s idle {row['train/idle_share']:.0%} eta {_duration(eta_s(row, num_updates))}"
    )


def eta_s(row: Row, num_updates: int) -> float:
    """Seconds to the last update at the mean speed so far."""
    return row["time_s"] / row["version"] * (num_updates - row["version"])


def _depth(row: Row) -> str:
    return f"{row['queue/depth_groups']:.0f} groups"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
