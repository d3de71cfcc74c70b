"""benchmarks/soak.py: what counts as growth."""

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

MIB = 1 << 20


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("soak")


@pytest.mark.parametrize(
    ("per_update", "noise", "flat"),
    [(0.0, 1.0, True), (0.0009, 0.0, True), (0.002, 0.0, False), (0.002, 10.0, True), (0.05, 1.0, False), (-0.05, 0.1, True)],
    ids=["level with noise", "less than a hundredth", "more", "more, but less than the noise", "much more", "less and less"],
)
def test_a_process_grows_where_the_line_rises_by_more_than_noise_and_a_hundredth(
    soak: ModuleType, per_update: float, noise: float, flat: bool
) -> None:
    """100 MiB and so much more per update: a hundredth is 1 MiB per 1,000 updates."""
    updates = np.arange(2000.0)
    memory = (100 + per_update * updates + noise * np.random.default_rng(0).standard_normal(2000)) * MIB

    found = soak.slope_of(updates, memory, 1000, 2000)

    assert found.flat is flat
    assert found.per_1000 / MIB == pytest.approx(1000 * per_update, abs=max(2 * found.error / MIB, 1e-3))


def test_what_was_before_the_middle_or_not_there_does_not_count(soak: ModuleType) -> None:
    updates = list(range(200))
    rises_then_stays = [float(min(update, 100)) * MIB for update in updates]

    assert soak.slope_of(updates, rises_then_stays, 100, 200).per_1000 == pytest.approx(0, abs=1e-3)
    assert soak.slope_of(updates, [float("nan")] * 150 + [1.0] * 50, 100, 200) is None


def test_drift_is_the_last_quarter_over_the_second(soak: ModuleType) -> None:
    assert soak.drift([9.0] * 4 + [2.0] * 4 + [7.0] * 4 + [3.0] * 4) == 1.5


@pytest.mark.parametrize(
    ("pid", "words", "title"),
    [
        (1, ["python", "-m", "async_rlhf"], "driver"),
        (2, ["ray::LearnerRank.train_step"], "LearnerRank"),
        (2, ["ray::IDLE"], "IDLE"),
        (2, ["/x/core/src/ray/raylet/raylet", "--port=1"], "raylet"),
        (2, ["python", "-u", "/x/ray/_private/log_monitor.py", "--a"], "log_monitor"),
    ],
    ids=["driver", "actor", "idle", "program", "script"],
)
def test_a_process_is_called_by_what_it_is(soak: ModuleType, pid: int, words: list[str], title: str) -> None:
    assert soak.title_of(SimpleNamespace(pid=pid, cmdline=lambda: words), 1) == title


def test_files_are_counted_by_what_lies_in_the_run_folder(soak: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "journal" / "old").mkdir(parents=True)
    (tmp_path / "journal" / "old" / "a").write_bytes(b"12345")
    (tmp_path / "journal" / "b").write_bytes(b"123")
    (tmp_path / "state.json").write_bytes(b"1")

    assert soak.sizes(tmp_path) == {"journal": 8, "state.json": 1}


def test_a_process_is_looked_at_under_one_name_however_it_changes_its_title(soak: ModuleType, tmp_path: Path) -> None:
    words = ["ray::IDLE"]
    watch = soak.Watch(SimpleNamespace(pid=1), tmp_path)
    process, other = (SimpleNamespace(pid=pid, cmdline=lambda: words) for pid in (7, 8))
    names = []
    for title in ("ray::IDLE", "ray::Generator.install", "ray::Generator.run"):
        words[:] = [title]
        names.append(watch._name(process))

    assert names == ["IDLE", "Generator", "Generator"] and watch._name(other) == "Generator #2"
