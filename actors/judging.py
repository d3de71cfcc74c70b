"""From completions of the held-out prompts to what an evaluation found: the scorers judge them, a comparer sets them against others."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from actors.crew import Crew
from actors.supervision import LOST
from async_rlhf.config import Config
from async_rlhf.errors import RewardError
from async_rlhf.evaluation import Evaluation, Findings, Sample, Stage
from async_rlhf.opponents import Opponent, outcomes_by_judge, outcomes_by_score
from async_rlhf.types import Prompt, Rollout
from async_rlhf.winrate import Comparer

ATTEMPTS = 3
"""Scorers that may die over one call before the evaluation fails."""


class Judging:
    """Judges the completions of one run's evaluations. Training's own scoring goes on: each call takes a scorer that is idle."""

    def __init__(
        self, config: Config, crew: Crew, prompts: Sequence[Prompt], opponent: Opponent | None, comparer: Comparer | None = None
    ) -> None:
        """
        Args:
            prompts: those held out, in the order of all completions.
            opponent: None: no win-rate is asked for.
            comparer: decides where evaluation.winrate is `judge`.
        """
        self._config = config
        self._crew = crew
        self._prompts = prompts
        self._opponent = opponent
        self._comparer = comparer
        self._grades: list[tuple[float, float]] = []
        """The opponent's scores and rewards, once they were needed."""

    async def find(self, stage: Stage, version: int, greedy: Sequence[Rollout], sampled: Sequence[Rollout] | None) -> Findings:
        """Everything that an evaluation found.

        Args:
            greedy, sampled: one completion per prompt; None: not asked for.
        Raises:
            RewardError: metric or reward broke its contract. ActorLostError: scorers keep dying over it.
        """
        findings = Findings(
            stage=stage,
            version=version,
            greedy=await self._assess(greedy, 0.0),
            sampled=None if sampled is None else await self._assess(sampled, self._config.generator.temperature),
        )
        return findings if self._opponent is None else await self._compare(findings, self._opponent)

    async def _assess(self, rollouts: Sequence[Rollout], temperature: float) -> Evaluation:
        samples: list[Sample] = []
        for part in self._parts():
            samples += await self._scorer("assess", self._prompts[part], rollouts[part], temperature > 0)
        versions = [span.version for rollout in rollouts for span in rollout.version_spans]
        return Evaluation(version=max(versions), oldest_version=min(versions), temperature=temperature, samples=tuple(samples))

    async def _compare(self, findings: Findings, opponent: Opponent) -> Findings:
        """With the outcomes against the opponent; or with the reason why there are none, if whoever decides fails."""
        try:
            outcomes = await self._outcomes(findings.greedy.samples, opponent)
        except RewardError as error:
            return replace(findings, problem=str(error))
        samples = tuple(replace(sample, outcome=outcome) for sample, outcome in zip(findings.greedy.samples, outcomes, strict=True))
        return replace(findings, greedy=replace(findings.greedy, samples=samples), opponent=opponent.name)

    async def _outcomes(self, samples: Sequence[Sample], opponent: Opponent) -> list[float | None]:
        evaluation, completions = self._config.evaluation, opponent.completions
        if self._comparer is not None:
            outcomes: list[float | None] = []
            for part in self._parts():  # on a thread: a judge waits for a network, and the run's loop must not
                of_part = self._prompts[part], samples[part], completions[part]
                outcomes += await asyncio.to_thread(outcomes_by_judge, self._comparer, *of_part)
            return outcomes
        if not self._grades:
            self._grades = await self._grade([completion or "" for completion in completions])
        return outcomes_by_score(samples, completions, self._grades, by_reward=evaluation.winrate == "reward")

    async def _grade(self, texts: Sequence[str]) -> list[tuple[float, float]]:
        grades: list[tuple[float, float]] = []
        for part in self._parts():
            scores, rewards = await self._scorer("grade", self._prompts[part], texts[part])
            grades += zip(scores, rewards or scores, strict=True)
        return grades

    async def _scorer(self, method: str, *args: Any) -> Any:
        """The answer of a scorer that has nothing else to do."""
        crew = self._crew
        for attempt in range(ATTEMPTS):
            scorer = await crew.idle_scorers.get()
            actor = scorer.actor
            try:
                return await actor.call(method, *args, timeout_s=self._config.timeouts.score_s)
            except LOST as error:
                await scorer.replace(actor, error)
                if attempt + 1 == ATTEMPTS:
                    raise
            finally:
                crew.idle_scorers.put_nowait(scorer)

    def _parts(self) -> list[slice]:
        """Few prompts at once: training's groups must not wait long for a scorer."""
        size = self._config.evaluation.max_inflight
        return [slice(start, start + size) for start in range(0, len(self._prompts), size)]
