"""Wishes: what a person may ask of a living run, what the driver answers, and what the command makes of it."""

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from actors.scaling import heed
from async_rlhf.commands.guard import HEARTBEAT
from async_rlhf.commands.resume import resumed_configs, settle_wishes
from async_rlhf.commands.scale import run_scale
from async_rlhf.config import Config, load_config, to_yaml
from async_rlhf.errors import ConfigError, DeadlineError, NoRoomError, RunError
from async_rlhf.scaling import (
    SCALED_FILE,
    WANTED_FILE,
    Answer,
    Wish,
    forget_wishes,
    make_wish,
    read_answer,
    read_wish,
    scaled_count,
    write_answer,
    write_wish,
)
from async_rlhf.state import TrainingState, write_atomically

pytestmark = pytest.mark.timeout(60)


# Words.


def test_a_wish_names_the_number_of_generators_and_no_two_are_alike() -> None:
    one, other = make_wish(["generators=4"]), make_wish(["generators=4"])

    assert one.generators == other.generators == 4 and one.wish_id != other.wish_id


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "scale expects generators=N, got nothing"),
        (["4"], "scale expects generators=N once, got '4'"),
        (["scorers=2"], "scale expects generators=N once, got 'scorers=2'"),
        (["generators=2", "generators=3"], "once, got 'generators=2 generators=3'"),
        (["generators"], "once, got 'generators'"),
        (["generators="], "generators must be a whole number, got ''"),
        (["generators=two"], "generators must be a whole number, got 'two'"),
        (["generators=1.5"], "generators must be a whole number, got '1.5'"),
        (["generators=0"], "generators must be from 1 to 4096, got 0"),
        (["generators=-3"], "generators must be from 1 to 4096, got -3"),
        (["generators=4097"], "generators must be from 1 to 4096, got 4097"),
        ([f"generators={'9' * 5000}"], "generators must be a whole number"),
    ],
)
def test_words_that_make_no_sense_are_refused_with_what_was_expected(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_wish(words)
    assert said in str(caught.value)


@given(st.lists(st.text(max_size=12), max_size=3))
def test_any_words_are_a_wish_in_range_or_a_config_error(words: list[str]) -> None:
    with suppress(ConfigError):
        assert 1 <= make_wish(words).generators <= 4096


# Files.


def test_a_wish_and_an_answer_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert read_wish(tmp_path) is None and read_answer(tmp_path) is None and scaled_count(tmp_path) is None
    wish = make_wish(["generators=3"])
    answer = Answer(wish_id=wish.wish_id, outcome="working", generators=2, lines=("one", "two"))

    write_wish(tmp_path, wish)
    write_answer(tmp_path, answer)

    assert read_wish(tmp_path) == wish and read_answer(tmp_path) == answer
    assert sorted(file.name for file in tmp_path.iterdir()) == [SCALED_FILE, WANTED_FILE]


@given(
    st.one_of(
        st.binary(max_size=40),
        st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3)).map(
            json.dumps
        ),
        st.dictionaries(
            st.sampled_from(["wish_id", "generators", "outcome", "lines"]),
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=2),
        ).map(json.dumps),
    )
)
def test_any_file_is_a_wish_an_answer_or_a_config_error(tmp_path_factory: pytest.TempPathFactory, content: str | bytes) -> None:
    folder = tmp_path_factory.mktemp("run")
    for name, read in ((WANTED_FILE, read_wish), (SCALED_FILE, read_answer)):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        try:
            found = read(folder)
        except ConfigError:
            continue
        assert found is not None and found.wish_id and 1 <= found.generators <= 4096


def test_a_file_that_nests_too_deep_is_refused(tmp_path: Path) -> None:
    (tmp_path / WANTED_FILE).write_text("[" * 100_000)

    with pytest.raises(ConfigError, match="cannot be read"):
        read_wish(tmp_path)


@pytest.mark.parametrize(
    ("answer", "count"),
    [
        (None, 4),
        (Answer(wish_id="other", outcome="done", generators=2), 4),
        (Answer(wish_id="w", outcome="working", generators=2), 4),
        (Answer(wish_id="w", outcome="done", generators=4), 4),
        (Answer(wish_id="w", outcome="failed", generators=3), 3),
    ],
    ids=["unheard", "of another wish", "under way", "done", "in part"],
)
def test_a_resumed_run_has_as_many_as_were_there_or_were_wished_and_not_yet_refused(
    tmp_path: Path, answer: Answer | None, count: int
) -> None:
    write_wish(tmp_path, Wish(wish_id="w", generators=4))
    if answer is not None:
        write_answer(tmp_path, answer)

    assert scaled_count(tmp_path) == count

    forget_wishes(tmp_path)
    assert scaled_count(tmp_path) is None


