"""The replay buffer under random schedules: the bound, the proof's invariant, the books, and liveness.

`Simulation` plays generators (prompt, lagging, stuck, dying, undead), a scorer and a learner against the buffer, from one
seed. It keeps its own books from what the buffer's calls return, and after every step compares the buffer with them; it
knows the contract of design section 3 and nothing of the code. Broken variants of the rules must fail in it.
"""

import random
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rlhf.errors import StalenessError
from async_rlhf.events import Event
from async_rlhf.ledger import Ledger
from async_rlhf.lineage import annulled
from async_rlhf.prompts import TaskStream
from async_rlhf.replay import ReplayBuffer
from async_rlhf.staleness import StalenessRule
from async_rlhf.tasks.base import Problem
from async_rlhf.tickets import PutOutcome, ReplaySettings, TicketState
from async_rlhf.types import FinishReason, Rollout, RolloutGroup, ScoredGroup, Ticket, VersionSpan

LEASE_S = 10.0
MAX_ATTEMPTS = 3


class NumberedProblems:
    def __init__(self, num_problems: int) -> None:
        self.num_problems = num_problems

    def problem(self, index: int) -> Problem:
        return Problem(prompt_id=str(index), text=str(index))


@dataclass(frozen=True)
class World:
    """What one simulation is about."""

    seed: int
    batch_groups: int
    max_staleness: int
    order: str
    num_updates: int = 6
    tie_share: float = 0.0
    num_prompts: int = 0
    """0: without end."""
    whole_rounds: bool = False
    annul_weight: int = 0
    """How often history is undone, beside the other things that happen."""
    num_steps: int = 120


@dataclass
class Lease:
    """A ticket in a generator's hands and the versions that sampled its tokens so far."""

    ticket: Ticket
    versions: list[int]


@dataclass
class Generator:
    """One incarnation after another; `installed` never falls within one."""

    name: str
    habit: str
    """`prompt`: installs the newest; `lagging`: some version on the way; `stuck`: none."""
    installed: int = 0
    restarts: int = 0
    leases: list[Lease] = field(default_factory=list)

    @property
    def incarnation(self) -> str:
        return f"{self.name}.{self.restarts}"


