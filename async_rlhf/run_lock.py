"""One driver per run: two would cut each other's metrics and write each other's state."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from async_rlhf.errors import ConfigError
from async_rlhf.files import lock_file

NAME = "LOCK"
"""File in the run folder; says who holds it."""


@contextmanager
def sole_driver(run_folder: Path) -> Generator[None]:
    """Be the run's one driver for as long as the block lasts.

    Raises:
        ConfigError: another living process drives the run.
    """
    try:
        handle = lock_file(run_folder / NAME)
    except BlockingIOError as error:
        raise ConfigError(
            f"{run_folder} must have one driver, got a second: {error} holds {run_folder / NAME}. "
            "That run still goes on: wait for it, or stop it (Ctrl-C, or SIGTERM to that process)"
        ) from None
    try:
        yield
    finally:
        os.close(handle)
