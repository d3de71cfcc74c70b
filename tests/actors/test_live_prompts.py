"""A replay queue whose prompts come while the run goes on."""

import asyncio
import json
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from actors.replay_queue import Installed, ReplayQueue
from async_rlhf.errors import ConfigError
from tests.support.rows import dataset_config, numbered, save_tokenizer, write_jsonl
from tests.support.samples import make_scored

pytestmark = pytest.mark.timeout(60)
A = "generator-0.0"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 30))


def make_queue(folder: Path, tokenizer: Path, *overrides: str, session: int = 0) -> ReplayQueue:
    """Two updates of four groups; each row of live.jsonl is asked once."""
    base = ["updates=2", "batch_groups=4", "learner.warmup_steps=0", "queue.ties=keep", "queue.max_epochs=1", "prompts.poll_s=0.05"]
    sources = {"s": {"path": folder / "live.jsonl", "live": "true"}}
    return ReplayQueue(dataset_config(sources, *base, *overrides), str(tokenizer), str(folder), session)


def append(folder: Path, begin: int, end: int) -> None:
    with (folder / "live.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in numbered(begin, end)))


def test_a_generator_that_waits_gets_the_rows_that_come(tmp_path: Path, tokenizer: Path) -> None:
    async def story() -> None:
        write_jsonl(tmp_path / "live.jsonl", numbered(0, 2))
        queue = make_queue(tmp_path, tokenizer)
        await queue.note(Installed(holder=A, version=0))
        first = await queue.tickets(A, 0, 1, 8, 0.0)
        assert first is not None and [ticket.prompt.prompt_id for ticket in first] == ["s/0", "s/1"]

        waiting = asyncio.create_task(queue.tickets(A, 0, 2, 8, 20.0))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        append(tmp_path, 2, 5)
        came = time.monotonic()
        tickets = await waiting

        assert tickets is not None and [ticket.prompt.prompt_id for ticket in tickets] == ["s/2", "s/3", "s/4"]
        assert time.monotonic() - came < 5.0, "it is woken by the next look, long before its wait ends"

    run(story())


def test_a_generator_is_told_that_there_is_nothing_yet_and_the_queue_is_not_at_its_end(tmp_path: Path, tokenizer: Path) -> None:
    async def story() -> None:
        write_jsonl(tmp_path / "live.jsonl", [])
        queue = make_queue(tmp_path, tokenizer)
        await queue.note(Installed(holder=A, version=0))

        started = time.monotonic()
        assert await queue.tickets(A, 0, 1, 8, 0.3) == []
        assert 0.3 <= time.monotonic() - started < 5.0
        batch = await queue.next_batch(0, 0.1)
        assert (batch.summary, batch.closed) == (None, False)

    run(story())


def test_a_batch_waits_for_rows_and_is_decided_whole_when_they_are_there(tmp_path: Path, tokenizer: Path) -> None:
    async def story() -> None:
        write_jsonl(tmp_path / "live.jsonl", numbered(0, 3))
        queue = make_queue(tmp_path, tokenizer)
        await queue.note(Installed(holder=A, version=0))
        tickets = await queue.tickets(A, 0, 1, 8, 0.0)
        assert tickets is not None
        await queue.put([make_scored(ticket, version=0, scores=(1.0, 0.0)) for ticket in tickets])
        batch = await queue.next_batch(0, 0.1)
        assert (batch.summary, batch.closed) == (None, False), "three groups of four, and more may come: no short batch"

        append(tmp_path, 3, 4)
        more = await queue.tickets(A, 0, 2, 8, 20.0)
        assert more is not None
        await queue.put([make_scored(ticket, version=0, scores=(1.0, 0.0)) for ticket in more])

        batch = await queue.next_batch(0, 1.0)
        assert batch.summary is not None and batch.summary.num_groups == 4

    run(story())


def test_a_queue_that_starts_again_goes_on_behind_the_rows_that_were_asked(tmp_path: Path, tokenizer: Path) -> None:
    async def story() -> None:
        write_jsonl(tmp_path / "live.jsonl", [{"prompt": ""}, *numbered(1, 3)])
        queue = make_queue(tmp_path, tokenizer)
        await queue.note(Installed(holder=A, version=0))
        assert len(await queue.tickets(A, 0, 1, 8, 0.0) or []) == 2
        queue._journal.close()
        append(tmp_path, 3, 5)

        again = make_queue(tmp_path, tokenizer)
        await again.note(Installed(holder=A, version=0))
        tickets = await again.tickets(A, 0, 2, 8, 0.0)

        assert tickets is not None and [ticket.prompt.prompt_id for ticket in tickets] == ["s/3", "s/4"]
        assert (await again.next_batch(0, 0.0)).counters.skipped_rows == {"prompt_empty": 1}

    run(story())


def test_a_source_that_cannot_be_used_ends_the_run_by_its_name(tmp_path: Path, tokenizer: Path) -> None:
    async def story() -> None:
        write_jsonl(tmp_path / "live.jsonl", [{"prompt": None}] * 30)
        queue = make_queue(tmp_path, tokenizer)
        await queue.note(Installed(holder=A, version=0))
        with pytest.raises(ConfigError, match=r"prompts\.sources\.s: 20 of 20 rows cannot be used"):
            await queue.tickets(A, 0, 1, 8, 0.0)

    run(story())
