"""Evaluations around fakes: beside the two loops of training, before them and after them, and when anybody dies over one."""

import asyncio
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actors.evaluator
import actors.live_evaluation
import actors.pipeline
from actors.crew import UpdateRecord
from actors.evaluator import Evaluator
from actors.gate import InstallGate
from actors.judging import Judging
from actors.live_evaluation import LiveEvaluation
from actors.remote import RemoteActor
from actors.supervision import guarded
from actors.transport import ByReference
from actors.weight_broadcaster import Offer
from async_rlhf.errors import LearnerLostError, ObjectLostError, RewardError, RewardLostError
from async_rlhf.evaluation import Findings, Sample, expected_of
from async_rlhf.opponents import Opponent
from async_rlhf.run_plan import RunPlan
from async_rlhf.types import InstallReport, Prompt, Rollout
from tests.actors.test_pipeline import FakeGenerator, FakeQueue, FakeScorer, Stage
from tests.support.local_actors import LocalHandle, local_kill
from tests.support.samples import make_rollout

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("local_kill")]
__all__ = ["local_kill"]
NUM_PROMPTS = 7
PROMPTS = [
    Prompt(prompt_id=f"held-out-{index}", text=f"{index}+0=", token_ids=np.array([index], np.int32), columns={"answer": str(index)})
    for index in range(NUM_PROMPTS)
]


@pytest.fixture(autouse=True)
def quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (actors.pipeline, actors.live_evaluation, actors.evaluator):
        monkeypatch.setattr(module, "POLL_S", 0.02)
    monkeypatch.setattr(actors.evaluator, "STRAGGLER_S", 0.1)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 30))


class Answering(FakeGenerator):
    """Answers held-out prompts, too: the first token is the prompt's, the version is the one installed when it is asked."""

    pause_s = 0.002
    most_asked, asked = 0, 0
    """Of all generators of one test."""
    temperatures: list[float]

    async def evaluate(self, prompts: Sequence[Prompt], temperature: float) -> list[Rollout]:
        cls = type(self)
        cls.asked += len(prompts)
        cls.most_asked = max(cls.most_asked, cls.asked)
        cls.temperatures.append(temperature)
        rng, version = np.random.default_rng(0), self.version
        await asyncio.sleep(self.pause_s)
        cls.asked -= len(prompts)
        rollouts = [make_rollout(rng, version=version) for _ in prompts]
        for prompt, rollout in zip(prompts, rollouts, strict=True):
            rollout.completion_ids[0] = prompt.token_ids[0]
        return rollouts


