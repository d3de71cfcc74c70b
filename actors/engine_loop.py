"""A thread that steps an engine, and runs commands between two steps.

Everything that touches the engine happens on this thread, in the order in which it was asked for: adding requests,
replacing weights, scoring the canary. So a weight update needs no pause protocol; it falls exactly between two tokens.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from actors.step_cost import StepMoments
from async_rlhf.errors import EngineError
from async_rlhf.protocols import Engine, Occupancy
from async_rlhf.types import Rollout

T = TypeVar("T")
EMPTY = Occupancy(num_running=0, num_waiting=0, kv_use_share=0.0)
NO_STEPS = StepMoments()
Finished = Callable[[str, tuple[Rollout, ...]], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineUsage:
    """Cumulative since the loop began."""

    busy_s: float
    """Seconds in which the engine had completions to sample."""
    num_tokens: int
    """Completion tokens of finished groups."""
    num_completions: int
    running_s: float = 0.0
    """Completions in the engine's batch x seconds."""
    waiting_s: float = 0.0
    """Completions waiting for a place in it x seconds."""
    kv_use_s: float = 0.0
    """Share of the key/value cache in use x seconds."""
    work_s: float = 0.0
    """Of busy_s, by the loop's clock."""
    steps: StepMoments = NO_STEPS
    """What steps cost, by the same clock."""
    occupancy: Occupancy = EMPTY
    """After the last step."""


@dataclass(slots=True)
class _Wait:
    ready: Callable[[Engine], Any]
    future: "Future[Any]"

    def over(self, engine: Engine) -> bool:
        """Whether nobody waits any more, maybe because of what is the case now."""
        answer = None if self.future.cancelled() else self.ready(engine)
        if answer is not None and self.future.set_running_or_notify_cancel():
            self.future.set_result(answer)
        return self.future.done()

    def failed_with(self, asked: "Future[Any]") -> None:
        """Who waits learns of the error that kept the loop from asking at all."""
        if (error := asked.exception()) is not None:
            _fail(self.future, error)


@dataclass(slots=True)
class _Command:
    run: Callable[[Engine], Any]
    future: "Future[Any]"
    when_idle: bool


class EngineLoop:
    """Owns an engine and its thread."""

    def __init__(self, engine: Engine, on_finished: Finished, clock: Callable[[], float] = time.perf_counter) -> None:
        """
        Args:
            on_finished: called on the loop's thread with each finished request and its completions.
            clock: what steps cost, read on the loop's thread; one of processor time leaves out what others took of a shared core.
        """
        self._engine = engine
        self._on_finished = on_finished
        self._clock = clock
        self._commands: deque[_Command] = deque()
        self._waits: list[_Wait] = []
        """Of the loop's thread alone."""
        self._changed = threading.Condition()
        self._closed = False
        self._failure: BaseException | None = None
        self._usage = EngineUsage(busy_s=0.0, num_tokens=0, num_completions=0)
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)
        self._thread.start()

    @property
    def usage(self) -> EngineUsage:
        """A snapshot of the counters."""
        return self._usage

    @property
    def failure(self) -> BaseException | None:
        """What ended the loop, if anything did."""
        return self._failure

    @property
    def closed(self) -> bool:
        """Whether close() was called: nothing more will be finished."""
        return self._closed

    def call(self, run: Callable[[Engine], T], *, when_idle: bool = False) -> "Future[T]":
        """Run `run(engine)` between two steps; later commands wait for it.

        Args:
            when_idle: wait until the engine has finished everything that it was given before.
        Raises:
            EngineError: the loop has ended.
        """
        command = _Command(run, Future(), when_idle)
        with self._changed:
            self._check_alive()
            self._commands.append(command)
            self._changed.notify_all()
        return command.future

    def when(self, ready: Callable[[Engine], T | None]) -> "Future[T]":
        """What `ready(engine)` answers once that is not None: asked between two steps, at once and after each, unless cancelled.

        Raises:
            EngineError: the loop has ended.
        """
        wait = _Wait(ready, Future())
        asked = self.call(lambda engine: wait.over(engine) or self._waits.append(wait))
        asked.add_done_callback(wait.failed_with)
        return wait.future

    def close(self) -> None:
        """Stop after the current step and free the engine."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout=30)

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineError(f"the engine failed: {self._failure!r}") from self._failure
        if self._closed:
            raise EngineError("the engine is closed")

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                ran = self._run_commands()
                # A command may finish completions, too (the canary steps the engine): hand them out even if nothing else runs.
                if ran or self._engine.num_running:
                    self._step()
        except BaseException as error:  # the thread's end: whoever waits must learn of it
            self._failure = error
            self._end(f"the engine failed: {error!r}")
        else:
            self._end("the engine is closed")
        finally:
            self._engine.close()

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not (self._closed or self._commands or self._engine.num_running):
                self._changed.wait()
            return not self._closed

    def _run_commands(self) -> bool:
        """Run what is due; returns whether there was anything."""
        ran = False
        while True:
            with self._changed:
                blocked = bool(self._commands) and self._commands[0].when_idle and self._engine.num_running > 0
                if not self._commands or blocked:
                    return ran
                command = self._commands.popleft()
            try:
                result = command.run(self._engine)
            except BaseException as error:
                self._failure = error  # before whoever asked is answered, and looks
                command.future.set_exception(error)
                raise
            command.future.set_result(result)
            ran = True

    def _step(self) -> None:
        before = self._engine.occupancy
        started, began = time.perf_counter(), self._clock()
        finished = self._engine.step()
        usage, work_s, step_s = self._usage, self._clock() - began, time.perf_counter() - started
        occupancy = self._engine.occupancy
        num_joined = max(0, before.num_waiting - occupancy.num_waiting)
        rollouts = [rollout for _, completions in finished for rollout in completions]
        self._usage = EngineUsage(
            busy_s=usage.busy_s + step_s,
            num_tokens=usage.num_tokens + sum(len(rollout.completion_ids) for rollout in rollouts),
            num_completions=usage.num_completions + len(rollouts),
            running_s=usage.running_s + occupancy.num_running * step_s,
            waiting_s=usage.waiting_s + occupancy.num_waiting * step_s,
            kv_use_s=usage.kv_use_s + occupancy.kv_use_share * step_s,
            work_s=usage.work_s + work_s,
            # Without completions it only hands out what a command left.
            steps=usage.steps.with_step(before.num_running + num_joined, num_joined, work_s)
            if before.num_running + num_joined
            else usage.steps,
            occupancy=occupancy,
        )
        for request_id, completions in finished:
            self._on_finished(request_id, completions)
        self._waits = [wait for wait in self._waits if not wait.over(self._engine)]

    def _end(self, reason: str) -> None:
        with self._changed:
            waiting, self._commands = [command.future for command in self._commands], deque()
            self._changed.notify_all()
        for future in (*waiting, *(wait.future for wait in self._waits)):
            _fail(future, EngineError(reason))


def _fail(future: "Future[Any]", error: BaseException) -> None:
    """Unless nobody waits any more, or it is answered."""
    if not future.done() and future.set_running_or_notify_cancel():
        future.set_exception(error)
