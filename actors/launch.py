"""Ray: connect, place, start and end actors. The one place that calls `ray.remote`.

Inside a submitted job, or where RAY_ADDRESS names a cluster, the run joins it; else it starts a Ray of its own, behind a fresh
token, and ends it with the run.
"""

import asyncio
import gc
import math
import os
import shutil
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray

from actors.environment import ACTOR_ENVIRONMENT, exported, give_way
from actors.placement import Placement
from actors.remote import CONTROL_GROUP, WEIGHTS_GROUP, Process, RemoteActor, kill, last_line, within
from async_rlhf.config import Config
from async_rlhf.demand import demands_of, total
from async_rlhf.errors import ConfigError, HeadLostError, JournalError, JournalLockedError, RunError

CHECKOUT = Path(__file__).resolve().parents[1]

PERMANENT = (ConfigError, JournalError)
"""What keeps an actor from starting however often it is tried."""

SHRINK = "lower generator.count, learner.num_ranks, scorer.count, reward.count or their num_cpus / num_gpus"
"""What the user of a run may do about a cluster that is too small."""

HEAD_PROBE_S = 5.0
"""Between two looks at Ray's head; and how long one may take."""

HEAD_SILENCE_S = 20.0
"""After a minute without its head, Ray ends this process on the spot, without a word and without a summary."""


@dataclass(frozen=True, kw_only=True)
class ActorSpec:
    """One actor to start."""

    name: str
    cls: type
    args: tuple[Any, ...]
    num_cpus: float = 0.0
    num_gpus: float = 0.0
    max_concurrency: int | None = None
    """Threads of a plain actor; None: one, or Ray's default for one with coroutines."""
    sends_weights: bool = False
    """Whether it has a thread for WEIGHTS_GROUP."""
    place: str = ""
    """Which reserved place it takes; empty: `name`. A restarted actor takes that of the one before."""
    group: str = ""
    """Places of one group are packed onto few nodes; empty: the place is on its own."""
    niceness: int = 0
    """In a Ray of our own; see environment.give_way. On another's, its administrator says who gives way to whom."""
    near: str = ""
    """Of an actor that reserves nothing: the place, or placement.HERE, on whose node it best is; empty: anywhere."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "place", self.place or self.name)


@dataclass
class Cluster:
    """A connection to Ray, and the actors that this run started there."""

    namespace: str
    address: str
    local_folder: Path | None
    """Session folder of a Ray of our own, token included; None when we joined one."""
    environment: Mapping[str, str]
    """What actors do not have from their nodes already."""
    has_gpus: bool
    """Whether a node has any, or may have: actors that asked for none shall not see them."""
    placement: Placement
    _head_lost: bool = False
    _actors: list[RemoteActor] = field(default_factory=list[RemoteActor])

    async def reserve(self, specs: Sequence[ActorSpec], remedy: str = SHRINK) -> None:
        """Reserve room for all actors at once: one that cannot be placed would wait without a word.

        Args:
            specs: before `start`; each is known by its `place`, which must be new.
            remedy: what its user may do about a cluster that is too small.

        Raises:
            ConfigError: the cluster is too small, or has no room free in time.
        """
        await self.placement.reserve(specs, remedy)

    async def reserve_more(self, spec: ActorSpec, timeout_s: float) -> None:
        """Reserve room for one more actor while the others live; then `start` it, as any other.

        Raises:
            NoRoomError: there is none in time; nothing stays reserved.
        """
        await self.placement.reserve_more(spec, timeout_s)

    def release(self, place: str) -> None:
        """Give back the room of a place whose actor has left for good; ends an actor that still lives there. Unknown ones are none."""
        self.placement.release(place)

    async def placed(self, spec: ActorSpec, timeout_s: float | None = None) -> None:
        """Wait until the actor's place is on a living node again, if its node was lost; Ray looks for another one by itself.

        Args:
            timeout_s: None: timeouts.place_s; 0: only look.
        Raises:
            NoRoomError: no node had room in time.
        """
        await self.placement.placed(spec.place, timeout_s)

    async def watch_head(self) -> None:
        """Look whether Ray's head still takes connections, for as long as it does.

        Raises:
            HeadLostError: it took none for HEAD_SILENCE_S.
        """
        host, _, port = self.address.rpartition(":")
        silent_s = 0.0
        while silent_s < HEAD_SILENCE_S:
            await asyncio.sleep(HEAD_PROBE_S)
            try:
                async with asyncio.timeout(HEAD_PROBE_S):
                    _, writer = await asyncio.open_connection(host, int(port))
                writer.close()
                silent_s = 0.0
            except (OSError, TimeoutError):
                silent_s += HEAD_PROBE_S
        self._head_lost = True
        raise HeadLostError(f"Ray's head (GCS) at {self.address} has taken no connection for {silent_s:g} s: the cluster is gone")

    @property
    def object_store_bytes(self) -> float:
        """The smallest object store of any node."""
        return min(node["Resources"].get("object_store_memory", 0.0) for node in ray.nodes() if node["Alive"])

    def start(self, spec: ActorSpec) -> RemoteActor:
        """Start an actor; returns at once. Only the run itself decides about restarts."""
        options: dict[str, Any] = {
            "name": spec.name,
            "num_cpus": spec.num_cpus,
            "num_gpus": spec.num_gpus,
            "max_restarts": 0,
        }
        if environment := {**self.environment, **({"CUDA_VISIBLE_DEVICES": ""} if self.has_gpus and not spec.num_gpus else {})}:
            options["runtime_env"] = {"env_vars": environment}
        if spec.max_concurrency is not None:
            options["max_concurrency"] = spec.max_concurrency
        options["scheduling_strategy"] = self.placement.strategy(spec.place, spec.near)
        threads = {CONTROL_GROUP: 1} | ({WEIGHTS_GROUP: 1} if spec.sends_weights else {})
        remote: Any = ray.remote  # its stubs know no concurrency groups
        handle = remote(concurrency_groups=threads)(spec.cls).options(**options).remote(*spec.args)
        actor = RemoteActor(handle, spec.name, spec.niceness if self.local_folder is not None else 0)
        self._actors.append(actor)
        return actor

    def close(self, keep_logs: Path | None = None) -> None:
        """End every actor of this run, give its room back, and end a Ray of our own. Nothing stops it halfway.

        Args:
            keep_logs: where to copy the logs of a Ray of our own; its session folder is deleted.
        """
        try:
            if self._head_lost:
                _kill_descendants()  # any call to Ray would wait for its head until Ray ends this process
            else:
                self._close_ray()
        finally:
            if self.local_folder is not None:
                if keep_logs is not None:
                    with suppress(OSError):
                        shutil.copytree(self.local_folder / "session_latest" / "logs", keep_logs, ignore_dangling_symlinks=True)
                shutil.rmtree(self.local_folder, ignore_errors=True)

    def _close_ray(self) -> None:
        if self.local_folder is None:  # a Ray of our own ends with all that it holds
            for actor in self._actors:
                with suppress(Exception):
                    kill(actor)
            self.placement.close()
        ray.shutdown()


def _kill_descendants() -> None:
    """End every process below this one: a Ray of our own, and all that it started."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            process.kill()


