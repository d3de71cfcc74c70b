"""From completions of the held-out prompts to what an evaluation found: the scorers judge them, a comparer sets them against others."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from actors.crew import Crew
from actors.supervision import LOST, first_line
from async_rlhf.errors import ActorFailedError, ObjectLostError, RewardError, RewardLostError
from async_rlhf.evaluation import Evaluation, Findings, Sample, Stage
from async_rlhf.opponents import Opponent, outcomes_by_judge, outcomes_by_score
from async_rlhf.run_plan import RunPlan
from async_rlhf.types import Prompt, Rollout
from async_rlhf.winrate import Comparer

ATTEMPTS = 3
"""Scorers that may die over one call before the evaluation fails."""


class Judging:
    """Judges the completions of one run's evaluations. Training's own scoring goes on: each call takes a scorer that is idle."""

    def __init__(self, plan: RunPlan, crew: Crew, prompts: Sequence[Prompt], opponent: Opponent | None, comparer: Comparer | None) -> None:
        """
        Args:
            prompts: those held out, in the order of all completions.
            opponent: None: no win-rate is asked for.
            comparer: decides where evaluation.winrate is `judge`; else None.
        """
        self._config = plan.config
        self._rated = plan.separate_reward
        self._grades = "grade" if plan.metric or not crew.rewards else "rate_texts"
        """Who measures: a scorer, by the task's metric or the reward, or a reward actor."""
        self._crew = crew
        self._prompts = prompts
        self._opponent = opponent
        self._comparer = comparer
        self._theirs: list[float] = []
        """The opponent's scores, or rewards, once they were needed."""

    async def find(self, stage: Stage, version: int, greedy: Sequence[Rollout], sampled: Sequence[Rollout] | None) -> Findings:
        """Everything that an evaluation found.

        Args:
            greedy, sampled: one completion per prompt; None: not asked for.
        Raises:
            RewardError: the metric broke its contract. ActorLostError: scorers keep dying over it.
        """
        findings = Findings(
            stage=stage,
            version=version,
            greedy=await self._assess(greedy, 0.0),
            sampled=None if sampled is None else await self._assess(sampled, self._config.generator.temperature),
        )
        try:
            if self._rated:
                findings = await self._rate(findings)
            return findings if self._opponent is None else await self._compare(findings, self._opponent)
        except (RewardError, RewardLostError, ActorFailedError, *LOST) as error:  # a reward or a judge that cannot be had
            return replace(findings, problem=first_line(error))

    async def _assess(self, rollouts: Sequence[Rollout], temperature: float) -> Evaluation:
        samples: list[Sample] = []
        for part in self._parts():
            of_part: list[Sample] = await self._scorer("assess", self._prompts[part], rollouts[part], temperature > 0)
            if self._grades == "rate_texts":
                scores = await self._scorer(self._grades, self._prompts[part], [sample.completion for sample in of_part])
                of_part = [replace(sample, score=score) for sample, score in zip(of_part, scores, strict=True)]
            samples += of_part
        versions = [span.version for rollout in rollouts for span in rollout.version_spans]
        return Evaluation(version=max(versions), oldest_version=min(versions), temperature=temperature, samples=tuple(samples))

    async def _rate(self, findings: Findings) -> Findings:
        """With the run's reward of each completion."""

        async def rated(evaluation: Evaluation) -> Evaluation:
            rewards = await self._grade("rate_texts", [sample.completion for sample in evaluation.samples])
            pairs = zip(evaluation.samples, rewards, strict=True)
            return replace(evaluation, samples=tuple(replace(sample, reward=reward) for sample, reward in pairs))

        sampled = None if findings.sampled is None else await rated(findings.sampled)
        return replace(findings, greedy=await rated(findings.greedy), sampled=sampled)

    async def _compare(self, findings: Findings, opponent: Opponent) -> Findings:
        """With the outcomes against the opponent."""
        outcomes = await self._outcomes(findings.greedy.samples, opponent.completions)
        samples = tuple(replace(sample, outcome=outcome) for sample, outcome in zip(findings.greedy.samples, outcomes, strict=True))
        return replace(findings, greedy=replace(findings.greedy, samples=samples), opponent=opponent.name)

    async def _outcomes(self, samples: Sequence[Sample], completions: Sequence[str | None]) -> list[float | None]:
        if self._comparer is not None:
            outcomes: list[float | None] = []
            for part in self._parts():  # on a thread: a judge waits for a network, and the run's loop must not
                of_part = self._prompts[part], samples[part], completions[part]
                outcomes += await asyncio.to_thread(outcomes_by_judge, self._comparer, *of_part)
            return outcomes
        by_reward = self._rated and self._config.evaluation.winrate == "reward"
        if not self._theirs:
            self._theirs = await self._grade("rate_texts" if by_reward else self._grades, [completion or "" for completion in completions])
        own = [sample.reward or 0.0 if by_reward else sample.score for sample in samples]
        return outcomes_by_score(own, self._theirs, completions)

    async def _grade(self, method: str, texts: Sequence[str]) -> list[float]:
        """Metric (`grade`) or reward (`rate_texts`) of one text per prompt."""
        scores: list[float] = []
        for part in self._parts():
            scores += await self._scorer(method, self._prompts[part], texts[part])
        return scores

    async def _scorer(self, method: str, *args: Any) -> Any:
        """The answer of a scorer (or reward actor) that has nothing else to do."""
        crew = self._crew
        rewards = method == "rate_texts" and bool(crew.rewards)
        idle, meter = (crew.idle_rewards, crew.meters.reward) if rewards else (crew.idle_scorers, crew.meters.score)
        for attempt in range(ATTEMPTS):
            scorer = await idle.get()
            actor = scorer.actor
            try:
                with meter.working(counted=False):
                    return await actor.call(method, *args, timeout_s=self._config.timeouts.score_s)
            except (*LOST, ObjectLostError) as error:  # a large answer is gone with the scorer's node
                await scorer.replace(actor, error)
                if attempt + 1 == ATTEMPTS:
                    raise
            finally:
                idle.put_nowait(scorer)

    def _parts(self) -> list[slice]:
        """Few prompts at once: training's groups must not wait long for a scorer."""
        size = self._config.evaluation.max_inflight
        return [slice(start, start + size) for start in range(0, len(self._prompts), size)]
