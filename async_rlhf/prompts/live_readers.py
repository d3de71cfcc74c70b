"""Where live rows are found: a file of JSON lines, a folder of files, a table of an SQLite database."""

# pyright: reportMissingTypeStubs=false
# (pyarrow ships partial types.)

import logging
import sqlite3
import time
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs, quote, urlsplit

from async_rlhf.errors import ConfigError
from async_rlhf.prompts.reading import parse_row
from async_rlhf.sources import FORMATS

logger = logging.getLogger(__name__)

NAMED_AFTER = 3
"""Looks at a file that cannot be read yet before it is named."""
KEPT_FILES = 32
"""Files of a folder whose rows are in memory."""
SETTLED_S = 2.0
"""A file that was not changed for so long is not being written."""
LOCK_WAIT_S = 5.0
"""How long a read waits for somebody who writes the database."""
SQLITE = "sqlite://"


class JsonlReader:
    """Lines of one file that is appended to. A last line without its newline is still being written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._starts = array("q")
        self._end = 0
        """Bytes read so far: whole lines."""
        self.files: Mapping[str, int] = {}

    @property
    def num_rows(self) -> int:
        """Whole lines that are not blank."""
        return len(self._starts)

    def poll(self) -> None:
        """Find the lines that were appended."""
        try:
            with self._path.open("rb") as file:
                if file.seek(0, 2) < self._end:
                    raise ConfigError(
                        f"{self._path} is shorter than it was; lines of a live source may be added, never removed: restore it"
                    )
                file.seek(self._end)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    if line.strip():
                        self._starts.append(self._end)
                    self._end += len(line)
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be read: {error}; make it readable, it may be empty") from error

    def row(self, index: int) -> tuple[str, Mapping[str, object] | None]:
        """Line `index`, blank ones not counted."""
        with self._path.open("rb") as file:
            file.seek(self._starts[index])
            return str(index), parse_row(file.readline())


class FolderReader:
    """Files that are put into a folder, each of which holds all its rows as soon as it can be read."""

    def __init__(self, path: Path, files: Mapping[str, int]) -> None:
        """
        Args:
            files: those that are known, in their order; their rows are not counted again.
        """
        self._path = path
        self.files: dict[str, int] = {}
        self._names: list[str] = []
        self._firsts: list[int] = []
        self._num_rows = 0
        self._seen: dict[str, tuple[int, int]] = {}
        """File -> (bytes, time of its last change) at the last look."""
        self._failures: dict[str, int] = {}
        self._loaded: OrderedDict[str, Any] = OrderedDict()
        for name, rows in files.items():
            self._add(name, rows)

    @property
    def num_rows(self) -> int:
        """Rows of all files found."""
        return self._num_rows

    def poll(self) -> None:
        """Find the files that came, the older ones first."""
        if not self._path.is_dir():
            raise ConfigError(f"{self._path} is no folder any more; rows of a live source may be added, never removed: restore it")
        came: list[tuple[int, str]] = []
        for file in self._path.rglob("*"):
            name = file.relative_to(self._path).as_posix()
            if name not in self.files and file.suffix in FORMATS and not file.name.startswith((".", "_")) and self._settled(name, file):
                came.append((self._seen[name][1], name))
        for _, name in sorted(came):
            try:
                rows = _load(self._path / name)
            except Exception as error:  # a half-written file can break its reader in many ways
                self._failures[name] = self._failures.get(name, 0) + 1
                if self._failures[name] == NAMED_AFTER:
                    logger.warning("%s could not be read at %d looks, and is tried again: %s", self._path / name, NAMED_AFTER, error)
                continue
            self._keep(name, rows)
            self._add(name, len(rows))

    def row(self, index: int) -> tuple[str, Mapping[str, object] | None]:
        """Row `index` in the order of the files."""
        place = bisect_right(self._firsts, index) - 1
        name, within = self._names[place], index - self._firsts[place]
        try:
            rows = self._loaded[name] if name in self._loaded else _load(self._path / name)
            self._keep(name, rows)
            return f"{name}:{within}", _row_of(rows, within)
        except Exception:  # it was removed, or written anew with fewer rows
            return f"{name}:{within}", None

    def _settled(self, name: str, file: Path) -> bool:
        try:
            stat = file.stat()
        except OSError:  # renamed just now
            return False
        before, self._seen[name] = self._seen.get(name), (stat.st_size, stat.st_mtime_ns)
        return before == self._seen[name] or time.time() - stat.st_mtime >= SETTLED_S

    def _add(self, name: str, rows: int) -> None:
        if rows:  # an empty one has no place among the others
            self._names.append(name)
            self._firsts.append(self._num_rows)
        self.files[name] = rows
        self._num_rows += rows

    def _keep(self, name: str, rows: Any) -> None:
        self._loaded[name] = rows
        self._loaded.move_to_end(name)
        while len(self._loaded) > KEPT_FILES:
            self._loaded.popitem(last=False)


class SqliteReader:
    """Rows of a table, by rowid. Values of columns that are declared as JSON are parsed."""

    def __init__(self, url: str) -> None:
        """Raises ConfigError where there is no such table."""
        self.files: Mapping[str, int] = {}
        self._path, self._table = split_sqlite(url)
        self._rowids = array("q")
        if not self._path.is_file():
            raise ConfigError(f"{url}: there is no file {self._path}; make the database and its table, which may be empty")
        self._connection = sqlite3.connect(f"file:{quote(str(self._path.resolve()))}?mode=ro", uri=True, timeout=LOCK_WAIT_S)
        self._name = '"' + self._table.replace('"', '""') + '"'
        try:
            columns = self._connection.execute(f"PRAGMA table_info({self._name})").fetchall()
            if not columns:
                raise ConfigError(f"{url}: {self._path} has no table {self._table!r}; it has: {', '.join(self._tables()) or 'none'}")
        except sqlite3.Error as error:
            raise ConfigError(f"{url} cannot be read: {error}") from error
        self.columns = [str(column[1]) for column in columns]
        self._json = [str(column[2]).upper() == "JSON" for column in columns]

    @property
    def num_rows(self) -> int:
        """Rows found so far."""
        return len(self._rowids)

    def poll(self) -> None:
        """Find the rows with a larger rowid than all before."""
        last = self._rowids[-1] if self._rowids else -(1 << 63)
        try:
            found = self._connection.execute(f"SELECT rowid FROM {self._name} WHERE rowid > ? ORDER BY rowid", (last,))
            self._rowids.extend(rowid for (rowid,) in found)
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):  # else somebody writes for long: at the next look, perhaps
                raise ConfigError(f"{self._path}, table {self._table}, cannot be read: {error}") from error

    def row(self, index: int) -> tuple[str, Mapping[str, object] | None]:
        """The row of the `index`-th rowid."""
        rowid = self._rowids[index]
        try:
            values = self._connection.execute(f"SELECT * FROM {self._name} WHERE rowid = ?", (rowid,)).fetchone()
        except sqlite3.Error as error:
            logger.warning("row %d of %s cannot be read: %s", rowid, self._path, error)
            values = None
        if values is None:
            return str(rowid), None
        parsed = (_parsed(value) if is_json else value for value, is_json in zip(values, self._json, strict=True))
        return str(rowid), dict(zip(self.columns, parsed, strict=True))

    def _tables(self) -> list[str]:
        return [name for (name,) in self._connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]


def split_sqlite(url: str) -> tuple[Path, str]:
    """File and table of `sqlite:///FILE?table=NAME`.

    Raises:
        ConfigError: it has another form.
    """
    parts = urlsplit(url)
    tables = parse_qs(parts.query).get("table", [])
    if not url.startswith(f"{SQLITE}/") or len(tables) != 1 or len(parts.path) < 2:
        raise ConfigError(f"an SQLite source must look like sqlite:///FILE?table=NAME (sqlite:////data/f.db for /data/f.db), got {url!r}")
    return Path(parts.path[1:]).expanduser(), tables[0]


def _load(path: Path) -> Any:
    """All rows of a file: a table, or a list of lines or of rows.

    Raises:
        Exception: it is not whole.
    """
    match FORMATS[path.suffix]:
        case "parquet":
            import pyarrow.parquet as pq

            return pq.read_table(path)
        case "csv":
            from pyarrow import csv

            return csv.read_csv(path)
        case "arrow":
            import pyarrow as pa

            with pa.OSFile(str(path), "rb") as source:
                try:
                    return pa.ipc.open_stream(source).read_all()
                except pa.ArrowInvalid:
                    source.seek(0)
                    return pa.ipc.open_file(source).read_all()
        case _:
            return _load_json(path)


def _load_json(path: Path) -> Sequence[object]:
    import json

    text = path.read_bytes()
    if path.suffix == ".json":
        rows = json.loads(text)
        if not isinstance(rows, list):
            raise ValueError("it holds no list of rows")
        return cast(Sequence[object], rows)
    lines = [line for line in text.split(b"\n") if line.strip()]
    if not lines or (not text.endswith(b"\n") and parse_row(lines[-1]) is None):
        raise ValueError("its last line is not whole" if lines else "it is empty")
    return lines


def _row_of(rows: Any, index: int) -> Mapping[str, object] | None:
    if not isinstance(rows, list):
        return rows.slice(index, 1).to_pylist()[0]
    entry: Any = rows[index]
    if isinstance(entry, bytes):
        return parse_row(entry)
    return cast(Mapping[str, object], entry) if isinstance(entry, dict) else None


def _parsed(value: object) -> object:
    import json

    try:
        return json.loads(value) if isinstance(value, str | bytes) else value
    except ValueError:
        return value
