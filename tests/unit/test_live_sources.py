"""Sources that grow: new rows first, old ones while there are none, in the same order in every process."""

import json
import logging
import os
import sqlite3
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from async_rlhf.config import Config
from async_rlhf.errors import ConfigError
from async_rlhf.prompts import PromptCursor
from async_rlhf.prompts.live_readers import KEPT_FILES, FolderReader, split_sqlite
from tests.support.rows import dataset_config, drawn, numbered, opened, save_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def live(path: object, *overrides: str) -> Config:
    return dataset_config({"s": {"path": path, "live": "true"}}, *overrides)


def append(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def put(folder: Path, name: str, begin: int, end: int, *, age_s: float = 60) -> None:
    """A file of JSON lines that was written `age_s` ago."""
    write_jsonl(folder / name, numbered(begin, end))
    os.utime(folder / name, (time.time() - age_s,) * 2)


def names(draws: list[tuple[str, int]]) -> list[str]:
    return [name.partition("/")[2] for name, _ in draws]


# Order


def test_new_rows_are_drawn_before_old_ones_come_round_again(tmp_path: Path, tokenizer: Path) -> None:
    path = write_jsonl(tmp_path / "s.jsonl", numbered(0, 4))
    stream = opened(live(path), tokenizer)

    assert drawn(stream, 4) == [(f"s/{row}", 0) for row in range(4)]
    assert {epoch for _, epoch in drawn(stream, 2)} == {1}
    append(path, numbered(4, 7))
    assert drawn(stream, 3) == [("s/4", 0), ("s/5", 0), ("s/6", 0)]
    assert [epoch for _, epoch in drawn(stream, 9)] == [1, 1, *[2] * 7], "the pass goes on, and the next one has them all"


def test_old_rows_come_round_in_a_seeded_order_each_once_in_a_pass(tmp_path: Path, tokenizer: Path) -> None:
    path = write_jsonl(tmp_path / "s.jsonl", numbered(0, 12))

    def passes(seed: int) -> list[list[str]]:
        stream = opened(live(path, f"seed={seed}"), tokenizer)
        return [names(drawn(stream, 12)) for _ in range(3)]

    first, second, third = passes(1)
    assert first == [str(row) for row in range(12)]
    assert sorted(second) == sorted(third) == sorted(first)
    assert len({tuple(first), tuple(second), tuple(third)}) == 3
    assert passes(1) == [first, second, third] != passes(2)


def test_with_one_epoch_each_row_is_drawn_once_and_the_stream_waits_for_more_without_ending(tmp_path: Path, tokenizer: Path) -> None:
    path = write_jsonl(tmp_path / "s.jsonl", numbered(0, 2))
    stream = opened(live(path, "queue.max_epochs=1"), tokenizer)

    assert names(drawn(stream, 5)) == ["0", "1"]
    assert (stream.draw(), stream.exhausted) == (None, False)
    append(path, numbered(2, 3))
    assert names(drawn(stream, 5)) == ["2"]


def test_an_empty_live_source_gives_nothing_and_leaves_the_draws_to_the_others(tmp_path: Path, tokenizer: Path) -> None:
    path = write_jsonl(tmp_path / "s.jsonl", [])
    alone = opened(live(path), tokenizer)
    mixed = {"s": {"path": path, "live": "true", "weight": 1000}, "m": {"path": write_jsonl(tmp_path / "m.jsonl", numbered(0, 9))}}
    both = opened(dataset_config(mixed), tokenizer)

    assert (alone.draw(), alone.exhausted) == (None, False)
    assert {name[0] for name, _ in drawn(both, 5)} == {"m"}
    append(path, numbered(0, 3))
    assert [name for name, epoch in drawn(both, 6) if epoch == 0 and name[0] == "s"] == ["s/0", "s/1", "s/2"]


def test_the_source_is_looked_at_every_poll_s(tmp_path: Path, tokenizer: Path) -> None:
    path = write_jsonl(tmp_path / "s.jsonl", numbered(0, 1))
    stream = opened(live(path, "prompts.poll_s=1000", "queue.max_epochs=1"), tokenizer)
    append(path, numbered(1, 2))

    assert names(drawn(stream, 5)) == ["0"]


# Restarts


@pytest.mark.parametrize("before", range(14))
def test_a_resume_goes_on_where_it_was_though_rows_came_meanwhile(before: int, tmp_path: Path, tokenizer: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    put(folder, "b.jsonl", 0, 3, age_s=50)
    put(folder, "a.jsonl", 3, 5, age_s=40)
    config = live(folder)
    whole = opened(config, tokenizer)
    drawn(whole, before)
    put(folder, "0.jsonl", 5, 8, age_s=90)  # sorts first by its name and by its age

    resumed = opened(config, tokenizer, whole.cursor)

    assert drawn(resumed, 30) == drawn(whole, 30)
    assert list(resumed.cursor.sources["s"].files.items()) == [("b.jsonl", 3), ("a.jsonl", 2), ("0.jsonl", 3)]


def test_the_journal_lists_each_file_once(tmp_path: Path, tokenizer: Path) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    put(folder, "a.jsonl", 0, 3)
    stream = opened(live(folder), tokenizer)
    drawn(stream, 1)
    first = stream.cursor
    put(folder, "b.jsonl", 3, 5)
    drawn(stream, 1)

    said = stream.cursor.since(first)

    assert said.sources["s"].files == {"b.jsonl": 2}
    assert said.onto(first) == stream.cursor
    assert said.onto(PromptCursor(epoch=0, index=0)) == said, "a source that is new has no cursor before"


def test_a_file_that_lost_lines_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    path = write_jsonl(tmp_path / "s.jsonl", numbered(0, 4))
    stream = opened(live(path), tokenizer)
    drawn(stream, 3)
    cursor = stream.cursor
    write_jsonl(path, numbered(0, 2))

    with pytest.raises(ConfigError, match=r"s\.jsonl is shorter than it was"):
        drawn(stream, 2)
    with pytest.raises(ConfigError, match=r"prompts\.sources\.s has 2 rows, but 3 were drawn"):
        opened(live(path), tokenizer, cursor)


# Files


def test_a_last_line_without_newline_is_not_read_yet(tmp_path: Path, tokenizer: Path) -> None:
    path = write_jsonl(tmp_path / "s.jsonl", numbered(0, 1))
    with path.open("a") as file:
        file.write('\n{"prompt": "1+')
    stream = opened(live(path, "queue.max_epochs=1"), tokenizer)
    assert names(drawn(stream, 3)) == ["0"]

    with path.open("a") as file:
        file.write('1="}\n')

    draw = stream.draw()
    assert draw is not None and draw[0].text == "1+1="


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json", ".arrow", ".jsonl"])
def test_a_folder_takes_files_of_every_kind(suffix: str, tmp_path: Path, tokenizer: Path) -> None:
    rows, file = numbered(0, 3), tmp_path / "s" / f"rows{suffix}"
    file.parent.mkdir()
    table = pa.Table.from_pylist(rows)
    match suffix:
        case ".parquet":
            pq.write_table(table, file)
        case ".csv":
            file.write_text("prompt,number\n" + "".join(f"{row['prompt']},{row['number']}\n" for row in rows))
        case ".json":
            file.write_text(json.dumps(rows))
        case ".arrow":
            with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
        case _:
            write_jsonl(file, rows)
    os.utime(file, (time.time() - 60,) * 2)

    draws = [opened(live(tmp_path / "s"), tokenizer).draw()]

    assert draws[0] is not None
    assert (draws[0][0].prompt_id, draws[0][0].text, draws[0][0].columns) == (f"s/rows{suffix}:0", "0+0=", {"number": 0})


def test_a_half_written_file_is_tried_again_and_named_after_some_looks(
    tmp_path: Path, tokenizer: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(numbered(0, 3)), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    (folder / "rows.parquet").write_bytes(whole[:-20])
    os.utime(folder / "rows.parquet", (time.time() - 60,) * 2)
    stream = opened(live(folder), tokenizer)

    with caplog.at_level(logging.WARNING):
        assert [stream.draw() for _ in range(5)] == [None] * 5
    assert [record.getMessage().count("rows.parquet could not be read at 3 looks") for record in caplog.records] == [1]
    (folder / "rows.parquet").write_bytes(whole)
    os.utime(folder / "rows.parquet", (time.time() - 30,) * 2)

    assert names(drawn(stream, 3)) == ["rows.parquet:0", "rows.parquet:1", "rows.parquet:2"]


def test_a_file_that_changed_just_now_waits_until_it_is_the_same_at_two_looks(tmp_path: Path) -> None:
    put(tmp_path, "a.jsonl", 0, 1, age_s=0)
    reader = FolderReader(tmp_path, {})

    reader.poll()
    assert reader.num_rows == 0
    append(tmp_path / "a.jsonl", numbered(1, 2))
    reader.poll()
    assert reader.num_rows == 0
    reader.poll()
    assert reader.num_rows == 2


def test_files_that_no_reader_knows_and_hidden_ones_are_left_alone(tmp_path: Path) -> None:
    for name in ("notes.txt", ".rows.jsonl", "_rows.jsonl", "rows.jsonl.part"):
        put(tmp_path, name, 0, 2)
    reader = FolderReader(tmp_path, {})

    reader.poll()

    assert (reader.num_rows, reader.files) == (0, {})


def test_a_folder_keeps_the_rows_of_a_few_files_in_memory_and_reads_the_others_again(tmp_path: Path) -> None:
    for number in range(KEPT_FILES + 3):
        put(tmp_path, f"{number:03}.jsonl", number, number + 1, age_s=1000 - number)
    reader = FolderReader(tmp_path, {})
    reader.poll()

    assert [reader.row(number)[1] for number in range(KEPT_FILES + 3)] == numbered(0, KEPT_FILES + 3)
    (tmp_path / "000.jsonl").unlink()
    assert reader.row(0) == ("000.jsonl:0", None), "a row that is gone is a row that cannot be read"


# Tables


def test_rows_of_a_table_come_by_rowid_with_json_columns_parsed(tmp_path: Path, tokenizer: Path) -> None:
    with sqlite3.connect(tmp_path / "s.db") as database:
        database.execute('CREATE TABLE "my rows" (prompt TEXT, marks JSON)')
        database.execute("""INSERT INTO "my rows" VALUES ('1+1=', '{"good": [1, 2]}')""")
    stream = opened(live(f"sqlite:///{tmp_path / 's.db'}?table=my rows"), tokenizer)
    first = stream.draw()
    with database:
        database.execute("INSERT INTO \"my rows\" VALUES ('2+2=', NULL)")
    second = stream.draw()
    database.close()

    assert first is not None and second is not None
    assert (first[0].prompt_id, first[0].text, first[0].columns) == ("s/1", "1+1=", {"marks": {"good": [1, 2]}})
    assert (second[0].prompt_id, second[0].text, second[1]) == ("s/2", "2+2=", 0)


def test_a_table_that_is_not_there_is_named_beside_those_that_are(tmp_path: Path, tokenizer: Path) -> None:
    with sqlite3.connect(tmp_path / "s.db") as database:
        database.execute("CREATE TABLE rows (prompt TEXT)")
    database.close()

    with pytest.raises(ConfigError, match=r"has no table 'row'; it has: rows"):
        opened(live(f"sqlite:///{tmp_path / 's.db'}?table=row"), tokenizer)
    with pytest.raises(ConfigError, match=r"there is no file .*nothing\.db"):
        opened(live(f"sqlite:///{tmp_path / 'nothing.db'}?table=row"), tokenizer)
    assert not (tmp_path / "nothing.db").exists()


@pytest.mark.parametrize("url", ["sqlite:///f.db", "sqlite:f.db?table=a", "sqlite:///?table=a", "sqlite:///f.db?table=a&table=b"])
def test_a_table_is_named_in_one_form(url: str) -> None:
    with pytest.raises(ConfigError, match=r"sqlite:///FILE\?table=NAME"):
        split_sqlite(url)


def test_a_live_source_of_another_kind_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    for path in (tmp_path / "missing.jsonl", tmp_path / "rows.parquet", "owner/name"):
        with pytest.raises(ConfigError, match=r"must be a folder, a \.jsonl file or sqlite"):
            opened(live(path), tokenizer)