class Simulation:
    def __init__(self, world: World, rule: type[StalenessRule] = StalenessRule, buffer: type[ReplayBuffer] = ReplayBuffer) -> None:
        self.world = world
        self.rng = random.Random(world.seed)
        prompts = TaskStream(
            NumberedProblems(world.num_prompts or 1000), lambda text: [0], seed=0, max_epochs=1 if world.num_prompts else 0
        )
        replay = ReplaySettings(
            num_updates=world.num_updates,
            order=world.order,
            max_replacements_per_batch=world.batch_groups,
            max_attempts=MAX_ATTEMPTS,
            max_failed_share=1.0,
            lease_s=LEASE_S,
            whole_rounds=world.whole_rounds,
        )
        self.buffer = buffer(rule(batch_groups=world.batch_groups, max_staleness=world.max_staleness), prompts, replay)
        self.events: list[Event] = []
        self.buffer.ledger.on_event = self.events.append
        self.batches: list[tuple[ScoredGroup, ...]] = []
        habits = ["prompt", self.rng.choice(["prompt", "lagging", "stuck"]), self.rng.choice(["lagging", "stuck"])]
        self.generators = [Generator(name=f"g{i}", habit=habit) for i, habit in enumerate(habits)]
        self.now_s = 0.0
        self.sampled: list[Lease] = []  # with the scorer
        self.undead: list[Lease] = []  # leases of dead incarnations, and results already delivered
        # The test's own books.
        self.live: dict[int, Ticket] = {}
        self.kept: dict[int, int] = {}  # ticket id -> attempt of the group that waits
        self.voided: set[int] = set()
        self.failures: Counter[int] = Counter()
        self.trained: set[int] = set()
        self.decided = self.most_decided = 0
        self.newest = 0  # versions 0..newest exist
        self.oldest = 0  # where the learner may fall back to

    # What can happen

    def request(self, generator: Generator) -> list[Ticket]:
        wish = self.rng.randint(1, 2 * self.world.batch_groups + 1)
        room = (generator.installed + self.world.max_staleness + 1) * self.world.batch_groups
        room -= self.decided * self.world.batch_groups + len(self.live)
        tickets = self.buffer.grant(generator.incarnation, generator.installed, wish, self.now_s)
        fresh = [ticket for ticket in tickets if ticket.attempt == 0]
        assert len(tickets) <= wish
        assert len(fresh) <= max(0, room), "more granted than there is room for"
        for ticket in tickets:
            assert ticket.deadline == generator.installed + self.world.max_staleness
            assert ticket.holder == generator.incarnation
            before = self.live.get(ticket.ticket_id)
            assert (before is None) == (ticket.attempt == 0), "only live tickets are reissued, and only dead ones are new"
            if before is not None:
                assert (ticket.attempt, ticket.seed, ticket.prompt) == (before.attempt + 1, before.seed, before.prompt)
                assert ticket.ticket_id not in self.kept, "a finished group is not sampled again"
            self.live[ticket.ticket_id] = ticket
            generator.leases.append(Lease(ticket=ticket, versions=[generator.installed]))
        return tickets

    def install(self, generator: Generator) -> None:
        target = {"prompt": self.newest, "lagging": self.rng.randint(generator.installed, self.newest), "stuck": generator.installed}
        if target[generator.habit] > generator.installed:
            generator.installed = target[generator.habit]
            for lease in generator.leases:  # running requests go on under the new weights
                lease.versions.append(generator.installed)

    def finish_sampling(self, generator: Generator) -> None:
        if generator.leases:
            lease = generator.leases.pop(self.rng.randrange(len(generator.leases)))
            self.buffer.mark_scoring([lease.ticket], self.now_s)
            self.sampled.append(lease)

    def score(self, *, tie_share: float) -> None:
        if self.sampled:
            lease = self.sampled.pop(self.rng.randrange(len(self.sampled)))
            self.put(lease, tied=self.rng.random() < tie_share)
            self.undead.append(lease)  # it may come a second time

    def put(self, lease: Lease, *, tied: bool) -> None:
        ticket = lease.ticket
        current = self.live.get(ticket.ticket_id)
        outcome = self.buffer.put(make_scored(lease, tied=tied))
        if outcome is PutOutcome.TIED:
            assert tied
            self.void(ticket)
        elif outcome is PutOutcome.KEPT:
            assert ticket.ticket_id not in self.kept, "two results for one ticket"
            self.kept[ticket.ticket_id] = ticket.attempt
        if outcome in (PutOutcome.TIED, PutOutcome.KEPT):
            assert current is not None
            assert (current.attempt, current.holder) == (ticket.attempt, ticket.holder), "a zombie's result was taken"

    def void(self, ticket: Ticket) -> None:
        del self.live[ticket.ticket_id]
        self.voided.add(ticket.ticket_id)

    def fail(self) -> None:
        holders = [holder.leases for holder in self.generators if holder.leases] + ([self.sampled] if self.sampled else [])
        if holders:
            leases = self.rng.choice(holders)
            lease = leases.pop(self.rng.randrange(len(leases)))
            current = self.live.get(lease.ticket.ticket_id)
            counts = current is not None and current.attempt == lease.ticket.attempt and lease.ticket.ticket_id not in self.kept
            slot = self.buffer.ledger.slots.get(lease.ticket.ticket_id)
            counts = counts and slot is not None and slot.state is not TicketState.LOST
            self.buffer.fail([lease.ticket], "by chance")
            self.failures[lease.ticket.ticket_id] += counts
            if counts and self.failures[lease.ticket.ticket_id] == MAX_ATTEMPTS:
                self.void(lease.ticket)

    def die(self, generator: Generator) -> None:
        self.buffer.lose_holder(generator.incarnation)
        self.undead += generator.leases
        generator.leases = []
        generator.restarts += 1
        generator.installed = self.rng.randint(0, self.newest)

    def haunt(self) -> None:
        if self.undead:
            lease = self.rng.choice(self.undead)
            if self.rng.random() < 0.3:
                self.buffer.mark_scoring([lease.ticket], self.now_s)
            self.put(lease, tied=self.rng.random() < self.world.tie_share)

    def annul(self) -> None:
        """The learner fell back and will not train the last batches as they were; every generator starts over."""
        if self.buffer.finished:
            return
        version = self.rng.randint(max(self.oldest, self.newest - 2), self.newest)
        undone = [scored for groups in self.batches[version:] for scored in groups]
        self.undo(version, undone)
        self.batches = self.batches[:version]
        self.newest = self.decided = version
        for scored in undone:
            ticket = scored.group.ticket
            self.trained.discard(ticket.ticket_id)
            self.live[ticket.ticket_id] = ticket
            self.kept[ticket.ticket_id] = ticket.attempt
        for ticket_id in [key for key in self.kept if self.buffer.ledger.slots.get(key) is None]:
            del self.kept[ticket_id]
            self.void(self.live[ticket_id])
        for ticket_id in self.live.keys() - self.kept.keys():
            self.live[ticket_id] = replace(self.live[ticket_id], holder="")
        for generator in self.generators:
            self.undead += generator.leases
            generator.leases, generator.installed = [], version
            generator.restarts += 1
        self.undead += self.sampled
        self.sampled = []

    def undo(self, version: int, undone: list[ScoredGroup]) -> None:
        self.buffer.ledger.record(annulled(self.buffer.ledger, version, undone, newest_faithful=version))

    def decide(self) -> bool:
        batch = self.buffer.decide()
        if batch is None:
            return False
        assert batch.update == self.decided < self.world.num_updates
        assert len(batch.groups) == self.world.batch_groups or (self.world.num_prompts and not self.live.keys() - self.kept.keys())
        self.batches.append(batch.groups)
        for scored in batch.groups:
            ticket = scored.group.ticket
            versions = [span.version for rollout in scored.group.rollouts for span in rollout.version_spans]
            assert all(0 <= batch.update - version <= self.world.max_staleness for version in versions), "bound broken"
            assert ticket.ticket_id not in self.trained, "trained twice"
            assert ticket.ticket_id not in self.voided, "voided and trained"
            assert self.kept.pop(ticket.ticket_id) == ticket.attempt
            del self.live[ticket.ticket_id]
            self.trained.add(ticket.ticket_id)
        if self.world.order == "ticket":
            ids = [scored.group.ticket.ticket_id for scored in batch.groups]
            assert ids == sorted(ids)
            assert all(ids[-1] < ticket_id for ticket_id in self.live), "overtaken"
        self.decided += 1
        return True

    def train(self) -> None:
        if self.newest < self.decided:
            self.buffer.mark_trained(self.newest)
            self.newest += 1

    # The schedules

    def step(self) -> None:
        generator = self.rng.choice(self.generators)
        actions = [
            (8, lambda: self.request(generator)),
            (14, lambda: self.finish_sampling(generator)),
            (14, lambda: self.score(tie_share=self.world.tie_share)),
            (6, self.decide),
            (5, self.train),
            (5, lambda: self.install(generator)),
            (2, self.fail),
            (1, lambda: self.die(generator)),
            (3, self.haunt),
            (self.world.annul_weight, self.annul),
            (2, self.wait),
        ]
        weights, calls = zip(*actions, strict=True)
        self.rng.choices(calls, weights)[0]()
        self.check()

    def wait(self) -> None:
        self.now_s += self.rng.choice([0.1, 1.0, LEASE_S])

    def round(self) -> None:
        """One healthy generator does its duty; all others take tickets and never finish them."""
        healthy, *idle = self.generators
        self.now_s += LEASE_S
        self.install(healthy)
        while self.request(healthy):
            self.check()
        while healthy.leases:
            self.finish_sampling(healthy)
        while self.sampled:
            self.score(tie_share=self.world.tie_share)
            self.check()
        while self.decide():
            self.check()
        self.train()
        for generator in idle:
            self.request(generator)
        self.check()

    def run(self) -> None:
        """Adversity first, then calm: the calm must bring the run to its end."""
        for _ in range(self.world.num_steps):
            self.step()
        self.generators[0].habit = "prompt"
        max_replacements = self.world.batch_groups * self.world.num_updates
        for _ in range(3 * self.world.num_updates + max_replacements + 10):
            if self.buffer.finished:
                break
            self.round()
        assert self.buffer.finished, f"no progress: {self.buffer.counters}"
        assert self.world.num_prompts or self.decided == self.world.num_updates
        while self.newest < self.decided:
            self.train()
        self.check()
        assert self.buffer.counters.trained == len(self.trained)
        self.check_history()

    def check_history(self) -> None:
        """The ledger is what its events made of it."""
        rebuilt = Ledger()
        for event in self.events:
            rebuilt.apply(event)
        ledger = self.buffer.ledger
        assert rebuilt.counters == ledger.counters
        assert (rebuilt.decided, rebuilt.lineage, rebuilt.cursor) == (ledger.decided, ledger.lineage, ledger.cursor)
        assert rebuilt.failed_prompts == ledger.failed_prompts
        assert rebuilt.requests == ledger.requests and rebuilt.tally == ledger.tally
        assert {number: asdict(entry) for number, entry in rebuilt.batches.items()} == {
            number: asdict(entry) for number, entry in ledger.batches.items()
        }
        assert list(rebuilt.slots) == list(ledger.slots)
        for number, slot in ledger.slots.items():
            assert rebuilt.slots[number].state is slot.state
            assert rebuilt.slots[number].ticket is slot.ticket and rebuilt.slots[number].scored is slot.scored

    # The invariants

    def check(self) -> None:
        world, counters = self.world, self.buffer.counters
        size, decided = world.batch_groups, self.decided
        assert self.buffer.decided == decided
        assert counters.balanced
        if not self.buffer.finished:  # a dropped last batch leaves without a sign
            assert counters.leased + counters.scoring + counters.waiting == len(self.live)
        assert counters.waiting == len(self.kept) or self.buffer.finished
        assert sum(counters.voided.values()) == len(self.voided)
        assert counters.taken + counters.trained == len(self.trained)
        # Of an undone history more may be live, until it is trained again.
        self.most_decided = max(self.most_decided, decided)
        assert decided * size + len(self.live) <= (self.most_decided + world.max_staleness + 1) * size
        assert decided * size + len(self.live) <= world.num_updates * size or world.num_prompts
        deadlines = [ticket.deadline for ticket in self.live.values()]
        for day in range(decided - 1, decided + world.max_staleness + 2):
            due = sum(deadline <= day for deadline in deadlines)
            assert due <= (day - decided + 1) * size, f"R_{day} = {due} at U = {decided}, B = {size}"


