"""A guard over the driver: a small process that does nothing but start the driver again when it was killed, or froze.

    guard (this process) --> driver: async-rlhf resume RUN --> Ray and all actors
       reads RUN/heartbeat      touches RUN/heartbeat

A driver that ends by itself, well or not, has told why, and is not started again.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from async_rlhf.commands.say import say
from async_rlhf.config.schema import SupervisionConfig
from async_rlhf.state import LIVE_PHASES, read_state

GUARD_PID = "ASYNC_RLHF_GUARD_PID"
"""Environment variable: tells a driver that it is guarded, and by whom. It stops when that process is gone."""

HEARTBEAT = "heartbeat"
"""File in the run folder that a driver touches every `supervision.ping_s`, or more often."""

MAX_BEAT_S = 20.0
"""Seconds between two touches at most: who looks at a run takes a driver for gone after a minute."""

POLL_S = 0.5

ECHO_S = 5.0
"""`ray job stop` and Slurm signal every process of a job: the driver gets what its guard passes on, too. Two are one within so long."""


def guard(folder: Path, settings: SupervisionConfig, console: Console) -> int:
    """Drive the run in `folder`, by as many drivers as it takes; returns the exit code of the last one.

    SIGINT and SIGTERM are passed on.
    """
    for number in range(settings.driver_restarts + 1):
        (folder / HEARTBEAT).unlink(missing_ok=True)
        code = _watch(_start(folder), folder / HEARTBEAT, settings.silence_s)
        if code in (0, 2, 130, 143) or not _ended_abruptly(folder, code):
            return code
        left = settings.driver_restarts - number
        what = f"signal {-code}" if code < 0 else f"exit code {code}, without a last word"
        then = "starting it again" if left else "no restart is left (supervision.driver_restarts)"
        say(console, f"the driver ended by {what}: {then}", style="yellow")
    return 1


def beat_s(settings: SupervisionConfig) -> float:
    """Seconds between two signs of life of a driver."""
    return min(settings.ping_s, MAX_BEAT_S)


def show_life(folder: Path) -> None:
    """Show that this driver lives."""
    (folder / HEARTBEAT).touch()


@contextmanager
def beating(folder: Path, settings: SupervisionConfig) -> Generator[None]:
    """Inside, a thread shows that this process lives: where the work may hold its own loop up, or there is none."""
    ended = threading.Event()

    def beat() -> None:
        show_life(folder)
        while not ended.wait(beat_s(settings)):
            show_life(folder)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def is_guarded() -> bool:
    """Whether a guard started this driver."""
    return GUARD_PID in os.environ


def guard_is_gone() -> bool:
    """Whether this driver was guarded, and its guard is dead."""
    pid = os.environ.get(GUARD_PID)
    return pid is not None and os.getppid() != int(pid)


def _start(folder: Path) -> "subprocess.Popen[bytes]":
    # In a session of its own: Ctrl-C in a terminal reaches the guard alone, which passes it on once.
    environment = {**os.environ, GUARD_PID: str(os.getpid())}
    return subprocess.Popen([sys.executable, "-m", "async_rlhf", "resume", str(folder)], env=environment, start_new_session=True)


def _watch(driver: "subprocess.Popen[bytes]", heartbeat: Path, silence_s: float) -> int:
    """Wait for the driver's end; a silent one is killed. Returns its exit code, negative for a signal."""
    previous = {signum: signal.signal(signum, lambda got, _: driver.send_signal(got)) for signum in (signal.SIGINT, signal.SIGTERM)}
    seen, silent_s = 0.0, 0.0
    try:
        while (code := driver.poll()) is None:
            time.sleep(POLL_S)
            beat = heartbeat.stat().st_mtime if heartbeat.is_file() else 0.0
            # Counted in waits of this process: if it was frozen itself, the driver gets its full time again.
            seen, silent_s = (seen, silent_s + POLL_S) if beat == seen else (beat, 0.0)
            if seen and silent_s > silence_s:
                driver.kill()
        return code
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        if driver.poll() is None:
            driver.kill()


def _ended_abruptly(folder: Path, code: int) -> bool:
    """Killed by a signal, or gone in the middle: the books of the run still say that it goes on."""
    return code < 0 or read_state(folder).phase in LIVE_PHASES
