"""Programs of the operating system that a few tests drive."""

import os
import shutil
from pathlib import Path

import pytest


def program(name: str) -> Path:
    """Where the program is; without it the test is skipped, or fails where all programs are required."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        reason = f"there is no {name} on this machine; `sudo bash .ci/debian` installs it"
        if os.environ.get("ASYNC_RLHF_TEST_PROGRAMS") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    return Path(found)
