"""Who plays in a run: what to start for each part, and the start of all of them at once."""

import asyncio
from collections.abc import Callable, Sequence

from actors.canary import shapes_of_folder, versions_with_room
from actors.crew import Crew
from actors.environment import SCORER_NICENESS
from actors.generator import Generator
from actors.launch import ActorSpec, first_failure, ready
from actors.learner_crew import LearnerCrew
from actors.placement import HERE
from actors.processor_time import ProcessorTime
from actors.receiving import ReceivingGenerator
from actors.replay_queue import ReplayQueue
from actors.reward import Rater
from actors.roster import Roster
from actors.scorer import Scorer
from actors.shared_folders import check_folders
from actors.supervision import Member, Supervisor
from actors.training_state import TrainingStateStore
from actors.transport import ByGroup, ByReference
from actors.weight_broadcaster import KEPT_VERSIONS, WeightBroadcaster
from async_rlhf.checkpoints import Checkpoint
from async_rlhf.config.rewards import RewardConfig
from async_rlhf.config.schema import ScorerConfig
from async_rlhf.run_plan import RunPlan


class Cast:
    """All parts of a run."""

    def __init__(self, plan: RunPlan, supervisor: Supervisor, learner: LearnerCrew) -> None:
        self._plan = plan
        self._supervisor = supervisor
        self.learner = learner
        self._generators: dict[int, Member] = {}
        self._num_kept = KEPT_VERSIONS
        config, folder = plan.config, str(plan.model_folder)

        def taker(name: str, cls: type, of: ScorerConfig | RewardConfig, *args: object) -> Member:
            def spec(incarnation: str) -> ActorSpec:
                return ActorSpec(
                    name=incarnation,
                    place=name,
                    cls=cls,
                    args=(config, folder, *args),
                    num_cpus=of.num_cpus,
                    num_gpus=of.num_gpus,
                    niceness=SCORER_NICENESS,
                )

            return Member(supervisor, name, spec)

        queue_args = (config, folder, str(plan.run_folder), plan.session)
        self.roster = Roster([self.generator(index) for index in range(config.generator.count)])
        self.scorers = [taker(name, Scorer, config.scorer, plan.reward, plan.metric) for name in _numbered("scorer", config.scorer.count)]
        self.rewards = [taker(name, Rater, config.reward, plan.reward) for name in _numbered("reward", config.reward.count)]
        self.queue = Member(supervisor, "replay_queue", lambda name: ActorSpec(name=name, cls=ReplayQueue, args=queue_args, near=HERE))
        self.broadcaster = Member(
            supervisor,
            "weight_broadcaster",
            lambda name: ActorSpec(name=name, cls=WeightBroadcaster, args=(config.timeouts.weights_s, self._num_kept), near="learner-0"),
        )
        self.state = Member(
            supervisor,
            "training_state",
            lambda name: ActorSpec(name=name, cls=TrainingStateStore, args=(str(plan.run_folder), name), near=HERE),
        )

    @property
    def members(self) -> Sequence[Member]:
        """All but the learner."""
        return [*self.roster.members, *self.scorers, *self.rewards, self.queue, self.broadcaster, self.state]

    def generator(self, index: int) -> Member:
        """The generator of that number, whether it takes part or not; always the same one."""
        of, config, name = self._plan.config.generator, self._plan.config, f"generator-{index}"

        def spec(incarnation: str) -> ActorSpec:
            return ActorSpec(
                name=incarnation,
                place=name,
                cls=ReceivingGenerator if config.weights.by_group else Generator,
                args=(config, str(self._plan.model_folder), incarnation),
                num_cpus=of.num_cpus,
                num_gpus=of.num_gpus,
                max_concurrency=8,
            )

        if index not in self._generators:
            self._generators[index] = Member(self._supervisor, name, spec)
        return self._generators[index]

    async def start(self, checkpoint: Checkpoint | None, on_ready: Callable[[str], None]) -> tuple[Crew, int]:
        """Start all actors at once: each spends seconds on its imports. Returns the crew, and the learner's version.

        Raises:
            ConfigError: the cluster has no room for them, or not for the weights, or a node does not see the run folder.
            RunError: one did not start.
        """
        plan, cluster = self._plan, self._supervisor.cluster
        shapes = shapes_of_folder(plan.model_folder)
        if not plan.config.weights.by_group:
            room = cluster.object_store_bytes
            self._num_kept = versions_with_room(shapes, plan.config.generator.dtype, KEPT_VERSIONS, room)
        specs = [member.next_spec() for member in self.members]
        ranks = self.learner.next_specs()
        await cluster.reserve([*specs, *ranks])
        await check_folders(cluster, plan)
        for member, spec in zip(self.members, specs, strict=True):
            member.cast(cluster.start(spec))
        rank_actors = [cluster.start(spec) for spec in ranks]
        actors = [*(member.actor for member in self.members), *rank_actors]
        waits = [ready(actor, plan.config.timeouts.start_s, on_ready) for actor in actors]
        joining = asyncio.ensure_future(self.learner.join(rank_actors, checkpoint.folder if checkpoint else None))
        await first_failure(joining, *waits)
        crew = Crew(
            supervisor=self._supervisor,
            roster=self.roster,
            scorers=self.scorers,
            rewards=self.rewards,
            queue=self.queue,
            broadcaster=self.broadcaster,
            learner=self.learner,
            processor=ProcessorTime(),
            transport=(ByGroup if plan.config.weights.by_group else ByReference)(plan.config),
        )
        return crew, joining.result()


def _numbered(what: str, count: int) -> list[str]:
    return [f"{what}-{index}" for index in range(count)]
