"""The compiled bodies on the CPU that find which parameters take part and that cap the votes which are sent.

Votes are few: planes are read a block's 64 bytes at a time, and only a block that has any is looked at bit by bit.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, no-check-untyped-defs, no-warn-unreachable

from __future__ import annotations

import numpy as np

from distsign.kernels.jit import _compiled, _jit
from distsign.kernels.jit_bits import count_ones, trailing_zeros
from distsign.kernels.spans import BLOCK, LANES

__all__ = ["find_active", "settle"]

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_ZERO = np.uint32(0)
_LINE = BLOCK // 8


@_compiled("(uint32[::1], int64[::1], int64[::1], int64[::1], boolean[::1])")
def find_active(x, start, length, row, out):
    for k in range(start.size):
        done = 0
        found = _ZERO
        while found == 0 and done < length[k]:
            n = min(BLOCK, length[k] - done)
            block = x[start[k] + done : start[k] + done + n]
            for i in range(n):
                found = np.uint32(found | (block[i] & _MAGNITUDE))
            done += n
        out[row[k]] = found != 0


@_jit
def _load_line(plane, first, last, words):
    """Load up to a block's 64 bytes, zeros after the end, and return whether any is not zero."""
    line = words.view(np.uint8)
    part = plane[first:last]
    if part.size == _LINE:
        for i in range(_LINE):
            line[i] = part[i]
    else:
        words[:] = 0
        for i in range(part.size):
            line[i] = part[i]
    found = np.uint64(0)
    for i in range(words.size):
        found |= words[i]
    return found != 0


@_jit
def _settle_range(mask, sign, first, last, num_blocked, left, carry, home, words):
    """Keep the first `left` votes in bytes `first` to `last`, zero their carry, and take back the others."""
    at = first
    while at < last and left > 0:
        block = at // _LINE
        end = min(last, (block + 1) * _LINE)
        if _load_line(mask, at, end, words):
            for w in range(words.size):
                word = words[w]
                while word != 0:
                    bit = 8 * (at + 8 * w) + np.int64(trailing_zeros(word))
                    word &= np.uint64(word - np.uint64(1))
                    if left > 0:
                        left -= 1
                        element = bit
                        if bit < num_blocked:
                            place = bit % BLOCK
                            element = bit - place + place % 32 * LANES + place // 32
                        if carry.size:
                            carry[home + element] = 0
                    else:
                        taken = np.uint8(~(1 << (bit % 8)))
                        mask[bit // 8] &= taken
                        sign[bit // 8] &= taken
        at = end
    for i in range(at, last):
        sign[i] &= np.uint8(~mask[i])
        mask[i] = 0
    return left


@_jit
def _count(plane, words):
    whole = plane.size // _LINE * _LINE
    # Not line by line: so it is vectors' work. x86 and ARM read words wherever they lie.
    lines = plane[:whole].view(np.uint64)
    count = np.int64(0)
    for i in range(lines.size):
        count += np.int64(count_ones(lines[i]))
    if _load_line(plane, whole, plane.size, words):
        for i in range(words.size):
            count += np.int64(count_ones(words[i]))
    return count


def _signature(kept):
    return (
        f"(uint8[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], {kept}[::1], int64[::1])"
    )


@_compiled(_signature("float32"), _signature("uint16"))
def settle(planes, length, mask_at, sign_at, home, caps, starts, carry, counts):
    """Settle with a carry in float32 or bfloat16, or an empty one, which stays as it is."""
    words = np.zeros(_LINE // 8, np.uint64)
    for k in range(length.size):
        num_bytes = (length[k] + 7) // 8
        mask = planes[mask_at[k] : mask_at[k] + num_bytes]
        sign = planes[sign_at[k] : sign_at[k] + num_bytes]
        counts[k] = _count(mask, words)
        if counts[k] and (carry.size or counts[k] > caps[k]):
            blocked = length[k] // BLOCK * BLOCK
            left = _settle_range(mask, sign, starts[k], num_bytes, blocked, caps[k], carry, home[k], words)
            _settle_range(mask, sign, 0, starts[k], blocked, left, carry, home[k], words)
