"""The journal's files: what they look like, and the one verifying pass with which everybody reads them.

    segment-00000000.log   segment header, then frames: header, payload, header, payload, ...
    segment-00000001.log   continues the sequence numbers and the digest of the segment before

Each frame's digest covers the digest before it, so that one digest stands for the whole history up to it, dropped segments included.

A crash can leave a torn tail: the last segment ends within a frame, within its own header, or in zeros. A pass ends before it and
counts its bytes. Everything else that does not verify is damage, and an error: no whole record disappears silently.
"""

import os
import re
import shlex
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from async_rlhf.checksums import digest as _digest
from async_rlhf.errors import JournalError

FORMAT_VERSION = 2

SEGMENT_MAGIC, FRAME_MAGIC = b"RLHFLOG\n", b"RCRD"
SEGMENT_FIELDS = struct.Struct("<8sIIQ16s")  # magic, format version, index, sequence number of the first frame, digest before it
FRAME_FIELDS = struct.Struct("<4scIQ16s16s")  # magic, kind, payload bytes, sequence number, digest of the payload, digest up to here
CHECKSUM = struct.Struct("<I")  # follows the fields of each header: their CRC-32
SEGMENT_HEADER_BYTES = SEGMENT_FIELDS.size + CHECKSUM.size
FRAME_HEADER_BYTES = FRAME_FIELDS.size + CHECKSUM.size
DIGEST_BYTES = 16  # the s fields above

_SEGMENT_NAME = re.compile(r"segment-(\d{8,})\.log")
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Position:
    """Where a frame begins, or the log ends."""

    segment: int
    offset: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """One record."""

    position: Position
    kind: str
    """One ASCII letter."""
    payload: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """The end of the log at some moment. Plain fields: `asdict(mark)` and `Mark(**fields)` are its JSON form."""

    segment: int
    offset: int
    digest: str
    """Hexadecimal; proves everything before it."""

    @property
    def position(self) -> Position:
        """Where the next frame begins, or the segment ends."""
        return Position(segment=self.segment, offset=self.offset)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tip:
    """Where the log, or a pass over it, stands: what comes next must continue it."""

    position: Position
    sequence: int
    digest: bytes


GENESIS = Tip(position=Position(segment=-1, offset=0), sequence=0, digest=bytes(DIGEST_BYTES))
"""Before the first segment."""


def read_frames(folder: Path, start: Position | None = None) -> Iterator[Frame]:
    """The records from `start` on, read without a lock while a writer may go on; ends before a torn or growing tail."""
    if not folder.is_dir():
        raise JournalError(f"{folder} is no journal: there is no such folder; give the folder `journal` of a run")
    yield from Scan(folder, start)


def check_mark(folder: Path, mark: Mark) -> None:
    """Prove that the journal holds exactly the history that ended at `mark`, and perhaps more.

    Raises:
        JournalError: it is shorter, another one, or damaged before the mark.
    """
    scan = Scan(folder, mark.position)
    next(iter(scan), None)
    assert scan.start_digest is not None, "a pass that does not meet its start raises"
    if scan.start_digest.hex() != mark.digest:
        raise JournalError(
            f"the journal {folder} tells another history: its digest at segment {mark.segment}, byte {mark.offset} must be {mark.digest}, "
            f"got {scan.start_digest.hex()}; restore the journal that belongs to the checkpoint, or resume from another checkpoint"
        )


def read_frame(folder: Path, position: Position) -> Frame:
    """The one record that begins at `position`, verified."""
    path = segment_path(folder, position.segment)
    with open_segment(path) as file:
        file.seek(position.offset)
        fields = _unsealed(file.read(FRAME_HEADER_BYTES))
        if fields is None or not fields.startswith(FRAME_MAGIC):
            raise JournalError(f"{path} has no record at byte {position.offset}, or a damaged one; take positions from append and frames")
        return _frame(file, path, position, fields)


