"""Processor seconds of a crew, read from this very process."""

import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import ray

from actors.processor_time import DRIVER, ProcessorTime, spent
from actors.remote import Process, RemoteActor


def actor(name: str, *, node_id: str = "here", pid: int | None = None, started_at: float | None = None) -> RemoteActor:
    """An actor in this process, or in another."""
    found = RemoteActor(None, name)
    started_at = psutil.Process().create_time() if started_at is None else started_at
    found.process = Process(node_id=node_id, pid=os.getpid() if pid is None else pid, started_at=started_at)
    return found


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> ProcessorTime:
    """On the node called here."""
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "here"))
    return ProcessorTime()


def test_processes_of_this_node_are_read_and_so_is_this_one(processor: ProcessorTime):
    found = processor.read({"generate": [actor("generator")]})

    assert 0 < found["generate"]["generator"] <= found[DRIVER][DRIVER]


def test_what_this_process_started_itself_is_its_own_ray_until_it_is_gone(monkeypatch: pytest.MonkeyPatch):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "here"))
        processor = ProcessorTime()
        living = processor.read({})
        child.communicate(b"\n")

    assert f"ray {child.pid}" in living[DRIVER] and DRIVER in living[DRIVER]
    assert f"ray {child.pid}" not in processor.read({})[DRIVER]


def test_of_a_part_that_is_not_all_on_this_node_nothing_is_said(processor: ProcessorTime):
    assert set(processor.read({"generate": [actor("a"), actor("b", node_id="elsewhere")]})) == {DRIVER}


def test_one_that_is_not_ready_yet_is_not_on_this_node(processor: ProcessorTime):
    assert set(processor.read({"score": [RemoteActor(None, "scorer")]})) == {DRIVER}


def test_the_dead_and_those_whose_number_another_process_has_are_left_out(processor: ProcessorTime):
    dead, other = actor("dead", pid=2**22 + 1), actor("other", started_at=1.0)

    assert processor.read({"score": [dead, other, actor("living")]})["score"].keys() == {"living"}


def test_only_processes_that_both_readings_know_count():
    before, after = {"train": {"rank-0": 1.0, "gone": 4.0}}, {"train": {"rank-0": 3.0, "new": 9.0}}

    assert spent(before, after, "train") == 2.0 and spent(before, after, "score") is None and spent({}, after, "train") is None
