"""One run from the first actor to the exported policy: start everybody, evaluate, let the two loops run, evaluate, export."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from actors.accounts import Accounts, Row
from actors.canary import check_room, shapes_of_folder
from actors.engine_loop import EngineUsage
from actors.generator import Generator
from actors.launch import ActorSpec, Cluster, first_failure, ready
from actors.pipeline import Crew, UpdateRecord, produce, train
from actors.remote import RemoteActor
from actors.replay_queue import ReplayQueue
from actors.scorer import Scorer
from actors.training_state import TrainingStateStore
from actors.weight_broadcaster import KEPT_VERSIONS, WeightBroadcaster
from async_rlhf.config import Config
from async_rlhf.errors import DeadlineError, RunError
from async_rlhf.evaluation import Evaluation, Sample
from async_rlhf.prompts import encode_problem, load_encode
from async_rlhf.protocols import LearnerClient
from async_rlhf.run_plan import RunPlan
from async_rlhf.state import TrainingState
from async_rlhf.tasks import load_task
from async_rlhf.types import Prompt, Rollout

STATE_ACTOR = "training_state"
"""Name of the TrainingState actor in the run's namespace."""


class Observer(Protocol):
    """Who wants to know how the run goes."""

    def stage(self, text: str) -> None:
        """A stage of the run begins or is through."""
        ...

    def update(self, row: Row, state: TrainingState) -> None:
        """An update is through."""
        ...


