"""A driver's signs of life: from its first moment on, and more often than those who look at it give it up."""

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import async_rlhf.commands.drive as drive
from async_rlhf.commands.guard import HEARTBEAT, beat_s, beating
from async_rlhf.config import load_config
from async_rlhf.dashboard.folder import SILENT_AFTER_S
from async_rlhf.errors import ConfigError
from async_rlhf.run_plan import RunPlan

QUICK = load_config(overrides=["supervision.ping_s=0.01"]).config


def beats(folder: Path, num: int) -> None:
    """Returns after so many further touches; hangs without."""
    for _ in range(num):
        (folder / HEARTBEAT).unlink(missing_ok=True)
        while not (folder / HEARTBEAT).is_file():
            time.sleep(0.005)


@pytest.mark.parametrize("ping_s", [0.01, 5.0, 1e6])
def test_a_driver_beats_three_times_before_the_dashboard_calls_it_silent_whatever_the_settings(ping_s: float):
    settings = load_config(overrides=[f"supervision.ping_s={ping_s}"]).config.supervision

    assert beat_s(settings) <= ping_s and 3 * beat_s(settings) <= SILENT_AFTER_S


def test_it_beats_again_and_again_and_not_after_the_end(tmp_path: Path):
    with beating(tmp_path, QUICK.supervision):
        beats(tmp_path, 3)

    assert "heartbeat" not in {thread.name for thread in threading.enumerate()}


def test_a_driver_beats_while_ray_starts_and_while_an_opponent_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[str] = []

    @contextmanager
    def on_ray(*args: object, **options: object) -> Generator[Any]:
        beats(tmp_path, 2)
        seen.append("ray")
        yield SimpleNamespace(address="", namespace="")
        seen.append("closed")

    def sample_opponent(*args: object) -> None:
        beats(tmp_path, 2)
        seen.append("opponent")
        raise ConfigError("no such opponent")

    monkeypatch.setattr(drive, "on_ray", on_ray)
    monkeypatch.setattr(drive, "sample_opponent", sample_opponent)
    plan = RunPlan(config=QUICK, run_folder=tmp_path, model_folder=tmp_path, reward="", metric="")
    watcher: Any = SimpleNamespace(rewound=lambda version: None, stage=lambda text: None, evaluations_dropped={}, verdict="")

    code, _ = drive._execute(plan, watcher)

    assert (code, seen) == (2, ["ray", "opponent"])
