"""Rows of a dataset: a hub id, local files, or a folder that `save_to_disk` wrote, through the library `datasets`."""

# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false
# (datasets ships no types.)

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from async_rlhf.config.prompts import SourceConfig
from async_rlhf.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".arrow": "arrow"}
"""File ending -> the reader of `datasets`."""


def load_rows(name: str, source: SourceConfig) -> "Dataset | IterableDataset":
    """The rows of a source in their own order; an IterableDataset where `streaming` asks for one.

    Args:
        name: of the source, for messages.
    Raises:
        ConfigError: nothing there, or nothing that can be read.
    """
    if not source.path:
        raise ConfigError(f"prompts source {name!r} has no path; give a hub id, a file or a folder")
    from datasets import load_dataset, load_from_disk

    path = Path(source.path).expanduser()
    try:
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            found: Any = load_from_disk(str(path))
            rows: Any = found[source.split] if isinstance(found, dict) else found
            return cast("IterableDataset", rows.to_iterable_dataset()) if source.streaming else cast("Dataset", rows)
        if path.exists():
            files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in FORMATS)
            kinds = {FORMATS.get(file.suffix, file.suffix) for file in files}
            if len(kinds) != 1 or not kinds <= set(FORMATS.values()):
                raise ConfigError(
                    f"prompts source {name!r}: {path} must hold files of one kind ({', '.join(FORMATS)}), got {sorted(kinds) or 'none'}"
                )
            split = source.split if "[" in source.split else "train"
            return cast(
                "Dataset", load_dataset(kinds.pop(), data_files=[str(file) for file in files], split=split, streaming=source.streaming)
            )
        return cast("Dataset", load_dataset(source.path, source.subset or None, split=source.split, streaming=source.streaming))
    except ConfigError:
        raise
    except Exception as error:  # whatever the library, or a hub, says
        raise ConfigError(f"prompts source {name!r} ({source.path}) cannot be read: {type(error).__name__}: {error}") from error
