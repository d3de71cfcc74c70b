"""Prompts from several sources of rows, mixed by weight; rows that make none are skipped, counted and, if they are bad, named."""

import logging
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import count

import numpy as np

from async_rlhf.errors import ConfigError
from async_rlhf.prompts.cursor import PromptCursor, SourceCursor
from async_rlhf.prompts.passes import RowSource
from async_rlhf.prompts.reading import BAD, Row, RowReader, Skipped
from async_rlhf.types import Prompt

logger = logging.getLogger(__name__)

MIN_BAD = 20
"""Bad rows that a source must have before their share ends the run."""
MAX_NAMED = 5
"""Bad rows of a source that are named."""
MAX_IN_A_ROW = 10_000
"""Rows that may be skipped one after the other: going on for ever is no way to find out that a filter lets nothing through."""


def key_of(name: str) -> int:
    """Tells the random orders of two sources apart."""
    return zlib.crc32(name.encode())


@dataclass(kw_only=True)
class OpenSource:
    """One source while it is drawn from."""

    name: str
    rows: RowSource
    reader: RowReader
    weight: float
    max_bad_share: float
    drawn: int = 0
    skipped: Counter[str] = field(default_factory=Counter[str])
    _named: list[str] = field(default_factory=list[str])

    @property
    def cursor(self) -> SourceCursor:
        """Where its next row is taken, and the counts."""
        return replace(self.rows.cursor, drawn=self.drawn, skipped=dict(self.skipped))

    def draw(self) -> tuple[Prompt, int] | None:
        """The next prompt and its epoch; None: there is none, for now or for good.

        Raises:
            ConfigError: too many rows are bad, or none can be used.
        """
        first: Row | None = None
        for num_skipped in count():
            row = self.rows.next_row()
            if row is None:
                if self.rows.finished and not self.drawn:
                    raise ConfigError(self._nothing(num_skipped))
                return None
            made = self.reader.read(row)
            if isinstance(made, Prompt):
                self.drawn += 1
                return made, row.epoch
            self._skip(row, made)
            first = first or row
            # A pass lies whole between the two rows, or so many rows do that another one will hardly help.
            if row.epoch >= first.epoch + 2 or num_skipped + 1 >= MAX_IN_A_ROW:
                if self.rows.rest():
                    return None
                raise ConfigError(self._nothing(num_skipped + 1))
        raise AssertionError("unreachable")

    def _skip(self, row: Row, why: Skipped) -> None:
        self.skipped[why.reason] += 1
        if why.reason not in BAD:
            return
        if len(self._named) < MAX_NAMED:
            self._named.append(f"row {row.row_id}: {why.reason}, {why.detail}")
            logger.warning("prompts.sources.%s, %s", self.name, self._named[-1])
        num_bad, total = sum(self.skipped[reason] for reason in BAD), self.drawn + self.skipped.total()
        if num_bad >= MIN_BAD and num_bad > self.max_bad_share * total:
            raise ConfigError(
                f"prompts.sources.{self.name}: {num_bad} of {total} rows cannot be used, more than prompts.max_bad_share "
                f"({self.max_bad_share:g}) allows; {'; '.join(self._named)}; repair the rows, or raise prompts.max_bad_share"
            )

    def _nothing(self, num_skipped: int) -> str:
        return nothing_usable(self.name, num_skipped, self.skipped, self._named)


def nothing_usable(name: str, num_rows: int, reasons: Mapping[str, int], named: list[str]) -> str:
    """What to say where rows were looked at and none was of use."""
    why = ", ".join(f"{number} {reason}" for reason, number in reasons.items() if number)
    return (
        f"prompts.sources.{name}: none of {num_rows} rows can be used ({'; '.join([why, *named])}); check prompt_column or template, and "
        "prompts.min_tokens and max_tokens (default: what generator.max_model_len leaves beside max_new_tokens)"
    )


class DatasetStream:
    """Draws from each source as often as its weight says, as long as it has rows.

    Which source draw n takes depends on (seed, n) and on which of them have a row: each gets an exponential waiting time of rate
    `weight`, and the shortest one that has a row wins. Each source has its own position and passes; one whose passes are over is
    left out, and the stream ends with the last one.
    """

    def __init__(self, sources: list[OpenSource], *, seed: int, cursor: PromptCursor) -> None:
        """
        Args:
            sources: standing where the cursor says.
            seed: decides which source is drawn from.
        """
        self._sources = sources
        self._seed = seed
        self._num_drawn = cursor.index

    @property
    def cursor(self) -> PromptCursor:
        """Where the next draw happens."""
        sources = {source.name: source.cursor for source in self._sources}
        return PromptCursor(epoch=min(source.epoch for source in sources.values()), index=self._num_drawn, sources=sources)

    @property
    def exhausted(self) -> bool:
        """All passes over all sources are over."""
        return all(source.rows.finished for source in self._sources)

    def draw(self) -> tuple[Prompt, int] | None:
        """The next prompt and the pass over its source; None: no source has a row, for now or for good.

        Raises:
            ConfigError: too many rows of a source are bad, or none can be used.
        """
        for source in sorted(self._sources, key=self._waiting_time):
            drawn = source.draw()
            if drawn is not None:
                self._num_drawn += 1
                return drawn
        return None

    def _waiting_time(self, source: OpenSource) -> float:
        return float(np.random.default_rng([self._seed, self._num_drawn, key_of(source.name)]).exponential() / source.weight)
