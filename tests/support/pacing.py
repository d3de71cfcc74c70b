"""Meeting points between a test and what goes on beside it."""

import threading
import time
from collections.abc import Callable

WAIT_S = 20.0


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until it is so."""
    ends = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.002)


class Permits(threading.Semaphore):
    """For the steps of one engine, which a test allows; there are none at first."""

    def __init__(self) -> None:
        super().__init__(0)
        self.asked = 0
        """Steps that asked for one; all before the last of them are over."""

    def take(self) -> None:
        """Wait for one."""
        self.asked += 1
        assert self.acquire(timeout=WAIT_S), "the test allowed no step"
