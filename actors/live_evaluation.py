"""Evaluations while training goes on: the held-out prompts on the generators that also sample for training, a few at once.

Weights may be replaced meanwhile, so an evaluation names the versions that sampled it. It is of use, and never needed: it is dropped
when a generator dies over it or when it is not over before the next one is due. Tickets, their seeds and the batches do not depend
on it. In a deterministic run it takes place while nothing else is sampled (see gate.py), so that not even rounding does.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from actors.crew import Crew
from actors.judging import Judging
from actors.launch import leaf
from actors.supervision import BROKEN, Member, first_line
from async_rlhf.config import Config
from async_rlhf.errors import ActorLostError, DeadlineError, RewardError, RewardLostError
from async_rlhf.evaluation import Findings
from async_rlhf.types import Prompt, Rollout

POLL_S = 1.0
"""How often a wait for an install looks whether there is anything left to ask."""


class Listener(Protocol):
    """Who wants to know what evaluations find."""

    def evaluated(self, findings: Findings) -> None:
        """One is through."""
        ...

    def evaluation_dropped(self, version: int, reason: str, text: str) -> None:
        """The one due at `version` was given up; `reason` counts it, `text` tells it."""
        ...


class LiveEvaluation:
    """Starts evaluations between the updates, one at a time."""

    def __init__(self, config: Config, crew: Crew, prompts: Sequence[Prompt], judging: Judging, listener: Listener) -> None:
        self._config = config
        self._crew = crew
        self._prompts = prompts
        self._judging = judging
        self._listener = listener
        self._task: asyncio.Task[None] | None = None
        self._version = -1

    def after_update(self, version: int) -> None:
        """Begin an evaluation where one is due; never waits. The last version has one of its own, after training."""
        every = self._config.evaluation.every_updates
        if not every or version % every or not 0 < version < self._config.updates:
            return
        if self._task is not None and not self._task.done():
            self._listener.evaluation_dropped(version, "previous_unfinished", f"the one of version {self._version} is still going on")
            return
        self._version = version
        if self._config.deterministic:
            self._crew.gate.close(version)
        self._task = asyncio.create_task(self._evaluate(version), name=f"evaluation of version {version}")

    async def end(self) -> None:
        """Training is over: wait for the evaluation that is going on."""
        if self._task is not None:
            await self._crew.gate.decide(self._version)
            await self._task

    async def stop(self, reason: str) -> None:
        """Give up the evaluation that is going on."""
        task, self._task = self._task, None
        if task is not None and not task.done():
            task.cancel()
            await asyncio.wait({task})  # awaiting the task itself would not tell its cancellation from ours
            self._listener.evaluation_dropped(self._version, reason, reason.replace("_", " "))

    async def _evaluate(self, version: int) -> None:
        temperature = self._config.generator.temperature
        try:
            if self._config.deterministic:
                await self._crew.gate.decided(version)
                self._check_installed(version)
            greedy = await self._ask_all(version, 0.0)
            sampled = await self._ask_all(version, temperature) if self._config.evaluation.sampled else None
            await self._crew.gate.open()
            self._listener.evaluated(await self._judging.find("between", version, greedy, sampled))
        except ActorLostError as error:
            self._listener.evaluation_dropped(version, "actor_lost", first_line(error))
        except (RewardError, RewardLostError) as error:
            self._listener.evaluation_dropped(version, "reward_failed", first_line(error))
        except Exception as error:  # an evaluation is of use, and never needed: training goes on, or ends by itself
            self._listener.evaluation_dropped(version, "failed", f"{type(error).__name__}: {first_line(error)}")
        finally:
            await self._crew.gate.open()

    def _check_installed(self, version: int) -> None:
        """Behind the closed gate no generator gets this version any more: none has it where the batch was sampled by an earlier driver."""
        if all(report.version < version for report in self._crew.installs.values()):
            raise DeadlineError(f"no generator has version {version}: its batch was sampled before")

    async def _ask_all(self, version: int, temperature: float) -> list[Rollout]:
        """One completion per prompt; each generator that has the version takes a few prompts at a time until none is left."""
        places = range(len(self._prompts))
        size = max(1, self._config.evaluation.max_inflight // max(1, len(self._crew.generators)))
        pending = deque([places[start : start + size] for start in range(0, len(places), size)])
        rollouts: dict[int, Rollout] = {}
        while pending:
            workers = self._crew.generators[: self._config.evaluation.max_inflight]
            if not workers:
                raise ActorLostError("no generator is left to ask")
            try:
                async with asyncio.TaskGroup() as group:
                    for generator in workers:
                        group.create_task(self._work(generator, version, temperature, pending, rollouts.update))
            except BaseExceptionGroup as errors:
                error = leaf(errors)
                raise error from error.__cause__
        return [rollouts[place] for place in places]

    async def _work(
        self,
        generator: Member,
        version: int,
        temperature: float,
        pending: deque[range],
        keep: Callable[[dict[int, Rollout]], None],
    ) -> None:
        """One generator's share; what it cannot finish before it leaves stays pending."""
        timeouts = self._config.timeouts
        if not await self._installed(generator, version, pending):
            return
        while pending and generator in self._crew.generators:
            part, actor = pending.popleft(), generator.actor
            prompts = [self._prompts[place] for place in part]
            try:
                rollouts: list[Rollout] = await actor.call("evaluate", prompts, temperature, timeout_s=timeouts.generate_s)
            except BROKEN as error:  # its produce loop sees that too, and replaces it
                if generator not in self._crew.generators:
                    pending.append(part)
                    return
                if isinstance(error, DeadlineError):  # alive, and slow
                    raise
                raise ActorLostError(f"{actor.name} was lost over it: {first_line(error)}") from error
            keep(dict(zip(part, rollouts, strict=True)))

    async def _installed(self, generator: Member, version: int, pending: deque[range]) -> bool:
        """Wait until a generator has the version; false if the others were done before, or it leaves."""
        crew, waited_s = self._crew, 0.0
        limit_s = self._config.timeouts.start_s + self._config.timeouts.weights_s
        while pending and generator in crew.generators:
            report = crew.installs.get(generator.actor.name)
            if report is not None and report.version >= version:
                return True
            if waited_s >= limit_s:
                raise DeadlineError(f"{generator.name} did not install version {version} within {limit_s:g} s")
            async with crew.installed:
                with suppress(TimeoutError):
                    await asyncio.wait_for(crew.installed.wait(), POLL_S)
                    continue
            waited_s += POLL_S
        return False
