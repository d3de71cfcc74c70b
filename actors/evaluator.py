"""Evaluations between the updates: greedy answers to the held-out problems, of one version alone, on all generators at once."""

import asyncio
from contextlib import suppress

from actors.crew import Crew
from actors.engine_loop import EngineUsage
from actors.supervision import BROKEN, Member
from async_rlhf.errors import DeadlineError
from async_rlhf.evaluation import Evaluation, Sample
from async_rlhf.prompts import encode_problem, load_encode
from async_rlhf.run_plan import RunPlan
from async_rlhf.tasks import load_task
from async_rlhf.types import Prompt, Rollout

POLL_S = 1.0
"""How often a wait for an install looks whether a new broadcaster has to be told the version."""


class Evaluator:
    """Asks the generators of a crew."""

    def __init__(self, plan: RunPlan, crew: Crew) -> None:
        self._plan = plan
        self._crew = crew
        self._timeouts = plan.config.timeouts

    async def evaluate(self, version: int) -> Evaluation:
        """Greedy accuracy of `version` on the held-out problems.

        Raises:
            DeadlineError: a generator does not get to that version in time.
        """
        encode = load_encode(self._plan.model_folder)
        prompts = [encode_problem(problem, encode) for problem in load_task(self._plan.config.task).held_out()]
        generators = self._crew.generators
        parts = [prompts[index :: len(generators)] for index in range(len(generators))]
        answers = await asyncio.gather(*(self._ask(who, part, version) for who, part in zip(generators, parts, strict=True)))
        asked = [prompt for part in parts for prompt in part]
        rollouts = [rollout for answer in answers for rollout in answer]
        foreign = {span.version for rollout in rollouts for span in rollout.version_spans} - {version}
        assert not foreign, f"the evaluation of version {version} was sampled by versions {sorted(foreign)} too"
        scores, texts = await self._crew.scorers[0].call("judge", asked, rollouts, timeout_s=self._timeouts.score_s)
        samples = tuple(
            Sample(prompt=prompt.text, completion=text, expected=prompt.columns.get("answer", ""), score=score)
            for prompt, text, score in zip(asked, texts, scores, strict=True)
        )
        return Evaluation(version=version, temperature=0.0, samples=samples)

    async def usage(self) -> dict[str, EngineUsage]:
        """The counters of every generator's engine that answers, by incarnation."""
        counters: dict[str, EngineUsage] = {}
        for generator in self._crew.generators:
            with suppress(*BROKEN):  # its produce loop replaces it
                counters[generator.actor.name] = await generator.actor.call("usage", timeout_s=self._timeouts.call_s)
        return counters

    async def _ask(self, generator: Member, prompts: list[Prompt], version: int) -> list[Rollout]:
        """One generator's answers; those of its successor if it dies over them."""
        while True:
            await self._wait_for(generator, version)
            actor = generator.actor
            try:
                return await actor.call("evaluate", prompts, 0.0, timeout_s=self._timeouts.generate_s)
            except BROKEN as error:
                await generator.replace(actor, error)  # its produce loop does the same; whoever is first

    async def _wait_for(self, generator: Member, version: int) -> None:
        crew, waited_s = self._crew, 0.0
        while (report := crew.installs.get(generator.actor.name)) is None or report.version < version:
            if crew.published[1] is not crew.broadcaster.actor:
                await crew.publish(version, self._plan.config)
            async with crew.installed:
                try:
                    await asyncio.wait_for(crew.installed.wait(), POLL_S)
                except TimeoutError:
                    waited_s += POLL_S
            if waited_s > self._timeouts.start_s + self._timeouts.weights_s:
                raise DeadlineError(
                    f"{generator.name} did not install version {version} within {waited_s:g} s (timeouts.start_s + timeouts.weights_s)"
                )
