"""What is handed on to actors through the environment, and that nothing of it stays behind."""

import os
import subprocess
import sys

import pytest

from actors.environment import exported


def test_what_is_started_inside_has_the_environment_and_this_process_has_its_own_again_afterwards(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ARLHF_CHANGED", "before")
    monkeypatch.delenv("ARLHF_ADDED", raising=False)
    before = dict(os.environ)

    with exported({"ARLHF_CHANGED": "inside", "ARLHF_ADDED": "too"}):
        look = "import os; print(os.environ['ARLHF_CHANGED'], os.environ['ARLHF_ADDED'])"
        seen = subprocess.run([sys.executable, "-S", "-c", look], capture_output=True, text=True, check=True).stdout.split()

    assert seen == ["inside", "too"]
    assert dict(os.environ) == before


def test_a_failure_inside_leaves_nothing_behind_either(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("ARLHF_ADDED", raising=False)

    with pytest.raises(RuntimeError, match="no Ray"), exported({"ARLHF_ADDED": "too"}):
        raise RuntimeError("no Ray")

    assert "ARLHF_ADDED" not in os.environ


def test_who_gives_way_does_so_with_all_its_threads_and_those_to_come():
    """In a process of its own: only root could take it back."""
    look = """
import os, threading
from actors.environment import give_way
def niceness(): return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
begun, over, seen = threading.Event(), threading.Event(), []
def early():
    before = niceness(); begun.set(); over.wait(); seen.append(niceness() - before)
old = threading.Thread(target=early); old.start(); begun.wait()
before = niceness(); give_way(3); over.set(); old.join()
young = threading.Thread(target=lambda: seen.append(niceness() - before)); young.start(); young.join()
print(*seen, niceness() - before)
"""
    found = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)

    assert found.stdout.split() == ["3", "3", "3"]
