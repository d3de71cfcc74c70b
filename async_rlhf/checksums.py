"""Checksums of what travels or is kept: XXH3, which reads memory as fast as it comes. They find damage, not malice."""

import numpy as np
import xxhash


def checksum(array: np.ndarray) -> int:
    """64 bits of the array's bytes, in order."""
    return xxhash.xxh3_64_intdigest(bytes_of(array))


def digest(*parts: bytes | memoryview) -> bytes:
    """128 bits of the parts, one behind the other."""
    state = xxhash.xxh3_128()
    for part in parts:
        state.update(part)
    return state.digest()


def bytes_of(array: np.ndarray) -> memoryview:
    """An array's memory, in order; copied only where it is not in one piece."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
