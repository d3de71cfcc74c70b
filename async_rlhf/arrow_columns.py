"""Arrow columns of what a row of rollouts holds many of: whole arrays at once, never number by number."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa

from async_rlhf.types import VersionSpan

SPANS = pa.list_(pa.struct([("version", pa.int64()), ("start", pa.int64()), ("end", pa.int64())]))
"""A row's version spans."""


def lists_column(arrays: Sequence[np.ndarray], dtype: type[np.generic]) -> pa.ListArray:
    """One array per row."""
    wrong = [array for array in arrays if array.dtype != dtype or array.ndim != 1]
    assert not wrong, f"must be one-dimensional {dtype.__name__}, got {wrong[0].dtype} of shape {wrong[0].shape}"
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
    assert offsets[-1] < 2**31, f"one Arrow list column holds up to 2**31 - 1 values, got {offsets[-1]}; encode fewer groups at once"
    return pa.ListArray.from_arrays(offsets.astype(np.int32), np.concatenate([np.empty(0, dtype), *arrays]))


def arrays_of(column: pa.ListArray) -> list[np.ndarray]:
    """The arrays again; they own their memory."""
    offsets, values = column.offsets.to_numpy(), column.values.to_numpy()
    return [values[begin:end].copy() for begin, end in pairwise(offsets)]


def spans_column(of_rows: Sequence[Sequence[VersionSpan]]) -> pa.ListArray:
    """The spans of each row."""
    offsets = np.cumsum([0, *map(len, of_rows)], dtype=np.int32)
    flat = [(span.version, span.start, span.end) for spans in of_rows for span in spans]
    columns = [np.ascontiguousarray(column) for column in np.array(flat, dtype=np.int64).reshape(-1, 3).T]
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(columns, fields=list(SPANS.value_type)))


def spans_of(column: pa.ListArray) -> list[tuple[VersionSpan, ...]]:
    """The spans again."""
    offsets, values = column.offsets.to_pylist(), column.values
    flat = zip(*(values.field(name).to_pylist() for name in ("version", "start", "end")), strict=True)
    spans = [VersionSpan(version=version, start=start, end=end) for version, start, end in flat]
    return [tuple(spans[begin:end]) for begin, end in pairwise(offsets)]
