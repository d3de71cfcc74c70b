"""Before Ray is imported: whether this run joins a cluster or starts a Ray of its own, and with which token.

Ray reads its authentication settings when it is imported, so this module must not import it.
"""

import os
import secrets
import shutil
import socket
import tempfile
from functools import cache
from pathlib import Path

from async_rlhf.errors import RunError

PREFIX = "arlhf-"
"""Of session folders, in the folder for temporary files."""

HEAD_ANSWERS_S = 10.0
"""Longest that a cluster's head may take to accept a connection."""


def open_session() -> Path | None:
    """Prepare the environment; returns the session folder of a Ray of our own, or None where RAY_ADDRESS names a cluster.

    The folder is readable by this user alone and holds a fresh token: whoever reaches an open Ray port runs code as we do.

    Raises:
        RunError: nobody answers at RAY_ADDRESS.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Errors that nobody awaits are those of calls whose other answer was awaited; each is reported once, by us.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    if address := os.environ.get("RAY_ADDRESS"):
        _check_head(address)
        return None
    # Ray's head keeps the story of its last 100,000 calls, 2 KB each, for its task list (60 MiB per 1,000 updates until then), and the
    # names of a million that it has forgotten.
    os.environ.setdefault("RAY_task_events_max_num_task_in_gcs", "5000")
    os.environ.setdefault("RAY_task_events_max_dropped_task_attempts_tracked_per_job_in_gcs", "5000")
    # What nobody holds any more is free at once, not up to a second later: a new version of the weights goes where the one before the last
    # was. Memory that is new to the store costs ten times as much to write.
    os.environ.setdefault("RAY_free_objects_period_milliseconds", "0")
    # More than this process's. By default 15, so low that whatever else wakes takes the core from the engine in the middle of a step; who
    # shall give way to whom is said in environment.py.
    os.environ.setdefault("RAY_worker_niceness", "0")
    folder = make_session_folder()
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(_token(), encoding="utf-8")
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
    return folder


def _check_head(address: str) -> None:
    """Ray itself would ask a head that is not there for minutes, in silence."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        return  # `auto`: Ray looks for the address itself, and says at once where it finds none
    try:
        socket.create_connection((host.strip("[]"), int(port)), HEAD_ANSWERS_S).close()
    except (OSError, OverflowError) as error:
        raise RunError(
            f"no Ray head answers at RAY_ADDRESS={address}: {error}; is the address right and the cluster up (`ray status`)? "
            "Without RAY_ADDRESS a Ray is started here"
        ) from error


@cache
def _token() -> str:
    """One per process: Ray reads it once, also where the process starts a second Ray after the first."""
    return secrets.token_hex(32)


def make_session_folder() -> Path:
    """A folder for a Ray of our own, which says whose it is; those of drivers that were killed are removed."""
    _sweep()
    # Short: the path of a Unix socket inside it may not exceed 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    (folder / "owner").write_text(str(os.getpid()), encoding="utf-8")
    return folder


def _sweep() -> None:
    """Remove the session folders of drivers that were killed: nobody else does."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            os.kill(int((folder / "owner").read_text(encoding="utf-8")), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (OSError, ValueError):
            continue  # somebody else's, or not one of ours
