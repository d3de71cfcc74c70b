"""Supervision: how often and how soon somebody starts again, who is frozen, and who waits for whom. No Ray is started."""

import asyncio
import re
import time
from collections.abc import Coroutine
from typing import Any

import pytest

from actors import remote
from actors.launch import ActorSpec
from actors.remote import RemoteActor, within
from actors.supervision import Member, Supervisor, guarded
from actors.wait_graph import WAITS, WaitGraph
from async_rlhf.config import Config, load_config
from async_rlhf.errors import ActorFailedError, ActorLostError, DeadlineError, EngineError, NoRoomError, RestartLimitError, RewardError
from tests.support.local_actors import LocalCluster, LocalHandle, local_kill

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("local_kill")]
__all__ = ["local_kill"]
CAUSE = ActorLostError("it died\nwith a long story")


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 30))


def make_config(**settings: float) -> Config:
    quick = {"ping_s": 0.01, "silence_s": 0.1, "backoff_s": 0.0} | settings
    return load_config(overrides=[f"supervision.{name}={value}" for name, value in quick.items()]).config


class Echo:
    """Answers, slowly if asked to, or fails."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def say(self, text: str) -> str:
        return f"{self.name}: {text}"

    async def work(self) -> str:
        await asyncio.sleep(20)
        return "done"

    async def fail(self, error: Exception) -> None:
        raise error

    async def two(self) -> tuple[int, str]:
        return 1, self.name


class Stage:
    """A supervisor over a local cluster, and one part that Echo plays."""

    def __init__(self, make: Any = Echo, session: int = 0, **settings: float) -> None:
        self.incidents: list[dict[str, Any]] = []
        self.cluster = LocalCluster()
        self.supervisor = Supervisor(self.cluster, make_config(**settings), session, self.incidents.append)  # type: ignore[arg-type]
        self.member = Member(self.supervisor, "echo", lambda name: ActorSpec(name=name, cls=make, args=(name,)))

    async def begin(self) -> "Stage":
        self.member.cast(await self.supervisor.begin(self.member.next_spec()))
        return self

    @property
    def handle(self) -> LocalHandle:
        return self.member.actor.handle

    def living(self) -> list[str]:
        return [name for name, handle in self.cluster.handles.items() if handle.alive]


async def nothing() -> None: ...


async def sleep_for_ever() -> None:
    await asyncio.Event().wait()


# Limits, and the wait before a new start.


def test_the_first_restart_is_immediate_and_the_wait_before_each_further_one_doubles_up_to_its_limit(monkeypatch: pytest.MonkeyPatch):
    """backoff_s 1.5, max_backoff_s 10: 0, 1.5, 3, 6, then 10 instead of 12."""
    waits: list[float] = []
    sleep = asyncio.sleep

    async def note(delay: float) -> None:
        waits.append(delay)
        await sleep(0)

    async def story() -> None:
        stage = Stage(backoff_s=1.5, max_backoff_s=10, max_restarts=9)
        monkeypatch.setattr(asyncio, "sleep", note)
        for _ in range(6):
            await stage.supervisor.replace("echo", CAUSE, nothing)

    run(story())
    assert waits == [0.0, 1.5, 3.0, 6.0, 10.0, 10.0]


@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_one_failure_more_than_max_restarts_ends_the_run_and_names_the_last_cause(allowed: int):
    async def story() -> None:
        stage = Stage(max_restarts=allowed)
        for number in range(allowed):
            await stage.supervisor.replace("echo", ActorLostError(f"death {number}"), nothing)
        cause = ActorLostError(f"death {allowed}")

        with pytest.raises(RestartLimitError) as caught:
            await stage.supervisor.replace("echo", cause, nothing)

        assert str(caught.value) == (
            f"echo failed {allowed + 1} times within 600 s, allowed are {allowed} restarts (supervision.max_restarts); "
            f"the last cause: death {allowed}"
        )
        assert caught.value.__cause__ is cause
        assert stage.supervisor.restarts["echo"] == allowed

    run(story())


def test_restarts_that_are_longer_ago_than_the_window_count_no_more_but_stay_in_the_books():
    async def story() -> None:
        stage = Stage(max_restarts=1, window_s=0.3)
        for _ in range(3):
            await stage.supervisor.replace("echo", CAUSE, nothing)
            await asyncio.sleep(0.35)
        assert stage.supervisor.restarts["echo"] == 3

        await stage.supervisor.replace("echo", CAUSE, nothing)
        with pytest.raises(RestartLimitError, match="failed 2 times"):
            await stage.supervisor.replace("echo", CAUSE, nothing)

    run(story())


def test_each_part_has_limits_of_its_own():
    async def story() -> None:
        stage = Stage(max_restarts=1)
        for name in ("queue", "scorer-0", "scorer-1"):
            await stage.supervisor.replace(name, CAUSE, nothing)

        assert stage.supervisor.restarts == {"queue": 1, "scorer-0": 1, "scorer-1": 1}
        with pytest.raises(RestartLimitError, match="scorer-1"):
            await stage.supervisor.replace("scorer-1", CAUSE, nothing)

    run(story())


def test_a_loss_and_a_return_are_reported_with_name_time_and_cause():
    async def story() -> None:
        stage = Stage()
        before = time.time()

        await stage.supervisor.replace("echo", CAUSE, lambda: asyncio.sleep(0.05))

        lost, back = stage.incidents
        assert (lost["event"], lost["name"], lost["cause"]) == ("lost", "echo", "it died")
        assert (back["event"], back["name"]) == ("back", "echo")
        assert before <= lost["time"] <= back["time"] <= time.time()
        assert 0.05 <= back["after_s"] <= back["time"] - lost["time"] + 0.05

    run(story())


def test_a_start_that_fails_is_a_failure_like_any_other():
    """Twice it does not come up, the third time it does: three restarts, three causes."""
    starts = [ActorFailedError("no such GPU"), EngineError("out of memory")]

    async def start() -> None:
        if starts:
            raise starts.pop(0)

    async def story() -> None:
        stage = Stage(max_restarts=3)

        await stage.supervisor.replace("echo", CAUSE, start)

        assert [entry.get("cause") for entry in stage.incidents] == ["it died", "no such GPU", "out of memory", None]
        assert stage.supervisor.restarts["echo"] == 3

    run(story())


def test_a_start_that_always_fails_reaches_the_limit_with_the_error_of_the_last_start():
    async def story() -> None:
        stage = Stage(max_restarts=2)

        async def start() -> None:
            raise ActorFailedError(f"start {len(stage.incidents)}")

        with pytest.raises(RestartLimitError, match=r"failed 3 times .* the last cause: start 2"):
            await stage.supervisor.replace("echo", CAUSE, start)

    run(story())


# Watching.


def test_a_frozen_actor_is_killed_and_named():
    async def story() -> None:
        stage = await Stage().begin()
        watching = asyncio.create_task(stage.supervisor.watch(stage.member.actor))
        await asyncio.sleep(0.05)
        assert not watching.done()
        stage.handle.freeze()

        text = re.escape("echo.0.0 gave no sign of life for 0.1 s (supervision.silence_s) and was killed")
        with pytest.raises(ActorLostError, match=text):
            await watching
        assert not stage.handle.alive

    run(story())


def test_a_dead_actor_is_noticed_by_whoever_watches_it():
    async def story() -> None:
        stage = await Stage().begin()
        stage.handle.die()

        with pytest.raises(ActorLostError, match=r"echo\.0\.0: a sign of life: the actor died"):
            await stage.supervisor.watch(stage.member.actor)

    run(story())


def test_an_actor_that_works_for_longer_than_the_silence_is_not_frozen():
    async def story() -> None:
        stage = await Stage(silence_s=0.05).begin()
        work = asyncio.create_task(stage.member.actor.call("work", timeout_s=20))
        watching = asyncio.create_task(stage.supervisor.watch(stage.member.actor))

        await asyncio.sleep(0.3)

        assert not work.done() and not watching.done() and stage.handle.alive

    run(story())


def test_a_part_without_room_is_not_tried_again_and_says_so():
    async def story() -> None:
        stage = await Stage(max_restarts=9).begin()

        async def no_room(spec: ActorSpec) -> None:
            raise NoRoomError(f"{spec.place} lost its node")

        stage.cluster.placed = no_room  # type: ignore[method-assign]
        with pytest.raises(NoRoomError, match="lost its node"):
            await stage.member.replace(stage.member.actor, CAUSE)

        assert stage.cluster.started == ["echo.0.0"], "nothing is started that would wait for room without a word"
        assert [entry["event"] for entry in stage.incidents] == ["lost"]

    run(story())


# Members.


def test_incarnations_are_named_after_the_part_the_session_and_their_number():
    async def story() -> None:
        stage = await Stage(session=3).begin()
        await stage.member.replace(stage.member.actor, CAUSE)
        await stage.member.replace(stage.member.actor, CAUSE)

        assert stage.cluster.started == ["echo.3.0", "echo.3.1", "echo.3.2"]
        assert stage.living() == ["echo.3.2"], "whoever is replaced is killed"

    run(story())


def test_a_call_survives_the_death_of_whoever_it_was_made_to():
    async def story() -> None:
        stage = await Stage().begin()
        stage.handle.die()

        assert await stage.member.call("say", "hello", timeout_s=20) == "echo.0.1: hello"
        stage.handle.die()
        assert await (await stage.member.fetch("two", timeout_s=20)) == "echo.0.2"
        assert [entry["event"] for entry in stage.incidents] == ["lost", "back"] * 2

    run(story())


def test_a_call_without_an_answer_in_time_kills_the_silent_one_and_is_made_again():
    async def story() -> None:
        stage = await Stage().begin()
        stage.handle.freeze()

        assert await stage.member.call("say", "hello", timeout_s=0.1) == "echo.0.1: hello"

        assert stage.living() == ["echo.0.1"]
        assert stage.incidents[0]["cause"].startswith("waited 0.1 s for echo.0.0.say without an answer")

    run(story())


@pytest.mark.parametrize("error", [RewardError("no score"), ValueError("a bug")])
def test_an_error_of_the_method_itself_is_raised_and_replaces_nobody(error: Exception):
    async def story() -> None:
        stage = await Stage().begin()

        with pytest.raises(RewardError if isinstance(error, RewardError) else ActorFailedError, match=str(error)):
            await stage.member.call("fail", error, timeout_s=20)

        assert stage.incidents == [] and stage.living() == ["echo.0.0"]

    run(story())


def test_many_callers_of_one_death_replace_it_once():
    async def story() -> None:
        stage = await Stage().begin()
        calls = [asyncio.create_task(stage.member.call("work", timeout_s=20)) for _ in range(5)]
        keeping = asyncio.create_task(stage.member.keep())
        await asyncio.sleep(0.02)

        stage.handle.die()
        await asyncio.sleep(0.2)

        assert stage.cluster.started == ["echo.0.0", "echo.0.1"] and stage.supervisor.restarts["echo"] == 1
        assert not any(call.done() for call in calls) and not keeping.done()

    run(story())


def test_replacing_somebody_who_was_replaced_already_changes_nothing():
    async def story() -> None:
        stage = await Stage().begin()
        first = stage.member.actor
        second = await stage.member.replace(first, CAUSE)

        assert await stage.member.replace(first, CAUSE) is second is stage.member.actor
        assert stage.supervisor.restarts["echo"] == 1

    run(story())


def test_a_part_is_kept_played_without_any_call():
    async def story() -> None:
        stage = await Stage(max_restarts=2).begin()
        keeping = asyncio.create_task(stage.member.keep())
        for number in (1, 2):
            stage.handle.die() if number == 1 else stage.handle.freeze()
            while stage.member.actor.name != f"echo.0.{number}":
                await asyncio.sleep(0.01)
        stage.handle.die()

        with pytest.raises(RestartLimitError):
            await keeping

    run(story())


def test_an_incarnation_that_does_not_come_up_is_passed_over():
    """The second constructor raises; the third is fine."""

    class Moody(Echo):
        def __init__(self, name: str) -> None:
            super().__init__(name)
            if name.endswith(".1"):
                raise ValueError("not today")

    async def story() -> None:
        stage = await Stage(Moody).begin()
        stage.handle.die()

        assert await stage.member.call("say", "hello", timeout_s=20) == "echo.0.2: hello"
        assert stage.incidents[1]["cause"] == "echo.0.1 did not start: ValueError('not today')"

    run(story())


@pytest.mark.parametrize("moment_s", [0.0, 0.02, 0.08])
def test_a_replacement_is_finished_even_if_whoever_asked_for_it_is_cancelled(moment_s: float, monkeypatch: pytest.MonkeyPatch):
    """A caller may end at any moment; an incarnation that starts meanwhile must not live on unknown, with the journal's lock."""

    async def slow_ready(actor: RemoteActor, timeout_s: float, on_ready: Any) -> None:
        await asyncio.sleep(0.05)

    async def story() -> None:
        stage = await Stage(backoff_s=0.01).begin()
        monkeypatch.setattr("actors.supervision.ready", slow_ready)
        stage.handle.die()
        asking = asyncio.create_task(stage.member.call("say", "hello", timeout_s=20))
        await asyncio.sleep(moment_s)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

        answer = await stage.member.call("say", "again", timeout_s=20)

        assert answer.endswith(": again")
        assert stage.living() == [stage.member.actor.name], "somebody lives on whom nobody knows"
        assert stage.supervisor.restarts["echo"] == 1

    run(story())


