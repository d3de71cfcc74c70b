"""Sources of prompts, looked at before any work starts."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from async_rlhf.config import Config
from async_rlhf.config.prompts import SourceConfig
from async_rlhf.errors import ConfigError
from async_rlhf.prompts.cursor import SourceCursor
from async_rlhf.prompts.dataset import DATASET, held_out_prompts, live_reader, num_held_out_rows, row_reader, training_sources
from async_rlhf.prompts.encoding import PromptTokenizer
from async_rlhf.prompts.live_readers import SQLITE, split_sqlite
from async_rlhf.prompts.mixture import MAX_NAMED, nothing_usable
from async_rlhf.prompts.reading import BAD, Row, template_columns
from async_rlhf.sources import columns_of, load_rows, require_columns
from async_rlhf.types import Prompt

NUM_CHECKED = 1000
"""Rows of each source that are read before any work starts, as long as none can be used."""

REWARD_ARGUMENTS = ("prompts", "completions")
"""What a reward function gets beside the columns: no column can have these names."""


def check_prompts(config: Config, model_folder: Path) -> None:
    """Read the beginning of every source of a dataset task.

    Raises:
        ConfigError: one is not there, lacks a column, holds chats that the tokenizer cannot read, or has no row that can be used; or
            there is nothing to evaluate.
    """
    if config.task.name != DATASET:
        return
    tokenizer = PromptTokenizer(model_folder)
    for name, source in training_sources(config).items():
        names, beginning = _beginning(name, source, config)
        if names or not source.live:
            _require(f"prompts.sources.{name}: {source.path}", source, names)
        _check_rows(name, source, config, tokenizer, beginning)
    for name, source in config.evaluation.sources.items():
        _require(f"evaluation.sources.{name}: {source.path}", source, columns_of(load_rows(name, source, "evaluation.sources")))
    held_out_prompts(replace(config, evaluation=replace(config.evaluation, num_prompts=1)), model_folder)


def absolute_sources(config: Config) -> Config:
    """The same config with absolute paths of local sources: actors may run in another folder."""
    prompts = replace(config.prompts, sources={name: _absolute(source) for name, source in config.prompts.sources.items()})
    evaluation = replace(config.evaluation, sources={name: _absolute(source) for name, source in config.evaluation.sources.items()})
    return replace(config, prompts=prompts, evaluation=evaluation)


def _beginning(name: str, source: SourceConfig, config: Config) -> tuple[Sequence[str], Iterator[Row]]:
    """The columns of a source, and the first of the rows that are trained."""
    if source.live:
        reader = live_reader(name, source, SourceCursor())
        reader.poll()
        found = [reader.row(index) for index in range(min(reader.num_rows, NUM_CHECKED))]
        names = list(dict.fromkeys(str(column) for _, columns in found for column in columns or ()))
        return names, (Row(row_id=row_id, columns=columns, epoch=0) for row_id, columns in found)
    rows: Any = load_rows(name, source)
    start = num_held_out_rows(config)
    some = rows.skip(start).take(NUM_CHECKED) if source.streaming else (rows[i] for i in range(start, min(len(rows), start + NUM_CHECKED)))
    return columns_of(rows), _numbered(f"prompts.sources.{name}: {source.path}", some, start)


def _numbered(where: str, rows: Any, start: int) -> Iterator[Row]:
    try:
        for number, columns in enumerate(cast("Iterator[Mapping[str, object]]", rows), start):
            yield Row(row_id=str(number), columns=columns, epoch=0)
    except Exception as error:  # whatever the library says
        raise ConfigError(f"{where} cannot be read: {type(error).__name__}: {error}") from error


def _check_rows(name: str, source: SourceConfig, config: Config, tokenizer: PromptTokenizer, rows: Iterator[Row]) -> None:
    """Go on to the first row that can be used."""
    reader = row_reader(name, source, config, tokenizer)
    reasons: Counter[str] = Counter()
    named: list[str] = []
    for row in rows:
        made = reader.read(row)
        if isinstance(made, Prompt):
            return
        reasons[made.reason] += 1
        if made.reason in BAD and len(named) < MAX_NAMED:
            named.append(f"row {row.row_id}: {made.reason}, {made.detail}")
    if source.live:
        return
    if not reasons:
        raise ConfigError(
            f"prompts.sources.{name}: {source.path} has no row to train on beside the first {num_held_out_rows(config)}, which "
            "prompts.held_out keeps from training; lower prompts.held_out, or give evaluation.sources"
        )
    raise ConfigError(nothing_usable(name, reasons.total(), reasons, named))


def _require(where: str, source: SourceConfig, present: Sequence[str]) -> None:
    try:
        needed = template_columns(source.template) if source.template else [source.prompt_column]
    except ValueError as error:
        raise ConfigError(f"{where}: template {source.template!r} is no format string: {error}") from None
    require_columns(where, [*needed, *([source.completion_column] if source.completion_column else [])], present)
    taken = [column for column in present if column in REWARD_ARGUMENTS and (source.template or column != source.prompt_column)]
    if taken:
        raise ConfigError(f"{where} has a column {taken[0]!r}, the name of what every reward function gets as its own argument; rename it")


def _absolute(source: SourceConfig) -> SourceConfig:
    if source.path.startswith(SQLITE):
        file, table = split_sqlite(source.path)
        return replace(source, path=f"{SQLITE}/{file.resolve()}?table={table}")
    path = Path(source.path).expanduser()
    return replace(source, path=str(path.resolve())) if source.path and path.exists() else source