class Judge(FakeScorer):
    """A completion's text is its first token, and its score that number; the reward is its negative."""

    assess_error: Exception | None = None
    rate_error: Exception | None = None

    async def assess(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], sampled: bool) -> list[Sample]:
        if self.assess_error is not None:
            raise self.assess_error
        first = [int(rollout.completion_ids[0]) for rollout in rollouts]
        return [
            Sample(
                prompt=prompt.text,
                completion=str(number),
                expected=expected_of(prompt),
                score=number,
                kl_nats=0.5 if sampled else None,
                num_tokens=2,
            )
            for prompt, number in zip(prompts, first, strict=True)
        ]

    async def grade(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        return [float(text) for text in texts]

    async def rate_texts(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        if self.rate_error is not None:
            raise self.rate_error
        return [-float(text) for text in texts]


class Listener:
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.found: list[Findings] = []
        self.dropped: list[tuple[int, str]] = []
        self.texts: list[str] = []

    def evaluated(self, findings: Findings) -> None:
        self.found.append(findings)

    def evaluation_dropped(self, version: int, reason: str, text: str) -> None:
        self.dropped.append((version, reason))
        self.texts.append(text)


class Theatre:
    """A stage with evaluations beside training."""

    def __init__(self, *overrides: str, num_generators: int = 1, scorers: Sequence[Any] = (), **judged: Any) -> None:
        Answering.asked = Answering.most_asked = 0
        Answering.temperatures = []
        self.scorers = list(scorers) or [Judge()]
        words = ("updates=6", "evaluation.every_updates=2", *overrides)
        self.stage = Stage(FakeQueue(num_tickets=40), Answering, self.scorers, *words, num_generators=num_generators)
        self.listener = Listener()
        config, crew = self.stage.config, self.stage.crew
        plan = RunPlan(config=config, run_folder=Path("run"), model_folder=Path("model"), reward=judged.get("reward", "m"), metric="m")
        judging = Judging(plan, crew, PROMPTS, judged.get("opponent"), judged.get("comparer"))
        self.live = LiveEvaluation(config, crew, PROMPTS, judging, self.listener)
        self.evaluator = Evaluator(config, crew, PROMPTS, judging)
        self.sampling_needs_installs = config.deterministic

    async def train(self, pause_s: float = 0.03) -> int:
        """All updates; what is going on then may end."""

        async def on_update(record: UpdateRecord) -> None:
            version = record.summary.update + 1
            self.live.after_update(version)
            # As the true queue would have it: no batch without somebody who sampled it.
            while self.sampling_needs_installs and all(report.version < version for report in self.stage.crew.installs.values()):
                await asyncio.sleep(0.001)

        async def all_of_it() -> int:
            version = await actors.pipeline.train(self.stage.crew, self.stage.config, 0, on_update)
            await self.live.end()
            return version

        await self.stage.begin()
        self.stage.learner.pause_s = pause_s
        return await guarded(all_of_it(), *self.stage.others())

    async def evaluate(self) -> Findings:
        """The start."""
        await self.stage.begin()
        return await guarded(self.evaluator.evaluate("start", 0), *self.stage.others())


def test_evaluation_that_is_due_takes_place_beside_training_and_names_its_versions() -> None:
    async def story() -> None:
        theatre = Theatre("evaluation.sampled=true")

        assert await theatre.train() == 6

        assert [findings.version for findings in theatre.listener.found] == [2, 4]
        for findings in theatre.listener.found:
            assert [sample.completion for sample in findings.greedy.samples] == [str(index) for index in range(NUM_PROMPTS)]
            oldest, newest = findings.versions
            assert findings.version <= oldest <= newest <= 6
            assert findings.sampled is not None and {sample.kl_nats for sample in findings.sampled.samples} == {0.5}
        assert theatre.listener.dropped == []
        assert set(Answering.temperatures) == {0.0, theatre.stage.config.generator.temperature}

    run(story())


def test_evaluation_that_sees_new_weights_names_all_of_them() -> None:
    async def story() -> None:
        theatre = Theatre("evaluation.max_inflight=1", "evaluation.every_updates=3")
        Answering.pause_s = 0.04
        try:
            await theatre.train(pause_s=0.005)
        finally:
            Answering.pause_s = 0.002

        (findings,) = theatre.listener.found
        assert findings.versions[0] >= 3 and findings.versions[1] > findings.versions[0]

    run(story())


@pytest.mark.parametrize(("max_inflight", "generators", "most"), [(1, 2, 1), (3, 1, 3), (5, 2, 4), (100, 2, NUM_PROMPTS)])
def test_no_more_completions_are_asked_at_once_than_allowed(max_inflight: int, generators: int, most: int) -> None:
    async def story() -> None:
        theatre = Theatre(f"evaluation.max_inflight={max_inflight}", num_generators=generators)

        await theatre.train()

        assert theatre.listener.found and Answering.most_asked == most

    run(story())


def test_tickets_and_updates_are_the_same_with_and_without_evaluations() -> None:
    async def story() -> None:
        seen: list[tuple[list[str], list[int]]] = []
        for every in (0, 1):
            theatre = Theatre(f"evaluation.every_updates={every}", "deterministic=true", "max_staleness=0", "queue.order=ticket")
            await theatre.train(pause_s=0.005)
            stage = theatre.stage
            seen.append(([event for event in stage.events if event.startswith("train ")], sorted(stage.queue.put_ids)[:12]))
            assert bool(theatre.listener.found) == bool(every)
        assert seen[0] == seen[1]

    run(story())


def test_deterministic_run_evaluates_one_version_alone_between_the_decision_of_a_batch_and_the_next_install() -> None:
    async def story() -> None:
        theatre = Theatre("deterministic=true", "max_staleness=0", "queue.order=ticket", "evaluation.sampled=true")

        await theatre.train(pause_s=0.0)

        assert [findings.versions for findings in theatre.listener.found] == [(2, 2), (4, 4)]
        events = theatre.stage.events
        for version in (2, 4):
            begin = next(index for index, event in enumerate(events) if event.startswith(f"train {version} begins"))
            installs = [index for index, event in enumerate(events) if event == "generator-0.install"]
            asked = [index for index, event in enumerate(events) if event == "generator-0.evaluate"]
            # Installs: one of version 0, then one for each update; the one of version + 1 comes after the whole evaluation.
            of_this = [index for index in asked if installs[version] < index < installs[version + 1]]
            decided = [index for index, event in enumerate(events[:begin]) if event == "queue.next_batch"][-1]
            assert of_this and min(of_this) > decided
        assert all(any(installs[v] < index < installs[v + 1] for v in (2, 4)) for index in asked)

    run(story())


def test_deterministic_run_drops_the_evaluation_of_a_version_that_no_generator_gets_instead_of_waiting_for_it() -> None:
    """After a resume batches are trained again without anybody sampling: the generators skip those versions."""

    async def story() -> None:
        theatre = Theatre("deterministic=true", "max_staleness=0", "queue.order=ticket")
        theatre.sampling_needs_installs = False
        await theatre.stage.begin()
        theatre.live.after_update(2)
        await theatre.stage.crew.gate.decide(2)

        await theatre.live.end()

        assert theatre.listener.dropped == [(2, "failed")]
        assert "no generator has version 2" in theatre.listener.texts[0]
        await asyncio.wait_for(theatre.stage.crew.gate.passed(100), 1)

    run(story())


def test_evaluation_is_dropped_when_its_generator_dies_and_training_goes_on() -> None:
    async def story() -> None:
        theatre, killed = Theatre("evaluation.every_updates=2"), []

        def fate(handle: LocalHandle, method: str, args: tuple[Any, ...], through: bool) -> None:
            if method == "evaluate" and not through and not killed:
                killed.append(handle.name)
                handle.die()

        theatre.stage.fate = fate
        assert await theatre.train() == 6

        assert theatre.listener.dropped == [(2, "actor_lost")] and killed[0] in theatre.listener.texts[0]
        assert [findings.version for findings in theatre.listener.found] == [4]
        assert theatre.stage.cluster.started.count("generator-0.0.1") == 1

    run(story())


def test_evaluation_by_a_generator_that_lives_and_is_slow_says_so() -> None:
    async def story() -> None:
        theatre = Theatre("evaluation.every_updates=3", "timeouts.generate_s=0.2")
        Answering.pause_s = 20.0
        try:
            assert await theatre.train(pause_s=0.2) == 6
        finally:
            Answering.pause_s = 0.002

        assert theatre.listener.dropped == [(3, "failed")]
        assert "DeadlineError: " in theatre.listener.texts[0] and "generator-0" in theatre.listener.texts[0]

    run(story())


def test_whoever_gives_an_evaluation_up_can_be_cancelled_over_it() -> None:
    """The evaluation takes its time to end."""

    class SlowGate(InstallGate):
        async def open(self) -> None:
            ending.set()
            await asyncio.sleep(5)

    ending = asyncio.Event()

    async def story() -> None:
        theatre = Theatre()
        theatre.stage.crew.gate = SlowGate()
        await theatre.stage.begin()
        theatre.live.after_update(2)
        await asyncio.sleep(0)
        stopping = asyncio.create_task(theatre.live.stop("run_ended"))
        await ending.wait()

        stopping.cancel()
        await asyncio.wait({stopping})

        assert stopping.cancelled()

    run(story())


def test_evaluation_that_is_due_before_the_last_one_is_over_is_dropped() -> None:
    async def story() -> None:
        theatre = Theatre("evaluation.every_updates=1", "evaluation.max_inflight=1")
        Answering.pause_s = 0.2
        try:
            await theatre.train(pause_s=0.0)
        finally:
            Answering.pause_s = 0.002

        assert [findings.version for findings in theatre.listener.found] == [1]
        assert theatre.listener.dropped == [(version, "previous_unfinished") for version in (2, 3, 4, 5)]

    run(story())


def test_evaluation_that_is_given_up_is_counted_and_leaves_the_gate_open() -> None:
    async def story() -> None:
        theatre = Theatre("deterministic=true", "max_staleness=0", "queue.order=ticket")
        await theatre.stage.begin()
        theatre.live.after_update(2)
        await asyncio.sleep(0)

        await theatre.live.stop("learner_lost")
        await theatre.live.stop("again, of nothing")

        assert theatre.listener.dropped == [(2, "learner_lost")]
        await asyncio.wait_for(theatre.stage.crew.gate.passed(100), 1)

    run(story())


@pytest.mark.parametrize("version", [0, 1, 3, 6, 8])
def test_evaluation_is_due_at_its_multiples_and_never_at_the_start_or_the_end(version: int) -> None:
    async def story() -> None:
        theatre = Theatre()
        theatre.live.after_update(version)
        await theatre.live.stop("it was begun")

        assert theatre.listener.dropped == []

    run(story())


@pytest.mark.parametrize(
    ("error", "reason", "text"),
    [
        (RewardError("the metric failed"), "reward_failed", "the metric failed"),
        (ZeroDivisionError("by zero"), "failed", "by zero"),
    ],
)
def test_metric_that_fails_costs_its_evaluation_and_not_the_run(error: Exception, reason: str, text: str) -> None:
    async def story() -> None:
        judge = Judge()
        judge.assess_error = error
        theatre = Theatre(scorers=[judge])

        assert await theatre.train() == 6

        assert theatre.listener.found == [] and set(theatre.listener.dropped) == {(2, reason), (4, reason)}
        assert text in theatre.listener.texts[0]

    run(story())


@pytest.mark.parametrize("with_node", [False, True], ids=["before-it-answers", "with-its-node-and-the-answer"])
def test_scorer_that_dies_over_an_evaluation_is_replaced_and_asked_again(with_node: bool) -> None:
    async def story() -> None:
        theatre, killed = Theatre(), []

        def fate(handle: LocalHandle, method: str, args: tuple[Any, ...], through: bool) -> None:
            if method == "assess" and through is with_node and not killed:
                killed.append(handle.name)
                if with_node:
                    raise ObjectLostError("the node of the answer died")
                handle.die()

        theatre.stage.fate = fate
        assert await theatre.train() == 6

        assert [findings.version for findings in theatre.listener.found] == [2, 4] and killed == ["scorer-0.0.0"]

    run(story())


def test_higher_metric_wins_where_the_metric_decides() -> None:
    """Scores 0..6 against 0, 0, 2, 2, 6, 6, 6: ties at 0, 2, 6; wins at 1, 3; losses at 4, 5."""

    async def story() -> None:
        opponent = Opponent(name="m", completions=("0", "0", "2", "2", "6", "6", "6"))
        theatre = Theatre("evaluation.winrate=metric", opponent=opponent)

        findings = await theatre.evaluate()

        assert [sample.outcome for sample in findings.greedy.samples] == [0.5, 1.0, 0.5, 1.0, 0.0, 0.0, 0.5]
        assert findings.opponent == "m" and findings.problem == ""
        assert {sample.reward for sample in findings.greedy.samples} == {None}, "training goes by the metric itself"

    run(story())


def test_higher_reward_wins_where_the_reward_decides_and_every_completion_is_rated() -> None:
    """The reward is the negative of the number: 0, -1, .. -6 against -3 each."""

    async def story() -> None:
        opponent = Opponent(name="m", completions=tuple("3" * NUM_PROMPTS))
        theatre = Theatre("evaluation.winrate=reward", "evaluation.sampled=true", opponent=opponent, reward="other")

        findings = await theatre.evaluate()

        assert [sample.outcome for sample in findings.greedy.samples] == [1.0, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0]
        assert findings.sampled is not None
        for part in (findings.greedy, findings.sampled):
            assert [sample.reward for sample in part.samples] == [-float(number) for number in range(NUM_PROMPTS)]

    run(story())


def test_reward_that_cannot_be_had_leaves_the_metric_and_says_why() -> None:
    async def story() -> None:
        judge = Judge()
        judge.rate_error = RewardLostError("the reward model's server is down")
        theatre = Theatre("evaluation.winrate=reward", scorers=[judge], reward="other", opponent=Opponent(name="m", completions=("0",) * 7))

        findings = await theatre.evaluate()

        assert findings.problem == "the reward model's server is down" and findings.greedy.accuracy == 3.0
        assert {(sample.reward, sample.outcome) for sample in findings.greedy.samples} == {(None, None)}

    run(story())


def test_judge_is_asked_for_a_few_pairs_at_a_time_and_its_failure_leaves_the_rest_of_the_evaluation() -> None:
    async def story() -> None:
        asked: list[list[str]] = []

        def judge(prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> Sequence[float]:
            asked.append([prompt.prompt_id for prompt in prompts])
            if len(asked) > 3:
                raise ConnectionError("the judge went home")
            return [1.0 for _ in prompts]

        opponent = Opponent(name="m", completions=tuple("x" * NUM_PROMPTS))
        theatre = Theatre("evaluation.max_inflight=3", opponent=opponent, comparer=judge)
        good = await theatre.evaluate()
        bad = await theatre.evaluator.evaluate("start", 0)

        assert [len(part) for part in asked[:3]] == [3, 3, 1]
        assert [sample.outcome for sample in good.greedy.samples] == [1.0] * NUM_PROMPTS
        assert "the judge went home" in bad.problem and bad.opponent == ""
        assert [sample.outcome for sample in bad.greedy.samples] == [None] * NUM_PROMPTS
        assert bad.greedy.accuracy == good.greedy.accuracy == 3.0

    run(story())


def test_an_evaluation_outlives_a_generator_that_leaves_over_it_and_one_that_joins() -> None:
    """Of two generators one is asked to leave while it answers; two others join. Nothing is dropped, every prompt is answered once."""

    async def story() -> None:
        theatre, scaling = Theatre("evaluation.max_inflight=2", "updates=12", num_generators=2), list[asyncio.Task[None]]()

        async def change() -> None:
            await theatre.stage.pool.scale(1, lambda line: None)
            await theatre.stage.pool.scale(3, lambda line: None)

        def fate(handle: LocalHandle, method: str, args: tuple[Any, ...], through: bool) -> None:
            if method == "evaluate" and not through and handle.name == "generator-1.0.0" and not scaling:
                scaling.append(asyncio.ensure_future(change()))

        theatre.stage.fate = fate
        await theatre.train(pause_s=0.1)
        await asyncio.gather(*scaling)

        assert scaling and theatre.listener.dropped == [] and [found.versions[0] for found in theatre.listener.found] == [2, 4, 6, 8, 10]
        for found in theatre.listener.found:
            assert [sample.completion for sample in found.greedy.samples] == [str(index) for index in range(NUM_PROMPTS)]
        assert [member.name for member in theatre.stage.crew.generators] == ["generator-0", "generator-1", "generator-2"]

    run(story())


def test_start_is_shared_by_the_generators_and_the_part_of_one_that_dies_goes_to_the_others() -> None:
    async def story() -> None:
        theatre, killed = Theatre("evaluation.sampled=true", num_generators=2), []

        def fate(handle: LocalHandle, method: str, args: tuple[Any, ...], through: bool) -> None:
            if method == "evaluate" and not through and handle.name.startswith("generator-1") and not killed:
                killed.append(handle.name)
                handle.die()

        theatre.stage.fate = fate
        findings = await theatre.evaluate()

        assert killed and [sample.completion for sample in findings.greedy.samples] == [str(index) for index in range(NUM_PROMPTS)]
        assert findings.versions == (0, 0) and findings.stage == "start"
        assert findings.sampled is not None and len(findings.sampled.samples) == NUM_PROMPTS

    run(story())


def test_start_outlives_the_answers_of_a_generator_that_are_gone_with_its_node() -> None:
    async def story() -> None:
        theatre, lost = Theatre(num_generators=2), []

        def fate(handle: LocalHandle, method: str, args: tuple[Any, ...], through: bool) -> None:
            if method == "evaluate" and through and handle.name.startswith("generator-1") and not lost:
                lost.append(handle.name)
                raise ObjectLostError("the node of the answers died")

        theatre.stage.fate = fate
        findings = await theatre.evaluate()

        assert lost and [sample.completion for sample in findings.greedy.samples] == [str(index) for index in range(NUM_PROMPTS)]

    run(story())


def test_start_ends_with_the_learner_that_was_to_send_the_weights() -> None:
    """It is evaluated again as soon as the learner is back; until then it would wait for nothing."""

    class Withholding(ByReference):
        by_sender = True

        async def deliver(self, generator: RemoteActor, offer: Offer, ranks: Sequence[RemoteActor]) -> InstallReport | None:
            await asyncio.sleep(0.01)
            return None

    async def story() -> None:
        theatre = Theatre("timeouts.start_s=0.5", "timeouts.weights_s=0.5")
        theatre.stage.crew.transport = Withholding(theatre.stage.config)
        asyncio.get_running_loop().call_later(0.05, setattr, theatre.stage.learner, "lost", LearnerLostError("learner-0 is gone"))

        with pytest.raises(LearnerLostError, match="learner-0 is gone"):
            await theatre.evaluate()

    run(story())
