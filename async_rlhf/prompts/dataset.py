"""The sources that a config names, opened: to train on, to evaluate on, and to check before any work starts."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from async_rlhf.config import Config
from async_rlhf.config.prompts import SourceConfig
from async_rlhf.errors import ConfigError
from async_rlhf.prompts.cursor import PromptCursor, SourceCursor
from async_rlhf.prompts.encoding import PromptTokenizer, encode_problem, load_encode
from async_rlhf.prompts.live import LiveReader, LiveRows
from async_rlhf.prompts.live_readers import SQLITE, FolderReader, JsonlReader, SqliteReader
from async_rlhf.prompts.mixture import DatasetStream, OpenSource, key_of
from async_rlhf.prompts.passes import MappedRows, Passes, RowSource, StreamedRows
from async_rlhf.prompts.reading import Row, RowReader
from async_rlhf.prompts.stream import PromptStream, TaskStream
from async_rlhf.sources import load_rows
from async_rlhf.tasks import load_task
from async_rlhf.types import Prompt

DATASET = "dataset"
"""task.name of the runs whose prompts are rows."""


def make_stream(config: Config, model_folder: Path, cursor: PromptCursor) -> PromptStream:
    """The stream of a run's prompts, standing where the cursor says.

    Raises:
        ConfigError: a source cannot be read, or is another one than the cursor's.
    """
    max_epochs = config.queue.max_epochs
    if config.task.name != DATASET:
        return TaskStream(load_task(config.task), load_encode(model_folder), seed=config.seed, max_epochs=max_epochs, cursor=cursor)
    tokenizer = PromptTokenizer(model_folder)
    opened: list[OpenSource] = []
    for name, source in training_sources(config).items():
        at = cursor.sources.get(name, SourceCursor())
        one = OpenSource(
            name=name,
            rows=_open(name, source, config, at),
            reader=row_reader(name, source, config, tokenizer),
            weight=source.weight,
            max_bad_share=config.prompts.max_bad_share,
        )
        one.drawn, one.skipped = at.drawn, Counter(at.skipped)
        opened.append(one)
    return DatasetStream(opened, seed=config.seed, cursor=cursor)


def held_out_prompts(config: Config, model_folder: Path) -> list[Prompt]:
    """What an evaluation asks, always in the same order: evaluation.sources if given, else what is held out from training.

    At most evaluation.num_prompts, of several sources by turns. Rows that cannot be used are left out.
    Raises:
        ConfigError: a source cannot be read, or there is nothing to ask.
    """
    limit = config.evaluation.num_prompts or None
    if config.task.name != DATASET:
        encode = load_encode(model_folder)
        return [encode_problem(problem, encode) for problem in load_task(config.task).held_out()[:limit]]
    tokenizer = PromptTokenizer(model_folder)
    parts = [_usable(name, source, config, tokenizer) for name, source in held_out_sources(config).items()]
    prompts = list(islice(_by_turns(parts), limit))
    if not prompts:
        raise ConfigError(
            "there is nothing to evaluate: no held-out row can be used; give evaluation.sources, or raise prompts.held_out (nothing is "
            "held out from live sources)"
        )
    return prompts


def held_out_sources(config: Config) -> Mapping[str, SourceConfig]:
    """The sources that an evaluation reads."""
    if config.evaluation.sources:
        return config.evaluation.sources
    return {name: source for name, source in config.prompts.sources.items() if not source.live} if config.prompts.held_out else {}


def max_prompt_tokens(config: Config) -> int:
    """Longest prompt that is asked, the default resolved."""
    return config.prompts.max_tokens or config.generator.max_model_len - config.generator.max_new_tokens


def training_sources(config: Config) -> Mapping[str, SourceConfig]:
    """The sources that a run is trained on.

    Raises:
        ConfigError: there is none.
    """
    if not config.prompts.sources:
        raise ConfigError("task.name dataset needs sources of prompts, got none; give prompts.sources.NAME.path, see docs/prompts.md")
    return config.prompts.sources


def row_reader(name: str, source: SourceConfig, config: Config, tokenizer: PromptTokenizer) -> RowReader:
    """What reads the rows of a source."""
    return RowReader(name, source, config.prompts, tokenizer, max_prompt_tokens(config))


def num_held_out_rows(config: Config) -> int:
    """Rows at the beginning of each source that is not live which are not trained."""
    return 0 if config.evaluation.sources else config.prompts.held_out


def _open(name: str, source: SourceConfig, config: Config, cursor: SourceCursor) -> RowSource:
    passes = Passes(seed=config.seed, key=key_of(name), max_epochs=config.queue.max_epochs)
    if source.live:
        return LiveRows(name, live_reader(name, source, cursor), passes, config.prompts.poll_s, cursor)
    rows: Any = load_rows(name, source)
    num_held_out = num_held_out_rows(config)
    if not source.streaming:
        return MappedRows(name, rows, num_held_out, passes, cursor)
    cursor = replace(cursor, size=cursor.size or config.prompts.shuffle_rows)
    return StreamedRows(name, rows.skip(num_held_out) if num_held_out else rows, num_held_out, passes, cursor)


def live_reader(name: str, source: SourceConfig, cursor: SourceCursor) -> LiveReader:
    """Finds the rows of a live source.

    Raises:
        ConfigError: it is none of the kinds that can grow.
    """
    if source.path.startswith(SQLITE):
        return SqliteReader(source.path)
    path = Path(source.path).expanduser()
    if path.is_dir():
        return FolderReader(path, cursor.files)
    if path.suffix == ".jsonl" and path.is_file():
        return JsonlReader(path)
    raise ConfigError(
        f"prompts.sources.{name} is live, so it must be a folder, a .jsonl file or sqlite:///FILE?table=NAME, each of which may be empty "
        f"but must be there; got {source.path!r}"
    )


def _usable(name: str, source: SourceConfig, config: Config, tokenizer: PromptTokenizer) -> Iterator[Prompt]:
    own = bool(config.evaluation.sources)
    if source.live:
        raise ConfigError(f"evaluation.sources.{name} cannot be live: evaluations ask the same prompts every time; leave `live` out")
    rows: Any = load_rows(name, source, "evaluation.sources" if own else "prompts.sources")
    reader = row_reader(name, source, config, tokenizer)
    for number, columns in enumerate(rows if own else islice(rows, config.prompts.held_out)):
        made = reader.read(Row(row_id=str(number), columns=columns, epoch=0))
        if isinstance(made, Prompt):
            yield made


def _by_turns(parts: list[Iterator[Prompt]]) -> Iterator[Prompt]:
    while parts:
        for part in list(parts):
            prompt = next(part, None)
            if prompt is None:
                parts.remove(part)
            else:
                yield prompt