@pytest.mark.parametrize(
    ("words", "count"), [((), 4), (("updates=99",), 4), (("generator.count=3",), 3), (("generator.count=2",), 2)], ids=str
)
def test_resume_takes_the_scaled_number_unless_it_is_told_another_one(tmp_path: Path, words: tuple[str, ...], count: int) -> None:
    folder = make_run(tmp_path / "run", "interrupted", "generator.count=2")
    write_wish(folder, Wish(wish_id="w", generators=4))
    write_answer(folder, Answer(wish_id="w", outcome="done", generators=4))

    before, config = resumed_configs(folder, words)

    assert (before.generator.count, config.generator.count) == (2, count)


@pytest.mark.parametrize("file", [WANTED_FILE, SCALED_FILE])
def test_resume_warns_of_a_wish_that_holds_nonsense_and_goes_on_without_it(tmp_path: Path, console: Console, file: str) -> None:
    """A restart by the guard has nobody who could mend the file."""
    folder = make_run(tmp_path / "run", "interrupted", "generator.count=2")
    write_wish(folder, Wish(wish_id="w", generators=4))
    (folder / file).write_text('{"wish_id": "w"')

    _, config = resumed_configs(folder, ())
    settle_wishes(folder, config.generator.count, console)

    assert config.generator.count == 2 and scaled_count(folder) is None
    said = console.export_text()
    assert said.startswith("warning: ") and file in said and "going on without it, with generator.count=2" in said


@pytest.mark.parametrize("kind", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
@pytest.mark.parametrize("file", [WANTED_FILE, SCALED_FILE])
def test_resume_warns_of_what_is_no_file_and_goes_on_without_it(
    tmp_path: Path, console: Console, file: str, kind: Callable[[Path], None]
) -> None:
    folder = make_run(tmp_path / "run", "interrupted", "generator.count=2")
    write_wish(folder, Wish(wish_id="w", generators=4))
    (folder / file).unlink(missing_ok=True)
    kind(folder / file)

    _, config = resumed_configs(folder, ())
    settle_wishes(folder, config.generator.count, console)

    assert config.generator.count == 2
    assert f"{file} must be a file, got a " in console.export_text()


def test_scale_says_that_a_folder_is_in_the_place_of_its_wish(tmp_path: Path, console: Console) -> None:
    folder = make_run(tmp_path / "run")
    (folder / WANTED_FILE).mkdir()
    before = sorted(folder.iterdir())

    with pytest.raises(ConfigError, match=r"wanted\.json must be a file, got a folder; delete it, and ask again"):
        run_scale(folder, ["generators=2"], 20, console)
    assert sorted(folder.iterdir()) == before


# The driver.


class FakePool:
    """Reaches the count, if it may."""

    def __init__(self, count: int = 1, error: Exception | None = None, pause_s: float = 0.0) -> None:
        self.count, self.error, self.pause_s = count, error, pause_s
        self.asked: list[int] = []

    async def scale(self, count: int, say: Any) -> None:
        self.asked.append(count)
        say("on the way")
        await asyncio.sleep(self.pause_s)
        if self.error is not None:
            raise self.error
        self.count = count


def quick(*overrides: str) -> Config:
    return load_config(overrides=["supervision.ping_s=0.01", *overrides]).config


def heeded(folder: Path, pool: FakePool, config: Config, story: Coroutine[Any, Any, None]) -> list[str]:
    """Let the driver heed wishes while the story goes on; returns its warnings."""
    warnings: list[str] = []

    async def both() -> None:
        heeding = asyncio.create_task(heed(folder, pool, config, warnings.append))
        try:
            await asyncio.wait_for(story, 20)
        finally:
            heeding.cancel()
            await asyncio.gather(heeding, return_exceptions=True)

    asyncio.run(both())
    return warnings


async def answered(folder: Path, wish: Wish) -> Answer:
    while True:
        answer = read_answer(folder)
        if answer is not None and answer.wish_id == wish.wish_id and answer.outcome != "working":
            return answer
        await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("pool", "config", "outcome", "last"),
    [
        (FakePool(2), quick(), "done", "generators 2 -> 4 after "),
        (FakePool(2, NoRoomError("1 CPU free")), quick(), "failed", "refused, nothing has changed: 1 CPU free"),
        (FakePool(2, RunError("no GPU")), quick(), "failed", "generators 2 -> 2 instead of 4: no GPU"),
        (
            FakePool(2),
            quick("deterministic=true", "max_staleness=0", "queue.order=ticket"),
            "failed",
            "refused: a deterministic run keeps its generators, because other ones sample in other batches",
        ),
    ],
    ids=["done", "no room", "no start", "deterministic"],
)
def test_a_wish_is_fulfilled_or_refused_and_the_answer_says_which(
    tmp_path: Path, pool: FakePool, config: Config, outcome: str, last: str
) -> None:
    wish = make_wish(["generators=4"])

    async def story() -> None:
        write_wish(tmp_path, wish)
        answer = await answered(tmp_path, wish)
        assert (answer.outcome, answer.generators) == (outcome, pool.count) and answer.lines[-1].startswith(last)
        assert answer.lines[0] == "the run has 2 generator(s), and shall have 4"

    heeded(tmp_path, pool, config, story())