def test_an_incarnation_that_takes_too_long_to_start_is_killed(monkeypatch: pytest.MonkeyPatch):
    """It may come up later, and take the place (a name, a journal's lock, a GPU) of whoever plays the part by then."""

    async def ready(actor: RemoteActor, timeout_s: float, on_ready: Any) -> None:
        if actor.name == "echo.0.1":
            raise DeadlineError("waited 1 s for the start of echo.0.1")

    async def story() -> None:
        stage = await Stage().begin()
        monkeypatch.setattr("actors.supervision.ready", ready)
        stage.handle.die()

        assert await stage.member.call("say", "hello", timeout_s=20) == "echo.0.2: hello"
        assert stage.living() == ["echo.0.2"]

    run(story())


# One failure ends all.


def test_guards_end_with_what_they_guard():
    ended: list[str] = []

    async def guard() -> None:
        try:
            await sleep_for_ever()
        finally:
            await asyncio.sleep(0.02)
            ended.append("guard")

    async def main() -> int:
        await asyncio.sleep(0.02)
        return 42

    async def story() -> None:
        assert await guarded(main(), guard(), guard()) == 42
        assert ended == ["guard", "guard"]

    run(story())


def test_a_guard_that_is_through_ends_nothing():
    async def main() -> int:
        await asyncio.sleep(0.05)
        return 42

    async def story() -> None:
        assert await guarded(main(), nothing()) == 42

    run(story())


