"""Rows of a source that grows while the run goes on: new ones first, old ones in passes while there are none."""

import time
from collections.abc import Callable, Mapping
from typing import Protocol

from async_rlhf.errors import ConfigError
from async_rlhf.prompts.cursor import SourceCursor
from async_rlhf.prompts.passes import Passes
from async_rlhf.prompts.reading import Row


class LiveReader(Protocol):
    """Rows by number, in the order in which they were found: a number stands for the same row in every process."""

    @property
    def num_rows(self) -> int:
        """Rows found so far."""
        ...

    @property
    def files(self) -> Mapping[str, int]:
        """File -> its rows, where that order cannot be seen in the source itself."""
        ...

    def poll(self) -> None:
        """Look for new rows.

        Raises:
            ConfigError: rows that were there are gone, or the source cannot be read any more.
        """
        ...

    def row(self, index: int) -> tuple[str, Mapping[str, object] | None]:
        """Its name, and its columns; None: it cannot be read."""
        ...


class LiveRows:
    """New rows in the order in which they were found (epoch 0); while there are none, passes over the old ones (epochs 1, 2, ...).

    A pass holds the rows that were there when it began; those that come meanwhile interrupt it, and take part in the next one.
    """

    def __init__(self, name: str, reader: LiveReader, passes: Passes, poll_s: float, cursor: SourceCursor) -> None:
        """
        Args:
            name: of the source, for messages.
            passes: `max_epochs` counts the first time that a row is drawn as its first pass.
            poll_s: seconds between two looks for new rows.
        Raises:
            ConfigError: rows that were drawn before are gone.
        """
        self._reader = reader
        self._passes = passes
        self._poll_s = poll_s
        self._fresh, self._epoch, self._index, self._size = cursor.fresh, cursor.epoch, cursor.index, cursor.size
        self._order = passes.order(self._epoch, self._size)
        self._resting_at = -1
        self.clock: Callable[[], float] = time.monotonic
        reader.poll()
        self._polled_s = self.clock()
        if reader.num_rows < self._fresh:
            raise ConfigError(
                f"prompts.sources.{name} has {reader.num_rows} rows, but {self._fresh} were drawn from it before; rows of a live source "
                "may be added, never removed: restore them"
            )

    @property
    def cursor(self) -> SourceCursor:
        """Where the next row is taken."""
        return SourceCursor(epoch=self._epoch, index=self._index, size=self._size, fresh=self._fresh, files=dict(self._reader.files))

    @property
    def finished(self) -> bool:
        """Never: a row may come at any moment."""
        return False

    def next_row(self) -> Row | None:
        """The next row, or None when there is none at the moment."""
        if self.clock() - self._polled_s >= self._poll_s:
            self._reader.poll()
            self._polled_s = self.clock()
        if self._fresh < self._reader.num_rows:
            self._fresh += 1
            return self._row(self._fresh - 1, epoch=0)
        if self._resting_at == self._reader.num_rows or (self._index >= self._size and not self._begin_pass()):
            return None
        self._index += 1
        return self._row(int(self._order[self._index - 1]), epoch=self._epoch)

    def rest(self) -> bool:
        """Draw no old rows until there are new ones."""
        self._resting_at = self._reader.num_rows
        return True

    def _begin_pass(self) -> bool:
        if self._passes.over(self._epoch + 1) or not self._reader.num_rows:
            return False
        self._epoch, self._index, self._size = self._epoch + 1, 0, self._reader.num_rows
        self._order = self._passes.order(self._epoch, self._size)
        return True

    def _row(self, index: int, *, epoch: int) -> Row:
        row_id, columns = self._reader.row(index)
        return Row(row_id=row_id, columns=columns, epoch=epoch)
