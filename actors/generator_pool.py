"""The generators of a run, elastic: each seat is kept at work, some join and some leave while training goes on.

| what            | how                                                                                                       |
|-----------------|-----------------------------------------------------------------------------------------------------------|
| joins           | room -> start -> newest version -> canary -> first ticket; what fails ends the join, never the run         |
| leaves          | no further ticket -> finishes what it has (timeouts.leave_s) -> ends -> its room is given back              |
| dies            | starts again, under the limits of supervision                                                              |
| dies, no room   | waits for room, for as long as others are at work; without any, for timeouts.batch_s                       |
| fails too often | rests until the limits let it start again, if there is another one; if all others rest, too, the run ends  |
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from actors.crew import Crew
from actors.launch import PERMANENT, ActorSpec
from actors.pipeline import produce
from actors.remote import kill_process
from actors.roster import Phase, Seat
from actors.supervision import BROKEN, Member, first_line
from actors.waiting import unless
from async_rlhf.config import Config
from async_rlhf.errors import NoRoomError, RestartLimitError, RunError

T = TypeVar("T")

ROOM_S = 15.0
"""Longest wait for room where no nodes come on demand: what another one has just given back needs a moment."""

Say = Callable[[str], None]
"""Takes a line for whoever asked."""


class _GaveUp(Exception):
    """One that was to join did not come up."""


class Rooms(Protocol):
    """Where generators may live; see Cluster."""

    async def reserve_more(self, spec: ActorSpec, timeout_s: float) -> None:
        """Room for one more, or NoRoomError."""

    def release(self, place: str) -> None:
        """Give the room of a place back."""

    async def placed(self, spec: ActorSpec, timeout_s: float | None = None) -> None:
        """Wait until a reserved place is on a living node, or NoRoomError; Ray looks for another node by itself."""


class GeneratorPool:
    """Keeps the seats of a crew's roster filled."""

    def __init__(self, crew: Crew, config: Config, rooms: Rooms, member: Callable[[int], Member]) -> None:
        """
        Args:
            member: the generator of that number; always the same one, so that no two of its incarnations are named alike.
        """
        self._crew = crew
        self._config = config
        self._rooms = rooms
        self._member = member
        self._sitting: dict[Seat, asyncio.Task[str]] = {}
        """What goes on in each seat; returns why the generator was given up before its first install, or nothing."""
        self._causes: dict[str, Exception] = {}
        """Why an incarnation was ended on purpose."""
        self._tasks: asyncio.TaskGroup | None = None
        self._scoring: asyncio.TaskGroup | None = None
        self._deserted_since: float | None = None

    @property
    def count(self) -> int:
        """Generators that nobody asked to leave."""
        return len(self._staying)

    async def work(self) -> None:
        """Keep every generator at work, for ever.

        Raises:
            RestartLimitError: all of them keep failing. NoRoomError: there is room for none.
        """
        # One group inside the other: at the end nobody samples any more before the scoring stops.
        async with asyncio.TaskGroup() as scoring, asyncio.TaskGroup() as tasks:
            self._scoring, self._tasks = scoring, tasks
            for seat in self._crew.roster:
                self._begin(seat, self._sit(seat))
            await asyncio.Event().wait()

    async def scale(self, count: int, say: Say) -> None:
        """Let generators join or leave until there are `count`. Cancelled, it leaves those that are on their way alone.

        Raises:
            NoRoomError: the cluster has none for them, and nothing has changed. RunError: some did not come up; those that did stay.
        """
        missing = count - self.count
        if missing > 0:
            await self._let_join(missing, say)
        elif missing < 0:
            await self._let_leave(sorted(self._staying, key=_usefulness)[:-missing], say)

    def recast(self, cause: Exception) -> None:
        """End all processes: what they have installed is of no use any more. Their seats are filled again."""
        for seat in self._crew.roster:
            if seat.member.is_played:
                self._crew.installs.pop(seat.member.actor.name, None)
                self._causes[seat.member.actor.name] = cause
                kill_process(seat.member.actor)

    @property
    def _staying(self) -> list[Seat]:
        return [seat for seat in self._crew.roster if not seat.leaving.is_set()]

    async def _let_join(self, number: int, say: Say) -> None:
        taken = {seat.member.name for seat in self._crew.roster}
        candidates = (self._member(index) for index in range(len(taken) + number))
        members = [member for member in candidates if member.name not in taken][:number]
        specs = [member.next_spec() for member in members]
        say(f"reserving room for {', '.join(member.name for member in members)}")
        await self._reserve(specs)
        seats = [self._crew.roster.add(member) for member in members]
        for seat, spec in zip(seats, specs, strict=True):
            self._begin(seat, self._join(seat, spec))
        say(f"starting {', '.join(member.name for member in members)}")
        arrivals = [self._begin_task(self._arrival(seat), f"arrival of {seat.member.name}") for seat in seats]
        failures = [line async for line, arrived in _in_turn(arrivals, say) if not arrived]
        if failures:
            raise RunError("; ".join(failures))

    async def _reserve(self, specs: Sequence[ActorSpec]) -> None:
        """Room for all of them, or for none."""
        limits = self._config.timeouts
        try:
            for spec in specs:
                limit_s = limits.place_s if self._config.run.autoscale else min(limits.place_s, ROOM_S)
                if any(seat.leaving.is_set() for seat in self._crew.roster):  # it gives its room back
                    limit_s = max(limit_s, limits.leave_s + ROOM_S)
                await self._rooms.reserve_more(spec, limit_s)
        except BaseException:
            for spec in specs:
                self._rooms.release(spec.place)
            raise

    async def _arrival(self, seat: Seat) -> tuple[str, bool]:
        """Wait until it is at work, or not to be expected any more; returns what to say, and whether it is."""
        name, sitting, began = seat.member.name, self._sitting[seat], time.monotonic()
        arriving = asyncio.create_task(seat.arrived.wait())
        try:
            await asyncio.wait({sitting, arriving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            arriving.cancel()
        after_s = time.monotonic() - began
        if seat.arrived.is_set():
            self._report("joined", name, after_s=after_s)
            return f"{name} joined after {after_s:.1f} s", True
        cause = sitting.result() or "it was asked to leave again"
        self._report("gave_up", name, cause=cause)
        return f"{name} did not join: {cause}", False

    async def _let_leave(self, seats: Sequence[Seat], say: Say) -> None:
        say(f"{', '.join(seat.member.name for seat in seats)} finish what they have and leave")
        for seat in seats:
            seat.leaving.set()
            self._crew.roster.turn(seat, Phase.LEAVING)
        departures = [self._begin_task(self._departure(seat), f"departure of {seat.member.name}") for seat in seats]
        async for _ in _in_turn(departures, say):
            pass

    async def _departure(self, seat: Seat) -> tuple[str, bool]:
        """Wait until it is gone; returns what to say."""
        name, began = seat.member.name, time.monotonic()
        await asyncio.wait({self._sitting[seat]})
        after_s = time.monotonic() - began
        self._report("left", name, after_s=after_s)
        return f"{name} left after {after_s:.1f} s", True

    def _report(self, event: str, name: str, **more: float | str) -> None:
        self._crew.supervisor.report({"event": event, "name": name, "time": time.time(), **more})

    def _begin(self, seat: Seat, sitting: Coroutine[Any, Any, str]) -> None:
        self._sitting[seat] = self._begin_task(sitting, f"produce {seat.member.name}")

    def _begin_task(self, work: Coroutine[Any, Any, T], name: str) -> "asyncio.Task[T]":
        assert self._tasks is not None, "work() comes first"
        return self._tasks.create_task(work, name=name)

    async def _join(self, seat: Seat, spec: ActorSpec) -> str:
        """All that happens in the seat of one that joins."""

        async def start() -> None:
            try:
                seat.member.cast(await self._crew.supervisor.begin(spec))
            except PERMANENT as error:
                raise _GaveUp(first_line(error)) from error
            except RunError as error:
                await self._refill(seat, error)

        try:
            await unless(seat.leaving, start())
            return await self._sit(seat)
        except _GaveUp as error:
            self._dismiss(seat)
            return str(error)

    async def _sit(self, seat: Seat) -> str:
        """Keep the seat filled until it is to be left."""
        assert self._scoring is not None, "work() comes first"
        while not seat.leaving.is_set():
            name = seat.member.actor.name
            try:
                await produce(seat, self._crew, self._config, self._scoring)
            except BROKEN as error:
                kill_process(seat.member.actor)
                if not seat.leaving.is_set():
                    await unless(seat.leaving, self._refill(seat, self._causes.pop(name, error)))
        self._dismiss(seat)
        return ""

    async def _refill(self, seat: Seat, cause: Exception) -> None:
        """Start the generator again, as often as the limits allow; over them it rests if another one takes part."""
        supervisor, roster = self._crew.supervisor, self._crew.roster
        comes = seat.joins and not seat.arrived.is_set()
        roster.turn(seat, Phase.RESTARTING)
        while True:
            try:
                await supervisor.replace(seat.member.name, cause, lambda: self._start(seat))
                return
            except (RestartLimitError, NoRoomError, *PERMANENT) as error:
                if comes:
                    raise _GaveUp(first_line(error)) from error
                # Also one that restarts just now counts: if it fails by its own fault, too, its own limit ends the run.
                if not isinstance(error, RestartLimitError) or not any(other.takes_part for other in roster if other is not seat):
                    raise
                if seat.phase is not Phase.RESTING:
                    roster.turn(seat, Phase.RESTING)
                    self._report("rests", seat.member.name, cause=first_line(error))
            await asyncio.sleep(max(self._config.supervision.max_backoff_s, self._config.supervision.ping_s))

    async def _start(self, seat: Seat) -> None:
        """Wait for room, and start it there.

        Raises:
            NoRoomError: nobody is at work, and there is room for nobody; or one that joins has lost its room.
        """
        spec, roster = seat.member.next_spec(), self._crew.roster
        while True:
            if not await self._has_room(spec, 0.0):
                roster.turn(seat, Phase.NO_ROOM)
                self._report("no_room", seat.member.name)
                while not await self._has_room(spec, self._config.supervision.ping_s):
                    self._check_room(seat)
            self._deserted_since = None
            roster.turn(seat, Phase.RESTARTING)
            with suppress(NoRoomError):  # lost again just now
                seat.member.cast(await self._crew.supervisor.begin(spec))
                return

    async def _has_room(self, spec: ActorSpec, wait_s: float) -> bool:
        try:
            await self._rooms.placed(spec, wait_s)
        except NoRoomError:
            return False
        return True

    def _check_room(self, seat: Seat) -> None:
        """Raise NoRoomError where waiting for room is of no use any more."""
        if seat.joins and not seat.arrived.is_set():
            raise NoRoomError(f"{seat.member.name} has lost its room before it was at work, and the cluster has no other")
        now, limit_s = time.monotonic(), self._config.timeouts.batch_s
        if self._crew.roster.members or self._deserted_since is None:
            self._deserted_since = None if self._crew.roster.members else now
        elif now - self._deserted_since > limit_s:
            raise NoRoomError(
                f"no generator is left, and for {limit_s:g} s (timeouts.batch_s) the cluster had no room for one; add nodes and resume"
            )

    def _dismiss(self, seat: Seat) -> None:
        if seat.member.is_played:
            kill_process(seat.member.actor)
        self._rooms.release(seat.member.name)
        self._crew.roster.remove(seat)
        del self._sitting[seat]


def _usefulness(seat: Seat) -> tuple[bool, int]:
    """Who leaves first: those that do not sample, and of the others the youngest."""
    return seat.phase is Phase.AT_WORK, -int(seat.member.name.rpartition("-")[2])


async def _in_turn(tasks: Iterable["asyncio.Task[tuple[str, bool]]"], say: Say) -> AsyncIterator[tuple[str, bool]]:
    """What each returns, as it comes; cancelled, it leaves them alone."""
    pending = set(tasks)
    while pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            say(task.result()[0])
            yield task.result()