def test_a_newer_wish_overtakes_one_that_is_under_way(tmp_path: Path) -> None:
    pool, first, second = FakePool(pause_s=10), make_wish(["generators=4"]), make_wish(["generators=2"])

    async def story() -> None:
        write_wish(tmp_path, first)
        while not pool.asked:
            await asyncio.sleep(0.005)
        pool.pause_s = 0.0
        write_wish(tmp_path, second)
        assert (await answered(tmp_path, second)).outcome == "done"

    heeded(tmp_path, pool, quick(), story())
    assert pool.asked == [4, 2]


def test_a_wish_that_an_earlier_driver_was_through_with_is_not_heeded_again(tmp_path: Path) -> None:
    pool, old, new = FakePool(), Wish(wish_id="old", generators=4), make_wish(["generators=2"])
    write_wish(tmp_path, old)
    write_answer(tmp_path, Answer(wish_id="old", outcome="failed", generators=1))

    async def story() -> None:
        await asyncio.sleep(0.05)
        write_wish(tmp_path, new)
        await answered(tmp_path, new)

    heeded(tmp_path, pool, quick(), story())
    assert pool.asked == [2]


def test_an_answer_that_cannot_be_written_is_warned_of_and_the_wish_is_fulfilled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, wish, tries = FakePool(), make_wish(["generators=2"]), list[Answer]()

    def write(folder: Path, answer: Answer) -> None:
        tries.append(answer)
        if len(tries) <= 2:
            raise OSError("stale file handle")
        write_answer(folder, answer)

    monkeypatch.setattr("actors.scaling.write_answer", write)

    async def story() -> None:
        write_wish(tmp_path, wish)
        assert (await answered(tmp_path, wish)).lines[:2] == ("the run has 1 generator(s), and shall have 2", "on the way")

    warnings = heeded(tmp_path, pool, quick(), story())
    assert pool.count == 2 and warnings[1] == "nobody was told `on the way`: stale file handle" and len(warnings) == 2


def test_the_driver_can_end_while_an_overtaken_wish_takes_its_time_to_end(tmp_path: Path) -> None:
    class Reluctant(FakePool):
        async def scale(self, count: int, say: Any) -> None:
            self.asked.append(count)
            try:
                await asyncio.sleep(5)
            except asyncio.CancelledError:
                ending.set()
                await asyncio.sleep(5)
                raise

    ending = asyncio.Event()

    async def story() -> None:
        pool = Reluctant()
        heeding = asyncio.create_task(heed(tmp_path, pool, quick(), lambda line: None))
        write_wish(tmp_path, make_wish(["generators=4"]))
        while not pool.asked:
            await asyncio.sleep(0.005)
        write_wish(tmp_path, make_wish(["generators=2"]))
        await ending.wait()

        heeding.cancel()
        await asyncio.wait({heeding})

        assert heeding.cancelled() and pool.asked == [4]

    asyncio.run(asyncio.wait_for(story(), 20))


def test_nonsense_is_warned_of_once_and_the_next_wish_is_heeded(tmp_path: Path) -> None:
    pool, wish = FakePool(), make_wish(["generators=2"])
    (tmp_path / WANTED_FILE).write_text('{"wish_id": "x", "generators": "many"}')

    async def story() -> None:
        await asyncio.sleep(0.1)
        write_wish(tmp_path, wish)
        await answered(tmp_path, wish)

    warnings = heeded(tmp_path, pool, quick(), story())
    assert len(warnings) == 1 and "generators must be from 1 to 4096, got 'many'" in warnings[0] and pool.asked == [2]


# The command.


def make_run(folder: Path, phase: str = "training", *overrides: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(load_config(overrides=overrides).config))
    set_phase(folder, phase)
    (folder / HEARTBEAT).touch()
    return folder


def set_phase(folder: Path, phase: str) -> None:
    state = TrainingState(run_id="r", phase=phase, version=3, num_updates=9, optimizer_steps=3, prompts=1, completions=2, tokens=9, seed=0)
    write_atomically(folder / "state.json", state.to_json())