class Scan:
    """One pass over a journal that verifies every byte. Once it is exhausted, `tip` is where the intact log ends."""

    def __init__(self, folder: Path, start: Position | None = None) -> None:
        self._folder = folder
        self._start = start
        self.tip = GENESIS
        self.torn_bytes = 0
        """What follows the tip in the last segment, or all of a segment without a whole header."""
        self.start_digest: bytes | None = None
        """Of everything before `start`; None until the pass met it."""

    def __iter__(self) -> Iterator[Frame]:
        paths = segment_paths(self._folder)
        before: int | None = None
        for index, path in paths.items():
            if self._start is not None and index < self._start.segment:
                continue
            if before is not None and index != before + 1:
                raise damage(path, 0, "the next segment", segment_path(self._folder, before + 1).name, path.name)
            with open_segment(path) as file:
                yield from self._segment(file, path, index, last=index == max(paths))
            before = index
        if self._start is not None and self.start_digest is None:
            raise self._start_error(self._start)

    def _segment(self, file: BinaryIO, path: Path, index: int, *, last: bool) -> Iterator[Frame]:
        size = os.fstat(file.fileno()).st_size  # what a writer appends from now on is no tear
        header = file.read(SEGMENT_HEADER_BYTES)
        begun = self.tip is not GENESIS
        if last and (begun or index == 0 or self._start is not None) and _torn(header, SEGMENT_HEADER_BYTES, file):
            self.torn_bytes = size
            return
        self._move(_segment_tip(header, path, index, self.tip if begun else None))
        while (at := self.tip.position).offset < size:
            header = file.read(FRAME_HEADER_BYTES)
            if last and _torn(header, FRAME_HEADER_BYTES, file):
                self.torn_bytes = size - at.offset
                return
            fields, tip = _next_tip(header, path, self.tip)
            if tip.position.offset > size:
                if not last:
                    raise damage(path, at.offset, "the end of its last frame", tip.position.offset, f"the end of the file, {size}")
                self.torn_bytes = size - at.offset
                return
            frame = _frame(file, path, at, fields)
            self._move(tip)
            if self._start is None or at >= self._start:
                yield frame

    def _move(self, tip: Tip) -> None:
        self.tip = tip
        if self._start is None or self.start_digest is not None:
            return
        if tip.position == self._start:
            self.start_digest = tip.digest
        elif tip.position > self._start:
            raise self._start_error(self._start)

    def _start_error(self, start: Position) -> JournalError:
        return JournalError(
            f"the journal {self._folder} must have a record, or its end, at segment {start.segment}, byte {start.offset}, but has none "
            f"there (its segments: {', '.join(map(str, segment_paths(self._folder))) or 'none'}). It is shorter than the expected one, or "
            "another one: restore that one, or resume from an earlier checkpoint"
        )


def _torn(header: bytes, whole_bytes: int, file: BinaryIO) -> bool:
    """Whether no header was ever written whole here: too few bytes are left, or nothing but zeros up to the end of the file."""
    if len(header) < whole_bytes:
        return True
    if any(header):
        return False
    return all(chunk.count(0) == len(chunk) for chunk in iter(lambda: file.read(_CHUNK_BYTES), b""))


def _segment_tip(header: bytes, path: Path, index: int, before: Tip | None) -> Tip:
    """The tip at the first frame of a segment. `before` None: the segments before it were dropped."""
    fields = _unsealed(header)
    if fields is None or len(header) < SEGMENT_HEADER_BYTES:
        raise damage(path, 0, "the segment header", f"{SEGMENT_HEADER_BYTES} bytes with their checksum", header.hex(" "))
    magic, version, own_index, sequence, digest = SEGMENT_FIELDS.unpack(fields)
    if (magic, version) != (SEGMENT_MAGIC, FORMAT_VERSION):
        raise JournalError(f"{path} has journal format {version}, this is format {FORMAT_VERSION}; use the version that wrote it")
    wanted = (index, sequence, digest) if before is None else (index, before.sequence, before.digest)
    if (own_index, sequence, digest) != wanted:
        expected, got = (f"{i}, {s}, {d.hex()}" for i, s, d in (wanted, (own_index, sequence, digest)))
        raise damage(path, 0, "index, first sequence number and digest of what is before it", expected, got)
    return Tip(position=Position(segment=index, offset=SEGMENT_HEADER_BYTES), sequence=sequence, digest=digest)


