"""The replay queue: who waits for what, who wakes whom, and what may be asked twice."""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from actors import replay_queue
from actors.replay_queue import Booked, HolderGone, Installed, Kept, NextBatch, ReplayQueue, ScoringFailed, Undone, WithScorer
from async_rlhf.config import load_config
from async_rlhf.errors import ConfigError, JournalError, JournalLockedError, RunError
from async_rlhf.journal import Mark, check_mark
from async_rlhf.journal_frames import segment_path
from async_rlhf.rollout_parts import part_path, read_trained
from async_rlhf.tasks.start import build_tokenizer
from async_rlhf.tickets import PutOutcome, QueueCounters
from async_rlhf.types import ScoredGroup, Ticket
from tests.support.samples import make_scored, plain

pytestmark = pytest.mark.timeout(60)
LONG_S = 20.0
A, B = "generator-0.0", "generator-1.0"


REQUESTS = itertools.count()


@dataclass(frozen=True)
class Place:
    """Where a queue's tokenizer is, and where its run."""

    tokenizer: Path
    run: Path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def place(tokenizer: Path, tmp_path: Path) -> Place:
    return Place(tokenizer=tokenizer, run=tmp_path)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 30))


def make_queue(place: Place, *overrides: str, session: int = 0) -> ReplayQueue:
    """Two updates of four groups each, staleness up to 1; ties stay."""
    base = ["updates=2", "batch_groups=4", "max_staleness=1", "learner.warmup_steps=0", "queue.ties=keep"]
    return ReplayQueue(load_config(overrides=[*base, *overrides]).config, str(place.tokenizer), str(place.run), session)


def kill(queue: ReplayQueue) -> None:
    """What SIGKILL leaves: the files as they are, and no lock."""
    queue._journal.close()


def scored(tickets: list[Ticket], *, version: int = 0, scores: tuple[float, ...] = (1.0, 0.0)) -> list[ScoredGroup]:
    return [make_scored(ticket, version=version, scores=scores) for ticket in tickets]


async def installed(queue: ReplayQueue, holder: str, version: int) -> None:
    await queue.note(Installed(holder=holder, version=version))


async def ask(queue: ReplayQueue, holder: str, count: int, wait_s: float) -> list[Ticket] | None:
    """A request of its own, by a generator that names no version but the first."""
    return await queue.tickets(holder, 0, next(REQUESTS), count, wait_s)


async def take_tickets(queue: ReplayQueue, holder: str, count: int) -> list[Ticket]:
    tickets = await ask(queue, holder, count, 0.0)
    assert tickets is not None and len(tickets) == count
    return tickets


async def with_scorer(queue: ReplayQueue, tickets: list[Ticket]) -> None:
    await queue.note(WithScorer(tickets=tuple(tickets)))


async def trained(queue: ReplayQueue, update: int) -> Booked:
    return await queue.trained(update, 100 + update, (-1.0,))


async def counters(queue: ReplayQueue) -> Any:
    return (await trained(queue, 10**6)).counters  # of no update: changes nothing


async def still_waits(task: "asyncio.Task[Any]") -> bool:
    await asyncio.sleep(0.05)
    return not task.done()


async def seconds(waiting: Awaitable[Any]) -> float:
    started = time.monotonic()
    await waiting
    return time.monotonic() - started


# Tickets.


def test_tickets_carry_encoded_prompts_holder_and_deadline(place: Place):
    async def story() -> None:
        queue = make_queue(place)
        await installed(queue, A, 0)

        tickets = await take_tickets(queue, A, 3)

        tokenizer = build_tokenizer()
        for index, ticket in enumerate(tickets):
            assert (ticket.ticket_id, ticket.holder, ticket.attempt, ticket.deadline) == (index, A, 0, 1)
            assert tokenizer.decode(ticket.prompt.token_ids) == ticket.prompt.text
            left, right = ticket.prompt.text.rstrip("=").split("+")
            assert ticket.prompt.columns == {"answer": str(int(left) + int(right))}
        assert len({ticket.prompt.prompt_id for ticket in tickets}) == 3

    run(story())


def test_no_more_tickets_than_staleness_allows_until_an_install_wakes_the_waiter(place: Place):
    """B = 4, eta = 0: four groups for version 0; the fifth needs version 1, which needs batch 0."""

    async def story() -> None:
        queue = make_queue(place, "max_staleness=0")
        await installed(queue, A, 0)
        first = await ask(queue, A, 100, 0.0)
        assert first is not None and len(first) == 4
        waiting = asyncio.create_task(ask(queue, A, 100, LONG_S))
        assert await still_waits(waiting)
        await queue.put(scored(first))
        assert (await queue.next_batch(0, 0.0)).summary is not None
        await trained(queue, 0)
        assert await still_waits(waiting), "a decision alone frees no ticket of version 0"

        await installed(queue, A, 1)

        second = await asyncio.wait_for(waiting, 5)
        assert second is not None and [ticket.ticket_id for ticket in second] == [4, 5, 6, 7]
        assert {ticket.deadline for ticket in second} == {1}

    run(story())


def test_waiting_for_tickets_ends_with_none_of_them_after_wait_s(place: Place):
    async def story() -> None:
        queue = make_queue(place)
        await installed(queue, A, 0)
        await ask(queue, A, 100, 0.0)

        async def nothing() -> None:
            assert await ask(queue, A, 1, 0.2) == []

        assert 0.2 <= await seconds(nothing()) < 5

    run(story())


