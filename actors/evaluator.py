"""Evaluations between the updates: greedy answers to the held-out problems, of one version alone, on the generators there are."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from actors.crew import Crew
from actors.engine_loop import EngineUsage
from actors.remote import RemoteActor
from actors.supervision import BROKEN
from async_rlhf.errors import DeadlineError
from async_rlhf.evaluation import Evaluation, Sample
from async_rlhf.prompts import held_out_prompts
from async_rlhf.run_plan import RunPlan
from async_rlhf.types import Prompt, Rollout

POLL_S = 1.0
"""How often a wait for an install looks whether a new broadcaster has to be told the version."""

STRAGGLER_S = 15.0
"""Once one generator has the version, the others get this long to have it too; those that do not are left out."""

Answer = tuple[Prompt, Rollout]


class Evaluator:
    """Asks the generators of a crew."""

    def __init__(self, plan: RunPlan, crew: Crew) -> None:
        self._plan = plan
        self._crew = crew
        self._timeouts = plan.config.timeouts

    async def evaluate(self, version: int) -> Evaluation:
        """Greedy accuracy of `version` on the held-out problems; a generator that dies over them leaves its part to the others.

        Raises:
            DeadlineError: no generator gets to that version in time.
        """
        open_prompts = await asyncio.to_thread(held_out_prompts, self._plan.config, self._plan.model_folder)
        answers: list[Answer] = []
        while open_prompts:
            actors = await self._installed(version)
            parts = [open_prompts[index :: len(actors)] for index in range(len(actors))]
            of_parts = await asyncio.gather(*(self._ask(actor, part, version) for actor, part in zip(actors, parts, strict=True)))
            answers += [answer for of_part in of_parts for answer in of_part]
            open_prompts = [prompt for part, of_part in zip(parts, of_parts, strict=True) if not of_part for prompt in part]
        return await self._judge(answers, version)

    async def usage(self) -> dict[str, EngineUsage]:
        """The counters of every generator's engine that answers, by incarnation."""
        counters: dict[str, EngineUsage] = {}
        for generator in self._crew.generators:
            with suppress(*BROKEN):  # its produce loop replaces it
                counters[generator.actor.name] = await generator.actor.call("usage", timeout_s=self._timeouts.call_s)
        return counters

    async def _judge(self, answers: Sequence[Answer], version: int) -> Evaluation:
        prompts, rollouts = [prompt for prompt, _ in answers], [rollout for _, rollout in answers]
        scores, texts = await self._crew.scorers[0].call("judge", prompts, rollouts, timeout_s=self._timeouts.score_s)
        samples = tuple(
            Sample(prompt=prompt.text, completion=text, expected=str(prompt.columns.get("answer", "")), score=score)
            for prompt, text, score in zip(prompts, texts, scores, strict=True)
        )
        return Evaluation(version=version, temperature=0.0, samples=samples)

    async def _ask(self, actor: RemoteActor, prompts: Sequence[Prompt], version: int) -> list[Answer]:
        """One generator's answers; none if it died over them."""
        try:
            rollouts: list[Rollout] = await actor.call("evaluate", prompts, 0.0, timeout_s=self._timeouts.generate_s)
        except BROKEN:  # its produce loop sees that too, and replaces it
            self._crew.installs.pop(actor.name, None)
            return []
        foreign = {span.version for rollout in rollouts for span in rollout.version_spans} - {version}
        assert not foreign, f"the evaluation of version {version} was sampled by versions {sorted(foreign)} too"
        return list(zip(prompts, rollouts, strict=True))

    async def _installed(self, version: int) -> list[RemoteActor]:
        """The generators that sample from `version`, as soon as all do, or the others take too long."""
        crew, waited_s, first_s = self._crew, 0.0, None
        limit_s = self._timeouts.start_s + self._timeouts.weights_s
        while True:
            if crew.published[1] is not crew.broadcaster.actor:
                await crew.publish(version, self._plan.config)
            actors = [generator.actor for generator in crew.generators]
            at_version = [actor for actor in actors if (report := crew.installs.get(actor.name)) and report.version >= version]
            first_s = waited_s if at_version and first_s is None else first_s
            if at_version and (len(at_version) == len(actors) or waited_s - (first_s or 0.0) >= STRAGGLER_S):
                return at_version
            if waited_s >= limit_s:
                raise DeadlineError(
                    f"no generator installed version {version} within {limit_s:g} s (timeouts.start_s + timeouts.weights_s)"
                )
            async with crew.installed:
                with suppress(TimeoutError):
                    await asyncio.wait_for(crew.installed.wait(), POLL_S)
                    continue
            waited_s += POLL_S