def make_scored(lease: Lease, *, tied: bool) -> ScoredGroup:
    """Two completions: one began under the first version, the other one later."""

    def rollout(versions: list[int]) -> Rollout:
        return Rollout(
            completion_ids=np.ones(len(versions), dtype=np.int32),
            behavior_logprobs=np.full(len(versions), -0.5, dtype=np.float32),
            version_spans=tuple(VersionSpan(version=version, start=i, end=i + 1) for i, version in enumerate(versions)),
            finish_reason=FinishReason.STOP,
        )

    return ScoredGroup(
        group=RolloutGroup(ticket=lease.ticket, rollouts=(rollout(lease.versions), rollout(lease.versions[-1:]))),
        scores=np.array([0.0, 0.0 if tied else 1.0], dtype=np.float32),
        reference_logprobs=(np.zeros(1, dtype=np.float32),) * 2,
        completions=("a", "b"),
    )


worlds = st.builds(
    World,
    seed=st.integers(0, 2**32 - 1),
    batch_groups=st.integers(1, 6),
    max_staleness=st.integers(0, 4),
    order=st.sampled_from(["ready", "ticket"]),
    tie_share=st.sampled_from([0.0, 0.2, 0.5]),
    num_prompts=st.sampled_from([0, 0, 7, 23]),
    annul_weight=st.sampled_from([0, 0, 1, 3]),
    num_steps=st.sampled_from([0, 40, 120, 300]),
)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(world=worlds)
def test_bound_books_and_progress_hold_under_any_schedule(world: World) -> None:
    Simulation(world).run()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(world=worlds)