def _next_tip(header: bytes, path: Path, tip: Tip) -> tuple[bytes, Tip]:
    """The verified fields of the frame header at `tip`, and the tip after its payload."""
    offset = tip.position.offset
    fields = _unsealed(header)
    if fields is None or not fields.startswith(FRAME_MAGIC):
        raise damage(path, offset, "a frame header", f"{FRAME_HEADER_BYTES} bytes with their checksum", header.hex(" ") or "nothing")
    _, _, length, sequence, _, digest = FRAME_FIELDS.unpack(fields)
    if sequence != tip.sequence:
        raise damage(path, offset, "the sequence number", tip.sequence, sequence)
    chained = _digest(tip.digest, fields[:-DIGEST_BYTES])
    if digest != chained:
        raise damage(path, offset, "the digest of everything up to here", chained.hex(), digest.hex())
    return fields, _tip_after(tip, length, digest)


def _frame(file: BinaryIO, path: Path, position: Position, fields: bytes) -> Frame:
    """The frame whose verified header was just read."""
    _, kind, length, _, wanted, _ = FRAME_FIELDS.unpack(fields)
    payload = file.read(length)
    digest = _digest(payload)
    if digest != wanted:
        raise damage(path, position.offset, "the digest of the payload", wanted.hex(), digest.hex())
    return Frame(position=position, kind=kind.decode("ascii"), payload=payload)


def _tip_after(tip: Tip, payload_bytes: int, digest: bytes) -> Tip:
    end = tip.position.offset + FRAME_HEADER_BYTES + payload_bytes
    return Tip(position=Position(segment=tip.position.segment, offset=end), sequence=tip.sequence + 1, digest=digest)


def segment_header(index: int, before: Tip) -> bytes:
    """The header of a segment that continues the log at `before`."""
    return _sealed(SEGMENT_FIELDS.pack(SEGMENT_MAGIC, FORMAT_VERSION, index, before.sequence, before.digest))


def frame_header(kind: str, payload: memoryview, tip: Tip) -> tuple[bytes, Tip]:
    """The header of a frame that continues the log at `tip`, and the tip after its payload."""
    fields = FRAME_FIELDS.pack(FRAME_MAGIC, kind.encode("ascii"), len(payload), tip.sequence, _digest(payload), b"")[:-DIGEST_BYTES]
    digest = _digest(tip.digest, fields)
    return _sealed(fields + digest), _tip_after(tip, len(payload), digest)


def _sealed(fields: bytes) -> bytes:
    return fields + CHECKSUM.pack(zlib.crc32(fields))


def _unsealed(header: bytes) -> bytes | None:
    """The fields of a header, None where its checksum does not fit."""
    fields, checksum = header[: -CHECKSUM.size], header[-CHECKSUM.size :]
    return fields if CHECKSUM.pack(zlib.crc32(fields)) == checksum else None


def segment_path(folder: Path, index: int) -> Path:
    """Where segment `index` lies."""
    return folder / f"segment-{index:08d}.log"


def segment_paths(folder: Path) -> Mapping[int, Path]:
    """The segments that exist, in order."""
    named = ((_SEGMENT_NAME.fullmatch(path.name), path) for path in folder.iterdir()) if folder.is_dir() else ()
    return dict(sorted((int(match[1]), path) for match, path in named if match))


def open_segment(path: Path) -> BinaryIO:
    """The file, for reading."""
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise JournalError(f"{path} does not exist: it was dropped, perhaps while the journal was being read; read it again") from error


def damage(path: Path, offset: int, what: str, expected: object, got: object) -> JournalError:
    """What to raise for bytes that no crash explains, and how to go on without them."""
    later = [str(other) for other in segment_paths(path.parent).values() if other.name > path.name]
    steps = [["truncate", "-s", str(offset), str(path)], ["rm", *later]] if offset else [["rm", str(path), *later]]
    give_up = " && ".join(shlex.join(step) for step in steps if len(step) > 1)
    return JournalError(
        f"{path} is damaged at byte {offset}: {what} must be {expected}, got {got}. Everything before it is intact, and "
        f"a checkpoint made before it needs no more: restore a copy of the file, or give up the rest, `{give_up}`, and resume from that one"
    )
