"""Between the run folder and the generator pool: wishes come in, answers go out."""

import asyncio
import time
from pathlib import Path
from typing import Protocol

from actors.generator_pool import Say
from async_rlhf.config import Config
from async_rlhf.errors import ConfigError, NoRoomError, RunError
from async_rlhf.scaling import Answer, Outcome, Wish, read_answer, read_wish, write_answer

LOOK_S = 2.0
"""Longest time between two looks for a wish."""


class Pool(Protocol):
    """See GeneratorPool."""

    @property
    def count(self) -> int: ...

    async def scale(self, count: int, say: Say) -> None: ...


async def heed(folder: Path, pool: Pool, config: Config, warn: Say) -> None:
    """Do what the newest wish in the run folder asks for, for ever; a newer one overtakes it.

    Args:
        warn: told of a file that holds no wish, and of an answer that could not be written.
    """
    heeded, warned = _heeded_before(folder), ""
    work: asyncio.Task[None] | None = None
    try:
        while True:
            try:
                wish = await asyncio.to_thread(read_wish, folder)
            except ConfigError as error:
                wish = None
                if str(error) != warned:
                    warned = str(error)
                    warn(warned)
            if wish is not None and wish.wish_id != heeded:
                await _end(work)
                heeded = wish.wish_id
                work = asyncio.create_task(_fulfil(folder, wish, pool, config, warn), name="scale")
            if work is not None and work.done():
                work = work.result()  # only what nobody expected is raised here, and ends the run
            await asyncio.sleep(min(LOOK_S, config.supervision.ping_s))
    finally:
        await _end(work)


async def _fulfil(folder: Path, wish: Wish, pool: Pool, config: Config, warn: Say) -> None:
    began, before, lines = time.monotonic(), pool.count, list[str]()

    def answer(outcome: Outcome, line: str) -> None:
        lines.append(line)
        try:
            write_answer(folder, Answer(wish_id=wish.wish_id, outcome=outcome, generators=pool.count, lines=tuple(lines)))
        except OSError as error:  # the storage may be gone for a moment, and training needs no answer
            warn(f"nobody was told `{line}`: {error}")

    def result(how: str) -> str:
        return f"generators {before} -> {pool.count} {how}"

    answer("working", f"the run has {before} generator(s), and shall have {wish.generators}")
    if config.deterministic:
        answer("failed", "refused: a deterministic run keeps its generators, because other ones sample in other batches")
        return
    try:
        await pool.scale(wish.generators, lambda line: answer("working", line))
    except NoRoomError as error:
        answer("failed", f"refused, nothing has changed: {error}")
    except RunError as error:
        answer("failed", result(f"instead of {wish.generators}: {error}"))
    except asyncio.CancelledError:
        answer("failed", result("so far: overtaken by another wish, or the end of the run"))
        raise
    else:
        answer("done", result(f"after {time.monotonic() - began:.1f} s"))


async def _end(work: "asyncio.Task[None] | None") -> None:
    """Cancel it, and wait for its end; `await work` would not tell its cancellation from ours."""
    if work is not None:
        work.cancel()
        await asyncio.wait({work})
        if not work.cancelled():
            work.result()


def _heeded_before(folder: Path) -> str:
    """The wish that an earlier driver, or nobody, is through with."""
    try:
        answer = read_answer(folder)
    except ConfigError:
        return ""
    return answer.wish_id if answer is not None and answer.outcome != "working" else ""
