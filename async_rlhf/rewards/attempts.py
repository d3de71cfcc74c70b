"""Calls that may fail: a deadline for each, further attempts after a wait, and several at once."""

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from async_rlhf.config.rewards import BACKOFF_JITTER, RewardPartConfig
from async_rlhf.errors import RewardError, RewardLostError

T = TypeVar("T")
Item = TypeVar("Item")


MAX_UNANSWERED = 3
"""Calls in a row without an answer, all their attempts included, after which nobody is thought to be there. The first is of several
groups, the next ones of single groups."""


class UnansweredError(RewardError):
    """All attempts at a call met the deadline."""


class TryAgainError(Exception):
    """This attempt failed; the next one may not."""


class NoAnswerError(TryAgainError):
    """The same: the deadline passed."""


class NobodyThereError(TryAgainError):
    """The same, and whatever was asked for had no part in it: nobody answers there, or says that he cannot serve anybody."""


def pause_s(settings: RewardPartConfig, attempt: int) -> float:
    """Seconds before attempt 1, 2, ...: backoff_s, doubled with each, and jittered."""
    return settings.backoff_s * 2 ** (attempt - 1) * random.uniform(1 - BACKOFF_JITTER, 1 + BACKOFF_JITTER)


async def insist(work: Callable[[int], Awaitable[T]], settings: RewardPartConfig, what: str) -> T:
    """Await work(0), and work(1), work(2), ... after a failure.

    Args:
        what: who is asked for what, for messages.
    Raises:
        RewardError: the last attempt failed too. RewardLostError: because nobody was there.
    """
    failures: list[Exception] = []
    for attempt in range(settings.retries + 1):
        if attempt:
            await asyncio.sleep(pause_s(settings, attempt))
        try:
            async with asyncio.timeout(settings.deadline_s):
                return await work(attempt)
        except TimeoutError:
            failures.append(NoAnswerError(f"no answer within {settings.deadline_s:g} s (deadline_s)"))
        except TryAgainError as error:
            failures.append(error)
    raise given_up(failures, what)


def given_up(failures: Sequence[Exception], what: str) -> Exception:
    """The error to raise after these failed attempts."""
    text = f"{what} failed {len(failures)} time(s) in a row, at last: {failures[-1]}"
    if isinstance(failures[-1], NobodyThereError):
        return RewardLostError(f"{text}; mend what answers there, then resume the run; `retries` and `backoff_s` say how long is waited")
    return UnansweredError(text) if all(isinstance(failure, NoAnswerError) for failure in failures) else RewardError(text)


class Patience:
    """Tells a completion that takes for ever from somebody who answers no more: the others are answered in between."""

    def __init__(self) -> None:
        self._unanswered = 0

    def answered(self) -> None:
        """Somebody is there."""
        self._unanswered = 0

    def tried(self, error: Exception) -> Exception:
        """The error to raise for a call that ended with this one."""
        if not isinstance(error, UnansweredError):
            return error
        self._unanswered += 1
        if self._unanswered < MAX_UNANSWERED:
            return error
        return RewardLostError(
            f"{error}; {self._unanswered} calls in a row got no answer, whatever they asked: mend that, then resume the run"
        )


async def in_order(items: Sequence[Item], work: Callable[[Item], Awaitable[T]], at_once: int) -> list[T]:
    """work(item) of each, in the order of the items, so many at once; the first error ends all, alone."""
    room = asyncio.Semaphore(at_once)

    async def one(item: Item) -> T:
        async with room:
            return await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(item)) for item in items]
    except BaseExceptionGroup as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from first.__cause__
    return [task.result() for task in tasks]


class BackgroundLoop:
    """An event loop in a thread of its own: for callers that have none, and connections that outlive a call."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rewards", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run to the end, and return the result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        """End the loop; further calls do nothing."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
