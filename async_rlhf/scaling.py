"""What a person wants of a living run, and what became of it: two small files in the run folder.

wanted.json    written by `async-rlhf scale`, on any machine that sees the folder; the newest wish is the one that counts
scaled.json    the driver's answer, line by line as things happen
"""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any, Literal, get_args

from async_rlhf.config.schema import GeneratorConfig
from async_rlhf.errors import ConfigError
from async_rlhf.state import write_atomically

WANTED_FILE, SCALED_FILE = "wanted.json", "scaled.json"

Outcome = Literal["working", "done", "failed"]

MAX_BYTES = 1 << 20
"""No file of ours is larger; a stranger's is not read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """How many of what a run shall have."""

    wish_id: str
    generators: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What the driver did about a wish."""

    wish_id: str
    outcome: Outcome
    generators: int
    """That stay: at work, or on their way there."""
    lines: tuple[str, ...] = ()
    """What happened so far, in words."""


def make_wish(words: Sequence[str]) -> Wish:
    """The wish that the words of a command line name: `generators=4`.

    Raises:
        ConfigError: they name nothing that can be scaled, or no number, or one out of range.
    """
    asked: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if name != "generators" or not equals or name in asked:
            raise ConfigError(f"scale expects generators=N once, got {' '.join(words)!r}; for instance: async-rlhf scale RUN generators=4")
        asked[name] = value
    if not asked:
        raise ConfigError("scale expects generators=N, got nothing; for instance: async-rlhf scale RUN generators=4")
    try:
        return _checked({"wish_id": uuid.uuid4().hex, "generators": int(asked["generators"])})
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"generators must be a whole number, got {asked['generators']!r}") from None


def write_wish(folder: Path, wish: Wish) -> None:
    """Say to the run's driver what it shall do.

    Raises:
        ConfigError: something else than a file is in its place.
    """
    _check_kind(folder / WANTED_FILE)
    write_atomically(folder / WANTED_FILE, json.dumps(asdict(wish)) + "\n")


def read_wish(folder: Path) -> Wish | None:
    """The newest wish; None: there never was one.

    Raises:
        ConfigError: the file holds none.
    """
    fields = _read(folder / WANTED_FILE)
    return None if fields is None else _checked(fields)


def write_answer(folder: Path, answer: Answer) -> None:
    """Say what became of a wish so far."""
    write_atomically(folder / SCALED_FILE, json.dumps(asdict(answer), indent=2) + "\n")


def read_answer(folder: Path) -> Answer | None:
    """The answer to the newest wish that was heeded; None: there is none.

    Raises:
        ConfigError: the file holds none.
    """
    fields = _read(folder / SCALED_FILE)
    if fields is None:
        return None
    outcome: Any = fields.get("outcome")
    lines: Any = fields.get("lines")
    if outcome not in get_args(Outcome) or not isinstance(lines, list):
        raise ConfigError(f"{folder / SCALED_FILE} holds no answer: outcome {outcome!r}, lines {lines!r}")
    wish = _checked(fields)
    return Answer(wish_id=wish.wish_id, outcome=outcome, generators=wish.generators, lines=tuple(map(str, lines)))


def scaled_count(folder: Path) -> int | None:
    """How many generators the run had last, or was to have, by a wish; None: nobody ever wished anything.

    Raises:
        ConfigError: a file holds nonsense.
    """
    wish, answer = read_wish(folder), read_answer(folder)
    if wish is None:
        return None
    through = answer is not None and answer.wish_id == wish.wish_id and answer.outcome != "working"
    return answer.generators if answer is not None and through else wish.generators


def forget_wishes(folder: Path) -> None:
    """They are in the config now, or overruled by it. A folder in the place of one holds none, and stays."""
    for file in (folder / WANTED_FILE, folder / SCALED_FILE):
        if not file.is_dir():
            file.unlink(missing_ok=True)


def _read(file: Path) -> Mapping[str, Any] | None:
    _check_kind(file)
    try:
        with file.open("rb") as stream:
            fields = json.loads(stream.read(MAX_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file} cannot be read: {error}; delete it, and ask again") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{file} must hold an object, got {type(fields).__name__}; delete it, and ask again")
    return fields  # pyright: ignore[reportUnknownVariableType]


def _check_kind(file: Path) -> None:
    """Opening a pipe would wait for its writer, and a folder cannot be replaced."""
    if file.exists() and not file.is_file():
        raise ConfigError(f"{file} must be a file, got a {'folder' if file.is_dir() else 'device or pipe'}; delete it, and ask again")


def _checked(fields: Mapping[str, Any]) -> Wish:
    wish_id, count = fields.get("wish_id"), fields.get("generators")
    limits = next(item.metadata for item in fields_of(GeneratorConfig) if item.name == "count")
    if not isinstance(wish_id, str) or not wish_id:
        raise ConfigError(f"a wish must have a wish_id, got {wish_id!r}; use async-rlhf scale")
    if not isinstance(count, int) or isinstance(count, bool) or not limits["ge"] <= count <= limits["le"]:
        raise ConfigError(f"generators must be from {limits['ge']:g} to {limits['le']:g}, got {count!r}; async-rlhf scale RUN generators=4")
    return Wish(wish_id=wish_id, generators=count)
