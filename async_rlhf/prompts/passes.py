"""Rows in passes over a source: of a set that can be read anywhere, and of one that is read as a stream, block by block."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from async_rlhf.errors import ConfigError, RunError
from async_rlhf.prompts.cursor import SourceCursor
from async_rlhf.prompts.reading import Row

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


class RowSource(Protocol):
    """Rows of one source, one after the other."""

    @property
    def cursor(self) -> SourceCursor:
        """Where the next row is taken."""
        ...

    @property
    def finished(self) -> bool:
        """No row will ever come again."""
        ...

    def next_row(self) -> Row | None:
        """The next row; None: there is none at the moment, or, when finished, none any more."""
        ...

    def rest(self) -> bool:
        """None of the rows can be used: wait until there are others. False: there will never be others."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """How often a source is gone through, and in what order."""

    seed: int
    key: int
    """Of the source: two of them differ in their order."""
    max_epochs: int
    """0: without end."""

    def order(self, epoch: int, size: int, block: int = 0) -> np.ndarray:
        """A permutation of `size` rows that depends on the seed, the source, the pass and the block of it."""
        return np.random.default_rng([self.seed, self.key, epoch, block]).permutation(size)

    def over(self, epoch: int) -> bool:
        """There is no pass `epoch`."""
        return 0 < self.max_epochs <= epoch


class MappedRows:
    """Every row of a set once in each pass, in a fresh seeded order."""

    def __init__(self, name: str, rows: "Dataset", num_held_out: int, passes: Passes, cursor: SourceCursor) -> None:
        """
        Args:
            name: of the source, for messages.
            num_held_out: rows at the beginning that are not drawn.
        Raises:
            ConfigError: there are no others; or the set has another size than when `cursor` was made.
        """
        size = len(rows) - num_held_out
        if size <= 0:
            raise ConfigError(
                f"prompts.sources.{name} has {len(rows)} rows, of which prompts.held_out ({num_held_out}) keeps all from training; lower "
                "prompts.held_out, or give evaluation.sources"
            )
        if cursor.size not in (0, size):
            raise ConfigError(
                f"prompts.sources.{name} has {size} rows to train on, but had {cursor.size} when the run began: its order would be another "
                "one; restore the rows, or add new ones as a source of their own"
            )
        self._name = name
        self._rows = rows
        self._num_held_out = num_held_out
        self._size = size
        self._passes = passes
        self._epoch, self._index = cursor.epoch, cursor.index
        self._order = passes.order(self._epoch, size)

    @property
    def cursor(self) -> SourceCursor:
        """Where the next row is taken."""
        return SourceCursor(epoch=self._epoch, index=self._index, size=self._size)

    @property
    def finished(self) -> bool:
        """All passes are over."""
        return self._passes.over(self._epoch)

    def next_row(self) -> Row | None:
        """The next row, or None when all passes are over.

        Raises:
            RunError: it cannot be read.
        """
        if self.finished:
            return None
        number, epoch = self._num_held_out + int(self._order[self._index]), self._epoch
        self._index += 1
        if self._index == self._size:
            self._epoch, self._index = epoch + 1, 0
            self._order = self._passes.order(self._epoch, self._size)
        try:
            columns = cast(Mapping[str, object], self._rows[number])
        except Exception as error:  # a file that is gone, an image that cannot be decoded
            raise RunError(f"prompts.sources.{self._name}, row {number}, cannot be read: {type(error).__name__}: {error}") from error
        return Row(row_id=str(number), columns=columns, epoch=epoch)

    def rest(self) -> bool:
        """See RowSource."""
        return False


class StreamedRows:
    """Blocks of rows in the order of the stream, each block in a fresh seeded order. Memory holds one block.

    The cursor holds the stream's own state at the beginning of the block, so a resume reads that block again and nothing before it.
    """

    def __init__(self, name: str, rows: "IterableDataset", num_held_out: int, passes: Passes, cursor: SourceCursor) -> None:
        """
        Args:
            name: of the source, for messages.
            rows: without those held out.
            num_held_out: how many those are: they count in the numbers of the rows.
            cursor: its `size` is the number of rows in a block.
        Raises:
            ConfigError: there are no rows. RunError: they cannot be read.
        """
        self._name = name
        self._rows = rows
        self._num_held_out = num_held_out
        self._passes = passes
        self._block_rows = cursor.size
        self._beginning = json.dumps(rows.state_dict())
        self._epoch, self._block_number, self._index = cursor.epoch, cursor.block, cursor.index
        self._state = cursor.stream
        if not self.finished:
            self._restart(self._state or self._beginning)
            if not self._block:
                raise ConfigError(
                    f"prompts.sources.{name} has no rows to train on, with prompts.held_out ({num_held_out}) kept from training"
                )

    @property
    def cursor(self) -> SourceCursor:
        """Where the next row is taken."""
        return SourceCursor(epoch=self._epoch, index=self._index, size=self._block_rows, block=self._block_number, stream=self._state)

    @property
    def finished(self) -> bool:
        """All passes are over."""
        return self._passes.over(self._epoch)

    def next_row(self) -> Row | None:
        """The next row, or None when all passes are over.

        Raises:
            RunError: the stream cannot be read on.
        """
        if self.finished:
            return None
        place, epoch = int(self._order[self._index]), self._epoch
        number = self._num_held_out + self._block_number * self._block_rows + place
        row = Row(row_id=str(number), columns=self._block[place], epoch=epoch)
        self._index += 1
        if self._index == len(self._block):
            self._next_block()
        return row

    def rest(self) -> bool:
        """See RowSource."""
        return False

    def _next_block(self) -> None:
        self._block_number, self._index = self._block_number + 1, 0
        self._state = json.dumps(self._rows.state_dict())
        self._read()
        if not self._block:
            self._epoch, self._block_number, self._state = self._epoch + 1, 0, ""
            if not self.finished:
                self._restart(self._beginning)

    def _restart(self, state: str) -> None:
        self._rows.load_state_dict(json.loads(state))
        self._iterator: Any = iter(self._rows)
        self._read()

    def _read(self) -> None:
        self._block: list[Mapping[str, object]] = []  # first: two blocks at once are twice the memory
        try:
            self._block = list(islice(self._iterator, self._block_rows))
        except Exception as error:  # whatever the library, or a hub, says
            raise RunError(
                f"prompts.sources.{self._name} cannot be read beyond row {self._num_held_out + self._block_number * self._block_rows} of "
                f"pass {self._epoch}: {type(error).__name__}: {error}; repair it and resume"
            ) from error
        self._order = self._passes.order(self._epoch, len(self._block), self._block_number)