def test_bound_books_and_progress_hold_in_whole_rounds(world: World) -> None:
    Simulation(World(**{**vars(world), "whole_rounds": True})).run()


# Broken variants must fail, or the simulation proves nothing.


class OneGrantTooMany(StalenessRule):
    def num_grantable(self, **state: Any) -> int:
        return super().num_grantable(**state) + 1


class AnyBatchWillDo(StalenessRule):
    def may_decide(self, **state: Any) -> bool:
        return True


class AnyReissueWillDo(StalenessRule):
    def may_reissue(self, **state: Any) -> bool:
        return True


class NoOlderGenerator(StalenessRule):
    def may_reissue(self, *, new_deadline: int, old_deadline: int, **state: Any) -> bool:
        return new_deadline > old_deadline


class ZombieFriend(ReplayBuffer):
    def put(self, scored: ScoredGroup) -> PutOutcome:
        slot = self.ledger.slots.get(scored.group.ticket.ticket_id)
        if slot is not None and slot.scored is None:
            self.ledger.slots.turn(slot.ticket.ticket_id, slot.state, scored.group.ticket)
        return super().put(scored)


class Forgetful(ReplayBuffer):
    def lose_holder(self, holder: str) -> int:
        for ticket_id in [key for key, slot in self.ledger.slots.items() if slot.ticket.holder == holder]:
            del self.ledger.slots[ticket_id]
        return 0


