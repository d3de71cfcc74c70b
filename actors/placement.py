"""Where actors live: each has a place in a placement group, reserved before it starts and kept for whoever comes after it.

    learner ranks             one group for all: Ray fills a node before it takes the next, and whatever crosses between ranks stays
                              inside nodes as far as possible. Not one strict group per node: how many ranks fit one differs from node
                              to node, and nobody knows those that an autoscaler will bring.
    generators, scorers, ...  a group each: they join, leave and move to another node one by one.

When a node dies Ray looks for new room for the places that it held, and for those alone: `placed` waits for that.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from actors.wait_graph import WAITS
from async_rlhf.demand import Demand, describe, describe_nodes, shortage
from async_rlhf.errors import ConfigError, NoRoomError

POLL_S = 1.0
"""Between two looks whether there is room; also how long Ctrl-C may have to wait for such a look."""

SAY_S = 10.0
"""Between two words about what is still waited for."""

HERE = "here"
"""On the node of this very process."""

MORE = "add nodes, or, where nodes come on demand, set run.autoscale=true"
OWN_MORE = "raise run.local_cpus if it is set and CPUs are missing, or run on a cluster that has more (docs/cluster.md)"
"""What else helps against a shortage: in a cluster that the run has joined, and in a Ray of its own."""

PARTS = {"learner": "learner rank", "reward": "reward actor"}
"""What the actors of some places are called in words; else as their place."""


class Placed(Protocol):
    """What wants a place."""

    @property
    def place(self) -> str:
        """Its name: unique, and the same for whoever comes after."""
        ...

    @property
    def group(self) -> str:
        """Places of one group are packed onto few nodes; empty: on its own."""
        ...

    @property
    def num_cpus(self) -> float: ...

    @property
    def num_gpus(self) -> float: ...


@dataclass(frozen=True)
class _Place:
    group: PlacementGroup
    index: int
    """Of its bundle."""
    demand: Demand


class Placement:
    """The places of one run."""

    def __init__(self, place_s: float, *, autoscales: bool, own: bool, say: Callable[[str], None]) -> None:
        """
        Args:
            place_s: longest wait for room.
            autoscales: nodes come when they are asked for, so that what is there today is no limit.
            own: the Ray is this run's own, on this machine alone: no node will ever come.
            say: told now and then what is still waited for.
        """
        self._place_s = place_s
        self._autoscales = autoscales and not own
        self._more = OWN_MORE if own else MORE
        self._say = say
        self._places: dict[str, _Place] = {}

    async def reserve(self, wanted: Sequence[Placed], remedy: str) -> None:
        """Reserve room for all of them at once; on failure for none.

        Raises:
            ConfigError: the cluster is too small, or had no room in time. Ends with `remedy`.
        """
        demands = demands_of(wanted)
        reason = "" if self._autoscales else shortage(demands, _nodes())
        if reason:
            raise ConfigError(f"{reason}; {remedy}, {self._more}")
        names = self._request(wanted)
        try:
            missing = await self._wait(names, self._place_s)
            if not missing:
                self._side_by_side(names)
            else:
                raise ConfigError(
                    f"the run asks for {describe(demands)}; for {self._place_s:g} s (timeouts.place_s) the Ray cluster had no room for "
                    f"{_list(missing)}; free beside what was reserved are {describe_nodes(_free())}; {remedy}, add nodes, wait for other "
                    "jobs to end, or raise timeouts.place_s"
                )
        except BaseException:
            self.release(*names)
            raise

    async def reserve_more(self, wanted: Placed, timeout_s: float) -> None:
        """Reserve room for one more, beside those that are there.

        Raises:
            NoRoomError: there was none in time; nothing stays reserved.
        """
        names = self._request([wanted])
        try:
            if await self._wait(names, timeout_s):
                asked, free = describe(demands_of([wanted])), describe_nodes(_free())
                raise NoRoomError(f"there is no room for {wanted.place} within {timeout_s:g} s: it takes {asked}, free are {free}")
        except BaseException:
            self.release(*names)
            raise

    async def placed(self, place: str, timeout_s: float | None = None) -> None:
        """Wait until the place is on a living node, which it is unless its node died.

        Args:
            timeout_s: None: timeouts.place_s.
        Raises:
            NoRoomError: no other node had room for it in time.
        """
        if place not in self._places:
            return
        limit_s = self._place_s if timeout_s is None else timeout_s
        if await self._wait([place], limit_s):
            raise NoRoomError(
                f"{place} lost its node, and no other one had room for it within {limit_s:g} s (timeouts.place_s): it takes "
                f"{describe([self._places[place].demand])}, free are {describe_nodes(_free())}; add a node and resume"
            )

    def release(self, *places: str) -> None:
        """Give room back, and end whoever lives there; places of a group all at once."""
        groups = [self._places.pop(place).group for place in places if place in self._places]
        for group in dict.fromkeys(groups):
            with suppress(Exception):  # Ray may be gone, and the room with it
                remove_placement_group(group)

    def close(self) -> None:
        """Give everything back."""
        self.release(*self._places)

    def strategy(self, place: str, near: str) -> Any:
        """Ray's scheduling strategy of an actor with this place; without one, where it best goes.

        Args:
            near: a place, or HERE, on whose node it should be as long as that is possible; empty: anywhere.
        """
        if place in self._places:
            return PlacementGroupSchedulingStrategy(self._places[place].group, self._places[place].index)
        if near == HERE:  # Ray takes a soft wish lightly, and without this node there is no driver either
            return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        node = self.nodes().get(near)
        return NodeAffinitySchedulingStrategy(node, soft=True) if node else "DEFAULT"

    def nodes(self) -> dict[str, str]:
        """Place -> id of its node; places that have none now are left out."""
        table: Mapping[str, Any] = placement_group_table()
        found: dict[str, str] = {}
        for name, place in self._places.items():
            node = table.get(place.group.id.hex(), {}).get("bundles_to_node_id", {}).get(place.index)
            if node:
                found[name] = node
        return found

    def _request(self, wanted: Sequence[Placed]) -> list[str]:
        """Ask for the room; the largest group first, because what is small fits into what is left."""
        groups: dict[str, list[Placed]] = {}
        for one in wanted:
            assert one.place not in self._places, f"{one.place} is reserved already"
            if _demand(one).bundle:
                groups.setdefault(one.group or f"place {one.place}", []).append(one)
        names: list[str] = []
        for members in sorted(groups.values(), key=_size, reverse=True):
            group = placement_group([_demand(one).bundle for one in members], strategy="PACK")
            for index, one in enumerate(members):
                self._places[one.place] = _Place(group, index, _demand(one))
                names.append(one.place)
        return names

    async def _wait(self, names: Sequence[str], timeout_s: float) -> list[str]:
        """Wait until all places have their nodes; returns those that have none in time."""
        begun = said = time.monotonic()
        with WAITS.waiting(f"room for {_list(names)}"):
            while True:
                nodes, now = await asyncio.to_thread(self.nodes), time.monotonic()
                missing = [name for name in names if name in self._places and name not in nodes]
                if not missing or now - begun >= timeout_s:
                    return missing
                if now - said >= SAY_S:
                    said, free = now, describe_nodes(_free())
                    self._say(f"waiting for room for {_list(missing)}, {now - begun:.0f} of {timeout_s:g} s; free: {free}")
                # In short waits: a thread cannot be cancelled, and Ctrl-C must not wait for it.
                await asyncio.to_thread(self._places[missing[0]].group.wait, POLL_S)

    def _side_by_side(self, names: Sequence[str]) -> None:
        """Neighbours of a group onto one node: Ray fills nodes, but may number its bundles across them."""
        nodes = self.nodes()
        groups: dict[PlacementGroup, list[str]] = {}
        for name in names:
            groups.setdefault(self._places[name].group, []).append(name)
        for members in groups.values():
            places = [self._places[name] for name in members]
            first = {node: index for index, node in reversed(list(enumerate(nodes.get(name, "") for name in members)))}
            order = sorted(range(len(members)), key=lambda index: first[nodes.get(members[index], "")])
            self._places.update({name: places[index] for name, index in zip(members, order, strict=True)})


def demands_of(wanted: Iterable[Placed]) -> list[Demand]:
    """What they ask for, equal ones counted together."""
    counts = Counter((_part(one.place), one.num_cpus, one.num_gpus) for one in wanted)
    demands = [Demand(part=part, count=count, num_cpus=cpus, num_gpus=gpus) for (part, cpus, gpus), count in counts.items()]
    return [demand for demand in demands if demand.bundle]


def _demand(one: Placed) -> Demand:
    return Demand(part=_part(one.place), count=1, num_cpus=one.num_cpus, num_gpus=one.num_gpus)


def _part(place: str) -> str:
    kind = place.partition("-")[0]
    return PARTS.get(kind, kind)


def _size(members: Sequence[Placed]) -> tuple[float, float]:
    return sum(one.num_gpus for one in members), sum(one.num_cpus for one in members)


def _nodes() -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _free() -> list[Mapping[str, float]]:
    from ray._private.state import available_resources_per_node

    per_node: dict[str, Mapping[str, float]] = available_resources_per_node()
    return list(per_node.values())


def _list(names: Sequence[str]) -> str:
    """The names, of many the first few."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
