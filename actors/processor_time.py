"""Processor seconds of the crew's processes: what they take of the cores, whoever else wants them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:  # a run's accounts, which read these, are opened before Ray may be imported: see session.py
    from actors.remote import RemoteActor

Seconds = Mapping[str, Mapping[str, float]]
"""Part of the crew -> process -> seconds since it began."""

DRIVER = "driver"
AGENT = "Agent"
"""In the titles of the processes with which a raylet looks after its node."""


class ProcessorTime:
    """Reads them, on this node."""

    def __init__(self) -> None:
        import ray

        self._node_id = ray.get_runtime_context().get_node_id()
        self._rays_own = list(_rays_own())

    def read(self, crew: Mapping[str, "Sequence[RemoteActor]"]) -> Seconds:
        """Of each part of the crew whose actors are all on this node; of this process with those of its own Ray. The dead are left out."""
        parts = {part: actors for part, actors in crew.items() if all(self._is_here(actor) for actor in actors)}
        found = {part: {actor.name: self._seconds(actor) for actor in actors} for part, actors in parts.items()}
        names = {DRIVER: psutil.Process(), **{f"ray {process.pid}": process for process in self._rays_own}}
        driver = {name: seconds for name, process in names.items() if (seconds := _spent_s(process)) is not None}
        living = {part: {name: seconds for name, seconds in of_part.items() if seconds is not None} for part, of_part in found.items()}
        return {**living, DRIVER: driver}

    def _is_here(self, actor: "RemoteActor") -> bool:
        return actor.process is not None and actor.process.node_id == self._node_id

    def _seconds(self, actor: "RemoteActor") -> float | None:
        assert actor.process is not None, "only processes of this node are read"
        with suppress(psutil.Error):
            process = psutil.Process(actor.process.pid)  # anew: it remembers when it began, and its number may have gone to another
            if process.create_time() == actor.process.started_at:
                return _spent_s(process)
        return None


def _spent_s(process: psutil.Process) -> float | None:
    """Since it began; None: it is gone."""
    with suppress(psutil.Error):
        times = process.cpu_times()
        return times.user + times.system
    return None


def _rays_own() -> Iterator[psutil.Process]:
    """The head, raylet, monitors and agents of a Ray that this process started; its workers are the crew's, or idle."""
    for process in psutil.Process().children():
        yield process
        with suppress(psutil.Error):
            yield from (child for child in process.children() if AGENT in " ".join(child.cmdline()))


def spent(before: Seconds, after: Seconds, part: str) -> float | None:
    """Seconds between two readings, of the processes that both know; None: there are none."""
    old, new = before.get(part, {}), after.get(part, {})
    both = old.keys() & new.keys()
    return sum(max(0.0, new[name] - old[name]) for name in both) if both else None
