"""What the driver sets for Prometheus at each heartbeat."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, cast

import pytest

from actors.crew import Crew
from actors.engine_loop import EngineUsage
from actors.exporter import Exporter, keep_beating
from actors.roster import Roster
from actors.supervision import Supervisor, guarded
from async_rlhf.config import load_config
from async_rlhf.dispensable import Dispensable
from async_rlhf.exported import EXPORTED, MAX_LABELLED, PREFIX, name_of, row_keys
from async_rlhf.protocols import Occupancy
from async_rlhf.tickets import QueueCounters
from async_rlhf.types import InstallReport

INSTALLED = InstallReport(version=4, install_s=0.5, pause_s=0.1, canary_error=0.0)


class Board:
    """Keeps what was set last, and all that was observed."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self.observed: list[tuple[str, float]] = []

    def set(self, name: str, labels: Mapping[str, str], value: float) -> None:
        assert set(labels) == set(EXPORTED[name].labels)
        self.values[name.removeprefix(PREFIX), tuple(labels.items())] = value

    def observe(self, name: str, value: float) -> None:
        assert EXPORTED[name].boundaries
        self.observed.append((name.removeprefix(PREFIX), value))

    def value(self, name: str, **labels: str) -> float:
        return self.values[name, tuple(labels.items())]


def member(name: str) -> Any:
    return SimpleNamespace(name=name, actor=SimpleNamespace(name=f"{name}.0.1"))


def make_exporter(num_generators: int = 2, clock: Callable[[], float] = lambda: 0.0) -> tuple[Exporter, Crew, Board]:
    config = load_config(overrides=["updates=9", "max_staleness=2"]).config
    crew = Crew(
        supervisor=Supervisor(cast(Any, None), config, 0, lambda entry: None),
        roster=Roster([member(f"generator-{index}") for index in range(num_generators)], clock),
        scorers=[member("scorer-0")],
        queue=member("replay_queue"),
        broadcaster=member("weight_broadcaster"),
        installs={f"generator-{index}.0.1": INSTALLED for index in range(num_generators)},
        learner=cast(Any, None),
        transport=cast(Any, None),
    )
    board = Board()
    return Exporter(crew, config, board), crew, board


def usage(busy_s: float, num_tokens: int) -> EngineUsage:
    full = Occupancy(num_running=7, num_waiting=2, kv_use_share=0.25)
    return EngineUsage(busy_s=busy_s, num_tokens=num_tokens, num_completions=1, occupancy=full)


def counters(**voided: int) -> QueueCounters:
    places = {"issued": 12, "leased": 3, "lost": 1, "scoring": 2, "waiting": 4, "taken": 0, "trained": 1, "reissued": 0}
    return QueueCounters(**places, voided=voided, dropped={}, refused={"too_old": 2})


def test_before_anything_happened_all_that_is_known_is_exported():
    exporter, _, board = make_exporter()

    exporter.beat(0.0)

    assert (board.value("policy_version"), board.value("target_updates"), board.value("bound_staleness_updates")) == (0, 9, 2)
    assert board.value("restarts", part="generator-1") == board.value("restarts", part="learner") == 0


def test_rates_are_of_the_time_between_heartbeats_and_a_restarted_generator_keeps_its_label():
    clock = iter((0.0, 100.0, 110.0)).__next__
    exporter, crew, board = make_exporter(2, clock)
    crew.usage = {"generator-0.0.1": usage(1.0, 10)}
    exporter.beat(100.0)

    crew.usage = {"generator-0.0.1": usage(3.0, 60), "generator-1.0.1": usage(5.0, 100)}
    exporter.beat(110.0)

    assert board.value("generate_tokens_per_s") == pytest.approx(15.0)
    assert board.value("generate_idle_share") == pytest.approx(1 - 7 / 20)
    assert board.value("generator_tokens_per_s", generator="generator-0") == pytest.approx(5.0)
    assert board.value("generator_idle_share", generator="generator-1") == pytest.approx(0.5)
    assert board.value("generator_kv_use_share", generator="generator-1") == 0.25
    assert board.value("generator_running_requests", generator="generator-0") == 7


def test_a_generator_that_died_has_no_gauges_until_its_successor_installed_a_version():
    exporter, crew, board = make_exporter(1)
    crew.usage = {"generator-0.0.1": usage(1.0, 10)}
    crew.installs.clear()

    exporter.beat(0.0)

    assert not [name for name, _ in board.values if name.startswith("generator_")]


