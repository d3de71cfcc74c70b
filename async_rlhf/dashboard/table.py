"""The rows of metrics.jsonl, kept column by column: a long run's fit into a little memory, and its curves are ready to be thinned."""

import math
import re
from array import array
from collections.abc import Iterable, Mapping

import numpy as np

from async_rlhf.dashboard.reading import Fields, number
from async_rlhf.report_curves import Values, thin

MAX_COLUMNS = 1000
"""A run has fewer than a hundred; a file that names more was not written by one."""
MAX_POINTS = 500
"""Of one curve on the page."""
KEY = re.compile(r"[\w.-]{1,80}(?:/[\w.@%+-]{1,120}){0,3}")
"""What a metric may be called."""
VERSION = "version"


class Table:
    """One row per update, versions strictly rising: a row of an earlier version takes back those from it on."""

    def __init__(self) -> None:
        self._columns: dict[str, array[float]] = {VERSION: array("d")}
        self.changes = 0
        """Rows that were ever taken in: another number, other content."""

    def __len__(self) -> int:
        return len(self._columns[VERSION])

    @property
    def keys(self) -> list[str]:
        """Of the columns that hold anything."""
        return [key for key, column in self._columns.items() if column]

    def clear(self) -> None:
        """Forget all rows."""
        self._cut(0)
        self.changes += 1

    def extend(self, rows: Iterable[Fields]) -> None:
        """Take in rows; one without a version is none."""
        for row in rows:
            version = number(row.get(VERSION))
            if version is None:
                continue
            versions = self._columns[VERSION]
            while versions and versions[-1] >= version:
                self._cut(len(versions) - 1)
            self._append(row)
            self.changes += 1

    def column(self, key: str) -> Values:
        """[rows] float64, NaN where a row has no such value."""
        known = np.array(self._columns.get(key, array("d")), dtype=np.float64)
        return np.concatenate([known, np.full(len(self) - len(known), np.nan)])

    def last(self, key: str, back: int = 0) -> float | None:
        """The value in the last row, or `back` rows before it; None where that row has none."""
        column, index = self._columns.get(key, array("d")), len(self) - 1 - back
        return number(column[index]) if 0 <= index < len(column) else None

    def tail_mean(self, key: str, num_rows: int) -> float | None:
        """Mean over the last rows that have the value; None: none has, or it is beyond all numbers."""
        column = self._columns.get(key, array("d"))[max(0, len(self) - num_rows) :]
        known = [value for value in column if math.isfinite(value)]
        return number(sum(known) / len(known)) if known else None

    def rows(self, num_rows: int) -> list[dict[str, float]]:
        """The last rows, with the values that each has."""
        begin = max(0, len(self) - num_rows)
        rows: list[dict[str, float]] = [{} for _ in range(len(self) - begin)]
        for key, column in self._columns.items():
            for row, value in zip(rows, column[begin:], strict=False):
                if math.isfinite(value):
                    row[key] = value
        return rows

    def thinned(self, peaks: Mapping[str, bool], max_points: int = MAX_POINTS) -> dict[str, list[float | None]]:
        """The version and each of these columns that holds anything, at most `max_points` values each.

        Args:
            peaks: key -> whether a stretch is shown by its maximum instead of its last value.
        """
        wanted = {VERSION: False, **{key: of for key, of in peaks.items() if self._columns.get(key)}}
        return {key: thinned(self.column(key), peaks=of, max_points=max_points) for key, of in wanted.items() if len(self)}

    def _append(self, row: Fields) -> None:
        end = len(self)
        for key, value in row.items():
            known = number(value)
            if known is None or (key not in self._columns and (len(self._columns) >= MAX_COLUMNS or not KEY.fullmatch(key))):
                continue
            column = self._columns.setdefault(key, array("d"))
            column.extend([math.nan] * (end - len(column)))
            column.append(known)

    def _cut(self, num_rows: int) -> None:
        for column in self._columns.values():
            del column[num_rows:]
            while column and math.isnan(column[-1]):
                column.pop()


def thinned(values: Values, *, peaks: bool = False, max_points: int = MAX_POINTS) -> list[float | None]:
    """At most `max_points` of the values, as JSON has them."""
    return [_rounded(value) for value in thin(values, peaks=peaks, max_points=max_points).tolist()]


def _rounded(value: float) -> float | None:
    """Six digits: what a curve shows, and JSON has no NaN."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