async def ready(actor: RemoteActor, timeout_s: float, on_ready: Callable[[str], None]) -> None:
    """Wait until the actor's constructor is through.

    Raises:
        RunError: it raised. DeadlineError: it took too long.
    """

    async def construct() -> None:
        try:
            actor.process = await actor.handle.__ray_call__.remote(_settled, actor.niceness)
        except Exception as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, PERMANENT) and not isinstance(cause, JournalLockedError):
                raise cause from error
            raise RunError(f"{actor.name} did not start: {last_line(error)}") from error

    await within(construct(), edge=f"the start of {actor.name}", timeout_s=timeout_s)
    on_ready(actor.name)


def _settled(_: Any, niceness: int) -> Process:
    give_way(niceness)
    # What imports and constructors made stays: each full collection would look through all of it, 80 ms in the queue, for nothing.
    gc.collect()
    gc.freeze()
    own = psutil.Process()
    return Process(node_id=ray.get_runtime_context().get_node_id(), pid=own.pid, started_at=own.create_time())


async def first_failure(*awaitables: Awaitable[Any]) -> None:
    """Await all; on the first failure cancel the others and raise it alone."""
    try:
        async with asyncio.TaskGroup() as tasks:
            for awaitable in awaitables:
                tasks.create_task(_await(awaitable))
    except BaseExceptionGroup as group:
        raise leaf(group) from None


def connect(config: Config, run_id: str, session: Path | None, say: Callable[[str], None] = lambda line: None) -> Cluster:
    """Start a Ray of our own in `session`, or, without one, join the cluster of this job or of RAY_ADDRESS.

    Args:
        say: gets a line now and then while the run waits for room.

    Raises:
        RunError: there is no Ray at RAY_ADDRESS.
    """
    namespace = f"async_rlhf_{run_id}"
    settings: dict[str, Any] = {"namespace": namespace, "log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    if session is None:
        address, environment = os.environ["RAY_ADDRESS"], {**ACTOR_ENVIRONMENT, **config.env}
        try:
            context: Any = ray.init(address=address, **settings)
        except Exception as error:
            raise RunError(f"cannot join the Ray cluster at RAY_ADDRESS={address}: {last_line(error)}") from error
    else:
        path = os.pathsep.join(part for part in (str(CHECKOUT), os.environ.get("PYTHONPATH", "")) if part)
        environment = {**config.env, "PYTHONPATH": path} if config.env else {}
        with exported({**ACTOR_ENVIRONMENT, "PYTHONPATH": path}):
            context = _start_local(config, session, settings)
    return Cluster(
        namespace=namespace,
        address=str(context.address_info["address"]),
        local_folder=session,
        environment=environment,
        has_gpus=session is None or ray.cluster_resources().get("GPU", 0) > 0,
        placement=Placement(config.timeouts.place_s, autoscales=config.run.autoscale, own=session is not None, say=say),
    )


def _start_local(config: Config, session: Path, settings: Mapping[str, Any]) -> Any:
    try:
        return ray.init(
            address="local",
            num_cpus=_local_cpus(config),
            object_store_memory=config.run.object_store_mib << 20,
            include_dashboard=False,
            _metrics_export_port=config.run.metrics_port or None,
            _temp_dir=str(session),
            **settings,
        )
    except BaseException:  # Ctrl-C too: half a Ray must not stay behind
        ray.shutdown()
        shutil.rmtree(session, ignore_errors=True)
        raise


def _local_cpus(config: Config) -> int:
    """Logical CPUs: enough for what the actors ask for, so that a small machine can host any number of them."""
    return config.run.local_cpus or max(math.ceil(total(demands_of(config))["CPU"]), os.cpu_count() or 1)


def leaf(group: BaseException) -> BaseException:
    """The first error inside nested groups."""
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


async def _await(awaitable: Awaitable[Any]) -> None:
    await awaitable
