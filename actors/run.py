"""One run from the first actor to the exported policy: start everybody, evaluate, let the two loops run, evaluate, export."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Protocol

from actors.accounts import Accounts, Row
from actors.canary import NOISE_NATS
from actors.cast import Cast
from actors.checkpointer import Checkpointer
from actors.crew import Crew, UpdateRecord
from actors.evaluator import Evaluator
from actors.exporter import Exporter, RayInstruments, keep_beating
from actors.generator_pool import GeneratorPool
from actors.judging import Judging
from actors.launch import Cluster
from actors.learner_crew import LearnerCrew, LearnerParts
from actors.live_evaluation import LiveEvaluation
from actors.pipeline import train
from actors.replay_queue import Undone
from actors.scaling import heed
from actors.supervision import Supervisor, guarded
from async_rlhf.checkpoints import discard, folders, newest
from async_rlhf.dispensable import Dispensable
from async_rlhf.errors import ActorLostError, AsyncRLHFError, LearnerLostError, RewardError, RunError
from async_rlhf.evaluation import Findings
from async_rlhf.evaluation_log import read_evaluations
from async_rlhf.opponents import find_opponent
from async_rlhf.prompts import held_out_prompts
from async_rlhf.rollouts import export_all
from async_rlhf.run_plan import RunPlan
from async_rlhf.state import TrainingState
from async_rlhf.winrate import load_comparer

REPLAY_TOLERANCE = 4
"""A batch trained again may move the canary by this many times what rounding alone may do (another number of ranks adds up in
another order); beyond that it is another history."""

TOLD = {
    "lost": "{name} is lost ({cause}); starting it again",
    "back": "{name} is back after {after_s:.1f} s",
    "no_room": "the cluster has no room for {name}; it starts again as soon as there is some",
    "rests": "{name} rests, the others go on: {cause}",
    "joined": "{name} joined after {after_s:.1f} s",
    "gave_up": "{name} did not join: {cause}",
    "left": "{name} left",
}
"""Incidents, as a line."""


class Observer(Protocol):
    """Who wants to know how the run goes."""

    def stage(self, text: str) -> None:
        """A stage of the run begins or is through."""
        ...

    def update(self, row: Row, state: TrainingState) -> None:
        """An update is through."""
        ...

    def incident(self, entry: Mapping[str, Any]) -> None:
        """An actor was lost, is back, joined or left."""
        ...

    def rewound(self, version: int) -> None:
        """What was booked after `version` will be booked again."""
        ...

    def evaluated(self, findings: Findings) -> None:
        """An evaluation is through."""
        ...

    def evaluation_dropped(self, version: int, reason: str, text: str) -> None:
        """The one due at `version` was given up."""
        ...


class Run:
    """One driver's part of a run, on one cluster."""

    def __init__(self, plan: RunPlan, cluster: Cluster, parts: LearnerParts, observer: Observer, accounts: Accounts) -> None:
        self._plan = plan
        self._config = plan.config
        self._cluster = cluster
        self._observer = observer
        self._accounts = accounts
        self._supervisor = Supervisor(cluster, plan.config, plan.session, self._on_incident)
        self._learner = LearnerCrew(plan, parts, self._supervisor)
        self._cast = Cast(plan, self._supervisor, self._learner)
        self._checkpointer = Checkpointer(plan.run_folder, plan.config, self._learner, self._cast.queue)
        self._pool: GeneratorPool | None = None
        self._phase = "starting"
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """End after the update that the run is at, with a checkpoint."""
        self._stopping.set()

    @property
    def stopping(self) -> bool:
        """Whether it was asked to stop."""
        return self._stopping.is_set()

    async def execute(self) -> None:
        """Run to the end, or to the checkpoint at which it stops when asked to; the caller closes the cluster, whatever happens here."""
        crew, version = await self._start()
        exporter = Dispensable("metrics for Prometheus", lambda: Exporter(crew, self._config, RayInstruments(self._plan.run_id)))
        keepers = [member.keep() for member in (*self._cast.scorers, *self._cast.rewards, crew.queue, crew.broadcaster, self._cast.state)]
        self._pool = GeneratorPool(crew, self._config, self._cluster, self._cast.generator)
        pool = (self._pool.work(), heed(self._plan.run_folder, self._pool, self._config, self._observer.stage), self._tell_changes(crew))
        main = asyncio.ensure_future(self._train(crew, version, exporter))
        main.set_name("train")
        try:
            await guarded(main, *pool, *keepers, self._learner.watch(), self._cluster.watch_head(), keep_beating(exporter))
        except RewardError:
            await self._count_groups(crew)
            raise

    async def _count_groups(self, crew: Crew) -> None:
        """What became of the groups that no update has booked."""
        with suppress(AsyncRLHFError):  # the run has failed already
            asked = crew.queue.actor.call("next_batch", self._accounts.updates, 0.0, timeout_s=self._config.timeouts.call_s)
            self._accounts.count((await asked).counters)

    async def _start(self) -> tuple[Crew, int]:
        """Start all actors; ends when the learner's version is with the broadcaster."""
        config = self._config
        self._observer.stage(
            f"starting {config.generator.count} generator(s) ({config.generator.engine}), {config.learner.num_ranks} learner rank(s) "
            f"(deepspeed), {config.scorer.count} scorer(s)" + (f", {config.reward.count} reward actor(s)" if config.reward.count else "")
        )
        crew, version = await self._cast.start(self._plan.checkpoint, lambda name: self._observer.stage(f"{name} is ready"))
        crew.stopping = self._stopping
        if self._plan.undo:
            await self._undo(crew, version, newest_faithful=version)
        self._observer.stage(f"installing version {version} on the generators, proving the canary")
        await crew.publish(version, config)
        return crew, version

    async def _train(self, crew: Crew, version: int, exporter: Dispensable[Exporter]) -> None:
        evaluator, live = await self._evaluators(crew)

        async def on_update(record: UpdateRecord) -> None:
            row = await self._on_update(crew, live, record)
            exporter.do(lambda made: made.update(record, row))

        try:
            while True:
                try:
                    if not crew.begun.is_set():
                        await self._begin(evaluator, crew, version)
                        if all(row["version"] != version for row in read_evaluations(self._plan.run_folder)):
                            live.after_update(version)
                    version = await train(crew, self._config, version, on_update)
                    await self._finish(evaluator, live, version)
                    return
                except LearnerLostError as error:
                    await live.stop("learner_lost")
                    version = await self._restart_learner(error)
        finally:
            await live.stop("run_ended")

    async def _evaluators(self, crew: Crew) -> tuple[Evaluator, LiveEvaluation]:
        plan, config = self._plan, self._config
        prompts = await asyncio.to_thread(held_out_prompts, config, plan.model_folder)
        comparer = load_comparer(config.evaluation.judge) if config.evaluation.winrate == "judge" else None
        judging = Judging(plan, crew, prompts, find_opponent(config.evaluation, plan.run_folder, prompts), comparer)
        return Evaluator(config, crew, prompts, judging), LiveEvaluation(config, crew, prompts, judging, self._observer)

    async def _begin(self, evaluator: Evaluator, crew: Crew, version: int) -> None:
        """Evaluate the start, unless an earlier driver did, and let tickets be taken."""
        if self._plan.evaluate_start:
            await self._record("evaluating")
            self._observer.evaluated(await evaluator.evaluate("start", version))
        self._accounts.begin(await evaluator.usage(), crew.meters.readings, crew.roster.generator_s)
        crew.begun.set()
        self._observer.stage(f"training: updates {version + 1} to {self._config.updates} of {self._config.batch_groups} groups")

    async def _restart_learner(self, error: LearnerLostError) -> int:
        """Go on from the newest checkpoint; what was booked after it is booked again as it is trained again."""
        self._checkpointer.abandon()
        version = await self._learner.restart(error)
        checkpoint, _ = newest(self._plan.run_folder)
        fresh = Accounts(config=self._config, run_id=self._plan.run_id).state("training")
        self._accounts.restore(checkpoint.state if checkpoint else fresh)
        self._observer.rewound(version)
        self._observer.stage(f"the learner goes on from version {version}")
        return version

    async def _finish(self, evaluator: Evaluator, live: LiveEvaluation, version: int) -> None:
        if version == 0 and not self.stopping:
            raise RunError("the prompts ran out before a single batch was complete; lower batch_groups or give more prompts")
        await self._checkpointer.make(self._accounts.state("training"))
        self._accounts.checkpoint = version
        if self.stopping:
            return
        await self._record("evaluating")
        await live.end()
        self._observer.evaluated(await evaluator.evaluate("final", version))
        self._observer.stage("exporting the policy")
        await self._learner.save_pretrained(self._plan.run_folder / "model")
        await asyncio.to_thread(export_all, self._plan.run_folder)
        await self._record("finished")

    async def _on_update(self, crew: Crew, live: LiveEvaluation, record: UpdateRecord) -> Row:
        """Book it; returns its row."""
        version = record.summary.update + 1
        tolerance = REPLAY_TOLERANCE * NOISE_NATS[self._config.generator.dtype]
        if record.booked.replay_error_nats > tolerance:
            self._observer.stage(
                f"update {version} trained again gave other weights (canary {record.booked.replay_error_nats:.3g} nats apart, allowed "
                f"{tolerance:g}): later batches are undone"
            )
            await live.stop("undone")
            await self._undo(crew, version, newest_faithful=version - 1)
            await self._recast(crew)
        row = self._accounts.add(record, self._supervisor.restarts)
        state = await self._record("training")
        self._observer.update(row, state)
        await self._checkpointer.between_updates(state)
        self._accounts.checkpoint = self._checkpointer.committed or self._accounts.checkpoint
        live.after_update(version)
        return row

    async def _undo(self, crew: Crew, version: int, newest_faithful: int) -> None:
        """A new lineage from `version` on; checkpoints of the old one are no longer of this history."""
        for folder in folders(self._plan.run_folder):  # first: whatever happens between, no checkpoint is ahead of the journal
            if int(folder.name) > version:
                discard(folder)
        undone = Undone(version=version, newest_faithful=newest_faithful)
        await crew.queue.call("note", undone, timeout_s=10 * self._config.timeouts.call_s)

    async def _recast(self, crew: Crew) -> None:
        """Versions of the undone history are with the broadcaster and in the generators: all of these start over."""
        cause = ActorLostError("its weights belong to a history that was undone")
        await crew.broadcaster.replace(crew.broadcaster.actor, cause)
        assert self._pool is not None
        self._pool.recast(cause)

    async def _tell_changes(self, crew: Crew) -> None:
        """Record who takes part whenever that changes, for ever."""
        while True:
            await crew.roster.changed.wait()
            crew.roster.changed.clear()
            self._accounts.health = crew.roster.health(crew.installs)
            await self._record(self._phase)

    async def _record(self, phase: str) -> TrainingState:
        self._phase = phase
        state = self._accounts.state(phase)
        await self._cast.state.call("record", state, timeout_s=self._config.timeouts.call_s)
        return state

    def _on_incident(self, entry: Mapping[str, Any]) -> None:
        self._observer.stage(TOLD[entry["event"]].format_map(entry))
        self._observer.incident(entry)
