"""Groups come back from the rollouts dataset bit for bit, whatever records they came from; what does not fit is refused."""

from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from async_rlhf.errors import JournalError
from async_rlhf.rollout_parts import FATE_SCHEMA, GroupFate, part_path, read_trained, write_part
from async_rlhf.rollout_table import SCHEMA, GroupRows, decode_rows, encode
from async_rlhf.types import ScoredGroup
from tests.unit.test_rollout_table import make_groups, same, scored_groups


def rows_of(groups: list[ScoredGroup]) -> list[GroupRows]:
    """As they come from a journal: three groups of a record."""
    return [rows for first in range(0, len(groups), 3) for rows in decode_rows(encode(groups[first : first + 3]))]


def trained(groups: list[ScoredGroup], update: int) -> list[GroupFate]:
    return [GroupFate(rows=rows, fate="trained", update=update, position=i) for i, rows in enumerate(rows_of(groups))]


def test_batches_come_back_from_the_parts_in_order_without_what_was_not_trained(tmp_path: Path) -> None:
    """Update 1 begins in part 0 and ends in part 1; groups lie in the order in which they were made."""
    batches = [make_groups(4, first=4 * update) for update in range(4)]
    fates = [trained(batch, update) for update, batch in enumerate(batches)]
    others = [
        GroupFate(rows=rows, fate=fate)
        for rows, fate in zip(rows_of(make_groups(3, 99)), ["tied", "failed: ...", "lost_history"], strict=True)
    ]
    write_part(tmp_path / "rollouts", 0, [*fates[1][:1], others[0], *reversed(fates[0])])
    write_part(tmp_path / "rollouts", 1, [others[1], *fates[3], *reversed(fates[1][1:]), *fates[2]])
    write_part(tmp_path / "rollouts", 2, others[2:])

    read = list(read_trained(tmp_path / "rollouts"))

    assert [update for update, _ in read] == [0, 1, 2, 3]
    assert all(same(left, right) for (_, left), right in zip(read, batches, strict=True))


@settings(max_examples=20, deadline=None)
@given(groups=st.lists(scored_groups(), min_size=1, max_size=3))
def test_parquet_keeps_every_bit(groups: list[ScoredGroup], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("rollouts")
    write_part(folder, 0, trained(groups, 7))

    [(update, copies)] = read_trained(folder)

    assert update == 7
    assert same(copies, groups)


def test_part_of_many_groups_is_read_back_whole(tmp_path: Path) -> None:
    groups = make_groups(300)
    write_part(tmp_path, 0, chain(trained(groups[:150], 0), trained(groups[150:], 1)))

    assert pq.ParquetFile(tmp_path / "part-00000000.parquet").num_row_groups > 1
    assert same([group for _, batch in read_trained(tmp_path) for group in batch], groups)


@settings(max_examples=40, deadline=None)
@given(order=st.permutations(range(9)), left_out=st.sets(st.integers(0, 8), max_size=5))
def test_groups_may_be_written_in_any_order(order: list[int], left_out: set[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Those that lie behind one another in a record are written in one piece, and only those."""
    folder = tmp_path_factory.mktemp("rollouts")
    groups, rows = make_groups(9), rows_of(make_groups(9))
    chosen = [number for number in order if number not in left_out]

    write_part(folder, 0, [GroupFate(rows=rows[number], fate="trained", update=0, position=i) for i, number in enumerate(chosen)])

    assert same(next(read_trained(folder))[1], [groups[number] for number in chosen])


def test_missing_or_repeated_groups_of_a_batch_are_an_error(tmp_path: Path) -> None:
    fates = [trained(make_groups(2, first=2 * update), update) for update in range(3)]
    for parts, why in [
        ([fates[0][1:]], r"must have 2 groups of update 0, got none at \[0\]"),
        ([fates[0], fates[0]], "group 0 of update 0 again"),
        ([fates[0] + fates[1], fates[0]], "group 0 of update 0 again"),
        ([fates[0], fates[2]], "must go on with update 1, got update 2"),
    ]:
        for old in tmp_path.glob("*.parquet"):
            old.unlink()
        for index, part in enumerate(parts):
            write_part(tmp_path, index, part)
        with pytest.raises(JournalError, match=why):
            list(read_trained(tmp_path))


def test_part_is_written_whole_or_not_at_all_and_may_be_written_again(tmp_path: Path) -> None:
    def interrupted() -> Any:
        yield from trained(make_groups(100), 0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_part(tmp_path, 0, interrupted())
    assert list(tmp_path.glob("*.parquet")) == []
    assert list(read_trained(tmp_path)) == []

    assert write_part(tmp_path, 0, trained(make_groups(2), 0)) == part_path(tmp_path, 0)
    write_part(tmp_path, 0, trained(make_groups(3), 0))

    assert [file.name for file in tmp_path.iterdir()] == ["part-00000000.parquet"]
    assert same(next(read_trained(tmp_path))[1], make_groups(3))


def test_part_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "rollouts").write_text("a file")

    with pytest.raises(JournalError, match=r"cannot write .*part-00000000\.parquet"):
        write_part(tmp_path / "rollouts", 0, [])


def test_only_trained_groups_have_an_update(tmp_path: Path) -> None:
    [rows] = rows_of(make_groups(1))
    for wrong in (GroupFate(rows=rows, fate="tied", update=1, position=0), GroupFate(rows=rows, fate="trained", update=1)):
        with pytest.raises(AssertionError, match="trained groups have update and position"):
            write_part(tmp_path, 0, [wrong])


def test_datasets_opens_the_parts(tmp_path: Path) -> None:
    from datasets import load_dataset

    groups = make_groups(3)
    write_part(tmp_path, 0, trained(groups[:2], 0))
    write_part(tmp_path, 1, [GroupFate(rows=rows_of(groups)[2], fate="tied")])

    table = load_dataset("parquet", data_files=str(tmp_path / "*.parquet"), split="train", cache_dir=str(tmp_path / "cache"))

    assert table.column_names == FATE_SCHEMA.names == [*SCHEMA.names, "fate", "update", "position"]
    assert table["fate"][:] == ["trained"] * 3 + ["tied"] * 3
    assert table["update"][:] == [0] * 3 + [None] * 3
    assert table["prompt_columns"][0] == [{"name": "answer", "json": '"2"'}]
    assert table["completion_ids"][0] == groups[0].group.rollouts[0].completion_ids.tolist()
    assert table["version_spans"][1][0]["version"] == 1
