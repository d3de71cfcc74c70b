"""One driver per run: two would cut each other's metrics and write each other's state."""

import fcntl
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from async_rlhf.errors import ConfigError

NAME = "LOCK"
"""File in the run folder; says who holds it."""


@contextmanager
def sole_driver(run_folder: Path) -> Generator[None]:
    """Be the run's one driver for as long as the block lasts. The kernel lets go of the lock with the process, however that ends.

    Raises:
        ConfigError: another living process drives the run.
    """
    handle = os.open(run_folder / NAME, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            driver = os.read(handle, 200).decode(errors="replace") or "another process"
            raise ConfigError(
                f"{run_folder} must have one driver, got a second: {driver} holds {run_folder / NAME}. "
                "That run still goes on: wait for it, or stop it (Ctrl-C, or SIGTERM to that process)"
            ) from None
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        os.close(handle)
