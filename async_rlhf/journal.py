"""The journal: an append-only, checksummed, segmented log of opaque records, and its one writer.

    journal/LOCK                     held by the living writer
    journal/segment-00000000.log     what the files look like, and how they are verified: journal_frames.py

A record survives this process's death once `append` returns, and the machine's after `sync`.
"""

import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from async_rlhf.errors import JournalError, JournalLockedError
from async_rlhf.files import lock_file, sync_folder
from async_rlhf.journal_frames import (
    Frame,
    Mark,
    Position,
    Scan,
    Tip,
    check_mark,
    damage,
    frame_header,
    read_frame,
    read_frames,
    segment_header,
    segment_path,
    segment_paths,
)

__all__ = ["MAX_PAYLOAD_BYTES", "Frame", "Journal", "Mark", "Position", "check_mark", "read_frames"]

logger = logging.getLogger(__name__)

MAX_PAYLOAD_BYTES = 1 << 30
"""Far below the 2 GiB that one write(2) takes; a record of this size is a mistake anyway."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Journal:
    """The log as its writer sees it. `sync` may run in another thread than `append`; two other calls never at once."""

    def __init__(self, folder: Path) -> None:
        """Open the journal in `folder`, or begin one: lock it, verify every byte, cut a torn tail.

        Raises:
            JournalError: another process writes it, it is damaged, or the storage refuses.
        """
        self.folder = folder
        self.cut_bytes = 0
        """What opening cut off as a torn tail; 0: nothing."""
        self._unsynced = True  # a writer that died may have left what the disk does not have yet
        self._broken = ""  # why nothing can be written any more
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sync_folder(folder.parent)
            self._lock = _lock(folder)
        except OSError as error:
            raise self._write_error(error) from error
        try:
            self._file, self._tip = self._recover()
            self._first = min(segment_paths(folder))
        except BaseException as error:
            os.close(self._lock)
            if isinstance(error, OSError):
                raise self._write_error(error) from error
            raise

    @property
    def end(self) -> Mark:
        """The end of the log now."""
        at = self._tip.position
        return Mark(segment=at.segment, offset=at.offset, digest=self._tip.digest.hex())

    @property
    def first_segment(self) -> int:
        """The oldest segment that was not dropped."""
        return self._first

    def append(self, kind: str, payload: bytes | memoryview) -> Position:
        """Write one record; from here on it survives this process's death. An append that fails leaves no trace.

        Raises:
            JournalError: no space, or the storage failed. Once there is space again, appending works again.
        """
        assert len(kind) == 1 and kind.isascii() and kind.isalpha(), f"a record's kind is one ASCII letter, got {kind!r}"
        view = memoryview(payload).cast("B")
        if len(view) > MAX_PAYLOAD_BYTES:
            raise JournalError(f"a record holds at most {MAX_PAYLOAD_BYTES} bytes, got {len(view)}; append it in several records")
        self._refuse_if_broken()
        header, tip = frame_header(kind, view, self._tip)
        position = self._tip.position
        try:
            _write(self._file, memoryview(header))
            _write(self._file, view)
        except BaseException as error:
            self._take_back(position.offset)
            if isinstance(error, OSError):
                raise self._write_error(error) from error
            raise
        self._tip, self._unsynced = tip, True
        return position

    def sync(self) -> None:
        """All records appended before this call survive the machine's death from here on.

        Raises:
            JournalError: the storage failed. It may have lost what was written since the last sync, so nothing more is taken.
        """
        self._refuse_if_broken()
        if not self._unsynced:
            return
        self._unsynced = False  # before it is done: an append meanwhile needs a sync of its own
        try:
            os.fdatasync(self._file)
        except OSError as error:
            self._broken = f"a sync failed ({error.strerror}) and what was appended before it may be lost"
            raise self._write_error(error) from error

    def rotate(self) -> int:
        """Sync, end the segment and begin the next one; returns its index.

        Raises:
            JournalError: no space, or the storage failed; the old segment goes on.
        """
        self.sync()
        try:
            file, tip = _begin_segment(self.folder, self._tip)
        except OSError as error:
            if segment_path(self.folder, self._tip.position.segment + 1).exists():
                self._broken = f"a new segment could neither be begun nor removed ({error.strerror})"
            raise self._write_error(error) from error
        os.close(self._file)
        self._file, self._tip = file, tip
        return tip.position.segment

    def drop_before(self, segment: int) -> None:
        """Delete the segments before `segment`, oldest first, so that a crash leaves no gap."""
        last = self._tip.position.segment
        assert segment <= last, f"the journal must keep its last segment, {last}, got drop_before({segment})"
        for index in range(self._first, segment):
            segment_path(self.folder, index).unlink()
            self._first = index + 1
        sync_folder(self.folder)

    def frames(self, start: Position | None = None) -> Iterator[Frame]:
        """The records from `start` up to the end of the log at the first step, in order, verified again.

        Raises:
            JournalError: no record begins and no segment ends at `start`, or the files are not what was written.
        """
        end = self._tip.position
        scan = Scan(self.folder, start)
        for frame in scan:
            if frame.position >= end:
                return
            yield frame
        if scan.tip.position < end:
            at = scan.tip.position
            raise damage(segment_path(self.folder, at.segment), at.offset, "the log's end", end, "an earlier one")

    def read(self, position: Position) -> Frame:
        """The record at `position`, verified again.

        Raises:
            JournalError: no record begins there, its segment was dropped, or it is damaged.
        """
        return read_frame(self.folder, position)

    def close(self) -> None:
        """Sync, and let another writer in."""
        if self._file < 0:
            return
        try:
            if not self._broken:
                self.sync()
        finally:
            os.close(self._file)
            os.close(self._lock)
            self._file, self._broken = -1, "it is closed"

    def _recover(self) -> tuple[int, Tip]:
        """Verify everything, remove what a crash tore, begin the first segment of a new journal; returns the file and the end."""
        scan = Scan(self.folder)
        for _ in scan:
            pass
        at = scan.tip.position
        self.cut_bytes = scan.torn_bytes
        for path in [path for index, path in segment_paths(self.folder).items() if index > at.segment]:
            path.unlink()
            sync_folder(self.folder)
            logger.warning("%s ended within its header: removed %s bytes", path, scan.torn_bytes)
        if at.segment < 0:
            return _begin_segment(self.folder, scan.tip)
        path = segment_path(self.folder, at.segment)
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        if os.fstat(file).st_size > at.offset:
            os.ftruncate(file, at.offset)
            os.fsync(file)
            logger.warning("%s ended in a torn record: cut %s bytes, from byte %s on", path, scan.torn_bytes, at.offset)
        return file, scan.tip

    def _take_back(self, offset: int) -> None:
        try:
            os.ftruncate(self._file, offset)
        except OSError as error:
            self._broken = f"a failed append could not be taken back ({error.strerror}); opening the journal again cuts it"

    def _refuse_if_broken(self) -> None:
        if self._broken:
            raise JournalError(f"the journal {self.folder} takes no records: {self._broken}; `async-rlhf resume {self.folder.parent}`")

    def _write_error(self, error: OSError) -> JournalError:
        resume = f"then `async-rlhf resume {self.folder.parent}`"
        if error.errno in _NO_SPACE:
            return JournalError(f"cannot write the journal: no space for {self.folder} ({error.strerror}): free space, {resume}")
        return JournalError(f"cannot write the journal {self.folder}: {error}: mend the storage, {resume}")


def _lock(folder: Path) -> int:
    path = folder / "LOCK"
    try:
        return lock_file(path)
    except BlockingIOError as error:
        raise JournalLockedError(
            f"the journal {folder} must have one writer, got a second: {error} holds {path}. "
            "That run still goes on: wait for it, or stop it"
        ) from error


def _begin_segment(folder: Path, tip: Tip) -> tuple[int, Tip]:
    """Create the segment that continues the log at `tip`, durably; returns its file and the tip in it. Removes it when that fails."""
    index = tip.position.segment + 1
    path = segment_path(folder, index)
    header = segment_header(index, tip)
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _write(handle, memoryview(header))
        os.fsync(handle)
        sync_folder(folder)
    except BaseException:
        os.close(handle)
        path.unlink(missing_ok=True)
        raise
    return handle, Tip(position=Position(segment=index, offset=len(header)), sequence=tip.sequence, digest=tip.digest)


def _write(handle: int, rest: memoryview) -> None:
    """All of it, however much one call takes: a call that takes no more says why."""
    while rest:
        rest = rest[os.write(handle, rest) :]
