"""Elias omega codes of sparse levels, as QSGD sends them.

Omega (Elias 1975): a number's binary digits, before them in the same way the number of digits less one, and so on down
to 1; a 0 ends it. 1 is `0`, 2 is `10 0`, 3 is `11 0`, 4 is `10 100 0`.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

__all__ = ["read_levels", "write_levels"]

_MOST_BITS = 2 * 64  # of a gap and a level, both below 2^32, and the sign


def write_levels(levels: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Return levels as a stream: how many are not 0 (4 bytes), then for each of them gap, sign, size.

    Args:
        levels: int32 `[n]`, most of them 0.

    Example:
        >>> write_levels(np.array([0, 0, -1, 2], dtype=np.int32)).tolist()  # 2; 11 0, 1, 0; 0, 0, 10 0
        [2, 0, 0, 0, 139, 0]
    """
    where = np.flatnonzero(levels)
    stream = np.zeros((len(where) * _MOST_BITS + 7) // 8, dtype=np.uint8)
    num_bits = _write(where, levels[where], stream)
    count = np.array([len(where)], dtype="<u4").view(np.uint8)
    return np.concatenate([count, stream[: (num_bits + 7) // 8]])


def read_levels(stream: NDArray[np.uint8], num_levels: int) -> NDArray[np.int32]:
    """Return the levels of a stream, int32 `[num_levels]`.

    Raises:
        ValueError: it is no stream of so many levels.
    """
    levels = np.zeros(num_levels, dtype=np.int32)
    count = int(np.ascontiguousarray(stream[:4]).view("<u4")[0]) if len(stream) >= 4 else -1
    if not 0 <= count <= num_levels or not _read(stream[4:], count, levels):
        raise ValueError(f"{len(stream)} bytes do not hold {num_levels} levels: they were damaged on their way")
    return levels


@numba.njit(cache=True)
def _put(number, stream, at):  # type: ignore[no-untyped-def]
    """Write the omega code of a number from 1 on; return where it ends."""
    groups = np.empty(8, dtype=np.int64)
    num_groups = 0
    while number > 1:
        groups[num_groups] = number
        num_groups += 1
        digits = 0
        while number >> digits:
            digits += 1
        number = digits - 1
    for k in range(num_groups - 1, -1, -1):
        digits = 0
        while groups[k] >> digits:
            digits += 1
        for digit in range(digits - 1, -1, -1):
            stream[at >> 3] |= np.uint8(((groups[k] >> digit) & 1) << (at & 7))
            at += 1
    return at + 1  # the 0 that ends it


@numba.njit(cache=True)
def _get(stream, at):  # type: ignore[no-untyped-def]
    """Return the number whose code begins at a bit, and where it ends; 0 if the stream ends before."""
    number = np.int64(1)
    end = 8 * stream.size
    while at < end and (stream[at >> 3] >> (at & 7)) & 1:
        digits = number + 1
        if digits > 40 or at + digits > end:
            return np.int64(0), at
        number = np.int64(0)
        for _ in range(digits):
            number = 2 * number + ((stream[at >> 3] >> (at & 7)) & 1)
            at += 1
    return (number, at + 1) if at < end else (np.int64(0), at)


@numba.njit(cache=True)
def _write(where, values, stream):  # type: ignore[no-untyped-def]
    at = 0
    last = -1
    for k in range(where.size):
        at = _put(where[k] - last, stream, at)
        last = where[k]
        if values[k] < 0:
            stream[at >> 3] |= np.uint8(1 << (at & 7))
        at = _put(abs(np.int64(values[k])), stream, at + 1)
    return at


@numba.njit(cache=True)
def _read(stream, count, levels):  # type: ignore[no-untyped-def]
    at = 0
    last = -1
    for _ in range(count):
        gap, at = _get(stream, at)
        last += gap
        if gap == 0 or last >= levels.size or at >= 8 * stream.size:
            return False
        negative = (stream[at >> 3] >> (at & 7)) & 1
        size, at = _get(stream, at + 1)
        if size == 0 or size > 2**31 - 1:
            return False
        levels[last] = -size if negative else size
    return True
