"""Who takes part in a run, and what is known of one update: what the two loops work with."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from actors.engine_loop import EngineUsage
from actors.gate import InstallGate
from actors.meters import Meters, Readings
from actors.processor_time import ProcessorTime, Seconds
from actors.remote import RemoteActor
from actors.replay_queue import Booked, Fact
from actors.roster import Roster
from actors.supervision import Member, Supervisor
from actors.transport import Transport
from actors.weight_broadcaster import Published
from async_rlhf.config import Config
from async_rlhf.metrics import BatchSummary
from async_rlhf.protocols import LearnerClient
from async_rlhf.tickets import QueueCounters
from async_rlhf.types import InstallReport, StepReport


@dataclass(kw_only=True)
class Crew:
    """Who takes part in a run, and what the loops share."""

    supervisor: Supervisor
    roster: Roster
    """The generators."""
    scorers: Sequence[Member]
    queue: Member
    broadcaster: Member
    learner: LearnerClient
    transport: Transport
    rewards: Sequence[Member] = ()
    """Empty: the scorers compute the rewards themselves."""
    usage: dict[str, EngineUsage] = field(default_factory=dict[str, EngineUsage])
    """By incarnation, cumulative; the dead ones stay."""
    installs: dict[str, InstallReport] = field(default_factory=dict[str, InstallReport])
    """The last one of each living generator, by incarnation."""
    installed: asyncio.Condition = field(default_factory=asyncio.Condition)
    """Notified of each install."""
    gate: InstallGate = field(default_factory=InstallGate)
    meters: Meters = field(default_factory=Meters)
    counters: QueueCounters | None = None
    """The queue's, as of its last answer; None: it was not asked yet."""
    update_s: float = 0.0
    """What the last update took, with the wait for its batch and its checkpoint; 0: none is through."""
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    """Set: tickets may be taken."""
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    """Set: the train loop ends after the update that it is at."""
    published: tuple[int, RemoteActor | None] = (-1, None)
    """The last version that was published, and the broadcaster that took it."""
    publisher: RemoteActor | None = None
    """The rank 0 that it came from."""
    idle_scorers: "asyncio.Queue[Member]" = field(default_factory=asyncio.Queue)
    """Those of `scorers` that have nothing to do: each scores one call at a time, whichever is free."""
    idle_rewards: "asyncio.Queue[Member]" = field(default_factory=asyncio.Queue)
    """Those of `rewards`, likewise."""

    processor: ProcessorTime | None = None
    """None: nobody asks what the processes take of the cores."""

    def __post_init__(self) -> None:
        for reward in self.rewards:
            self.idle_rewards.put_nowait(reward)
        for scorer in self.scorers:
            self.idle_scorers.put_nowait(scorer)

    @property
    def generators(self) -> Sequence[Member]:
        """Those that take part at this moment."""
        return self.roster.members

    @property
    def processor_seconds(self) -> Seconds:
        """Of the processes that are at work, by part; see ProcessorTime."""
        if self.processor is None:
            return {}
        parts = {"generate": self.generators, "score": self.scorers, "reward": self.rewards, "queue": [self.queue]}
        crew = {part: [member.actor for member in members if member.is_played] for part, members in parts.items()}
        return self.processor.read({**crew, "train": self.learner.ranks, "publish": [self.broadcaster.actor]})

    async def publish(self, version: int, config: Config) -> Published:
        """Have the learner's version pulled and offered to the generators."""
        limit = config.timeouts.weights_s + config.timeouts.call_s
        published = await self.broadcaster.call("publish", version, self.learner.ranks, timeout_s=limit)
        self.published, self.publisher = (version, self.broadcaster.actor), self.learner.ranks[0]
        return published

    @property
    def must_publish(self) -> bool:
        """Whether whoever a new generator gets its first version from began empty since."""
        if self.transport.by_sender and self.publisher is not self.learner.ranks[0]:
            return True
        return self.published[1] is not self.broadcaster.actor

    def check_sender(self) -> None:
        """Raise LearnerLostError where no generator gets a version until the learner has started again."""
        if self.transport.by_sender and self.learner.lost is not None:
            raise self.learner.lost

    async def note(self, fact: Fact, config: Config) -> None:
        """Tell the queue."""
        self.counters = await self.queue.call("note", fact, timeout_s=config.timeouts.call_s)


@dataclass(frozen=True, kw_only=True)
class UpdateRecord:
    """Everything that is known about one finished update."""

    summary: BatchSummary
    reports: Sequence[StepReport]
    """One per rank."""
    booked: Booked
    wait_s: float
    """The learner's wait for the batch."""
    published: Published
    usage: Mapping[str, EngineUsage]
    """Per incarnation of a generator, cumulative."""
    installs: Mapping[str, InstallReport]
    """The last one of each living generator."""
    generator_s: float = 0.0
    """Seconds that generators have taken part in the run so far, all of them together."""
    health: Mapping[str, str] = field(default_factory=dict[str, str])
    """Generator -> what it is doing."""
    take_s: float = 0.0
    """From the decision until the ranks begin: the shards are made, and move to them."""
    readings: Readings = field(default_factory=Readings)
    """Of the meters, cumulative."""
    processor: Seconds = field(default_factory=dict[str, Mapping[str, float]])
    """Processor seconds, cumulative."""

    @property
    def counters(self) -> QueueCounters:
        """The queue's, after the update."""
        return self.booked.counters

    @property
    def train_s(self) -> float:
        """Seconds inside train_step, slowest rank."""
        return max(report.train_s for report in self.reports)