@contextmanager
def acting_driver(folder: Path, *steps: tuple[str, str]) -> Iterator[None]:
    """Answers the first wish by these (outcome, line), one after the other; the outcome `phase` ends the run instead."""

    def act() -> None:
        ends = time.monotonic() + 20
        while (wish := read_wish(folder)) is None and time.monotonic() < ends:
            time.sleep(0.01)
        lines: list[str] = []
        for outcome, line in steps:
            if outcome == "phase":
                set_phase(folder, line)
                return
            lines.append(line)
            assert wish is not None
            write_answer(folder, Answer(wish_id=wish.wish_id, outcome=outcome, generators=2, lines=tuple(lines)))  # type: ignore[arg-type]
            time.sleep(0.1)

    driver = threading.Thread(target=act)
    driver.start()
    try:
        yield
    finally:
        driver.join()


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> Console:
    monkeypatch.setattr("async_rlhf.commands.scale.POLL_S", 0.02)
    return Console(record=True, width=200)


def test_each_line_of_the_answer_is_printed_once(tmp_path: Path, console: Console) -> None:
    folder = make_run(tmp_path / "run")

    with acting_driver(folder, ("working", "starting"), ("working", "joined"), ("done", "generators 1 -> 2 after 9.0 s")):
        run_scale(folder, ["generators=2"], 20, console)

    assert console.export_text().splitlines() == ["starting", "joined", "generators 1 -> 2 after 9.0 s"]


def test_a_refusal_is_an_error_with_the_drivers_words(tmp_path: Path, console: Console) -> None:
    folder = make_run(tmp_path / "run")

    with (
        acting_driver(folder, ("working", "starting"), ("failed", "refused: 1 CPU free")),
        pytest.raises(RunError, match="refused: 1 CPU free"),
    ):
        run_scale(folder, ["generators=2"], 20, console)


def test_a_run_that_ends_meanwhile_is_told(tmp_path: Path, console: Console) -> None:
    folder = make_run(tmp_path / "run")

    with acting_driver(folder, ("phase", "finished")), pytest.raises(RunError, match="the run is finished now, before it was through"):
        run_scale(folder, ["generators=2"], 20, console)


def test_of_two_commands_at_once_the_overtaken_one_says_so(tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one comes and goes while the first one is asking the storage for the time."""
    folder = make_run(tmp_path / "run")
    before = sorted(file.name for file in folder.iterdir())
    touch, others = Path.touch, list[str]()

    def touch_and_let_another_in(file: Path) -> None:
        touch(file)
        others.append(file.name)
        if len(others) == 1:
            with pytest.raises(DeadlineError):
                run_scale(folder, ["generators=3"], 0.05, console)

    monkeypatch.setattr(Path, "touch", touch_and_let_another_in)

    with pytest.raises(RunError, match=r"overtaken by another wish, for 3 generator\(s\), .* async-rlhf status "):
        run_scale(folder, ["generators=2"], 20, console)
    assert sorted(file.name for file in folder.iterdir()) == sorted([*before, WANTED_FILE]) and len(set(others)) == 2


def test_a_wish_that_takes_too_long_stands(tmp_path: Path, console: Console) -> None:
    folder = make_run(tmp_path / "run")

    with pytest.raises(DeadlineError, match=r"not through with this after 0\.1 s, and goes on with it"):
        run_scale(folder, ["generators=2"], 0.1, console)
    assert scaled_count(folder) == 2


@pytest.mark.parametrize("phase", ["finished", "failed", "interrupted"])
def test_a_run_that_has_ended_is_refused_with_what_to_do_instead(tmp_path: Path, phase: str, console: Console) -> None:
    folder = make_run(tmp_path / "run", phase)

    with pytest.raises(ConfigError, match=rf"got one that is {phase}; .*async-rlhf resume .* generator\.count=2"):
        run_scale(folder, ["generators=2"], 20, console)
    assert not (folder / WANTED_FILE).exists()


def test_a_driver_without_a_sign_of_life_is_named_and_the_wish_taken_back(tmp_path: Path, console: Console) -> None:
    folder = make_run(tmp_path / "run")
    for name in (HEARTBEAT, "state.json"):
        os.utime(folder / name, (time.time() - 500, time.time() - 500))

    with pytest.raises(ConfigError, match=r"gave no sign of life for 500 s: it was killed.* resume"):
        run_scale(folder, ["generators=2"], 20, console)
    assert not (folder / WANTED_FILE).exists()


def test_a_deterministic_run_and_a_folder_without_a_run_are_refused(tmp_path: Path, console: Console) -> None:
    folder = make_run(tmp_path / "run", "training", "deterministic=true", "max_staleness=0", "queue.order=ticket")

    with pytest.raises(ConfigError, match="deterministic"):
        run_scale(folder, ["generators=2"], 20, console)
    with pytest.raises(ConfigError, match="is no run folder"):
        run_scale(tmp_path, ["generators=2"], 20, console)
