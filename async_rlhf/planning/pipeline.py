"""The pipeline as a discrete-event simulation, with the real queue in it.

The replay buffer that grants, keeps and decides is `async_rlhf.replay.ReplayBuffer` itself, over the real `StalenessRule` and `Ledger`:
the bound holds in the model by the same code as in a run, and is asserted there for every token. Modelled are those around it, after
the two loops of `actors/pipeline.py`: generators (generator.py, engine.py), reward actors and scorers as pools, the learner (take,
train_step, push, book) and installs, and the calls between them; and, where all run on one machine without a GPU, its cores (cores.py).

Many generators: with more than MAX_GENERATORS (or MAX_LIVE_GROUPS groups on their way), one simulated generator and one simulated group
stand for `scale` real ones. Shares and rates per member stay what they are, as all work is divided alike; only chance evens out less,
so the model of a large fleet is a little pessimistic about stragglers.
"""

from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy

from async_rlhf import traffic
from async_rlhf.config import Config
from async_rlhf.ledger import Ledger
from async_rlhf.planning.cores import Cores
from async_rlhf.planning.engine import Finished
from async_rlhf.planning.generator import ModelGenerator
from async_rlhf.planning.lengths import Lengths
from async_rlhf.planning.prediction import Prediction, Scope
from async_rlhf.planning.rates import Rates, num_trained
from async_rlhf.planning.signals import Signal
from async_rlhf.prompts import PromptCursor
from async_rlhf.replay import ReplayBuffer
from async_rlhf.staleness import StalenessRule
from async_rlhf.tickets import PutOutcome, ReplaySettings
from async_rlhf.types import FinishReason, Prompt, Rollout, RolloutGroup, ScoredGroup, VersionSpan

MAX_GENERATORS = 32
"""Simulated one by one."""
MAX_LIVE_GROUPS = 1024
WARM_UP = 5
"""Updates before the measurement begins."""

Steps = Generator[Any, Any, None]


class _Prompts:
    """A source without end: what is asked plays no part."""

    exhausted = False

    def __init__(self) -> None:
        self._prompt = Prompt(prompt_id="", text="", token_ids=np.empty(0, dtype=np.int32))
        self.cursor = PromptCursor(epoch=0, index=0)

    def draw(self) -> tuple[Prompt, int]:
        return self._prompt, 0


@dataclass
class _Member:
    """One simulated generator, as the loops know it."""

    name: str
    generator: ModelGenerator
    changed: Signal
    """Another version is installed."""
    installed: int = 0


class _Pool:
    """Scorers, or reward actors."""

    def __init__(self, env: simpy.Environment, count: int, scale: float, call_s: float, token_s: float) -> None:
        num = max(1, round(count / scale))
        self.members = simpy.Resource(env, num)
        self._share = count / scale / num
        """Real members per simulated one and unit of work; 1 where the numbers come out even."""
        self._call_s, self._token_s = call_s, token_s

    def work_s(self, num_tokens: float) -> float:
        """Of one call."""
        return (self._call_s + self._token_s * num_tokens) / self._share