def fails(order: str, **broken: Any) -> str:
    """The message of the first world of 60 in which the variant breaks; empty if it never does."""
    for seed in range(60):
        world = World(seed=seed, batch_groups=1 + seed % 4, max_staleness=seed % 3, order=order, tie_share=0.2, num_steps=300)
        try:
            Simulation(world, **broken).run()
        except (AssertionError, StalenessError) as error:
            return str(error) or "assertion"
    return ""


@pytest.mark.parametrize("order", ["ready", "ticket"])
@pytest.mark.parametrize(
    "broken",
    [{"rule": OneGrantTooMany}, {"buffer": ZombieFriend}, {"buffer": Forgetful}],
    ids=["one grant too many", "zombie's result taken", "lost lease forgotten"],
)
def test_simulation_catches_a_variant_broken_in_both_orders(broken: dict[str, Any], order: str) -> None:
    assert fails(order, **broken)


@pytest.mark.parametrize("rule", [AnyBatchWillDo, AnyReissueWillDo])
def test_simulation_catches_a_rule_that_lets_groups_become_overdue(rule: type[StalenessRule]) -> None:
    assert "R_" in fails("ready", rule=rule)


def test_simulation_catches_a_reissue_rule_that_never_lets_go() -> None:
    """Equal deadlines refused: at eta 0 the lost ticket of the newest generator waits for ever."""
    assert "no progress" in fails("ready", rule=NoOlderGenerator)


@pytest.mark.parametrize("order", ["ready", "ticket"])
def test_simulation_finds_nothing_in_the_true_rule_in_the_same_worlds(order: str) -> None:
    assert fails(order) == ""
