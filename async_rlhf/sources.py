"""Rows of a dataset: a hub id, local files, or a folder that `save_to_disk` wrote, through the library `datasets`."""

# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
# (datasets ships no types.)

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from async_rlhf.config.prompts import SourceConfig
from async_rlhf.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".arrow": "arrow"}
"""File ending -> the reader of `datasets`."""


def load_rows(name: str, source: SourceConfig, section: str = "prompts.sources") -> "Dataset | IterableDataset":
    """The rows of a source in their own order; an IterableDataset where `streaming` asks for one.

    Args:
        name: of the source, for messages.
        section: of the config that it stands in, likewise.
    Raises:
        ConfigError: nothing there, or nothing that can be read.
    """
    key = f"{section}.{name}"
    if not source.path:
        raise ConfigError(f"{key} has no path; give a hub id, a file or a folder")
    import datasets

    datasets.disable_progress_bars()
    path = Path(source.path).expanduser()
    try:
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            return _saved(key, path, source)
        if path.is_file():
            return _of_file(key, path, source)
        if not path.exists() and _looks_local(source.path):
            raise ConfigError(f"{key}: there is no file or folder {path}; give one, or a hub id such as owner/name")
        found = datasets.load_dataset(str(path) if path.exists() else source.path, source.subset or None, **_reading(source))
        return cast("Dataset", found)
    except ConfigError:
        raise
    except Exception as error:  # whatever the library, or a hub, says
        what = f"{key} ({source.path}) cannot be read: {type(error).__name__}: {str(error).strip()}"
        raise ConfigError(what if path.exists() else f"{what}; {_HUB_REMEDY}") from error


_HUB_REMEDY = (
    "it is no local file or folder, so it must be a dataset of the Hugging Face hub: check its name, log in (HF_TOKEN) if it is private, "
    "fetch it once where there is a network (hf download --repo-type dataset NAME), or give local files"
)


def require_columns(where: str, needed: Iterable[str], present: Sequence[str]) -> None:
    """Raise ConfigError for the first column that is needed and not there."""
    for column in needed:
        if column not in present:
            raise ConfigError(f"{where} has no column {column!r}; it has: {', '.join(present) or 'none'}")


def columns_of(rows: "Dataset | IterableDataset") -> list[str]:
    """Names of the columns; of a stream that does not say, those of its first row."""
    names: Sequence[str] | None = rows.column_names
    if names is None:
        names = [str(name) for first in rows.take(1) for name in cast(Mapping[str, object], first)]
    return list(names)


def _saved(key: str, path: Path, source: SourceConfig) -> "Dataset | IterableDataset":
    """A set, or one split of it, that `save_to_disk` wrote."""
    from datasets import ReadInstruction, load_from_disk

    found: Any = load_from_disk(str(path))
    split = re.split(r"[\[+]", source.split)[0]
    if isinstance(found, dict):
        if split not in found:
            raise ConfigError(f"{key}: {path} has no split {split!r}; it has: {', '.join(map(str, cast(dict[Any, Any], found)))}")
        found = found[split]
    rows = cast("Dataset", found)
    if split != source.split:
        (part,) = ReadInstruction.from_spec(source.split).to_absolute({split: len(rows)})
        rows = rows.select(range(part.from_, part.to))
    return rows.to_iterable_dataset() if source.streaming else rows


def _of_file(key: str, path: Path, source: SourceConfig) -> "Dataset | IterableDataset":
    from datasets import load_dataset

    if path.suffix not in FORMATS:
        raise ConfigError(f"{key}: {path} must end in {', '.join(FORMATS)}; got {path.suffix or 'no ending'}")
    if re.split(r"[\[+]", source.split)[0] != "train":
        raise ConfigError(f"{key}: a single file has one split, train (a slice of it is train[:1000]), got split {source.split!r}")
    return cast("Dataset", load_dataset(FORMATS[path.suffix], data_files=str(path), **_reading(source)))


def _reading(source: SourceConfig) -> dict[str, Any]:
    return {"split": source.split, "streaming": source.streaming}


def _looks_local(path: str) -> bool:
    """A path that is no hub id, or most probably none."""
    return path.startswith(("/", ".", "~")) or path.count("/") > 1 or Path(path).suffix in FORMATS
