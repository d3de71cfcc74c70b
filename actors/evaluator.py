"""Evaluations before the first and after the last update: the held-out prompts, answered by one version, on all generators at once."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from actors.crew import Crew
from actors.engine_loop import EngineUsage
from actors.judging import Judging
from actors.remote import RemoteActor
from actors.supervision import BROKEN
from async_rlhf.config import Config
from async_rlhf.errors import ActorLostError, DeadlineError, ObjectLostError
from async_rlhf.evaluation import Findings, Stage
from async_rlhf.types import Prompt, Rollout

POLL_S = 1.0
"""How often a wait for an install looks whether a new broadcaster has to be told the version."""

STRAGGLER_S = 15.0
"""Once one generator has the version, the others get this long to have it too; those that do not are left out."""


class Evaluator:
    """Asks the generators of a crew."""

    def __init__(self, config: Config, crew: Crew, prompts: Sequence[Prompt], judging: Judging) -> None:
        self._config = config
        self._crew = crew
        self._prompts = prompts
        self._judging = judging
        self._timeouts = config.timeouts

    async def evaluate(self, stage: Stage, version: int) -> Findings:
        """What `version` answers to the held-out prompts; a generator that dies over them leaves its part to the others.

        Raises:
            DeadlineError: no generator gets to that version in time. RewardError: metric or reward broke its contract.
            LearnerLostError: no generator gets to that version before the learner has started again.
        """
        greedy = await self._ask_all(version, 0.0)
        sampled = await self._ask_all(version, self._config.generator.temperature) if self._config.evaluation.sampled else None
        return await self._judging.find(stage, version, greedy, sampled)

    async def usage(self) -> dict[str, EngineUsage]:
        """The counters of every generator's engine that answers, by incarnation."""
        counters: dict[str, EngineUsage] = {}
        for generator in self._crew.generators:
            with suppress(*BROKEN):  # its produce loop replaces it
                counters[generator.actor.name] = await generator.actor.call("usage", timeout_s=self._timeouts.call_s)
        return counters

    async def _ask_all(self, version: int, temperature: float) -> list[Rollout]:
        """One completion per prompt."""
        rollouts: dict[int, Rollout] = {}
        while len(rollouts) < len(self._prompts):
            actors = await self._installed(version)
            missing = [index for index in range(len(self._prompts)) if index not in rollouts]
            parts = [missing[place :: len(actors)] for place in range(len(actors))]
            answers = await asyncio.gather(*(self._ask(actor, part, temperature) for actor, part in zip(actors, parts, strict=True)))
            for of_part in answers:
                rollouts |= of_part
        foreign = {span.version for rollout in rollouts.values() for span in rollout.version_spans} - {version}
        assert not foreign, f"the evaluation of version {version} was sampled by versions {sorted(foreign)} too"
        return [rollouts[index] for index in range(len(self._prompts))]

    async def _ask(self, actor: RemoteActor, part: Sequence[int], temperature: float) -> dict[int, Rollout]:
        """One generator's answers by the prompt's place; none if it died over them.

        Raises:
            DeadlineError: it did not answer in time. ActorFailedError, EngineError: it lives, and cannot.
        """
        prompts = [self._prompts[index] for index in part]
        try:
            rollouts: list[Rollout] = await actor.call("evaluate", prompts, temperature, timeout_s=self._timeouts.generate_s)
        except (ActorLostError, ObjectLostError):  # it, or its node with the answers; its produce loop sees that too, and replaces it
            self._crew.installs.pop(actor.name, None)
            return {}
        except DeadlineError as error:
            raise DeadlineError(
                f"{actor.name} did not answer {len(part)} held-out prompts within {self._timeouts.generate_s:g} s "
                "(timeouts.generate_s); raise that, or lower evaluation.num_prompts"
            ) from error
        return dict(zip(part, rollouts, strict=True))

    async def _installed(self, version: int) -> list[RemoteActor]:
        """The generators that sample from `version`, as soon as all do, or the others take too long."""
        crew, waited_s, first_s = self._crew, 0.0, None
        limit_s = self._timeouts.start_s + self._timeouts.weights_s
        while True:
            if crew.must_publish:
                await crew.publish(version, self._config)
            actors = [generator.actor for generator in crew.generators]
            at_version = [actor for actor in actors if (report := crew.installs.get(actor.name)) and report.version >= version]
            first_s = waited_s if at_version and first_s is None else first_s
            if at_version and (len(at_version) == len(actors) or waited_s - (first_s or 0.0) >= STRAGGLER_S):
                return at_version
            crew.check_sender()
            if waited_s >= limit_s:
                raise DeadlineError(
                    f"no generator installed version {version} within {limit_s:g} s (timeouts.start_s + timeouts.weights_s)"
                )
            async with crew.installed:
                with suppress(TimeoutError):
                    await asyncio.wait_for(crew.installed.wait(), POLL_S)
                    continue
            waited_s += POLL_S
