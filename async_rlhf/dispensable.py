"""What a run can do without: monitoring tells how it goes, and never ends it."""

import logging
from collections.abc import Callable
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Dispensable(Generic[T]):
    """Something whose first failure, whatever it is, is logged, and the last thing that is asked of it. Not for several threads at once."""

    def __init__(self, name: str, make: Callable[[], T]) -> None:
        """
        Args:
            name: for people, as in "the run goes on without NAME".
            make: makes it, now; may fail.
        """
        self._name = name
        self._made: list[T] = []
        self.works = True
        """Whether nothing failed yet."""
        self._attempt(lambda: self._made.append(make()))

    def do(self, act: Callable[[T], object]) -> None:
        """Have it act, unless it failed before."""
        if self.works:
            self._attempt(lambda: act(self._made[0]))

    def end(self, act: Callable[[T], object]) -> None:
        """Have it let go of what it holds, also after a failure; not where it was never made."""
        if self._made:
            self._attempt(lambda: act(self._made[0]))

    def _attempt(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # whatever a disk, another process or a library says
            if self.works:
                logger.warning("the run goes on without %s: %s: %s", self._name, type(error).__name__, error, exc_info=True)
            self.works = False