@pytest.mark.parametrize("who", ["main", "guard"])
def test_the_first_error_of_anybody_ends_all_and_comes_alone(who: str):
    ended: list[str] = []

    async def wait(name: str) -> None:
        try:
            await sleep_for_ever()
        except asyncio.CancelledError:
            ended.append(name)
            raise ValueError("an error while ending") from None

    async def fail() -> None:
        await asyncio.sleep(0.02)
        raise DeadlineError("too long")

    async def story() -> None:
        main, guard = (fail(), wait("guard")) if who == "main" else (wait("main"), fail())
        with pytest.raises(DeadlineError, match="too long"):
            await guarded(main, guard, wait("other"))
        assert sorted(ended) == sorted(["guard" if who == "main" else "main", "other"])

    run(story())


def test_an_error_from_inside_a_task_group_comes_alone_and_keeps_its_cause():
    async def fail() -> None:
        raise RestartLimitError("too often") from CAUSE

    async def main() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fail())
            tasks.create_task(sleep_for_ever())

    async def story() -> None:
        with pytest.raises(RestartLimitError, match="too often") as caught:
            await guarded(guarded(main()), sleep_for_ever())
        assert caught.value.__cause__ is CAUSE

    run(story())


def test_cancelling_cancels_everybody():
    ended: list[str] = []

    async def wait(name: str) -> None:
        try:
            await sleep_for_ever()
        finally:
            ended.append(name)

    async def story() -> None:
        task = asyncio.create_task(guarded(wait("main"), wait("guard")))
        await asyncio.sleep(0.02)
        task.cancel()

        with pytest.raises(asyncio.CancelledError):
            await task
        assert sorted(ended) == ["guard", "main"]

    run(story())


