"""Files of a run folder that somebody else may have made, or is writing this moment: read within limits, and never waited for."""

import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

MAX_FILE_BYTES = 64 << 20
"""Of a file that is read whole."""
MAX_LINE_BYTES = 1 << 20
"""A longer line is skipped."""
READ_BYTES = 16 << 20
"""Of a growing file at once: the rest comes with the next reading."""
ANCHOR_BYTES = 256
"""So many bytes before the place that was reached must still be the same."""

Fields = Mapping[str, Any]
"""A JSON object, nothing of it checked: take values out by the functions below."""


def number(value: object) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def count(value: object) -> int:
    """A whole number that is not negative; 0 for anything else."""
    return max(0, int(number(value) or 0))


def text(value: object, default: str = "") -> str:
    """A text, or the default for anything else."""
    return value if isinstance(value, str) else default


def fields(value: object) -> Fields:
    """A JSON object, or an empty one for anything else."""
    return cast(Fields, value) if isinstance(value, dict) else {}


def parse(line: str | bytes) -> object:
    """What a JSON text says; None where it is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # damaged, not UTF-8, a number of a million digits; nested a million times
        return None


def open_inside(folder: Path, name: str) -> int | None:
    """A descriptor of a regular file that really lies in `folder`; None where there is none: absent, a pipe, a link that leads out."""
    path = folder / name
    try:
        if not path.resolve(strict=True).is_relative_to(folder.resolve(strict=True)):
            return None
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, RuntimeError, ValueError):  # RuntimeError: links in a circle
        return None
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return handle
    os.close(handle)
    return None


def read_text(folder: Path, name: str, max_bytes: int = MAX_FILE_BYTES) -> str | None:
    """The whole file as text; None where there is none, or a larger one."""
    handle = open_inside(folder, name)
    if handle is None:
        return None
    with open(handle, "rb") as file:
        content = file.read(max_bytes + 1)
    return content.decode("utf-8", errors="replace") if len(content) <= max_bytes else None


def read_object(folder: Path, name: str) -> Fields:
    """The JSON object in the file; an empty one where there is none."""
    return fields(parse(read_text(folder, name) or ""))


def stamp(folder: Path, name: str) -> tuple[int, int, int]:
    """Changes when the file does: inode, bytes and nanoseconds of its last change; zeros where there is none."""
    try:
        found = os.stat(folder / name)
    except (OSError, ValueError):
        return (0, 0, 0)
    return (found.st_ino, found.st_size, found.st_mtime_ns)


class Tail:
    """The objects in a growing file of JSON lines, each handed out once; lines that hold none are passed over.

    A last line without its end is not there yet. When the file was replaced or is no longer what it was up to the place reached (a
    restarted learner takes rows back), reading begins anew.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self._inode = 0
        self._offset = 0
        self._anchor = b""

    def read(self) -> tuple[list[Fields], bool]:
        """The objects that came since the last call, and whether they are all there is (reading began anew)."""
        handle = open_inside(self._folder, self._name)
        if handle is None:
            anew = self._offset > 0
            self._begin(0)
            return [], anew
        with open(handle, "rb") as file:
            inode, anew = os.fstat(handle).st_ino, False
            if inode != self._inode or not self._goes_on(file.seek, file.read):
                anew = self._inode != 0
                self._begin(inode)
            file.seek(self._offset)
            chunk = file.read(READ_BYTES)
        return self._take(chunk), anew

    def _begin(self, inode: int) -> None:
        self._inode, self._offset, self._anchor = inode, 0, b""

    def _goes_on(self, seek: Any, read: Any) -> bool:
        seek(self._offset - len(self._anchor))
        return read(len(self._anchor)) == self._anchor

    def _take(self, chunk: bytes) -> list[Fields]:
        end = chunk.rfind(b"\n") + 1
        if end == 0:
            if len(chunk) < MAX_LINE_BYTES:
                return []
            end = len(chunk)  # a line without end: passed over, piece by piece
        self._offset += end
        self._anchor = (self._anchor + chunk[max(0, end - ANCHOR_BYTES) : end])[-ANCHOR_BYTES:]
        found: list[Fields] = []
        for line in chunk[:end].split(b"\n"):
            if not line.strip():
                continue
            row = parse(line) if len(line) <= MAX_LINE_BYTES else None
            if isinstance(row, dict):
                found.append(cast(Fields, row))
        return found
