"""Real runs: real vLLM, DeepSpeed and Ray, one process tree each."""

from collections.abc import Iterator

import pytest

from tests.support.command import ray_processes, wait_gone


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """No test may leave a Ray, vLLM or DeepSpeed process behind."""
    before = ray_processes()
    yield
    assert not wait_gone(before), "processes were left behind"