def test_who_waited_for_whom_is_kept_from_the_moment_of_the_failure():
    async def fail() -> None:
        await asyncio.sleep(0.05)
        raise ActorLostError("gone")

    async def story() -> None:
        waiting = within(sleep_for_ever(), edge="scorer-0.score", timeout_s=20)
        with pytest.raises(ActorLostError):
            await guarded(waiting, fail())

        assert "waits for scorer-0.score, since 0." in WAITS.at_failure
        assert "scorer-0.score" not in WAITS.render()

    run(story())


# Deadlines.


def test_a_deadline_passes_when_nobody_answers_and_says_who_waits_for_whom():
    async def story() -> None:
        started = time.monotonic()
        with pytest.raises(DeadlineError) as caught:
            await within(sleep_for_ever(), edge="queue.take", timeout_s=0.15)

        assert 0.15 <= time.monotonic() - started < 5
        assert str(caught.value).startswith("waited 0.15 s for queue.take without an answer; raise the deadline under `timeouts`")
        assert re.search(r"who waits for whom:\n.* waits for queue\.take, since 0\.\d s", str(caught.value))

    run(story())


def test_a_deadline_of_many_slices_passes_after_all_of_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(remote, "SLICE_S", 0.05)

    async def story() -> None:
        started = time.monotonic()
        with pytest.raises(DeadlineError):
            await within(sleep_for_ever(), edge="x.y", timeout_s=0.22)

        assert 0.22 <= time.monotonic() - started < 5

    run(story())