def test_old_heartbeats_are_forgotten():
    exporter, crew, board = make_exporter(1)
    crew.usage = {"generator-0.0.1": usage(0.0, 1000)}

    for beat in range(20):
        exporter.beat(5.0 * beat)

    assert board.value("generator_tokens_per_s", generator="generator-0") == 0.0


def test_groups_by_place_and_every_reason_of_a_drop_are_there_before_the_first_drop():
    exporter, crew, board = make_exporter()
    crew.counters = counters(tied=5)

    exporter.beat(0.0)

    assert {place: board.value("queue_groups", place=place) for place in ("leased", "scoring", "waiting")} == {
        "leased": 3,
        "scoring": 2,
        "waiting": 4,
    }
    assert board.value("dropped_groups", reason="tied") == 5
    assert board.value("dropped_groups", reason="failed") == 0
    assert board.value("refused_groups", reason="too_old") == 2


def test_an_updates_row_is_exported_from_then_on_with_the_parts_of_a_reward_as_labels():
    exporter, _, board = make_exporter()
    record = SimpleNamespace(summary=SimpleNamespace(staleness=(0, 2, 1)))

    exporter.update(cast(Any, record), {"update": 3, "train/loss": 0.5, "reward/part/brevity.cut": 0.25})
    exporter.beat(0.0)
    exporter.beat(5.0)

    assert board.value("train_loss") == 0.5
    assert board.value("reward_part", part="brevity.cut") == 0.25
    assert board.value("generator_policy_version", generator="generator-0") == 4
    assert board.observed == [("staleness_updates", staleness) for staleness in (0, 2, 1)]
    assert not [name for name, _ in board.values if name == "update"]


def test_very_many_generators_have_no_gauges_of_their_own():
    exporter, crew, board = make_exporter(MAX_LABELLED + 1)
    crew.usage = {"generator-0.0.1": usage(1.0, 10)}

    exporter.beat(0.0)
    exporter.beat(5.0)

    assert not [name for name, _ in board.values if name.startswith("generator_")]
    assert board.value("generate_tokens_per_s") == 0.0


def test_the_heartbeat_goes_on_until_it_is_ended():
    exporter, _, board = make_exporter()

    async def beat_once() -> None:
        keeping = asyncio.ensure_future(keep_beating(Dispensable("metrics", lambda: exporter)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not keeping.done()
        keeping.cancel()

    asyncio.run(beat_once())

    assert board.value("target_updates") == 9


@pytest.mark.parametrize("broken", ["undeclared", "refused"])
def test_a_run_goes_on_without_an_exporter_that_failed_which_is_told_once(
    broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    made, _, board = make_exporter()
    exporter = Dispensable("metrics for Prometheus", lambda: made)
    monkeypatch.setattr("actors.exporter.HEARTBEAT_S", 0.0)
    monkeypatch.setattr("actors.exporter.row_keys", lambda: ["not/declared"])

    def refuse(name: str, labels: Mapping[str, str], value: float) -> None:
        raise ValueError(f"{name} takes no tag but run")

    async def train() -> str:
        await asyncio.sleep(0)
        if broken == "undeclared":  # EXPORTED of an update's row
            exporter.do(lambda it: it.update(cast(Any, SimpleNamespace(summary=SimpleNamespace(staleness=()))), {"not/declared": 0.5}))
        else:
            monkeypatch.setattr(board, "set", refuse)
        for _ in range(20):
            await asyncio.sleep(0)
        return "trained"

    with caplog.at_level(logging.WARNING):
        assert asyncio.run(guarded(train(), keep_beating(exporter))) == "trained"

    (record,) = caplog.records
    reason = {"undeclared": "KeyError: 'async_rlhf_not_declared'", "refused": "takes no tag but run"}[broken]
    assert record.getMessage().startswith("the run goes on without metrics for Prometheus: ") and reason in record.getMessage()


def test_names_of_rows_are_their_keys_and_no_two_are_equal():
    names = [name_of(key)[0] for key in row_keys()]

    assert len(set(names)) == len(names)
    assert name_of("generate/tokens_per_s") == (f"{PREFIX}generate_tokens_per_s", {})
    assert set(names) < set(EXPORTED)