def test_two_holders_share_the_admission_and_each_has_its_own_version(place: Place):
    """eta = 1, U = 1 after the first batch: A at version 1 may fill 3 batches' worth in all, B at version 0 only 2."""

    async def story() -> None:
        queue = make_queue(place, "updates=5")
        await installed(queue, A, 0)
        await installed(queue, B, 0)
        of_a, of_b = await take_tickets(queue, A, 5), await take_tickets(queue, B, 3)
        assert await ask(queue, A, 1, 0.0) == [] and await ask(queue, B, 1, 0.0) == []
        assert {t.holder for t in of_a} == {A} and {t.holder for t in of_b} == {B}
        await queue.put(scored(of_a[:4]))
        assert (await queue.next_batch(0, 0.0)).summary is not None

        await installed(queue, A, 1)

        assert await ask(queue, B, 1, 0.0) == []
        more = await ask(queue, A, 100, 0.0)
        assert more is not None and len(more) == 4 and {t.deadline for t in more} == {2}

    run(story())


def test_an_older_install_that_reports_late_does_not_take_a_version_back(place: Place):
    async def story() -> None:
        queue = make_queue(place, "updates=5", "max_staleness=0")
        await installed(queue, A, 0)
        await queue.put(scored(await take_tickets(queue, A, 4)))
        await queue.next_batch(0, 0.0)
        await installed(queue, A, 1)
        await installed(queue, A, 0)

        tickets = await ask(queue, A, 100, 0.0)

        assert tickets is not None and {ticket.deadline for ticket in tickets} == {1}

    run(story())


def test_a_lost_ticket_goes_out_again_when_its_lease_is_over(place: Place):
    async def story() -> None:
        queue = make_queue(place, "queue.lease_s=0.1", "timeouts.generate_s=0.05")
        await installed(queue, A, 0)
        await installed(queue, B, 0)
        old = await take_tickets(queue, A, 1)
        await asyncio.sleep(0.15)

        again = await take_tickets(queue, B, 1)

        assert (again[0].ticket_id, again[0].attempt, again[0].holder) == (old[0].ticket_id, 1, B)
        assert again[0].seed == old[0].seed and again[0].prompt.prompt_id == old[0].prompt.prompt_id
        assert await queue.put(scored(old)) == [PutOutcome.STALE_ATTEMPT]
        assert await queue.put(scored(again)) == [PutOutcome.KEPT]

    run(story())


# Batches.


def test_a_batch_waits_for_its_last_group_and_a_put_wakes_it(place: Place):
    async def story() -> None:
        queue = make_queue(place)
        await installed(queue, A, 0)
        tickets = await take_tickets(queue, A, 4)
        waiting = asyncio.create_task(queue.next_batch(0, LONG_S))
        await queue.put(scored(tickets[:3]))
        assert await still_waits(waiting)

        await queue.put(scored(tickets[3:]))

        answer = await asyncio.wait_for(waiting, 5)
        assert answer.summary is not None and answer.summary.ticket_ids == (0, 1, 2, 3)
        assert answer.counters.taken == 4 and answer.counters.waiting == 0 and not answer.closed

    run(story())


def test_waiting_for_a_batch_ends_without_one_after_wait_s(place: Place):
    async def story() -> None:
        queue = make_queue(place)
        await installed(queue, A, 0)
        await take_tickets(queue, A, 2)

        async def nothing() -> None:
            answer = await queue.next_batch(0, 0.2)
            assert answer.summary is None and not answer.closed
            assert (answer.counters.leased, answer.counters.waiting) == (2, 0)

        assert 0.2 <= await seconds(nothing()) < 5

    run(story())


def test_asking_again_for_a_batch_or_a_shard_gives_the_same(place: Place):
    async def story() -> None:
        queue = make_queue(place, "learner.num_ranks=2")
        await installed(queue, A, 0)
        await queue.put(scored(await take_tickets(queue, A, 8)))
        first = await queue.next_batch(0, 0.0)
        shard = await queue.take(0, 1)

        again = await queue.next_batch(0, 0.0)

        assert again == first and again.counters.taken == 4
        assert (await queue.take(0, 1))[1] is shard[1] and shard[0] == 0
        await trained(queue, 0)
        assert (await trained(queue, 0)).counters.trained == 4
        assert (await queue.next_batch(1, 0.0)).summary is not None

    run(story())


