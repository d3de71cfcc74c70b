"""The replay queue: who waits for what, who wakes whom, and what may be asked twice."""

import asyncio
import time
from collections.abc import Awaitable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from actors.replay_queue import ReplayQueue
from async_rlhf.config import load_config
from async_rlhf.tasks.start import build_tokenizer
from async_rlhf.tickets import PutOutcome
from async_rlhf.types import ScoredGroup, Ticket
from tests.support.samples import make_scored

pytestmark = pytest.mark.timeout(60)
LONG_S = 20.0
A, B = "generator-0.0", "generator-1.0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(path)
    return path


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 30))


def make_queue(folder: Path, *overrides: str) -> ReplayQueue:
    """Two updates of four groups each, staleness up to 1; ties stay."""
    base = ["updates=2", "batch_groups=4", "max_staleness=1", "learner.warmup_steps=0", "queue.ties=keep"]
    return ReplayQueue(load_config(overrides=[*base, *overrides]).config, str(folder))


def scored(tickets: list[Ticket], *, version: int = 0, scores: tuple[float, ...] = (1.0, 0.0)) -> list[ScoredGroup]:
    return [make_scored(ticket, version=version, scores=scores) for ticket in tickets]


async def take_tickets(queue: ReplayQueue, holder: str, count: int) -> list[Ticket]:
    tickets = await queue.tickets(holder, count, 0.0)
    assert tickets is not None and len(tickets) == count
    return tickets


async def still_waits(task: "asyncio.Task[Any]") -> bool:
    await asyncio.sleep(0.05)
    return not task.done()


async def seconds(waiting: Awaitable[Any]) -> float:
    started = time.monotonic()
    await waiting
    return time.monotonic() - started


# Tickets.


def test_tickets_carry_encoded_prompts_holder_and_deadline(folder: Path):
    async def story() -> None:
        queue = make_queue(folder)
        await queue.installed(A, 0)

        tickets = await take_tickets(queue, A, 3)

        tokenizer = build_tokenizer()
        for index, ticket in enumerate(tickets):
            assert (ticket.ticket_id, ticket.holder, ticket.attempt, ticket.deadline) == (index, A, 0, 1)
            assert tokenizer.decode(ticket.prompt.token_ids) == ticket.prompt.text
            left, right = ticket.prompt.text.rstrip("=").split("+")
            assert ticket.prompt.columns == {"answer": str(int(left) + int(right))}
        assert len({ticket.prompt.prompt_id for ticket in tickets}) == 3

    run(story())


def test_no_more_tickets_than_staleness_allows_until_an_install_wakes_the_waiter(folder: Path):
    """B = 4, eta = 0: four groups for version 0; the fifth needs version 1, which needs batch 0."""

    async def story() -> None:
        queue = make_queue(folder, "max_staleness=0")
        await queue.installed(A, 0)
        first = await queue.tickets(A, 100, 0.0)
        assert first is not None and len(first) == 4
        waiting = asyncio.create_task(queue.tickets(A, 100, LONG_S))
        assert await still_waits(waiting)
        await queue.put(scored(first))
        assert (await queue.next_batch(0, 0.0)).summary is not None
        await queue.trained(0)
        assert await still_waits(waiting), "a decision alone frees no ticket of version 0"

        await queue.installed(A, 1)

        second = await asyncio.wait_for(waiting, 5)
        assert second is not None and [ticket.ticket_id for ticket in second] == [4, 5, 6, 7]
        assert {ticket.deadline for ticket in second} == {1}

    run(story())


def test_waiting_for_tickets_ends_with_none_of_them_after_wait_s(folder: Path):
    async def story() -> None:
        queue = make_queue(folder)
        await queue.installed(A, 0)
        await queue.tickets(A, 100, 0.0)

        async def nothing() -> None:
            assert await queue.tickets(A, 1, 0.2) == []

        assert 0.2 <= await seconds(nothing()) < 5

    run(story())


def test_two_holders_share_the_admission_and_each_has_its_own_version(folder: Path):
    """eta = 1, U = 1 after the first batch: A at version 1 may fill 3 batches' worth in all, B at version 0 only 2."""

    async def story() -> None:
        queue = make_queue(folder, "updates=5")
        await queue.installed(A, 0)
        await queue.installed(B, 0)
        of_a, of_b = await take_tickets(queue, A, 5), await take_tickets(queue, B, 3)
        assert await queue.tickets(A, 1, 0.0) == [] and await queue.tickets(B, 1, 0.0) == []
        assert {t.holder for t in of_a} == {A} and {t.holder for t in of_b} == {B}
        await queue.put(scored(of_a[:4]))
        assert (await queue.next_batch(0, 0.0)).summary is not None

        await queue.installed(A, 1)

        assert await queue.tickets(B, 1, 0.0) == []
        more = await queue.tickets(A, 100, 0.0)
        assert more is not None and len(more) == 4 and {t.deadline for t in more} == {2}

    run(story())


