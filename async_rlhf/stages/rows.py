"""Rows of the configured sources, one by one: what can be used is kept, what cannot is counted and named."""

import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from async_rlhf.config.prompts import SourceConfig
from async_rlhf.errors import ConfigError
from async_rlhf.sources import load_rows

Row = Mapping[str, Any]
Message = dict[str, str]
Text = str | list[Message]
"""Plain text, or chat messages, each with `role` and `content`."""
Kept = TypeVar("Kept")

DEFAULT = SourceConfig()


class BadRowError(Exception):
    """This row cannot be used; the others may do. `args`: what is wrong in general, and in particular."""


@dataclass(kw_only=True)
class RowCount:
    """How many rows of one source were read, and which of them cannot be used."""

    key: str
    """The source's config key."""
    read: int = 0
    bad: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    """What is wrong -> the rows of which it is, for people."""

    @property
    def num_bad(self) -> int:
        """Rows left out."""
        return sum(map(len, self.bad.values()))

    def describe(self) -> str:
        """One line; empty: all rows are good."""
        if not self.num_bad:
            return ""
        kinds = "; ".join(f"{len(rows)} {kind} ({rows[0]}{', ...' if len(rows) > 1 else ''})" for kind, rows in self.bad.items())
        return f"{self.key}: {self.num_bad} of {self.read} rows left out: {kinds}"


def read_sources(
    section: str, sources: Mapping[str, SourceConfig], max_bad_share: float, convert: Callable[[SourceConfig, Row], Kept]
) -> tuple[list[Kept], list[str]]:
    """All usable rows of all sources, converted, in order; and a line for each source with unusable ones.

    Args:
        section: config key of the stage, for messages.
        convert: raises BadRowError for a row that it cannot use.
    Raises:
        ConfigError: a source cannot be read, lacks a column, or has too many unusable rows.
    """
    kept: list[Kept] = []
    notes: list[str] = []
    for name, source in sources.items():
        count = RowCount(key=f"{section}.sources.{name}")
        kept += usable(cast("Iterable[Row]", load_rows(name, source, f"{section}.sources")), source, count, convert)
        check_count(section, count, max_bad_share)
        notes += [count.describe()] if count.num_bad else []
    return kept, notes


def usable(rows: Iterable[Row], source: SourceConfig, count: RowCount, convert: Callable[[SourceConfig, Row], Kept]) -> Iterable[Kept]:
    """The converted rows that can be used; `count` learns of all."""
    for number, row in enumerate(rows):
        count.read += 1
        try:
            yield convert(source, row)
        except BadRowError as error:
            kind, detail = error.args
            count.bad.setdefault(kind, []).append(f"row {number}{': ' if detail else ''}{detail}")
        except KeyError as error:
            raise ConfigError(
                f"{count.key} has no column {error.args[0]!r}, it has: {', '.join(row)}; name the right one with {_setting(source, error)}"
            ) from None


def check_count(section: str, count: RowCount, max_bad_share: float) -> None:
    """Raise ConfigError if a source is empty, or too much of it cannot be used."""
    if not count.read:
        raise ConfigError(f"{count.key} has no rows; give a file with some")
    if count.num_bad == count.read or count.num_bad > max_bad_share * count.read:
        raise ConfigError(f"{count.describe()}; mend the rows, or raise {section}.max_bad_share ({max_bad_share:g}) to go on without them")


def prompt_of(source: SourceConfig, row: Row) -> Text:
    """What the policy reads: the template filled in, or the prompt column."""
    if source.template:
        return source.template.format(**row)
    return text_of(row, source.prompt_column)


def has_prompt(source: SourceConfig, row: Row) -> bool:
    """Whether a preference row holds its prompt apart. A prompt column that is asked for by name must be there."""
    return bool(source.template) or source.prompt_column in row or source.prompt_column != DEFAULT.prompt_column


def text_of(row: Row, column: str) -> Text:
    """The column's text or messages.

    Raises:
        BadRowError: it holds something else, or nothing. KeyError: there is no such column.
    """
    value: Any = row[column]
    if isinstance(value, str):
        if not value.strip():
            raise BadRowError(f"with an empty {column}", "")
        return value
    if isinstance(value, Sequence) and value and all(map(_is_message, cast("Sequence[Any]", value))):
        return [{"role": message["role"], "content": message["content"]} for message in cast("Sequence[Message]", value)]
    kind = "nothing" if value is None or value == [] else type(cast(object, value)).__name__
    raise BadRowError(f"whose {column} is neither text nor chat messages", kind)


def split_held_out(rows: Sequence[Kept], num_held_out: int, seed: int, section: str) -> tuple[list[Kept], list[Kept]]:
    """(rows to train on, rows held out), drawn by `seed`, each in the order of the rows."""
    if num_held_out >= len(rows):
        raise ConfigError(
            f"{section}.held_out must leave at least one row to train on, got {num_held_out} of {len(rows)} usable rows; "
            f"set {section}.held_out={len(rows) // 10}"
        )
    held_out = set(np.random.default_rng(seed).permutation(len(rows))[:num_held_out].tolist())
    return [row for i, row in enumerate(rows) if i not in held_out], [row for i, row in enumerate(rows) if i in held_out]


def fingerprint(path: str) -> list[list[str | int]]:
    """Name, size and time of change of a local file, or of the files in a folder: other contents make another result."""
    root = Path(path).expanduser()
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file()) if path and root.is_dir() else []
    return [[file.name if file == root else str(file.relative_to(root)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _setting(source: SourceConfig, error: KeyError) -> str:
    """The setting that named the missing column."""
    missing = error.args[0]
    if missing in {name for _, name, _, _ in string.Formatter().parse(source.template)}:
        return "template"
    columns = ("prompt_column", "completion_column", "chosen_column", "rejected_column", "margin_column")
    return next((key for key in columns if getattr(source, key) == missing), "its columns' settings")