class Learner(LearnerClient, Protocol):
    """The learner group, from its start to its export."""

    async def join(self) -> None: ...

    async def save_pretrained(self, folder: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class LearnerParts:
    """How to make a learner; handed in, because actors know nothing of learners."""

    rank_class: type
    """Constructed with (config, model_folder, rank)."""
    make_group: Callable[[Sequence[RemoteActor], Config], Learner]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run that reached its end has to show."""

    start: Evaluation
    final: Evaluation


class Run:
    """The cast of one run, on one cluster."""

    def __init__(self, plan: RunPlan, cluster: Cluster, parts: LearnerParts, observer: Observer, accounts: Accounts) -> None:
        self._plan = plan
        self._config = plan.config
        self._cluster = cluster
        self._parts = parts
        self._observer = observer
        self.accounts = accounts

    async def execute(self) -> Outcome:
        """Run to the end; the caller closes the cluster, whatever happens here."""
        crew, learner, state = await self._start()
        await self._record(state, "evaluating")
        start = await self._evaluate(crew, "start", version=0)
        usage: dict[str, EngineUsage] = {}
        await first_failure(*(self._read_usage(name, actor, usage) for name, actor in crew.generators.items()))
        self.accounts.begin(usage)
        self._observer.stage(f"training: {self._config.updates} updates of {self._config.batch_groups} groups")

        async def on_update(record: UpdateRecord) -> None:
            installs = await crew.broadcaster.call("reports", timeout_s=self._config.timeouts.call_s)
            row = self.accounts.add(record, installs)
            self._observer.update(row, await self._record(state, "training"))

        producers = [produce(name, crew, self._config, usage) for name in crew.generators]
        await first_failure(train(crew, self._config, usage, on_update), *producers)
        if self.accounts.updates == 0:
            raise RunError("the prompts ran out before a single batch was complete; lower batch_groups or give more prompts")
        await self._record(state, "evaluating")
        final = await self._evaluate(crew, "final", version=self.accounts.updates)
        self._observer.stage("exporting the policy")
        await learner.save_pretrained(str(self._plan.run_folder / "model"))
        await self._record(state, "finished")
        return Outcome(start=start, final=final)

    async def _start(self) -> tuple[Crew, Learner, RemoteActor]:
        """Start all actors at once: each spends seconds on its imports. Ends when every generator samples from version 0."""
        config, folder = self._config, str(self._plan.model_folder)
        generators, ranks, scorers, queue, state = self._specs(folder)
        self._observer.stage(
            f"starting {len(generators)} generator(s) ({config.generator.engine}), {len(ranks)} learner rank(s) (deepspeed), "
            f"{len(scorers)} scorer(s)"
        )
        shapes = shapes_of_folder(self._plan.model_folder)
        check_room(shapes, config.generator.dtype, KEPT_VERSIONS, self._cluster.object_store_bytes())
        await self._cluster.reserve([*generators, *ranks, *scorers])
        started = {spec.name: self._cluster.start(spec) for spec in (*generators, *ranks, *scorers, queue, state)}
        rank_actors = [started[spec.name] for spec in ranks]
        generator_actors = {spec.name: started[spec.name] for spec in generators}
        broadcaster = self._cluster.start(
            ActorSpec(
                name="weight_broadcaster",
                cls=WeightBroadcaster,
                args=(rank_actors, generator_actors, started[queue.name], config.timeouts.weights_s),
            )
        )
        learner = self._parts.make_group(rank_actors, config)
        waits = [ready(actor, config.timeouts.start_s, self._on_ready) for actor in started.values()]
        await first_failure(learner.join(), *waits)
        self._observer.stage("installing version 0 on the generators, proving the canary")
        await broadcaster.call("publish", 0, timeout_s=config.timeouts.weights_s + config.timeouts.call_s)
        crew = Crew(
            generators=generator_actors,
            scorers=[started[spec.name] for spec in scorers],
            queue=started[queue.name],
            learner=learner,
            broadcaster=broadcaster,
        )
        await self._wait_installed(crew, 0)
        return crew, learner, started[state.name]

    def _specs(self, folder: str) -> tuple[list[ActorSpec], list[ActorSpec], list[ActorSpec], ActorSpec, ActorSpec]:
        config, plan = self._config, self._plan
        generators = [
            ActorSpec(
                name=f"generator-{index}.0",
                cls=Generator,
                args=(config, folder, f"generator-{index}.0"),
                num_cpus=config.generator.num_cpus,
                num_gpus=config.generator.num_gpus,
                max_concurrency=8,
            )
            for index in range(config.generator.count)
        ]
        ranks = [
            ActorSpec(
                name=f"learner-{rank}",
                cls=self._parts.rank_class,
                args=(config, folder, rank),
                num_cpus=config.learner.num_cpus,
                num_gpus=config.learner.num_gpus,
            )
            for rank in range(config.learner.num_ranks)
        ]
        scorers = [
            ActorSpec(
                name=f"scorer-{index}",
                cls=Scorer,
                args=(config, folder, plan.reward, plan.metric),
                num_cpus=config.scorer.num_cpus,
                num_gpus=config.scorer.num_gpus,
            )
            for index in range(config.scorer.count)
        ]
        queue = ActorSpec(name="replay_queue", cls=ReplayQueue, args=(config, folder))
        state = ActorSpec(name=STATE_ACTOR, cls=TrainingStateStore, args=(str(plan.run_folder),))
        return generators, ranks, scorers, queue, state

    async def _wait_installed(self, crew: Crew, version: int) -> None:
        limit = self._config.timeouts.weights_s
        if not await crew.broadcaster.call("wait_installed", version, limit, timeout_s=limit + self._config.timeouts.call_s):
            raise DeadlineError(f"not every generator installed version {version} within {limit:g} s (timeouts.weights_s)")

    async def _evaluate(self, crew: Crew, name: str, version: int) -> Evaluation:
        """Greedy accuracy on the held-out problems, of `version` alone, on all generators at once."""
        await self._wait_installed(crew, version)
        encode = load_encode(self._plan.model_folder)
        prompts = [encode_problem(problem, encode) for problem in load_task(self._config.task).held_out()]
        names = list(crew.generators)
        parts = [prompts[index :: len(names)] for index in range(len(names))]
        limit = self._config.timeouts.generate_s
        calls = (crew.generators[who].call("evaluate", part, 0.0, timeout_s=limit) for who, part in zip(names, parts, strict=True))
        answers: list[list[Rollout]] = await asyncio.gather(*calls)
        asked: list[Prompt] = [prompt for part in parts for prompt in part]
        rollouts = [rollout for answer in answers for rollout in answer]
        foreign = {span.version for rollout in rollouts for span in rollout.version_spans} - {version}
        assert not foreign, f"the evaluation of version {version} was sampled by versions {sorted(foreign)} too"
        scores, texts = await crew.scorers[0].call("judge", asked, rollouts, timeout_s=self._config.timeouts.score_s)
        samples = tuple(
            Sample(prompt=prompt.text, completion=text, expected=prompt.columns.get("answer", ""), score=score)
            for prompt, text, score in zip(asked, texts, scores, strict=True)
        )
        evaluation = Evaluation(version=version, temperature=0.0, samples=samples)
        self._observer.stage(f"{name} accuracy (greedy, {len(samples)} held-out problems, version {version}): {evaluation.accuracy:.3f}")
        return evaluation

    async def _record(self, state: RemoteActor, phase: str) -> TrainingState:
        current = self.accounts.state(phase)
        await state.call("record", current, timeout_s=self._config.timeouts.call_s)
        return current

    async def _read_usage(self, name: str, actor: RemoteActor, usage: dict[str, EngineUsage]) -> None:
        usage[name] = await actor.call("usage", timeout_s=self._config.timeouts.call_s)

    def _on_ready(self, name: str) -> None:
        self._observer.stage(f"{name} is ready")