def test_a_process_that_was_stopped_for_longer_than_a_deadline_still_takes_the_answer(monkeypatch: pytest.MonkeyPatch):
    """Deadline .5 s in slices of .1 s; this process sleeps for 1 s, and the answer comes .1 s after it woke up."""
    monkeypatch.setattr(remote, "SLICE_S", 0.1)

    async def story() -> None:
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        call = asyncio.create_task(within(answer, edge="x.y", timeout_s=0.5))
        await asyncio.sleep(0.02)
        time.sleep(1.0)
        asyncio.get_running_loop().call_later(0.1, answer.set_result, 42)

        assert await call == 42

    run(story())


def test_work_that_outlived_its_deadline_is_cancelled():
    ended: list[bool] = []

    async def work() -> None:
        try:
            await sleep_for_ever()
        finally:
            ended.append(True)

    async def story() -> None:
        with pytest.raises(DeadlineError):
            await within(work(), edge="x.y", timeout_s=0.02)
        await asyncio.sleep(0)
        assert ended == [True]

    run(story())


# The wait graph.


def test_waits_are_told_longest_first_and_signs_of_life_oldest_first():
    async def story() -> None:
        graph = WaitGraph()
        graph.heard_from("generator-0")

        async def wait(edge: str) -> None:
            with graph.waiting(edge):
                await sleep_for_ever()

        tasks = []
        for name, edge in (("train", "queue.next_batch"), ("produce", "generator-0.collect")):
            tasks.append(asyncio.create_task(wait(edge), name=name))
            await asyncio.sleep(0.11)
        graph.heard_from("queue")

        lines = graph.render().splitlines()

        assert [re.sub(r"\d+\.\d s", "N s", line) for line in lines] == [
            "who waits for whom:",
            "  train waits for queue.next_batch, since N s",
            "  produce waits for generator-0.collect, since N s",
            "  last sign of life of generator-0: N s ago",
            "  last sign of life of queue: N s ago",
        ]
        assert float(lines[1].split("since ")[1].split(" s")[0]) >= 0.2
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert "waits for queue" not in graph.render(), "who no longer waits is not told of"

    run(story())


def test_an_actor_that_is_gone_gives_no_signs_of_life():
    graph = WaitGraph()
    graph.heard_from("scorer-0")
    graph.heard_from("queue")

    graph.forget("scorer-0")
    graph.forget("never seen")

    assert "scorer-0" not in graph.render() and "queue" in graph.render()


def test_a_wait_that_ends_in_an_error_is_over():
    async def story() -> None:
        graph = WaitGraph()
        with pytest.raises(ValueError), graph.waiting("x.y"):
            raise ValueError
        assert graph.render() == "who waits for whom:"

    run(story())
