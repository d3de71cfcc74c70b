"""Files that grow, tear, turn back, or were made to harm: the dashboard reads what is whole, and never waits or leaves the folder."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rlhf.dashboard.reading import MAX_LINE_BYTES, Tail, number, parse, read_object, read_text
from async_rlhf.dashboard.settings import differing, read_settings
from async_rlhf.dashboard.table import MAX_COLUMNS, MAX_POINTS, Table
from async_rlhf.state import write_atomically
from tests.support.dashboard_runs import HOSTILE

ROWS = [{"version": version, "reward/mean": version / 7, "text": "\u00e9\n" * (version % 3)} for version in range(1, 30)]
CONTENT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def drain(tail: Tail) -> list[object]:
    rows, _ = tail.read()
    return list(rows)


@given(cuts=st.lists(st.integers(0, len(CONTENT)), max_size=12))
@settings(max_examples=25, deadline=None)
def test_each_row_comes_once_and_whole_however_the_writing_is_cut(cuts: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("run")
    tail, found = Tail(folder, "metrics.jsonl"), []
    with (folder / "metrics.jsonl").open("wb", buffering=0) as file:
        for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(CONTENT)], strict=True):
            file.write(CONTENT[begin:end])
            found += drain(tail)

    assert found == ROWS


@given(junk=st.lists(st.binary(max_size=60).map(lambda line: line.replace(b"\n", b"")), max_size=8))
@settings(max_examples=25, deadline=None)
def test_garbled_lines_are_passed_over_and_the_rows_between_them_stay(junk: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("run")
    lines = [line for index, each in enumerate(junk) for line in (each, json.dumps({"version": index}).encode())]
    (folder / "metrics.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))

    rows = drain(Tail(folder, "metrics.jsonl"))

    assert [row for row in rows if row in [{"version": index} for index in range(len(junk))]] == [{"version": i} for i in range(len(junk))]


def test_a_file_that_was_replaced_by_a_shorter_one_is_read_anew(tmp_path: Path) -> None:
    file, tail = tmp_path / "metrics.jsonl", Tail(tmp_path, "metrics.jsonl")
    file.write_bytes(CONTENT)
    drain(tail)

    write_atomically(file, CONTENT[: CONTENT.index(b"\n") + 1].decode())

    assert tail.read() == (ROWS[:1], True)


def test_a_file_that_was_cut_in_place_and_grew_beyond_the_old_end_is_read_anew(tmp_path: Path) -> None:
    file, tail = tmp_path / "metrics.jsonl", Tail(tmp_path, "metrics.jsonl")
    file.write_bytes(CONTENT[: len(CONTENT) // 2])
    drain(tail)

    other = CONTENT.replace(b"reward", b"REWARD")
    with file.open("r+b") as same:
        same.write(other)
    rows, anew = tail.read()

    assert anew
    assert len(rows) == len(ROWS)
    assert "REWARD/mean" in rows[0]


def test_a_file_that_went_is_told_once(tmp_path: Path) -> None:
    file, tail = tmp_path / "metrics.jsonl", Tail(tmp_path, "metrics.jsonl")
    file.write_bytes(CONTENT)
    drain(tail)
    file.unlink()

    assert [tail.read(), tail.read()] == [([], True), ([], False)]


def test_a_line_without_end_is_skipped_and_what_follows_it_is_read(tmp_path: Path) -> None:
    file, tail = tmp_path / "metrics.jsonl", Tail(tmp_path, "metrics.jsonl")
    file.write_bytes(b"[" * (2 * MAX_LINE_BYTES))
    assert drain(tail) == []
    with file.open("ab") as more:
        more.write(b"\n" + CONTENT)

    assert drain(tail) == ROWS


@pytest.mark.parametrize(
    "text", ['{"a": NaN', "[" * 100_000, '{"a": ' + "9" * 10_000 + "}", "\x00\x01", ""], ids=["torn", "deep", "huge", "binary", "empty"]
)
def test_what_is_no_json_is_nothing(text: str) -> None:
    assert parse(text) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, True, "1", None, [1]], ids=repr)
def test_only_finite_numbers_are_numbers(value: object) -> None:
    assert number(value) is None


def test_nothing_outside_the_folder_is_read_and_no_pipe_is_waited_for(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "secret.json").write_text('{"secret": 1}')
    (run / "inside.json").write_text('{"mine": 1}')
    (run / "state.json").symlink_to(tmp_path / "secret.json")
    (run / "link.json").symlink_to(run / "inside.json")
    (run / "circle.json").symlink_to(run / "circle.json")
    (run / "folder.json").mkdir()
    os.mkfifo(run / "metrics.jsonl")

    assert [read_object(run, name) for name in ("state.json", "../secret.json", "circle.json", "folder.json", "absent")] == [{}] * 5
    assert read_object(run, "link.json") == {"mine": 1}
    assert Tail(run, "metrics.jsonl").read() == ([], False)
    assert read_text(run, "inside.json", max_bytes=3) is None


def test_a_row_of_an_earlier_version_takes_back_the_rows_from_it_on() -> None:
    table = Table()
    table.extend([{"version": 1, "a/x": 1}, {"version": 2, "a/x": 2, "a/y": 5}, {"version": 3, "a/x": 3}, {"version": 2, "a/x": 20}])

    assert table.column("version").tolist() == [1, 2]
    assert table.column("a/x").tolist() == [1, 20]
    assert np.isnan(table.column("a/y")).all()
    assert table.keys == ["version", "a/x"]


@given(
    rows=st.lists(
        st.dictionaries(
            st.sampled_from(["version", "a/x", "b/y_s", HOSTILE, "a" * 500]),
            st.one_of(st.integers(0, 9), st.floats(allow_nan=True), st.text(max_size=3), st.none(), st.just(10**400)),
        ),
        max_size=30,
    )
)
@settings(max_examples=60, deadline=None)
def test_whatever_rows_say_columns_stay_aligned_versions_rise_and_the_curves_are_json(rows: list[dict[str, object]]) -> None:
    table = Table()
    table.extend(rows)
    curves = table.thinned({"a/x": True, "b/y_s": False})

    versions = table.column("version")
    assert (np.diff(versions) > 0).all()
    assert {len(table.column(key)) for key in table.keys} <= {len(table)}
    assert set(table.keys) <= {"version", "a/x", "b/y_s"}
    assert {len(column) for column in curves.values()} <= {len(table)}
    json.dumps(curves, allow_nan=False)


def test_a_long_run_is_thinned_and_a_file_of_endless_names_makes_no_endless_table() -> None:
    table = Table()
    table.extend({"version": version, f"k/{version}": 1, "a/x": version} for version in range(3 * MAX_COLUMNS))

    assert len(table.keys) <= MAX_COLUMNS
    assert table.last("a/x") == 3 * MAX_COLUMNS - 1
    assert len(table.thinned({"a/x": False})["a/x"]) <= MAX_POINTS


def test_settings_are_flat_secrets_are_hidden_and_a_config_that_unfolds_for_ever_is_none(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("a: {b: 1, c: [x, y]}\nenv: {API_KEY: hunter2, HOME: /root}\nd: null\n")
    assert read_settings(tmp_path) == {"a.b": 1, "a.c": "[x, y]", "env.API_KEY": "***", "env.HOME": "/root", "d": None}

    bomb = "a0: &a0 {x: 1, y: 2}\n" + "".join(f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}, z: *a{i - 1}}}\n" for i in range(1, 30))
    for text in (bomb, "a: &a {b: *a}\n", "{{", "- 1\n- 2\n", "!!python/object/apply:os.system ['true']", "a: " + "[" * 5000):
        config.write_text(text)
        assert read_settings(tmp_path) == {}, text[:40]


def test_only_settings_that_differ_are_compared_and_neither_place_nor_environment_counts() -> None:
    runs = {"x": {"seed": 0, "run.dir": "/x", "env.A": 1, "same": 3}, "y": {"seed": 1, "run.dir": "/y", "same": 3, "more": None}}

    assert differing(runs) == {"seed": {"x": 0, "y": 1}, "more": {"x": None, "y": None}}
