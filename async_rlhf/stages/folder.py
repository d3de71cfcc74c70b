"""Where a stage works, and how its result appears whole or not at all.

FOLDER.partial/             beside the target, held by one process at a time
    settings.json           what the work was begun with
    trainer/checkpoint-N/   from where a killed stage goes on; the file WHOLE in it comes last
    made/                   the result so far: metrics.jsonl, tensorboard/; becomes FOLDER when it is finished
"""

import difflib
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from async_rlhf.errors import ConfigError, StageStopped
from async_rlhf.stages.messages import StageWatch
from async_rlhf.state import write_atomically

WHOLE = "WHOLE"
"""File in a checkpoint: nothing of it is missing."""
POLL_S = 0.3


class TargetTakenError(ConfigError):
    """Something is already where the result belongs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageFolder:
    """The work folder of one stage, held by this process."""

    target: Path
    work: Path

    @property
    def made(self) -> Path:
        """What becomes the target."""
        return self.work / "made"

    @property
    def trainer(self) -> Path:
        """Checkpoints."""
        return self.work / "trainer"

    def newest_checkpoint(self) -> Path | None:
        """The newest whole one; one that a kill cut short is passed over."""
        whole = [folder for folder in self.trainer.glob("checkpoint-*") if (folder / WHOLE).is_file()]
        return max(whole, key=step_of, default=None)

    @property
    def holds_work(self) -> bool:
        """Something of it would be lost with it."""
        return self.newest_checkpoint() is not None or any(self.made.glob("part-*.parquet"))

    def discard(self) -> None:
        """Nobody shall go on from here."""
        shutil.rmtree(self.work, ignore_errors=True)

    def finish(self) -> None:
        """Let the target appear."""
        os.replace(self.made, self.target)
        self.discard()


def step_of(checkpoint: Path) -> int:
    """The optimizer steps in a checkpoint, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def work_folder(target: Path) -> Path:
    """Where a stage works that makes `target`."""
    return target.parent / f"{target.name}.partial"


def check_target(target: Path) -> None:
    """Raise TargetTakenError if a folder cannot be made there."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise TargetTakenError(f"the folder of a new model must not exist or be empty, got {target}; delete it or name another folder")


@contextmanager
def working(
    target: Path, settings: Mapping[str, Any], watch: StageWatch, check: Callable[[Path], None] = check_target
) -> Generator[StageFolder]:
    """Hold the work folder for as long as the block lasts.

    However the block ends: what is on the disk by then stays for whoever comes with the same settings; an empty folder goes.

    Raises:
        ConfigError: the target is taken, or other settings have begun to make it. StageStopped: while waiting for another process.
    """
    check(target)
    folder = StageFolder(target=target, work=work_folder(target))
    handle = _hold(folder.work, watch)
    try:
        check(target)  # whoever held the work folder before may have finished
        _check_settings(folder, settings)
        folder.made.mkdir(exist_ok=True)
        yield folder
    finally:
        if not folder.holds_work:
            folder.discard()
        os.close(handle)


def _hold(work: Path, watch: StageWatch) -> int:
    """Be the only process in the work folder; the kernel lets go of it with the process, however that ends."""
    told = False
    while True:
        try:
            work.mkdir(parents=True, exist_ok=True)
            handle = os.open(work / "LOCK", os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # its holder removed it between the two calls
        except OSError as error:
            raise ConfigError(f"{work} cannot be written: {error}; name another folder") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (work / "LOCK").exists() and os.fstat(handle).st_ino == (work / "LOCK").stat().st_ino:
                os.ftruncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return handle
        except BlockingIOError:
            if not told:
                holder = os.read(handle, 200).decode(errors="replace") or "another process"
                watch.note(f"waiting for {holder}, which works in {work}")
                told = True
            time.sleep(POLL_S)
        os.close(handle)
        if watch.stopping():
            raise StageStopped(f"stopped while waiting for {work}")


def _check_settings(folder: StageFolder, settings: Mapping[str, Any]) -> None:
    file = folder.work / "settings.json"
    text = json.dumps(settings, indent=1, sort_keys=True) + "\n"
    before = file.read_text(encoding="utf-8") if file.is_file() else text
    if before == text or not folder.holds_work:
        write_atomically(file, text)
        return
    changes = [line for line in difflib.ndiff(before.splitlines(), text.splitlines()) if line[0] in "+-"]
    raise ConfigError(
        f"{folder.work} holds unfinished work under other settings ({'; '.join(' '.join(line.split()) for line in changes[:6])}); "
        "give the same settings to go on with it, or delete it, or name another folder"
    )
