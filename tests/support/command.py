"""Run the command line as a user does: in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from async_rlhf.recorder import read_rows

CHECKOUT = Path(__file__).resolve().parents[2]
MARK = "ASYNC_RLHF_TESTED_BY"
"""Environment variable that every process of a tested command inherits: whose it is, on a machine with other runs."""


@dataclass(frozen=True)
class Finished:
    """What a command left."""

    code: int
    output: str


def command(*words: str) -> list[str]:
    """The command line of `async-rlhf WORDS`."""
    return [sys.executable, "-m", "async_rlhf", *words]


def environment() -> dict[str, str]:
    """The environment without any trace of a Ray session."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**env, "PYTHONPATH": str(CHECKOUT), "COLUMNS": "200", MARK: str(os.getpid())}


def run_cli(*words: str, timeout_s: float = 900) -> Finished:
    """Run `async-rlhf WORDS` to its end."""
    done = subprocess.run(
        command(*words), cwd=CHECKOUT, env=environment(), capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL
    )
    return Finished(done.returncode, done.stdout + done.stderr)


def run_until(*words: str, seen: Callable[[str], bool], signum: signal.Signals, log: Path, between: Callable[[], Any]) -> Finished:
    """Start `async-rlhf WORDS`; once `seen(its output)`, call `between`, send `signum`, and wait for the end."""
    with driver(log, *words) as process:
        wait_for(lambda: seen(log.read_text()), process, log, timeout_s=600)
        between()
        process.send_signal(signum)
        code = process.wait(timeout=180)
    return Finished(code, log.read_text())


@contextmanager
def driver(log: Path, *words: str, **env: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A running `async-rlhf WORDS`, killed at the exit if it is still there."""
    with log.open("w") as stream:
        process = subprocess.Popen(
            command(*words),
            cwd=CHECKOUT,
            env={**environment(), **env},
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def wait_for(what: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Path, timeout_s: float = 400) -> None:
    """Wait until it is so, while the process lives."""
    ends = time.monotonic() + timeout_s
    while not what():
        assert process.poll() is None and time.monotonic() < ends, f"it never came so far:\n{log.read_text()[-3000:]}"
        time.sleep(0.2)


def has_rows(folder: Path, count: int) -> Callable[[], bool]:
    """Whether a run has so many updates behind it; it may be writing the next row."""
    return lambda: len(read_rows(folder)) >= count


def rows_of(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl of a run that has ended: every line is a row. Of one that goes on: async_rlhf.recorder.read_rows."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary_of(folder: Path) -> dict[str, Any]:
    """summary.json of a run folder."""
    return json.loads((folder / "summary.json").read_text())


def ray_processes() -> set[int]:
    """Ids of all processes of these tests' Ray sessions and engines."""
    marks = ("raylet", "gcs_server", "ray::", "EngineCore", "default_worker.py")
    found: set[int] = set()
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if any(mark in line for mark in marks) and process.info["status"] != psutil.STATUS_ZOMBIE:
            with suppress(psutil.Error):  # it ended just now, or is another user's
                if process.environ().get(MARK) == str(os.getpid()):
                    found.add(process.pid)
    return found


def wait_gone(before: set[int], timeout_s: float = 90) -> set[int]:
    """Ray processes beyond `before` that are still there after `timeout_s`; a cluster's last ones need a moment to end."""
    ends = time.monotonic() + timeout_s
    while (left := ray_processes() - before) and time.monotonic() < ends:
        time.sleep(0.3)
    return left
