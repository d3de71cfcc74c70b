"""A lock lasts as long as its holder, and says who that is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from async_rlhf.errors import ConfigError
from async_rlhf.files import lock_file
from async_rlhf.run_lock import sole_driver

HOLD = """
import sys, time
from pathlib import Path
from async_rlhf.files import lock_file
lock_file(Path(sys.argv[1]))
print(1, flush=True)
time.sleep(60)
"""


def test_lock_of_another_process_is_refused_by_its_name_until_that_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "LOCK")], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == b"1\n"
            with pytest.raises(BlockingIOError, match=f"process {holder.pid} on "):
                lock_file(tmp_path / "LOCK")
            with pytest.raises(ConfigError, match=f"must have one driver, got a second: process {holder.pid}"), sole_driver(tmp_path):
                pass
        finally:
            holder.kill()
    os.close(lock_file(tmp_path / "LOCK"))


def test_run_is_free_again_after_its_driver_ended_by_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), sole_driver(tmp_path):
        raise RuntimeError
    with sole_driver(tmp_path):
        pass
