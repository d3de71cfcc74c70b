"""Generators join and leave a real run that goes on, by the command line."""

import json
import operator
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from actors.environment import LEARNER_NICENESS, SCORER_NICENESS
from async_rlhf.audit import audit
from async_rlhf.commands.guard import HEARTBEAT
from async_rlhf.recorder import read_rows
from tests.support.command import CHECKOUT, command, environment, has_rows, ray_processes, rows_of, run_cli, summary_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

WORDS = (
    *("train", "conf/quickstart.yaml", "batch_groups=16", "updates=100000", "run.local_cpus=4"),
    *("evaluation.num_prompts=20", "supervision.ping_s=1", "timeouts.stop_s=60", "timeouts.place_s=5"),
)


def hosts_of(kind: str) -> list[psutil.Process]:
    """Those of these tests' processes that host such an actor."""
    found: list[psutil.Process] = []
    for pid in ray_processes():
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            if re.match(rf"ray::{kind}\b", " ".join(process.cmdline())):
                found.append(process)
    return found


def generator_processes() -> int:
    """How many of these tests' processes host a generator."""
    return len(hosts_of("Generator"))


def assert_who_gives_way(driver: int) -> None:
    """The learner and the scorer do, the generator and the queue are as nice as the driver."""
    kinds = {"Generator": 0, "ReplayQueue": 0, "LearnerRank": LEARNER_NICENESS, "Scorer": SCORER_NICENESS}
    assert {kind: [process.nice() - driver for process in hosts_of(kind)] for kind in kinds} == {kind: [of] for kind, of in kinds.items()}


@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=pytest.mark.long)])
def test_generators_join_and_leave_a_run_that_goes_on_and_no_sample_is_lost(tmp_path: Path, engine: str) -> None:
    """One -> two -> one, and in between four, for which the cluster (4 CPUs) has no room. The driver shows its life all the time."""
    folder, log = tmp_path / "run", tmp_path / "log"
    beats: dict[bool, set[float]] = {False: set(), True: set()}  # before and after Ray is there
    with log.open("w") as stream:
        driver = subprocess.Popen(
            command(*WORDS, f"generator.engine={engine}", f"run.dir={folder}"),
            cwd=CHECKOUT,
            env=environment(),
            stdout=stream,
            stderr=subprocess.STDOUT,
        )

    def wait_for(what: Callable[[], bool]) -> None:
        ends = time.monotonic() + 600
        while not what():
            assert driver.poll() is None and time.monotonic() < ends, f"it never came so far:\n{log.read_text()[-3000:]}"
            with suppress(FileNotFoundError):
                beats[(folder / "ray.json").is_file()].add((folder / HEARTBEAT).stat().st_mtime)
            time.sleep(0.2)

    def more_rows(number: int) -> None:
        wait_for(has_rows(folder, len(read_rows(folder)) + number))

    try:
        more_rows(2)
        assert generator_processes() == 1
        assert_who_gives_way(psutil.Process(driver.pid).nice())

        up = run_cli("scale", str(folder), "generators=2")
        assert up.code == 0 and "generators 1 -> 2 after" in up.output, up.output
        more_rows(3)
        assert generator_processes() == 2
        status = run_cli("status", str(folder))
        assert "generator-0: at work, version" in status.output and "generator-1: at work, version" in status.output

        full = run_cli("scale", str(folder), "generators=4")
        assert full.code == 1 and "refused, nothing has changed" in full.output and "free are 0 CPU" in full.output, full.output

        down = run_cli("scale", str(folder), "generators=1")
        assert down.code == 0 and "generators 2 -> 1 after" in down.output, down.output
        more_rows(3)
        assert generator_processes() == 1
    finally:
        driver.send_signal(signal.SIGINT)
        code = driver.wait(timeout=400)

    assert code == 130, log.read_text()[-3000:]
    assert min(map(len, beats.values())) >= 2, beats
    found = audit(folder)
    assert found.problems == () and (found.lost, found.duplicated, found.bound_violations) == (0, 0, 0)
    generators, seconds = ([row[name] for row in rows_of(folder)] for name in ("generate/generators", "time/update_s"))
    assert 1.0 < sum(map(operator.mul, generators, seconds)) / sum(seconds) < 2.0, "one at first, then two, then one"
    assert max(generators) < 2.5, "an update's own number is measured between two moments of the driver"
    assert summary_of(folder)["restarts"] == {}
    events = [json.loads(line) for line in (folder / "incidents.jsonl").read_text().splitlines()]
    assert [(entry["event"], entry["name"]) for entry in events] == [("joined", "generator-1"), ("left", "generator-1")]

    again = run_cli("scale", str(folder), "generators=2")
    assert again.code == 2 and "got one that is interrupted" in again.output and "generator.count=2" in again.output