def test_an_older_install_that_reports_late_does_not_take_a_version_back(folder: Path):
    async def story() -> None:
        queue = make_queue(folder, "updates=5", "max_staleness=0")
        await queue.installed(A, 0)
        await queue.put(scored(await take_tickets(queue, A, 4)))
        await queue.next_batch(0, 0.0)
        await queue.installed(A, 1)
        await queue.installed(A, 0)

        tickets = await queue.tickets(A, 100, 0.0)

        assert tickets is not None and {ticket.deadline for ticket in tickets} == {1}

    run(story())


def test_a_lost_ticket_goes_out_again_when_its_lease_is_over(folder: Path):
    async def story() -> None:
        queue = make_queue(folder, "queue.lease_s=0.1", "timeouts.generate_s=0.05")
        await queue.installed(A, 0)
        await queue.installed(B, 0)
        old = await take_tickets(queue, A, 1)
        await asyncio.sleep(0.15)

        again = await take_tickets(queue, B, 1)

        assert (again[0].ticket_id, again[0].attempt, again[0].holder) == (old[0].ticket_id, 1, B)
        assert again[0].seed == old[0].seed and again[0].prompt.prompt_id == old[0].prompt.prompt_id
        assert await queue.put(scored(old)) == [PutOutcome.STALE_ATTEMPT]
        assert await queue.put(scored(again)) == [PutOutcome.KEPT]

    run(story())


# Batches.


def test_a_batch_waits_for_its_last_group_and_a_put_wakes_it(folder: Path):
    async def story() -> None:
        queue = make_queue(folder)
        await queue.installed(A, 0)
        tickets = await take_tickets(queue, A, 4)
        waiting = asyncio.create_task(queue.next_batch(0, LONG_S))
        await queue.put(scored(tickets[:3]))
        assert await still_waits(waiting)

        await queue.put(scored(tickets[3:]))

        answer = await asyncio.wait_for(waiting, 5)
        assert answer.summary is not None and answer.summary.ticket_ids == (0, 1, 2, 3)
        assert answer.counters.taken == 4 and answer.counters.waiting == 0 and not answer.closed

    run(story())


def test_waiting_for_a_batch_ends_without_one_after_wait_s(folder: Path):
    async def story() -> None:
        queue = make_queue(folder)
        await queue.installed(A, 0)
        await take_tickets(queue, A, 2)

        async def nothing() -> None:
            answer = await queue.next_batch(0, 0.2)
            assert answer.summary is None and not answer.closed
            assert (answer.counters.leased, answer.counters.waiting) == (2, 0)

        assert 0.2 <= await seconds(nothing()) < 5

    run(story())


def test_asking_again_for_a_batch_or_a_shard_gives_the_same(folder: Path):
    async def story() -> None:
        queue = make_queue(folder, "learner.num_ranks=2")
        await queue.installed(A, 0)
        await queue.put(scored(await take_tickets(queue, A, 8)))
        first = await queue.next_batch(0, 0.0)
        shard = await queue.take(0, 1)

        again = await queue.next_batch(0, 0.0)

        assert again == first and again.counters.taken == 4
        assert await queue.take(0, 1) is shard
        await queue.trained(0)
        assert (await queue.trained(0)).trained == 4
        assert (await queue.next_batch(1, 0.0)).summary is not None

    run(story())


