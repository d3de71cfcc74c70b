"""The roster: which generators take part now, what each is doing, and for how long there were how many."""

import time
from asyncio import Event
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum

from actors.supervision import Member
from async_rlhf.types import InstallReport


class Phase(StrEnum):
    """What a generator is doing, as `async-rlhf status` says it."""

    STARTING = "starting"
    """With the run itself: it has installed nothing yet."""
    JOINING = "joining"
    """The same in a run that goes on without it."""
    AT_WORK = "at work"
    RESTARTING = "restarting"
    NO_ROOM = "lost: the cluster has no room for it"
    RESTING = "lost: it failed too often"
    """It starts again as soon as supervision.window_s allows."""
    LEAVING = "leaving"


_TAKING_PART = (Phase.STARTING, Phase.AT_WORK, Phase.RESTARTING)


class Seat:
    """A generator's place in the run, whoever sits there."""

    def __init__(self, member: Member, phase: Phase) -> None:
        self.member = member
        self.phase = phase
        self.joins = phase is Phase.JOINING
        """Whether the run began without it."""
        self.arrived = Event()
        """Set at its first install."""
        self.leaving = Event()
        """Set: it takes no further ticket."""

    @property
    def takes_part(self) -> bool:
        """Whether others may count on it."""
        return self.phase in _TAKING_PART


class Roster:
    """All seats. Only the generator pool adds, removes and changes them; everybody may look."""

    def __init__(self, members: Sequence[Member], now: Callable[[], float] = time.perf_counter) -> None:
        """
        Args:
            members: that the run begins with.
            now: seconds.
        """
        self._now = now
        self._seats = [Seat(member, Phase.STARTING) for member in members]
        self._generator_s = 0.0
        self._since = now()
        self.changed = Event()
        """Set at each change; whoever waits for it clears it."""

    def __iter__(self) -> Iterator[Seat]:
        return iter(tuple(self._seats))

    @property
    def members(self) -> list[Member]:
        """Those that take part: neither on their way in or out, nor lost for a while."""
        return [seat.member for seat in self._seats if seat.takes_part]

    @property
    def generator_s(self) -> float:
        """Seconds that members have taken part so far, all of them together."""
        self._count()
        return self._generator_s

    def add(self, member: Member) -> Seat:
        """A member joins a run that goes on."""
        seat = Seat(member, Phase.JOINING)
        self._seats.append(seat)
        self.changed.set()
        return seat

    def remove(self, seat: Seat) -> None:
        """It is gone."""
        self._count()
        self._seats.remove(seat)
        self.changed.set()

    def turn(self, seat: Seat, phase: Phase) -> None:
        """`seat` does something else from now on; whoever leaves does nothing else any more."""
        if phase is Phase.AT_WORK:
            seat.arrived.set()
        if phase is Phase.RESTARTING and not seat.arrived.is_set():
            phase = Phase.JOINING if seat.joins else Phase.STARTING
        if seat.phase in (phase, Phase.LEAVING):
            return
        self._count()
        seat.phase = phase
        self.changed.set()

    def health(self, installs: Mapping[str, InstallReport]) -> dict[str, str]:
        """What each is doing, and the version that it samples from.

        Args:
            installs: the last one of each living generator, by incarnation.
        """
        versions = {name.partition(".")[0]: report.version for name, report in installs.items()}
        names = [seat.member.name for seat in self._seats]
        return {
            name: f"{seat.phase}, version {versions[name]}" if name in versions else str(seat.phase)
            for name, seat in zip(names, self._seats, strict=True)
        }

    def _count(self) -> None:
        now = self._now()
        self._generator_s += (now - self._since) * len(self.members)
        self._since = now
