"""Files that outlive a crash, and locks that do not outlive their holder."""

import fcntl
import os
import socket
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Force the folder's entries to the disk: a new file is not safe before its name is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_folder(folder: Path, *, replace: bool = False) -> Generator[Path]:
    """An empty folder beside `folder` to write into; at the exit it becomes `folder`, and after an error it is gone.

    Args:
        replace: what stands there gives way; else it must not exist, or be empty.
    Raises:
        OSError: it is taken, or cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as parent:
        made = Path(parent) / "made"
        made.mkdir()
        yield made
        sync_folder(made)
        old = Path(parent) / "old"
        if replace and folder.exists():
            os.replace(folder, old)
        try:
            os.replace(made, folder)
        except OSError:
            if old.exists():
                os.replace(old, folder)
            raise
        sync_folder(folder.parent)


def lock_file(path: Path) -> int:
    """Hold the file's lock for as long as the returned descriptor stays open: the kernel lets go of it with the process.

    Raises:
        BlockingIOError: another process holds it; its argument says which.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
    except BlockingIOError:
        holder = os.read(handle, 200).decode(errors="replace") or "another process"
        os.close(handle)
        raise BlockingIOError(holder) from None
    except BaseException:
        os.close(handle)
        raise
    return handle