@pytest.mark.parametrize(("ranks", "minibatches"), [(1, 1), (2, 1), (2, 2), (1, 4), (4, 1)])
def test_shards_cover_the_batch_exactly(ranks: int, minibatches: int, folder: Path):
    async def story() -> None:
        queue = make_queue(folder, f"learner.num_ranks={ranks}", f"algorithm.minibatches_per_batch={minibatches}")
        await queue.installed(A, 0)
        groups = scored(await take_tickets(queue, A, 4))
        await queue.put(groups)
        await queue.next_batch(0, 0.0)

        shards = [await queue.take(0, rank) for rank in range(ranks)]

        assert all(len(shard) == minibatches and {len(part) for part in shard} == {4 // ranks // minibatches} for shard in shards)
        dealt = [group for shard in shards for part in shard for group in part]
        assert sorted(map(id, dealt)) == sorted(map(id, groups))

    run(story())


@pytest.mark.parametrize("update", [1, 5])
def test_a_batch_out_of_turn_is_an_error(update: int, folder: Path):
    async def story() -> None:
        with pytest.raises(AssertionError, match=f"batch {update} was asked for, but 0 is next"):
            await make_queue(folder).next_batch(update, 0.0)

    run(story())


def test_a_shard_of_a_batch_that_is_not_the_decided_one_is_an_error(folder: Path):
    async def story() -> None:
        with pytest.raises(AssertionError, match="batch 0 is not the decided one"):
            await make_queue(folder).take(0, 0)

    run(story())


# Puts.


def test_putting_never_waits_for_room_even_while_others_wait(folder: Path):
    async def story() -> None:
        queue = make_queue(folder)
        await queue.installed(A, 0)
        tickets = await take_tickets(queue, A, 8)
        waiting = [asyncio.create_task(queue.tickets(A, 1, LONG_S)) for _ in range(3)]
        await asyncio.sleep(0)

        outcomes = await asyncio.wait_for(queue.put(scored(tickets)), 20)

        assert outcomes == [PutOutcome.KEPT] * 8
        for task in waiting:
            task.cancel()

    run(story())


def test_a_second_put_of_a_group_is_refused_and_counted(folder: Path):
    async def story() -> None:
        queue = make_queue(folder)
        await queue.installed(A, 0)
        groups = scored(await take_tickets(queue, A, 1))

        assert await queue.put([*groups, *groups]) == [PutOutcome.KEPT, PutOutcome.DUPLICATE]
        counters = (await queue.next_batch(0, 0.0)).counters
        assert counters.refused == {"duplicate": 1} and counters.waiting == 1 and counters.balanced

    run(story())


def test_groups_with_a_scorer_are_counted_there(folder: Path):
    async def story() -> None:
        queue = make_queue(folder)
        await queue.installed(A, 0)
        await queue.scoring(await take_tickets(queue, A, 3))

        counters = (await queue.next_batch(0, 0.0)).counters

        assert (counters.leased, counters.scoring) == (0, 3)

    run(story())


def test_a_replaced_tie_counts_in_the_mean_reward_and_frees_a_ticket(folder: Path):
    """Four kept groups of mean .5 and one tie at 1: (8 * .5 + 2 * 1) / 10 = .6; the next update starts afresh."""

    async def story() -> None:
        queue = make_queue(folder, "queue.ties=replace")
        await queue.installed(A, 0)
        tickets = await take_tickets(queue, A, 8)
        assert await queue.tickets(A, 1, 0.0) == []
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


def test_the_last_decision_wakes_every_waiter_with_the_end(folder: Path):
    async def story() -> None:
        queue = make_queue(folder)
        await queue.installed(A, 0)
        await queue.installed(B, 0)
        await queue.put(scored(await take_tickets(queue, A, 8)))
        await queue.next_batch(0, 0.0)
        await queue.trained(0)
        waiting = [asyncio.create_task(queue.tickets(holder, 1, LONG_S)) for holder in (A, B, B)]
        assert await still_waits(waiting[0])

        last = await queue.next_batch(1, 0.0)

        assert last.summary is not None
        assert await asyncio.wait_for(asyncio.gather(*waiting), 5) == [None, None, None]
        await queue.trained(1)
        end = await queue.next_batch(2, LONG_S)
        assert end.summary is None and end.closed and end.counters.trained == 8 and end.counters.balanced

    run(story())


@pytest.mark.parametrize(("last_batch", "sizes"), [("short", [4, 2]), ("drop", [4])])
def test_prompts_that_run_out_end_with_a_short_batch_or_without_it(last_batch: str, sizes: list[int], folder: Path):
    """Six problems in one pass, batches of four."""

    async def story() -> None:
        queue = make_queue(
            folder, "updates=9", "task.num_train=6", "queue.max_epochs=1", f"queue.last_batch={last_batch}", "max_staleness=3"
        )
        await queue.installed(A, 0)
        await queue.put(scored(await take_tickets(queue, A, 6)))
        found: list[int] = []
        while (answer := await queue.next_batch(len(found), 1.0)).summary is not None:
            found.append(answer.summary.num_groups)

        assert found == sizes and answer.closed
        assert sum(answer.counters.dropped.values()) == 6 - sum(sizes)
        assert await queue.tickets(A, 1, LONG_S) is None

    run(story())


@pytest.mark.parametrize("eta", [0, 1, 3])
def test_no_trained_token_is_ever_older_than_max_staleness(eta: int, folder: Path):
    """Two generators of different speed, one of which installs each version late; six updates to the end."""

    async def story() -> None:
        queue = make_queue(folder, "updates=6", f"max_staleness={eta}")
        newest = 0
        staleness: list[int] = []

        async def generate(holder: str, pause_s: float, lag_s: float) -> None:
            version = 0
            await queue.installed(holder, 0)
            while (tickets := await queue.tickets(holder, 2, 0.2)) is not None:
                sampled_by = version
                await asyncio.sleep(pause_s)
                await queue.scoring(tickets)
                await queue.put(scored(tickets, version=sampled_by))
                if newest > version:
                    version = newest
                    await asyncio.sleep(lag_s)
                    await queue.installed(holder, version)

        async def learn() -> None:
            nonlocal newest
            for update in range(6):
                answer = await queue.next_batch(update, LONG_S)
                assert answer.summary is not None and answer.counters.balanced
                staleness.append(answer.summary.staleness_max)
                await queue.trained(update)
                newest = update + 1

        await asyncio.gather(generate(A, 0.001, 0.0), generate(B, 0.02, 0.01), learn())

        assert len(staleness) == 6 and max(staleness) <= eta

    run(story())
