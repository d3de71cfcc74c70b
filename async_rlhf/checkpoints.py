"""Checkpoints as folders: what makes one whole, which one to resume from, which ones to keep.

    checkpoints/00000120/COMMIT         names, sizes and CRC-32 of all other files; written last: without it there is no checkpoint
                         state.json     the TrainingState of that moment
                         journal.json   how far the journal went, and its digest
                         learner/       the learner's own files

A rename is not atomic everywhere, so the COMMIT file alone is the truth.
"""

import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from async_rlhf.errors import ConfigError
from async_rlhf.files import sync_folder
from async_rlhf.journal import Mark
from async_rlhf.state import TrainingState, state_from_json

logger = logging.getLogger(__name__)

FOLDER, COMMIT, STATE, JOURNAL = "checkpoints", "COMMIT", "state.json", "journal.json"
_CHUNK_BYTES = 1 << 22
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A whole one."""

    folder: Path
    version: int
    state: TrainingState
    mark: Mark


def folder_of(run_folder: Path, version: int) -> Path:
    """Where the checkpoint of `version` is, or would be."""
    return run_folder / FOLDER / f"{version:08d}"


def commit(folder: Path, state: TrainingState, mark: Mark, files: Mapping[str, tuple[int, int]]) -> None:
    """Make a checkpoint of a folder in which the learner's files are.

    Args:
        files: name -> (size in bytes, CRC-32) of each, as their writers know it.
    """
    written = dict(files)
    for name, text in ((STATE, state.to_json()), (JOURNAL, json.dumps(asdict(mark)))):
        written[name] = (len(text.encode()), zlib.crc32(text.encode()))
        _write(folder / name, text)
    entries = {name: {"bytes": size, "crc32": checksum} for name, (size, checksum) in sorted(written.items())}
    _write(folder / COMMIT, json.dumps({"version": state.version, "files": entries}, indent=1))
    for path in (folder, folder.parent):
        sync_folder(path)


def read(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`, every byte of it verified.

    Raises:
        ConfigError: it is not whole; says which file, what is expected, and what is there.
    """
    if not (folder / COMMIT).is_file():
        raise ConfigError(f"checkpoint {folder} has no {COMMIT} file: the run ended while it was being written")
    try:
        entry: dict[str, Any] = json.loads((folder / COMMIT).read_text(encoding="utf-8"))
        files = {str(name): (int(facts["bytes"]), int(facts["crc32"])) for name, facts in entry["files"].items()}
        version = int(entry["version"])
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ConfigError(f"checkpoint {folder}: its {COMMIT} file is damaged ({error})") from None
    for name, (size, checksum) in files.items():
        _check_file(folder, name, size, checksum)
    if folder.name != f"{version:08d}" or not {STATE, JOURNAL} <= files.keys():
        raise ConfigError(f"checkpoint {folder}: its {COMMIT} file is damaged (version {version}, files {', '.join(files)})")
    state = _parse(folder, STATE, state_from_json)
    mark = _parse(folder, JOURNAL, lambda text: Mark(**json.loads(text)))
    return Checkpoint(folder=folder, version=version, state=state, mark=mark)


def folders(run_folder: Path) -> list[Path]:
    """Every checkpoint folder of a run, whole or not, newest first."""
    found = (run_folder / FOLDER).glob("[0-9]*")
    return sorted((path for path in found if path.is_dir() and path.name.isdigit()), key=lambda path: int(path.name), reverse=True)


def newest(run_folder: Path, version: int | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint (or that of `version`), and what is wrong with each newer one.

    None: there is none; a run can still begin at version 0 if its journal is whole.
    Raises:
        ConfigError: the one asked for is damaged or missing.
    """
    if version is not None:
        folder = folder_of(run_folder, version)
        if not folder.is_dir():
            known = ", ".join(str(int(path.name)) for path in folders(run_folder)) or "none"
            raise ConfigError(f"{run_folder} has no checkpoint of version {version}; there are: {known}")
        return read(folder), []
    skipped: list[str] = []
    for folder in folders(run_folder):
        try:
            return read(folder), skipped
        except ConfigError as error:
            skipped.append(str(error))
    return None, skipped


def prune(run_folder: Path, keep_last: int) -> int:
    """Delete all but the newest `keep_last` committed checkpoints, and what was never committed before the newest one.

    Returns:
        The version of the oldest one left; 0 without any.
    """
    committed = [folder for folder in folders(run_folder) if (folder / COMMIT).is_file()]
    kept = committed[:keep_last]
    if not kept:
        return 0
    for folder in folders(run_folder):
        if folder not in kept and int(folder.name) < int(kept[0].name):
            discard(folder)
    return int(kept[-1].name)


def discard(folder: Path) -> None:
    """Delete a checkpoint: its COMMIT file first, so that no crash leaves half of it as a whole one."""
    (folder / COMMIT).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _parse(folder: Path, name: str, parse: Callable[[str], T]) -> T:
    try:
        return parse((folder / name).read_text(encoding="utf-8"))
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"checkpoint {folder}: {name} was written by another release of async-rlhf: {error}") from None


def _check_file(folder: Path, name: str, size: int, checksum: int) -> None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"checkpoint {folder}: its {COMMIT} file names {name!r}, which is outside of it")
    if not path.is_file():
        raise ConfigError(f"checkpoint {folder}: {name} is missing")
    found = path.stat().st_size
    if found != size:
        raise ConfigError(f"checkpoint {folder}: {name} has {found} bytes, expected {size}")
    crc = 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    if crc != checksum:
        raise ConfigError(f"checkpoint {folder}: the content of {name} has CRC-32 {crc}, expected {checksum}")


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
