"""How long QSGD's payloads must be, code by code."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def qsgd_bytes(levels: NDArray[np.int32], num_chunks: int) -> int:
    """Return the length of a tensor's payload: a norm each chunk, the number of levels that are not 0, and their codes.

    Example:
        >>> qsgd_bytes(np.array([0, 0, -1, 2]), num_chunks=1)
        10
    """
    where = np.flatnonzero(levels)
    gaps = np.diff(where, prepend=-1)
    values = np.abs(levels[where])
    bits = sum(_omega_bits(int(gap)) + 1 + _omega_bits(int(value)) for gap, value in zip(gaps, values, strict=True))
    return 4 * num_chunks + 4 + (bits + 7) // 8


def _omega_bits(number: int) -> int:
    bits = 1
    while number > 1:
        bits += number.bit_length()
        number = number.bit_length() - 1
    return bits
