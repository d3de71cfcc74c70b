"""The thread that steps the engine: what it does in which order, and who learns of its end."""

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from actors.engine_loop import EngineLoop
from actors.step_cost import StepMoments
from async_rlhf.errors import EngineError
from async_rlhf.protocols import Occupancy, SampleRequest
from async_rlhf.types import FinishReason, Rollout, VersionSpan
from tests.support.pacing import Permits, eventually

pytestmark = pytest.mark.timeout(30)
WAIT_S = 10.0


def request(name: str, num_steps: int = 1) -> SampleRequest:
    """Takes `num_steps` steps: the fake reads them from the seed."""
    return SampleRequest(request_id=name, prompt_ids=np.zeros(1, dtype=np.int32), num_samples=2, seed=num_steps, temperature=1.0)


class PacedEngine:
    """Writes down what happens to it. A step happens only when the test allows one."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.allowed = Permits()
        self.closed = threading.Event()
        self.step_error: Exception | None = None
        self._left: dict[str, int] = {}
        self._lengths: dict[str, int] = {}
        self._finished: list[tuple[str, tuple[Rollout, ...]]] = []

    @property
    def num_running(self) -> int:
        return 2 * len(self._left)

    @property
    def occupancy(self) -> Occupancy:
        return Occupancy(num_running=self.num_running, num_waiting=0, kv_use_share=0.5)

    def add(self, request: SampleRequest) -> None:
        self.events.append(f"add {request.request_id}")
        self._left[request.request_id] = self._lengths[request.request_id] = request.seed

    def step(self) -> list[tuple[str, tuple[Rollout, ...]]]:
        if self._left:
            self.allowed.take()
            self.events.append("step")
            if self.step_error is not None:
                raise self.step_error
            self.advance()
        finished, self._finished = self._finished, []
        return finished

    def advance(self) -> None:
        for name in list(self._left):
            self._left[name] -= 1
            if not self._left[name]:
                del self._left[name]
                self._finished.append((name, (self._rollout(self._lengths[name]),) * 2))

    def close(self) -> None:
        self.events.append("close")
        self.closed.set()

    def _rollout(self, length: int) -> Rollout:
        return Rollout(
            completion_ids=np.zeros(length, dtype=np.int32),
            behavior_logprobs=np.zeros(length, dtype=np.float32),
            version_spans=(VersionSpan(version=0, start=0, end=length),),
            finish_reason=FinishReason.STOP,
        )


class Stage:
    """A loop around a paced engine, and the names of the requests that it finished."""

    def __init__(self) -> None:
        self.engine = PacedEngine()
        self.finished: list[str] = []
        self.loop = EngineLoop(self.engine, lambda name, _: self.finished.append(name))  # type: ignore[arg-type]

    def add(self, name: str, num_steps: int = 1) -> None:
        self.loop.call(lambda engine: engine.add(request(name, num_steps))).result(timeout=WAIT_S)

    def start(self, name: str, num_steps: int = 1) -> None:
        """Add the first, and wait until its first step has begun: what is asked for from now on comes after that."""
        self.add(name, num_steps)
        eventually(lambda: self.engine.allowed.asked == 1)

    def note(self, text: str, *, when_idle: bool = False) -> Any:
        return self.loop.call(lambda engine: self.engine.events.append(text), when_idle=when_idle)

    def allow(self, num_steps: int) -> None:
        self.engine.allowed.release(num_steps)


@contextmanager
def staged() -> Iterator[Stage]:
    stage = Stage()
    try:
        yield stage
    finally:
        stage.allow(1000)
        stage.loop.close()


def test_a_command_falls_between_two_steps():
    with staged() as stage:
        stage.start("a", num_steps=3)
        done = stage.note("command")  # asked for while the first step goes on
        stage.allow(3)
        done.result(timeout=WAIT_S)
        eventually(lambda: stage.finished == ["a"])

    assert stage.engine.events == ["add a", "step", "command", "step", "step", "close"]


def test_commands_run_in_the_order_in_which_they_were_asked_for():
    with staged() as stage:
        stage.start("a", num_steps=2)
        futures = [stage.note(str(index)) for index in range(5)]
        stage.allow(1)
        futures[-1].result(timeout=WAIT_S)

        assert stage.engine.events == ["add a", "step", "0", "1", "2", "3", "4"]


def test_a_command_for_an_idle_engine_waits_for_the_running_ones_and_holds_later_commands_back():
    with staged() as stage:
        stage.add("a", num_steps=2)
        drained = stage.note("install", when_idle=True)
        later = stage.loop.call(lambda engine: engine.add(request("b")))
        stage.allow(1)
        eventually(lambda: stage.engine.events.count("step") == 1)
        assert not drained.done() and not later.done()
        stage.allow(1)
        later.result(timeout=WAIT_S)
        stage.allow(1)
        eventually(lambda: stage.finished == ["a", "b"])

    assert stage.engine.events == ["add a", "step", "step", "install", "add b", "step", "close"]


def test_commands_asked_for_before_a_waiting_one_do_not_wait_with_it():
    with staged() as stage:
        stage.start("a", num_steps=5)
        usual, drained = stage.note("usual"), stage.note("install", when_idle=True)
        stage.allow(1)
        usual.result(timeout=WAIT_S)

        assert not drained.done() and stage.engine.events == ["add a", "step", "usual"]


def test_a_command_for_an_idle_engine_runs_at_once_when_it_is_idle():
    with staged() as stage:
        stage.note("install", when_idle=True).result(timeout=WAIT_S)

        assert stage.engine.events == ["install"]


def test_the_answer_of_a_command_reaches_its_caller():
    with staged() as stage:
        assert stage.loop.call(lambda engine: engine.num_running + 41).result(timeout=WAIT_S) == 41


def test_an_idle_loop_does_not_step():
    with staged() as stage:
        stage.allow(10)
        stage.note("command").result(timeout=WAIT_S)
        time.sleep(0.05)

        assert stage.engine.events == ["command"]


def test_completions_that_finish_inside_a_command_are_handed_out_without_further_work():
    """The canary of an install steps the engine: the last completions may end in it, with nothing left to wake the loop."""
    with staged() as stage:
        stage.start("a", num_steps=2)
        scoring = stage.loop.call(lambda engine: stage.engine.advance())
        stage.allow(1)
        scoring.result(timeout=WAIT_S)

        eventually(lambda: stage.finished == ["a"])


def test_usage_counts_completions_tokens_and_busy_time():
    with staged() as stage:
        assert (stage.loop.usage.num_tokens, stage.loop.usage.num_completions, stage.loop.usage.busy_s) == (0, 0, 0.0)
        stage.start("a", num_steps=3)
        stage.loop.call(lambda engine: engine.add(request("b", 1)))
        time.sleep(0.05)
        stage.allow(3)
        eventually(lambda: len(stage.finished) == 2)
        usage = stage.loop.usage
        time.sleep(0.05)

        # Two completions each: 2 * 3 tokens of a, 2 * 1 of b.
        assert (usage.num_tokens, usage.num_completions) == (8, 4)
        assert usage.busy_s >= 0.05
        assert stage.loop.usage == usage


def test_an_error_in_a_step_fails_everybody_who_waits_and_every_later_call():
    with staged() as stage:
        stage.engine.step_error = RuntimeError("out of memory")
        stage.add("a", num_steps=5)
        waiting = [stage.note("drain", when_idle=True), stage.note("later")]
        stage.allow(1)

        for future in waiting:
            with pytest.raises(EngineError, match="the engine failed: RuntimeError\\('out of memory'\\)"):
                future.result(timeout=WAIT_S)
        with pytest.raises(EngineError, match="out of memory"):
            stage.note("too late")
        assert isinstance(stage.loop.failure, RuntimeError)
        assert stage.engine.closed.wait(WAIT_S)


def test_an_error_in_a_command_reaches_its_caller_as_it_is_and_ends_the_loop():
    with staged() as stage:
        stage.start("a", num_steps=5)

        def fail(engine: object) -> None:
            raise ValueError("bad weights")

        seen: list[BaseException | None] = []
        failing, behind = stage.loop.call(fail), stage.note("behind")
        failing.add_done_callback(lambda _: seen.append(stage.loop.failure))
        stage.allow(1)

        with pytest.raises(ValueError, match="bad weights"):
            failing.result(timeout=WAIT_S)
        with pytest.raises(EngineError, match="bad weights"):
            behind.result(timeout=WAIT_S)
        assert seen == [failing.exception()], "who is answered sees the failure"
        assert stage.engine.closed.wait(WAIT_S)
        with pytest.raises(EngineError, match="bad weights"):
            stage.note("too late")


def test_close_ends_the_thread_frees_the_engine_once_and_refuses_later_calls():
    with staged() as stage:
        stage.loop.close()
        stage.loop.close()

        assert stage.engine.events == ["close"]
        assert "engine-loop" not in {thread.name for thread in threading.enumerate()}
        with pytest.raises(EngineError, match="the engine is closed"):
            stage.note("too late")
        assert stage.loop.failure is None


def test_close_fails_whoever_still_waits():
    """A drain that never came to its turn must not wait for ever."""
    with staged() as stage:
        stage.add("a", num_steps=100)
        drained = stage.note("install", when_idle=True)
        stage.allow(1)
        closing = threading.Thread(target=stage.loop.close)
        closing.start()
        eventually(lambda: stage.loop.closed)
        stage.allow(1)
        closing.join(WAIT_S)

        with pytest.raises(EngineError, match="the engine is closed"):
            drained.result(timeout=WAIT_S)


def test_whoever_waits_is_answered_between_two_steps_as_soon_as_there_is_an_answer():
    with staged() as stage:
        stage.add("a", num_steps=3)
        waiting = stage.loop.when(lambda engine: stage.engine.events.count("step") if stage.engine.events.count("step") >= 2 else None)
        stage.allow(1)
        eventually(lambda: stage.engine.events.count("step") == 1)
        assert not waiting.done()
        stage.allow(1)

        assert waiting.result(timeout=WAIT_S) == 2


def test_what_is_so_already_is_answered_at_once_also_by_an_idle_engine():
    with staged() as stage:
        assert stage.loop.when(lambda engine: engine.num_running + 41).result(timeout=WAIT_S) == 41
        assert stage.engine.events == []


def test_nobody_asks_for_those_who_wait_no_longer():
    asked: list[int] = []
    with staged() as stage:
        given_up, answered = stage.loop.when(lambda engine: asked.append(0)), stage.loop.when(lambda engine: asked.append(1) or "yes")
        answered.result(timeout=WAIT_S)
        assert given_up.cancel()
        before = list(asked)
        stage.add("a", num_steps=3)
        stage.allow(3)
        eventually(lambda: stage.finished == ["a"])

    assert asked == before and asked.count(1) == 1


@pytest.mark.parametrize("fails", [True, False], ids=["failed", "closed"])
def test_the_end_of_the_loop_fails_those_who_wait(fails: bool):
    with staged() as stage:
        waiting = stage.loop.when(lambda engine: None)
        stage.note("they wait").result(timeout=WAIT_S)
        if fails:
            stage.engine.step_error = RuntimeError("out of memory")
            stage.add("a")
            stage.allow(1)
        else:
            stage.loop.close()

        with pytest.raises(EngineError, match="out of memory" if fails else "the engine is closed"):
            waiting.result(timeout=WAIT_S)


def test_who_asks_too_late_learns_of_the_end_too():
    """The question is still behind the step that fails."""
    with staged() as stage:
        stage.start("a")
        stage.engine.step_error = RuntimeError("out of memory")
        waiting = stage.loop.when(lambda engine: None)
        stage.allow(1)

        with pytest.raises(EngineError, match="out of memory"):
            waiting.result(timeout=WAIT_S)


def test_a_question_that_raises_ends_the_loop_and_everybody_learns_of_it():
    def ask(engine: Any) -> None:
        raise RuntimeError("no such counter")

    with staged() as stage:
        others = stage.loop.when(lambda engine: None)
        stage.note("they wait").result(timeout=WAIT_S)
        asking = stage.loop.when(ask)

        for future in (asking, others):
            with pytest.raises((EngineError, RuntimeError), match="no such counter"):
                future.result(timeout=WAIT_S)


class JoiningEngine(PacedEngine):
    """Completions wait until the step that they join."""

    def __init__(self) -> None:
        super().__init__()
        self._joined: set[str] = set()

    @property
    def occupancy(self) -> Occupancy:
        running = [name for name in self._left if name in self._joined]
        return Occupancy(num_running=2 * len(running), num_waiting=2 * (len(self._left) - len(running)), kv_use_share=0.0)

    def advance(self) -> None:
        self._joined |= self._left.keys()
        super().advance()


def test_what_steps_cost_is_read_off_the_loops_own_clock_and_who_joins_is_counted_once():
    """A clock that goes on by a second whenever it is looked at: each of three steps costs one; two completions join in the first."""
    engine: Any = JoiningEngine()
    done = threading.Event()
    seconds = itertools.count(0.0)
    engine.allowed.release(3)
    loop = EngineLoop(engine, lambda name, completions: done.set(), clock=lambda: next(seconds))
    try:
        loop.call(lambda owned: engine.add(request("a", num_steps=3)))

        assert done.wait(WAIT_S)
        assert loop.usage.work_s == 3.0
        assert loop.usage.steps == StepMoments().with_step(2, 2, 1.0).with_step(2, 0, 1.0).with_step(2, 0, 1.0)
    finally:
        loop.close()