class PipelineModel:
    """One simulation. The processes carry the names of the loops of actors/pipeline.py."""

    def __init__(self, config: Config, rates: Rates, lengths: Lengths, scope: Scope) -> None:
        live = (config.max_staleness + 1) * config.batch_groups
        scale = max(1.0, config.generator.count / MAX_GENERATORS, min(live / MAX_LIVE_GROUPS, config.generator.count))
        self._num_generators = max(1, round(config.generator.count / scale))
        self._scale = config.generator.count / self._num_generators
        self._batch_groups = max(1, round(config.batch_groups / self._scale))
        self._config, self._rates, self._lengths, self._num_updates = config, rates, lengths, scope.num_updates
        self._env = simpy.Environment()
        self._cores = Cores(self._env, scope.num_cores / self._scale)
        self._rng = np.random.default_rng(scope.seed)
        self._buffer = self._make_buffer()
        self._grantable, self._arrived, self._published = (Signal(self._env) for _ in range(3))
        pools = (("rewards", config.reward.count, "reward"), ("scorers", config.scorer.count, "score"))
        self._pools = {
            name: _Pool(self._env, count, self._scale, getattr(rates, f"{key}_call_s"), getattr(rates, f"{key}_token_s"))
            for name, count, key in pools
            if count
        }
        """Whom a group passes, in order."""
        self._groups: dict[int, tuple[Sequence[float], bool]] = {}
        """Ticket id -> lengths, tied."""
        self._version = 0
        self._update_s = 0.0
        """What the last update took."""
        self._kept = 0
        """Groups kept since the last decision that are not in a batch."""
        self._busy = dict.fromkeys((*self._pools, "learner"), 0.0)
        self._num_calls = 0
        self._staleness = Counter[int]()
        self._waiting: list[int] = []
        self._marks: list[tuple[float, dict[str, float]]] = []

    def run(self) -> Prediction:
        """To the end of the last update."""
        self._members = [self._make_member(index) for index in range(self._num_generators)]
        for member in self._members:
            for process in (self._feed, self._drain, self._refresh):
                self._env.process(process(member))
        self._env.run(until=self._env.process(self._train()))
        return self._prediction()

    def _make_buffer(self) -> ReplayBuffer:
        config = self._config
        settings = ReplaySettings(
            num_updates=self._num_updates + config.max_staleness + 2,  # the last updates are not short of prompts
            order=config.queue.order,
            max_replacements_per_batch=round(config.max_replacements_per_batch / self._scale),
            lease_s=float("inf"),
        )
        rule = StalenessRule(batch_groups=self._batch_groups, max_staleness=config.max_staleness)
        return ReplayBuffer(rule, _Prompts(), settings, Ledger())

    def _make_member(self, index: int) -> _Member:
        generator = ModelGenerator(self._env, self._config, self._rates, self._cores)
        return _Member(name=f"generator-{index}", generator=generator, changed=Signal(self._env))

    def _feed(self, member: _Member) -> Steps:
        while True:
            wanted = yield from member.generator.room()  # comes with the answer to the last submit
            yield from self._call()
            while not (tickets := self._buffer.grant(member.name, member.installed, wanted, self._env.now)):
                yield self._grantable.wait() | member.changed.wait()
            yield from self._call()
            groups = [(ticket, *self._lengths.draw(self._rng, self._config.completions_per_prompt)) for ticket in tickets]
            self._groups.update({ticket.ticket_id: (lengths.tolist(), tied) for ticket, lengths, tied in groups})
            member.generator.submit([(ticket, self._groups[ticket.ticket_id][0]) for ticket in tickets])

    def _drain(self, member: _Member) -> Steps:
        while True:
            finished = yield from member.generator.collect(traffic.gather_s(self._config, self._update_s))
            yield from self._call()
            self._env.process(self._score(finished))

    def _score(self, finished: Sequence[Finished]) -> Steps:
        yield from self._call()
        self._buffer.mark_scoring([group.ticket for group in finished], self._env.now)
        prompt, size = self._lengths.prompt_tokens, self._config.completions_per_prompt
        tokens = sum(sum(self._groups[group.ticket.ticket_id][0]) + size * prompt for group in finished)
        for name, pool in self._pools.items():
            with pool.members.request() as turn:
                yield turn
                began = self._env.now
                self._num_calls += 1  # how long it is on its way is in the member's rate
                yield from self._cores.work(self._rates.call_work_s)
                yield from self._cores.work(pool.work_s(tokens))
                self._busy[name] += self._env.now - began
        yield from self._call()
        voided = False
        for group in finished:
            outcome = self._buffer.put(self._scored(group))
            voided |= outcome is PutOutcome.TIED
            self._kept += outcome is PutOutcome.KEPT
        self._arrived.notify()
        if voided:
            self._grantable.notify()

    def _refresh(self, member: _Member) -> Steps:
        while True:
            while self._version <= member.installed:
                yield self._published.wait()
            offer = self._version
            yield from self._call()
            self._num_calls += 1  # the install: how long it is on its way is in transfer_s
            yield self._env.timeout(self._rates.transfer_s)
            yield member.generator.engine.install(self._rates.load_s, offer, reread=self._config.weights.rereads)
            yield from self._call()
            member.installed = offer
            member.changed.notify()

    def _train(self) -> Steps:
        config, rates = self._config, self._rates
        for update in range(self._num_updates):
            started, batch = self._env.now, None
            while batch is None:
                if self._kept >= self._batch_groups:
                    batch = self._buffer.decide()
                if batch is None:
                    yield self._arrived.wait()
            yield from self._call()
            # To take, to train_step, to publish and to book it: how long they are on their way is in the rates of these.
            self._num_calls += 2 * config.learner.num_ranks + 2
            self._kept -= len(batch.groups)
            self._staleness.update(batch.staleness if update >= WARM_UP else ())
            groups = [self._groups.pop(scored.group.ticket.ticket_id) for scored in batch.groups]
            size, prompt = config.completions_per_prompt, self._lengths.prompt_tokens
            trained = [(sum(lengths) / size + prompt) * num_trained(config, tied=tied) for lengths, tied in groups]
            tokens = self._scale * sum(trained)
            algorithm = config.algorithm
            step_s = rates.train_step_s(
                tokens, ranks=config.learner.num_ranks, epochs=algorithm.epochs_per_batch, minibatches=algorithm.minibatches_per_batch
            )
            yield from self._cores.work(rates.take_s)
            began = self._env.now
            yield from self._cores.work(step_s, config.learner.num_ranks / self._scale)
            self._busy["learner"] += self._env.now - began
            yield from self._cores.work(rates.export_s)
            self._version = update + 1
            self._published.notify()
            yield from self._cores.work(rates.book_s)
            self._buffer.mark_trained(update, 0, ())
            self._buffer.ledger.forget_before(update)
            self._waiting.append(self._kept)
            self._update_s = self._env.now - started
            self._mark()

    def _call(self) -> Steps:
        """From actor to actor, by way of the driver."""
        self._num_calls += 1
        yield self._env.timeout(self._rates.call_s)
        yield from self._cores.work(self._rates.call_work_s)

    def _scored(self, finished: Finished) -> ScoredGroup:
        lengths, tied = self._groups[finished.ticket.ticket_id]
        rollouts = tuple(_rollout(finished.version, int(tokens)) for tokens in lengths)
        scores = np.zeros(len(lengths), dtype=np.float32)
        scores[0] = 0.0 if tied else 1.0
        group = RolloutGroup(ticket=finished.ticket, rollouts=rollouts)
        return ScoredGroup(group=group, scores=scores, reference_logprobs=(), completions=())

    def _mark(self) -> None:
        busy = {"generators": sum(member.generator.engine.busy_s for member in self._members), **self._busy}
        tokens = sum(member.generator.engine.num_tokens for member in self._members)
        counts = {"tokens": tokens, "calls": float(self._num_calls)}
        self._marks.append((self._env.now, {**busy, **counts}))

    def _prediction(self) -> Prediction:
        (began, before), (ended, after) = self._marks[WARM_UP - 1], self._marks[-1]
        passed_s, num = ended - began, self._num_updates - WARM_UP
        spent = {key: after.get(key, 0.0) - before.get(key, 0.0) for key in after}
        trained = sum(self._staleness.values())
        idle = {name: 1 - spent[name] / (passed_s * pool.members.capacity) for name, pool in self._pools.items()}
        return Prediction(
            update_s=passed_s / num,
            completions_per_s=self._config.batch_groups * self._config.completions_per_prompt * num / passed_s,
            tokens_per_s=self._scale * spent["tokens"] / passed_s,
            generator_idle=1 - spent["generators"] / (passed_s * self._num_generators),
            scorer_idle=idle["scorers"],
            reward_idle=idle.get("rewards"),
            learner_idle=1 - spent["learner"] / passed_s,
            staleness={staleness: num_groups / trained for staleness, num_groups in sorted(self._staleness.items())},
            stretch=self._cores.stretch,
            calls=spent["calls"] / num,
            waiting_groups=self._scale * float(np.mean(self._waiting[WARM_UP:])),
        )


def _rollout(version: int, tokens: int) -> Rollout:
    return Rollout(
        completion_ids=np.empty(0, dtype=np.int32),
        behavior_logprobs=np.empty(0, dtype=np.float32),
        version_spans=(VersionSpan(version=version, start=0, end=tokens),),
        finish_reason=FinishReason.STOP,
    )