@pytest.mark.parametrize(("ranks", "minibatches"), [(1, 1), (2, 1), (2, 2), (1, 4), (4, 1)])
def test_shards_cover_the_batch_exactly(ranks: int, minibatches: int, place: Place):
    async def story() -> None:
        queue = make_queue(place, f"learner.num_ranks={ranks}", f"algorithm.minibatches_per_batch={minibatches}")
        await installed(queue, A, 0)
        groups = scored(await take_tickets(queue, A, 4))
        await queue.put(groups)
        await queue.next_batch(0, 0.0)

        shards = [(await queue.take(0, rank))[1] for rank in range(ranks)]

        assert all(len(shard) == minibatches and {len(part) for part in shard} == {4 // ranks // minibatches} for shard in shards)
        dealt = [group for shard in shards for part in shard for group in part]
        assert sorted(map(id, dealt)) == sorted(map(id, groups))

    run(story())


@pytest.mark.parametrize("update", [1, 5])
def test_a_batch_out_of_turn_is_an_error(update: int, place: Place):
    async def story() -> None:
        with pytest.raises(RunError, match=f"batch {update} was asked for, but 0 is next"):
            await make_queue(place).next_batch(update, 0.0)

    run(story())


def test_a_shard_of_a_batch_that_is_not_the_decided_one_is_an_error(place: Place):
    async def story() -> None:
        with pytest.raises((AssertionError, RunError), match="batch 0"):
            await make_queue(place).take(0, 0)

    run(story())


# Puts.


def test_putting_never_waits_for_room_even_while_others_wait(place: Place):
    async def story() -> None:
        queue = make_queue(place)
        await installed(queue, A, 0)
        tickets = await take_tickets(queue, A, 8)
        waiting = [asyncio.create_task(ask(queue, A, 1, LONG_S)) for _ in range(3)]
        await asyncio.sleep(0)

        outcomes = await asyncio.wait_for(queue.put(scored(tickets)), 20)

        assert outcomes == [PutOutcome.KEPT] * 8
        for task in waiting:
            task.cancel()

    run(story())


def test_a_second_put_of_a_group_is_refused_and_counted(place: Place):
    async def story() -> None:
        queue = make_queue(place)
        await installed(queue, A, 0)
        groups = scored(await take_tickets(queue, A, 1))

        assert await queue.put([*groups, *groups]) == [PutOutcome.KEPT, PutOutcome.DUPLICATE]
        counters = (await queue.next_batch(0, 0.0)).counters
        assert counters.refused == {"duplicate": 1} and counters.waiting == 1 and counters.balanced

    run(story())


def test_groups_with_a_scorer_are_counted_there(place: Place):
    async def story() -> None:
        queue = make_queue(place)
        await installed(queue, A, 0)
        await with_scorer(queue, await take_tickets(queue, A, 3))

        counters = (await queue.next_batch(0, 0.0)).counters

        assert (counters.leased, counters.scoring) == (0, 3)

    run(story())


def test_a_replaced_tie_counts_in_the_mean_reward_and_frees_a_ticket(place: Place):
    """Four kept groups of mean .5 and one tie at 1: (8 * .5 + 2 * 1) / 10 = .6; the next update starts afresh."""

    async def story() -> None:
        queue = make_queue(place, "queue.ties=replace")
        await installed(queue, A, 0)
        tickets = await take_tickets(queue, A, 8)
        assert await ask(queue, A, 1, 0.0) == []
        assert await queue.put(scored(tickets[:1], scores=(1.0, 1.0))) == [PutOutcome.TIED]
        tickets += await take_tickets(queue, A, 1)
        await queue.put(scored(tickets[1:5]))

        first = (await queue.next_batch(0, 0.0)).summary
        await queue.put(scored(tickets[5:9], scores=(0.0, 0.5)))
        second = (await queue.next_batch(1, 0.0)).summary

        assert first is not None and first.metrics["reward/mean"] == pytest.approx(0.6, abs=1e-6)
        assert first.metrics["reward/batch_mean"] == pytest.approx(0.5, abs=1e-6)
        assert second is not None and second.metrics["reward/mean"] == pytest.approx(0.25, abs=1e-6)

    run(story())


# The end.


def test_the_last_decision_wakes_every_waiter_with_the_end(place: Place):
    async def story() -> None:
        queue = make_queue(place)
        await installed(queue, A, 0)
        await installed(queue, B, 0)
        await queue.put(scored(await take_tickets(queue, A, 8)))
        await queue.next_batch(0, 0.0)
        await trained(queue, 0)
        waiting = [asyncio.create_task(ask(queue, holder, 1, LONG_S)) for holder in (A, B, B)]
        assert await still_waits(waiting[0])

        last = await queue.next_batch(1, 0.0)

        assert last.summary is not None
        assert await asyncio.wait_for(asyncio.gather(*waiting), 5) == [None, None, None]
        await trained(queue, 1)
        end = await queue.next_batch(2, LONG_S)
        assert end.summary is None and end.closed and end.counters.trained == 8 and end.counters.balanced

    run(story())


@pytest.mark.parametrize(("last_batch", "sizes"), [("short", [4, 2]), ("drop", [4])])
def test_prompts_that_run_out_end_with_a_short_batch_or_without_it(last_batch: str, sizes: list[int], place: Place):
    """Six problems in one pass, batches of four."""

    async def story() -> None:
        queue = make_queue(
            place, "updates=9", "task.num_train=6", "queue.max_epochs=1", f"queue.last_batch={last_batch}", "max_staleness=3"
        )
        await installed(queue, A, 0)
        await queue.put(scored(await take_tickets(queue, A, 6)))
        found: list[int] = []
        while (answer := await queue.next_batch(len(found), 1.0)).summary is not None:
            found.append(answer.summary.num_groups)

        assert found == sizes and answer.closed
        assert sum(answer.counters.dropped.values()) == 6 - sum(sizes)
        assert await ask(queue, A, 1, LONG_S) is None

    run(story())


@pytest.mark.parametrize("eta", [0, 1, 3])
def test_no_trained_token_is_ever_older_than_max_staleness(eta: int, place: Place):
    """Two generators of different speed, one of which installs each version late; six updates to the end."""

    async def story() -> None:
        queue = make_queue(place, "updates=6", f"max_staleness={eta}")
        newest = 0
        staleness: list[int] = []

        async def generate(holder: str, pause_s: float, lag_s: float) -> None:
            version = 0
            await installed(queue, holder, 0)
            while (tickets := await ask(queue, holder, 2, 0.2)) is not None:
                sampled_by = version
                await asyncio.sleep(pause_s)
                await with_scorer(queue, tickets)
                await queue.put(scored(tickets, version=sampled_by))
                if newest > version:
                    version = newest
                    await asyncio.sleep(lag_s)
                    await installed(queue, holder, version)

        async def learn() -> None:
            nonlocal newest
            for update in range(6):
                answer = await queue.next_batch(update, LONG_S)
                assert answer.summary is not None and answer.counters.balanced
                staleness.append(answer.summary.staleness_max)
                await trained(queue, update)
                newest = update + 1

        await asyncio.gather(generate(A, 0.001, 0.0), generate(B, 0.02, 0.01), learn())

        assert len(staleness) == 6 and max(staleness) <= eta

    run(story())


# A queue that dies, and the one after it.

WORLD = (
    "updates=3",
    "batch_groups=2",
    "queue.ties=replace",
    "queue.max_replacements_per_batch=1",
    "reward.normalize=true",
    "learner.num_ranks=2",
)
Answers = dict[str, Any]
Call = Callable[[ReplayQueue, Answers], Awaitable[Any]]


def groups_of(answers: Answers, tickets: str, *indices: int, version: int = 0, scores: tuple[float, ...] = (1.0, 0.0)) -> list[ScoredGroup]:
    return scored([answers[tickets][index] for index in indices], version=version, scores=scores)


STORY: dict[str, Call] = {
    "A installs 0": lambda queue, _: installed(queue, A, 0),
    "A asks": lambda queue, _: queue.tickets(A, 0, 1, 3, 0.0),
    "B asks": lambda queue, _: queue.tickets(B, 0, 1, 9, 0.0),
    "A has two scored": lambda queue, seen: with_scorer(queue, seen["A asks"][:2]),
    "A puts one and a tie": lambda queue, seen: queue.put(
        [*groups_of(seen, "A asks", 0, scores=(0.5, 0.25)), *groups_of(seen, "A asks", 1, scores=(1.0, 1.0))]
    ),
    "nothing yet": lambda queue, _: queue.next_batch(0, 0.0),
    "B puts": lambda queue, seen: queue.put(groups_of(seen, "B asks", 0, scores=(3.0, 0.0))),
    "batch 0": lambda queue, _: queue.next_batch(0, 0.0),
    "shard 0.0": lambda queue, _: queue.take(0, 0),
    "shard 0.1": lambda queue, _: queue.take(0, 1),
    "trained 0": lambda queue, _: trained(queue, 0),
    "A asks again": lambda queue, _: queue.tickets(A, 1, 2, 9, 0.0),
    "checkpoint": lambda queue, _: queue.checkpoint(),
    "A dies": lambda queue, _: queue.note(HolderGone(holder=A)),
    "C asks": lambda queue, _: queue.tickets("C", 1, 1, 9, 0.0),
    "C has one scored": lambda queue, seen: with_scorer(queue, seen["C asks"][:1]),
    "C puts": lambda queue, seen: queue.put(groups_of(seen, "C asks", 1, 2, version=1, scores=(0.0, 0.5))),
    "batch 1": lambda queue, _: queue.next_batch(1, 0.0),
    "shard 1.0": lambda queue, _: queue.take(1, 0),
    "shard 0.1 again": lambda queue, _: queue.take(0, 1),
    "trained 1": lambda queue, _: trained(queue, 1),
    "kept": lambda queue, _: queue.note(Kept(version=1)),
    "C dies": lambda queue, _: queue.note(HolderGone(holder="C")),
    "D asks": lambda queue, _: queue.tickets("D", 2, 1, 9, 0.0),
    "D puts": lambda queue, seen: queue.put(groups_of(seen, "D asks", *range(len(seen["D asks"])), version=2)),
    "C puts late": lambda queue, seen: queue.put(groups_of(seen, "C asks", 0, version=1)),
    "batch 2": lambda queue, _: queue.next_batch(2, 0.0),
    "shard 2.0": lambda queue, _: queue.take(2, 0),
    "trained 2": lambda queue, _: trained(queue, 2),
    "the end": lambda queue, _: queue.next_batch(3, 0.0),
    "no more tickets": lambda queue, _: queue.tickets(A, 3, 3, 1, 0.0),
}
PUTS = {name for name in STORY if "put" in name}


async def lived_through(place: Place, dies_after: str | None, *, unheard: bool = False) -> Answers:
    """The answers to all calls; the queue dies after one of them, whose answer was heard, or is asked for again."""
    queue, answers = make_queue(place, *WORLD), dict[str, Any]()
    for name, call in STORY.items():
        answers[name] = await call(queue, answers)
        if name == dies_after:
            kill(queue)
            queue = make_queue(place, *WORLD)
            if unheard:
                again = await call(queue, answers)
                answers[name] = answers[name] if name in PUTS else again
                if name in PUTS:
                    assert set(again) == {PutOutcome.DUPLICATE}
    kill(queue)
    return answers


def without_refusals(answers: Answers) -> Any:
    """What must not depend on deaths; a put that is made again counts as a duplicate, and a checkpoint begins where it is made."""

    def of(answer: Any) -> Any:
        if isinstance(answer, NextBatch | Booked):
            return replace(answer, counters=replace(answer.counters, refused={}))
        if isinstance(answer, QueueCounters):
            return replace(answer, refused={})
        return None if isinstance(answer, Mark) else answer

    return {name: plain(of(answer)) for name, answer in answers.items()}


def test_the_story_has_everything_in_it(place: Place):
    async def story() -> None:
        answers = await lived_through(place, None)

        assert [len(answers[name]) for name in ("A asks", "B asks", "A asks again", "C asks", "D asks")] == [3, 1, 3, 4, 1]
        assert answers["A puts one and a tie"] == [PutOutcome.KEPT, PutOutcome.TIED]
        assert [ticket.attempt for ticket in (*answers["C asks"], *answers["D asks"])] == [1, 1, 1, 1, 2]
        assert all(answers[f"batch {update}"].summary is not None for update in range(3)) and answers["the end"].closed
        assert plain(answers["shard 0.1"]) == plain(answers["shard 0.1 again"])
        assert answers["no more tickets"] is None and answers["trained 2"].counters.balanced
        _, ((shaped,),) = answers["shard 1.0"]
        assert plain(shaped.scores) != plain(shaped.judged_scores), "the second batch is shaped by the first"

    run(story())


@pytest.mark.parametrize("unheard", [False, True], ids=["heard", "unheard"])
def test_a_queue_that_dies_after_any_call_goes_on_as_if_it_had_not(unheard: bool, tokenizer: Path, tmp_path: Path):
    """Tickets, batches, shards bit for bit, counters, moments, and whether a call that is made again changes anything."""

    async def story() -> None:
        expected = without_refusals(await lived_through(Place(tokenizer=tokenizer, run=tmp_path / "never"), None))
        for index, name in enumerate(STORY):
            found = without_refusals(await lived_through(Place(tokenizer=tokenizer, run=tmp_path / str(index)), name, unheard=unheard))
            for call, answer in expected.items():
                assert found[call] == answer, f"died after {name!r}: {call!r} is answered otherwise"

    run(story())


def test_a_failure_that_is_reported_again_by_a_caller_that_never_heard_counts_once(place: Place):
    """max_attempts 2: a second failure would void the prompt."""

    async def story() -> None:
        queue = make_queue(place, "queue.max_attempts=2")
        failed = ScoringFailed(tickets=tuple(await take_tickets(queue, A, 1)), reason="boom")
        await queue.note(failed)
        kill(queue)
        queue = make_queue(place, "queue.max_attempts=2")

        await queue.note(failed)

        assert (await counters(queue)).voided == {} and (await counters(queue)).lost == 1

    run(story())


def test_groups_of_a_put_that_died_halfway_are_all_there_or_asked_for_again(place: Place):
    """Some of the groups were kept before: the same call again keeps the rest."""

    async def story() -> None:
        queue = make_queue(place)
        groups = scored(await take_tickets(queue, A, 3))
        await queue.put(groups[:2])
        kill(queue)
        queue = make_queue(place)

        assert await queue.put(groups) == [PutOutcome.DUPLICATE, PutOutcome.DUPLICATE, PutOutcome.KEPT]

    run(story())


def test_leases_of_before_a_restart_run_on_this_queues_clock(place: Place):
    async def story() -> None:
        settings = ("queue.lease_s=0.2", "timeouts.generate_s=0.1")
        queue = make_queue(place, *settings)
        await take_tickets(queue, A, 1)
        kill(queue)
        await asyncio.sleep(0.25)
        queue = make_queue(place, *settings)
        assert (await counters(queue)).leased == 1 and (await counters(queue)).lost == 0

        await asyncio.sleep(0.25)

        assert [ticket.attempt for ticket in await take_tickets(queue, B, 1)] == [1]

    run(story())


def test_a_new_driver_revokes_every_lease_and_keeps_every_group(place: Place):
    async def story() -> None:
        queue = make_queue(place)
        of_a, of_b = await take_tickets(queue, A, 4), await take_tickets(queue, B, 3)
        await with_scorer(queue, of_a[:3])
        await queue.put(scored(of_a[:2]))
        kill(queue)

        queue = make_queue(place, session=1)

        now = await counters(queue)
        assert (now.leased, now.lost, now.scoring, now.waiting) == (5, 5, 0, 2) and now.balanced
        again = await take_tickets(queue, "generator-0.1.0", 5)
        assert [(ticket.ticket_id, ticket.attempt) for ticket in again] == [(2, 1), (3, 1), (4, 1), (5, 1), (6, 1)]
        assert [ticket.seed for ticket in again] == [ticket.seed for ticket in (*of_a[2:], *of_b)]
        assert await queue.put(scored(of_b)) == [PutOutcome.STALE_ATTEMPT] * 3
        await queue.put(scored(again[:2]))
        assert (await queue.next_batch(0, 0.0)).summary is not None

    run(story())


def test_the_same_driver_again_revokes_nothing_and_an_older_one_neither(place: Place):
    async def story() -> None:
        kill(make_queue(place, session=2))
        queue = make_queue(place, session=2)
        await take_tickets(queue, A, 2)
        for session in (2, 1):
            kill(queue)
            queue = make_queue(place, session=session)
            assert (await counters(queue)).lost == 0

    run(story())


def test_request_numbers_of_the_driver_before_are_forgotten(place: Place):
    """Incarnations have their own names in each session; should one repeat, its first request is new all the same."""

    async def story() -> None:
        queue = make_queue(place)
        first = await queue.tickets(A, 0, 1, 2, 0.0)
        kill(queue)
        queue = make_queue(place, session=1)

        again = await queue.tickets(A, 0, 1, 2, 0.0)

        assert first is not None and again is not None
        assert [(t.ticket_id, t.attempt) for t in again] == [(t.ticket_id, 1) for t in first]

    run(story())


@pytest.mark.parametrize(("setting", "was"), [("batch_groups=8", "batch_groups 4 -> 8"), ("max_staleness=0", "max_staleness 1 -> 0")])
def test_settings_that_the_bound_rests_on_may_not_change(setting: str, was: str, place: Place):
    async def story() -> None:
        kill(make_queue(place))

        with pytest.raises(ConfigError, match=f"written under other settings.*: {was}; undo the change"):
            make_queue(place, setting, session=1)

    run(story())


def test_other_settings_may_change(place: Place):
    async def story() -> None:
        kill(make_queue(place))
        queue = make_queue(place, "updates=3", "queue.ties=replace", "queue.lease_s=5000", session=1)
        assert await take_tickets(queue, A, 8)

    run(story())


def test_two_queues_never_write_one_journal(place: Place, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(replay_queue, "LOCK_WAIT_S", 0.3)

    async def story() -> None:
        queue = make_queue(place)

        with pytest.raises(JournalLockedError):
            make_queue(place)

        assert await take_tickets(queue, A, 1)

    run(story())


def test_a_new_queue_waits_for_one_that_was_just_killed(place: Place):
    async def story() -> None:
        queue = make_queue(place)
        asyncio.get_running_loop().run_in_executor(None, lambda: (time.sleep(0.5), queue._journal.close()))

        assert await take_tickets(make_queue(place), A, 1)

    run(story())


def test_a_damaged_journal_is_refused_by_name(place: Place):
    async def story() -> None:
        queue = make_queue(place)
        await take_tickets(queue, A, 2)
        await queue.checkpoint()
        kill(queue)
        path = segment_path(place.run / "journal", 0)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

        with pytest.raises(JournalError, match=path.name):
            make_queue(place)

    run(story())


def test_what_was_answered_is_in_the_journal_before_the_answer(place: Place):
    """A copy of the files at the moment of the answer holds the change, without any further call, close or sync."""

    async def story() -> None:
        queue = make_queue(place)

        def seen() -> Any:
            copy = Place(tokenizer=place.tokenizer, run=place.run / f"copy-{next(REQUESTS)}")
            (copy.run / "journal").mkdir(parents=True)
            for file in (place.run / "journal").glob("segment-*"):
                (copy.run / "journal" / file.name).write_bytes(file.read_bytes())
            return make_queue(copy)

        tickets = await take_tickets(queue, A, 5)
        assert (await counters(seen())).leased == 5
        await with_scorer(queue, tickets)
        assert (await counters(seen())).scoring == 5
        await queue.put(scored(tickets))
        assert (await counters(seen())).waiting == 5
        await queue.next_batch(0, 0.0)
        assert (await counters(seen())).taken == 4
        await trained(queue, 0)
        assert (await counters(seen())).trained == 4
        await queue.note(HolderGone(holder=A))
        await queue.note(ScoringFailed(tickets=tuple(await take_tickets(queue, B, 1)), reason="boom"))
        assert (await counters(seen())).lost == 1

    run(story())


# Facts.


def test_leases_of_a_generator_that_is_gone_wake_who_waits_for_tickets(place: Place):
    async def story() -> None:
        queue = make_queue(place)
        await take_tickets(queue, A, 8)
        waiting = asyncio.create_task(ask(queue, B, 9, LONG_S))
        assert await still_waits(waiting)

        await queue.note(HolderGone(holder=A))

        tickets = await asyncio.wait_for(waiting, 5)
        assert tickets is not None and [ticket.attempt for ticket in tickets] == [1] * 8

    run(story())


def test_a_request_that_outlives_its_generator_gets_nothing(place: Place):
    """The queue still holds the dead generator's last call when it learns of the death: the leases are for the living."""

    async def story() -> None:
        queue = make_queue(place)
        await take_tickets(queue, A, 8)
        of_the_dead = asyncio.create_task(ask(queue, A, 9, 0.3))
        assert await still_waits(of_the_dead)

        await queue.note(HolderGone(holder=A))

        assert await of_the_dead == []
        assert [ticket.attempt for ticket in await take_tickets(queue, B, 8)] == [1] * 8

    run(story())


def test_requests_from_before_an_undoing_get_nothing_and_do_no_harm(place: Place):
    """Their generators hold weights that no longer exist, and are about to be replaced; one waits, another one asks only now."""

    async def story() -> None:
        queue = make_queue(place, "updates=9")
        await train_batches(queue, 0, 1, 2)
        assert await queue.tickets(B, 3, next(REQUESTS), 99, 0.0)
        waiting = asyncio.create_task(queue.tickets(B, 3, next(REQUESTS), 9, 0.3))
        assert await still_waits(waiting)

        await queue.note(Undone(version=1, newest_faithful=1))

        assert await waiting == []
        started = time.monotonic()
        assert await queue.tickets(A, 3, next(REQUESTS), 9, 0.2) == []
        assert time.monotonic() - started >= 0.2, "whoever asks in vain does so slowly"
        assert await queue.tickets("generator-0.0.1", 1, 1, 9, 0.0)

    run(story())


def test_a_group_that_nobody_could_score_goes_out_again_and_wakes_who_waits(place: Place):
    async def story() -> None:
        queue = make_queue(place)
        tickets = await take_tickets(queue, A, 8)
        await with_scorer(queue, tickets)
        waiting = asyncio.create_task(ask(queue, B, 9, LONG_S))
        assert await still_waits(waiting)

        await queue.note(ScoringFailed(tickets=(tickets[3],), reason="boom"))

        again = await asyncio.wait_for(waiting, 5)
        assert again is not None and [(ticket.ticket_id, ticket.attempt) for ticket in again] == [(3, 1)]

    run(story())


def test_a_request_names_the_version_even_when_its_install_was_never_noted(place: Place):
    """The note may have died with the queue before this one."""

    async def story() -> None:
        queue = make_queue(place, "max_staleness=0")
        await queue.put(scored(await take_tickets(queue, A, 4)))
        await queue.next_batch(0, 0.0)
        kill(queue)
        queue = make_queue(place, "max_staleness=0")

        tickets = await queue.tickets(A, 1, 7, 9, 0.0)

        assert tickets is not None and {ticket.deadline for ticket in tickets} == {1} and len(tickets) == 4

    run(story())


# Training again.


def test_an_update_that_is_trained_again_says_how_far_it_came_out_from_the_first_time(place: Place):
    async def story() -> None:
        queue = make_queue(place)
        await queue.put(scored(await take_tickets(queue, A, 4)))
        await queue.next_batch(0, 0.0)
        assert (await queue.trained(0, 5, (-1.0, -2.0))).replay_error_nats == 0.0
        kill(queue)
        queue = make_queue(place)

        assert (await queue.trained(0, 5, (-1.0, -2.0))).replay_error_nats == 0.0
        again = await queue.trained(0, 6, (-1.25, -2.0))

        assert again.replay_error_nats == pytest.approx(0.25) and again.counters.trained == 4

    run(story())


def test_a_batch_that_was_trained_is_dealt_out_again_after_any_restart_bit_for_bit(place: Place):
    """A learner that fell back gets the same summaries and shards, also of batches before the last."""

    async def story() -> None:
        settings = ("updates=4", "reward.normalize=true", "learner.num_ranks=2")
        queue = make_queue(place, *settings)
        summaries, shards = [], []
        for update in range(3):
            await installed(queue, A, update)
            await queue.put(scored(await take_tickets(queue, A, 4), version=update, scores=(update + 0.5, 0.25, 4.0)))
            summaries.append((await queue.next_batch(update, 0.0)).summary)
            shards.append([await queue.take(update, rank) for rank in range(2)])
            await trained(queue, update)
        kill(queue)
        queue = make_queue(place, *settings, session=1)

        for update in (1, 2, 0):
            assert (await queue.next_batch(update, 0.0)).summary == summaries[update]
            assert plain([await queue.take(update, rank) for rank in range(2)]) == plain(shards[update])

    run(story())


# Checkpoints, and what they let go.


async def train_batches(queue: ReplayQueue, *updates: int) -> list[list[ScoredGroup]]:
    """One full batch per update, trained; returns their groups in the order of the batch, as they were put."""
    batches: list[list[ScoredGroup]] = []
    for update in updates:
        await installed(queue, A, update)
        groups = scored(await take_tickets(queue, A, 4), version=update, scores=(update + 0.5, 0.25))
        await queue.put(groups)
        summary = (await queue.next_batch(update, 0.0)).summary
        assert summary is not None
        by_id = {group.group.ticket.ticket_id: group for group in groups}
        batches.append([by_id[ticket_id] for ticket_id in summary.ticket_ids])
        await trained(queue, update)
    return batches


def segments(place: Place) -> list[str]:
    return sorted(path.name for path in (place.run / "journal").glob("segment-*"))


def parts(place: Place) -> list[str]:
    return sorted(path.name for path in (place.run / "rollouts").glob("*"))


def test_a_checkpoint_marks_how_far_the_history_goes_and_that_much_is_on_the_disk(place: Place):
    async def story() -> None:
        queue = make_queue(place, "updates=9")
        await train_batches(queue, 0)

        mark = await queue.checkpoint()

        check_mark(place.run / "journal", mark)
        await train_batches(queue, 1)
        check_mark(place.run / "journal", mark)
        kill(queue)
        segment_path(place.run / "journal", mark.segment).write_bytes(b"")
        with pytest.raises(JournalError):
            check_mark(place.run / "journal", mark)

    run(story())


def test_segments_that_no_checkpoint_needs_become_the_dataset(place: Place):
    """Checkpoints after updates 0, 1, 2; the oldest kept is of version 2: what came before its segment is exported and gone."""

    async def story() -> None:
        queue, batches = make_queue(place, "updates=9"), list[list[ScoredGroup]]()
        for update in range(3):
            batches += await train_batches(queue, update)
            await queue.checkpoint()

        await queue.note(Kept(version=2))

        assert parts(place) == ["part-00000000.parquet", "part-00000001.parquet"]
        assert segments(place) == ["segment-00000002.log", "segment-00000003.log"]
        found = list(read_trained(place.run / "rollouts"))
        assert plain(found) == plain([(0, batches[0]), (1, batches[1])])
        for update in (0, 1):
            with pytest.raises(RunError, match=f"batch {update} was asked for, but 3 is next and it is no longer kept"):
                await queue.next_batch(update, 0.0)
        assert (await queue.next_batch(2, 0.0)).summary is not None
        kill(queue)

        queue = make_queue(place, "updates=9", session=1)

        assert (await queue.next_batch(2, 0.0)).summary is not None
        assert (await counters(queue)).trained == 12
        await train_batches(queue, 3)
        await queue.checkpoint()
        await queue.note(Kept(version=4))
        assert [update for update, _ in read_trained(place.run / "rollouts")] == [0, 1, 2, 3]

    run(story())


@pytest.mark.parametrize("version", [0, 1])
def test_nothing_goes_that_the_oldest_checkpoint_needs(version: int, place: Place):
    """Version 0: no checkpoint at all. Version 1: batch 1 is still needed, and it is in the segment that began there."""

    async def story() -> None:
        queue = make_queue(place, "updates=9")
        for update in range(2):
            await train_batches(queue, update)
            if update >= 1 - version:
                await queue.checkpoint()

        await queue.note(Kept(version=version))

        for update in range(version, 2):
            assert (await queue.next_batch(update, 0.0)).summary is not None
            assert (await queue.take(update, 0))[0] == update

    run(story())


def test_an_export_that_died_halfway_is_made_again(place: Place):
    """Part 0 was written, its segment not yet removed; the same fact again, to the next queue."""

    async def story() -> None:
        queue = make_queue(place, "updates=9")
        batches = await train_batches(queue, 0)
        await queue.checkpoint()
        kill(queue)
        replay_queue.export_segment(place.run, 0)
        (place.run / "rollouts" / ".part-00000001.parquet.unfinished").write_bytes(b"half")
        queue = make_queue(place, "updates=9")

        await queue.note(Kept(version=1))
        await queue.note(Kept(version=1))

        assert segments(place) == ["segment-00000001.log"]
        assert plain(list(read_trained(place.run / "rollouts"))) == plain([(0, batches[0])])

    run(story())


def test_waiting_groups_outlive_the_segment_that_they_came_in_with(place: Place):
    async def story() -> None:
        queue = make_queue(place, "updates=9", "max_staleness=3")
        early = scored(await take_tickets(queue, A, 2))
        await queue.put(early)
        more = scored(await take_tickets(queue, A, 3))
        await queue.put(more)
        await queue.next_batch(0, 0.0)
        await trained(queue, 0)
        await queue.checkpoint()
        await queue.note(Kept(version=1))
        kill(queue)
        queue = make_queue(place, "updates=9", "max_staleness=3")

        await queue.put(scored(await take_tickets(queue, A, 3)))

        assert (await queue.next_batch(1, 0.0)).summary is not None
        _, ((*batch,),) = await queue.take(1, 0)
        (old,) = [group for group in batch if group.group.ticket.ticket_id == 4]
        assert plain(old) == plain(more[2])

    run(story())


# History undone.


def test_undone_batches_give_back_what_living_policies_sampled_and_void_the_rest(place: Place):
    """Batches 0 to 2 of versions 0 to 2; the learner goes on from version 1: groups of version 2 never happened."""

    async def story() -> None:
        queue = make_queue(place, "updates=9")
        await train_batches(queue, 0, 1, 2)
        await installed(queue, A, 3)
        waiting, leased = await take_tickets(queue, A, 1), await take_tickets(queue, A, 2)
        await queue.put(scored(waiting, version=3))

        await queue.note(Undone(version=1, newest_faithful=1))

        now = await counters(queue)
        assert (now.trained, now.taken, now.waiting, now.leased, now.lost) == (4, 0, 4, 2, 2)
        assert now.voided == {"lost_history": 5} and now.balanced
        assert await queue.put(scored(leased, version=3)) == [PutOutcome.STALE_ATTEMPT] * 2
        again = await queue.next_batch(1, 0.0)
        assert again.summary is not None and again.summary.ticket_ids == (4, 5, 6, 7)

    run(story())


def test_after_an_undoing_the_new_generators_count_from_what_they_install(place: Place):
    async def story() -> None:
        queue = make_queue(place, "updates=9", "max_staleness=0")
        await train_batches(queue, 0, 1)
        await installed(queue, A, 2)
        successor = "generator-0.0.1"

        await queue.note(Undone(version=1, newest_faithful=1))

        assert await queue.tickets(successor, 1, 1, 9, 0.0) == [], "batch 1 is complete: what was undone fills it"
        assert (await queue.next_batch(1, 0.0)).summary is not None
        assert await queue.tickets(successor, 1, 2, 9, 0.0) == []
        tickets = await queue.tickets(successor, 2, 3, 9, 0.0)
        assert tickets is not None and {ticket.deadline for ticket in tickets} == {2}

    run(story())


def test_undoing_survives_the_queue_and_may_be_asked_for_twice(place: Place):
    async def story() -> None:
        queue = make_queue(place, "updates=9")
        await train_batches(queue, 0, 1, 2)
        await queue.note(Undone(version=1, newest_faithful=1))
        expected = plain(await counters(queue))
        kill(queue)
        queue = make_queue(place, "updates=9")
        assert plain(await counters(queue)) == expected

        await queue.note(Undone(version=1, newest_faithful=1))

        assert plain(await counters(queue)) == expected
        answer = await queue.next_batch(1, 0.0)
        assert answer.summary is not None and answer.summary.ticket_ids == (4, 5, 6, 7)

    run(story())


def test_a_batch_decided_anew_is_dealt_out_anew(place: Place):
    """Batch 1 was dealt out before it was undone; whoever takes its second version must not get the first one's shard."""

    async def story() -> None:
        queue = make_queue(place, "updates=9")
        await train_batches(queue, 0, 1)
        await queue.take(1, 0)
        await queue.note(Undone(version=1, newest_faithful=0))
        fresh = scored(await take_tickets(queue, B, 4), version=0)
        await queue.put(fresh)
        answer = await queue.next_batch(1, 0.0)
        assert answer.summary is not None and answer.summary.ticket_ids == (8, 9, 10, 11)

        _, ((*dealt,),) = await queue.take(1, 0)

        assert sorted(group.group.ticket.ticket_id for group in dealt) == [8, 9, 10, 11]

    run(story())


def test_the_dataset_has_an_undone_batch_as_it_was_trained_in_the_end_and_every_group_once(place: Place):
    async def story() -> None:
        queue = make_queue(place, "updates=9")
        batches = await train_batches(queue, 0, 1)
        await queue.note(Undone(version=1, newest_faithful=0))
        fresh = scored(await take_tickets(queue, B, 4), version=0)
        await queue.put(fresh)
        await queue.next_batch(1, 0.0)
        await trained(queue, 1)
        await queue.checkpoint()
        await queue.note(Kept(version=2))

        assert plain(list(read_trained(place.run / "rollouts"))) == plain([(0, batches[0]), (1, fresh)])
        rows = pq.read_table(part_path(place.run / "rollouts", 0)).to_pylist()
        fates = [(row["ticket_id"], row["fate"]) for row in rows if row["completion_index"] == 0]
        assert sorted(fates) == [(n, "trained") for n in range(4)] + [(n, "lost_history") for n in range(4, 8)] + [
            (n, "trained") for n in range(8, 12)
        ]

    run(story())
