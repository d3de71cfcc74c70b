"""Streams of prompts from sources of rows: passes, mixtures, and resumes that draw what would have been drawn."""

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rlhf.errors import ConfigError
from async_rlhf.events import Granted
from async_rlhf.history_codec import decode, encode, ledger_from_json, ledger_to_json
from async_rlhf.ledger import Ledger
from async_rlhf.prompts import PromptCursor, SourceCursor
from async_rlhf.prompts.passes import Passes, StreamedRows
from tests.support.rows import dataset_config, drawn, numbered, opened, save_tokenizer, write_jsonl

Folders = tuple[Path, dict[str, str]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file of 23 rows; a folder of three Parquet files with row groups of 4, 31 rows; a live file of 6; a live table of 5."""
    folder = tmp_path_factory.mktemp("sources")
    write_jsonl(folder / "mapped.jsonl", numbered(0, 23))
    (folder / "streamed").mkdir()
    for part, (begin, end) in enumerate([(0, 11), (11, 12), (12, 31)]):
        pq.write_table(pa.Table.from_pylist(numbered(begin, end)), folder / "streamed" / f"part-{part}.parquet", row_group_size=4)
    write_jsonl(folder / "live.jsonl", numbered(0, 6))
    with sqlite3.connect(folder / "live.db") as database:
        database.execute("CREATE TABLE asked (prompt TEXT, number INTEGER)")
        database.executemany("INSERT INTO asked VALUES (:prompt, :number)", numbered(0, 5))
    database.close()
    yield folder


def sources(folder: Path, *names: str) -> dict[str, dict[str, object]]:
    every: dict[str, dict[str, object]] = {
        "mapped": {"path": folder / "mapped.jsonl", "weight": 3},
        "streamed": {"path": folder / "streamed", "streaming": "true"},
        "file": {"path": folder / "live.jsonl", "live": "true", "weight": 2},
        "table": {"path": f"sqlite:///{folder / 'live.db'}?table=asked", "live": "true"},
    }
    return {name: every[name] for name in names}


def journaled(cursor: PromptCursor) -> PromptCursor:
    """The cursor as the journal gives it back."""
    event = Granted(tickets=(), request=0, cursor=cursor.since(PromptCursor(epoch=0, index=0)))
    (read,) = decode("G", encode(event), lambda number: pytest.fail(f"{number} is asked for"))
    assert isinstance(read, Granted)
    ledger = Ledger()
    ledger.cursor = read.cursor.onto(ledger.cursor)
    return ledger_from_json(json.loads(json.dumps(ledger_to_json(ledger)))).cursor


def without_reader_state(cursor: PromptCursor) -> PromptCursor:
    """The library writes the same place in several ways."""
    return replace(cursor, sources={name: replace(source, stream="") for name, source in cursor.sources.items()})


# Resume

MIXTURES = [("mapped",), ("streamed",), ("file",), ("table",), ("mapped", "streamed", "file", "table")]


@pytest.mark.parametrize("names", MIXTURES, ids="+".join)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(before=st.integers(0, 90), held_out=st.sampled_from([0, 5]), block=st.integers(1, 40), max_epochs=st.sampled_from([0, 0, 2]))
def test_a_stream_resumed_at_any_cursor_draws_what_it_would_have_drawn(
    names: tuple[str, ...], before: int, held_out: int, block: int, max_epochs: int, folder: Path, tokenizer: Path
) -> None:
    config = dataset_config(
        sources(folder, *names), f"prompts.held_out={held_out}", f"prompts.shuffle_rows={block}", f"queue.max_epochs={max_epochs}"
    )
    whole = opened(config, tokenizer)
    drawn(whole, before)
    resumed = whole
    for _ in range(2):  # a resume of a resume, too
        cursor = journaled(resumed.cursor)
        assert cursor == resumed.cursor
        resumed = opened(config, tokenizer, cursor)
        assert drawn(resumed, 25) == drawn(whole, 25)

    assert without_reader_state(resumed.cursor) == without_reader_state(whole.cursor)
    assert resumed.exhausted == whole.exhausted


def test_a_set_with_another_number_of_rows_than_the_cursor_knows_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    config = dataset_config({"a": {"path": write_jsonl(tmp_path / "a.jsonl", numbered(0, 5))}})
    cursor = opened(config, tokenizer).cursor
    write_jsonl(tmp_path / "a.jsonl", numbered(0, 6))

    with pytest.raises(ConfigError, match=r"prompts\.sources\.a has 6 rows to train on, but had 5 when the run began"):
        opened(config, tokenizer, cursor)


def test_a_source_may_join_and_another_leave_and_the_others_go_on(folder: Path, tokenizer: Path) -> None:
    before = opened(dataset_config(sources(folder, "mapped", "streamed")), tokenizer)
    first = [name for name, _ in drawn(before, 20) if name.startswith("mapped")]

    after = opened(dataset_config(sources(folder, "mapped", "file")), tokenizer, before.cursor)

    more = [name for name, epoch in drawn(after, 60) if name.startswith("mapped") and epoch == 0]
    assert sorted(first + more) == sorted(f"mapped/{number}" for number in range(23)), "each row once in the pass"


# Passes


@pytest.mark.parametrize("name", ["mapped", "streamed"])
def test_each_pass_holds_every_row_that_is_not_held_out_once_in_an_order_of_its_own(name: str, folder: Path, tokenizer: Path) -> None:
    rows = {"mapped": 23, "streamed": 31}[name] - 4
    stream = opened(dataset_config(sources(folder, name), "prompts.held_out=4", "prompts.shuffle_rows=8"), tokenizer)

    passes = [drawn(stream, rows) for _ in range(3)]

    for number, one in enumerate(passes):
        assert sorted(one) == sorted((f"{name}/{row}", number) for row in range(4, 4 + rows))
    assert len({tuple(prompt for prompt, _ in one) for one in passes}) == 3


def test_a_stream_is_shuffled_in_blocks_which_keep_their_order(folder: Path, tokenizer: Path) -> None:
    stream = opened(dataset_config(sources(folder, "streamed"), "prompts.shuffle_rows=10"), tokenizer)

    numbers = [int(name.partition("/")[2]) for name, _ in drawn(stream, 31)]

    blocks = [numbers[0:10], numbers[10:20], numbers[20:30], numbers[30:]]
    assert [sorted(block) for block in blocks] == [[*range(10)], [*range(10, 20)], [*range(20, 30)], [30]]
    assert all(block != sorted(block) for block in blocks[:3])


def test_a_stream_reads_no_more_than_one_block_ahead_and_a_resume_only_its_own_block() -> None:
    """20 files of 10 rows, blocks of 10. A resume begins at the reader's own last mark: in the file before, which it reads again."""
    from datasets import IterableDataset

    read: list[int] = []

    def rows_of(begins: list[int]) -> Iterator[dict[str, object]]:
        for begin in begins:
            for number in range(begin, begin + 10):
                read.append(number)
                yield {"prompt": "1", "number": number}

    def rows() -> StreamedRows:
        made = IterableDataset.from_generator(rows_of, gen_kwargs={"begins": list(range(0, 200, 10))})
        return StreamedRows("s", made, 0, Passes(seed=0, key=0, max_epochs=1), cursor)

    cursor = SourceCursor(size=10)
    source = rows()
    for number in range(1, 156):
        assert source.next_row() is not None
        assert len(set(read)) <= number + 10
    read.clear()
    cursor = source.cursor

    resumed = rows()

    assert resumed.next_row() == source.next_row()
    assert min(read) >= 140 and max(read) == 159


@pytest.mark.parametrize("name", ["mapped", "streamed"])
def test_a_source_ends_with_the_last_draw_of_its_last_pass(name: str, folder: Path, tokenizer: Path) -> None:
    rows = {"mapped": 23, "streamed": 31}[name]
    stream = opened(dataset_config(sources(folder, name), "queue.max_epochs=2", "prompts.shuffle_rows=7"), tokenizer)

    assert len(drawn(stream, 2 * rows - 1)) == 2 * rows - 1
    assert not stream.exhausted
    assert len(drawn(stream, 5)) == 1
    assert stream.exhausted
    assert opened(dataset_config(sources(folder, name), "queue.max_epochs=2"), tokenizer, stream.cursor).exhausted


# Mixtures


def test_sources_are_drawn_from_by_weight(tmp_path: Path, tokenizer: Path) -> None:
    """2000 draws at 3 : 1; the share of the first is binomial around 0.75 with a deviation of 0.0097."""
    config = dataset_config(
        {
            "a": {"path": write_jsonl(tmp_path / "a.jsonl", numbered(0, 40)), "weight": 3},
            "b": {"path": write_jsonl(tmp_path / "b.jsonl", numbered(0, 40))},
        }
    )

    counts = Counter(name[0] for name, _ in drawn(opened(config, tokenizer), 2000))

    assert abs(counts["a"] / 2000 - 0.75) < 0.04


def test_a_small_source_comes_round_again_before_the_large_one_has_finished_a_pass(tmp_path: Path, tokenizer: Path) -> None:
    config = dataset_config(
        {
            "small": {"path": write_jsonl(tmp_path / "a.jsonl", numbered(0, 3))},
            "large": {"path": write_jsonl(tmp_path / "b.jsonl", numbered(0, 500))},
        }
    )

    draws = drawn(opened(config, tokenizer), 200)

    assert max(epoch for name, epoch in draws if name.startswith("small")) > 10
    assert max(epoch for name, epoch in draws if name.startswith("large")) == 0
    assert len(set(draws)) == 200, "a row comes once in each pass over its source"


def test_with_max_epochs_every_source_gets_its_passes_and_the_stream_ends_with_the_last(tmp_path: Path, tokenizer: Path) -> None:
    config = dataset_config(
        {
            "small": {"path": write_jsonl(tmp_path / "a.jsonl", numbered(0, 3)), "weight": 50},
            "large": {"path": write_jsonl(tmp_path / "b.jsonl", numbered(0, 20))},
        },
        "queue.max_epochs=2",
    )
    stream = opened(config, tokenizer)

    assert Counter(name.partition("/")[0] for name, _ in drawn(stream, 100)) == {"small": 6, "large": 40}
    assert stream.exhausted


def test_which_source_a_draw_takes_depends_on_the_seed(folder: Path, tokenizer: Path) -> None:
    def order(seed: int) -> list[tuple[str, int]]:
        return drawn(opened(dataset_config(sources(folder, "mapped", "streamed"), f"seed={seed}"), tokenizer), 20)

    assert order(1) == order(1) != order(2)
