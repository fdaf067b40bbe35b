"""The compiled bodies of the CPU kernels: Numba, one core each, without the interpreter lock.

Written so that LLVM vectorises them: the loop that is vectorised runs over the 16 lanes of a block, and what happens to
the 32 bits of a lane's word is unrolled inside it, by helpers that Numba itself inlines (a call left to LLVM stays
scalar). Blocks are sliced out first, because an index that might be negative is checked for wrap-around. Conditions are
arithmetic, because LLVM may split a loop at a branch. `error_model="numpy"` leaves out the check for a zero divisor.
Each of these alone stops vectorisation.

Array arguments: `x` float32 gradient as uint32 bits, `start`, `length`, `row`, `mask_at`, `sign_at` as in `Spans`.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from distsign.kernels.spans import BLOCK, LANES

__all__ = ["find_moments", "pack_ballots", "unpack_verdicts"]

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_EXPONENT_ONE = np.uint32(0x00800000)
_TOP = np.uint32(0x80000000)
_ONE = np.uint32(1)
_ZERO = np.uint32(0)
_BYTES = LANES * 4
_STRIDE = BLOCK // 4

_OPTIONS: Any = {"nogil": True, "error_model": "numpy", "cache": True}
_jit: Any = numba.njit(**_OPTIONS)
_inline: Any = numba.njit(nogil=True, error_model="numpy", inline="always")


def _compiled(signature: str) -> Any:
    """Compile at import, before the first collective: later, other ranks would wait for this one under a timeout."""
    return numba.njit(signature, **_OPTIONS)


# ---------------------------------------------------------------------------------------------------------------- pack


@_inline
def _mask8(x, at, limit):
    """Bit i: does element `at + 16 i` vote? Magnitudes of IEEE floats compare as integers, NaN above infinity."""
    m = np.uint32((x[at] & _MAGNITUDE) > limit)
    m |= np.uint32((x[at + LANES] & _MAGNITUDE) > limit) << np.uint32(1)
    m |= np.uint32((x[at + 2 * LANES] & _MAGNITUDE) > limit) << np.uint32(2)
    m |= np.uint32((x[at + 3 * LANES] & _MAGNITUDE) > limit) << np.uint32(3)
    m |= np.uint32((x[at + 4 * LANES] & _MAGNITUDE) > limit) << np.uint32(4)
    m |= np.uint32((x[at + 5 * LANES] & _MAGNITUDE) > limit) << np.uint32(5)
    m |= np.uint32((x[at + 6 * LANES] & _MAGNITUDE) > limit) << np.uint32(6)
    m |= np.uint32((x[at + 7 * LANES] & _MAGNITUDE) > limit) << np.uint32(7)
    return m


@_inline
def _sign8(x, at, s):
    """Shift the signs of eight elements into the top of `s`, so that after 32 of them bit i is element i's sign."""
    s = (s >> _ONE) | (x[at] & _TOP)
    s = (s >> _ONE) | (x[at + LANES] & _TOP)
    s = (s >> _ONE) | (x[at + 2 * LANES] & _TOP)
    s = (s >> _ONE) | (x[at + 3 * LANES] & _TOP)
    s = (s >> _ONE) | (x[at + 4 * LANES] & _TOP)
    s = (s >> _ONE) | (x[at + 5 * LANES] & _TOP)
    s = (s >> _ONE) | (x[at + 6 * LANES] & _TOP)
    s = (s >> _ONE) | (x[at + 7 * LANES] & _TOP)
    return s


@_inline
def _overflow8(x, at, w):
    """Collect in the top bit of `w` whether any of eight elements is NaN or infinite: its exponent overflows by one."""
    w |= (x[at] & _MAGNITUDE) + _EXPONENT_ONE
    w |= (x[at + LANES] & _MAGNITUDE) + _EXPONENT_ONE
    w |= (x[at + 2 * LANES] & _MAGNITUDE) + _EXPONENT_ONE
    w |= (x[at + 3 * LANES] & _MAGNITUDE) + _EXPONENT_ONE
    w |= (x[at + 4 * LANES] & _MAGNITUDE) + _EXPONENT_ONE
    w |= (x[at + 5 * LANES] & _MAGNITUDE) + _EXPONENT_ONE
    w |= (x[at + 6 * LANES] & _MAGNITUDE) + _EXPONENT_ONE
    w |= (x[at + 7 * LANES] & _MAGNITUDE) + _EXPONENT_ONE
    return w


@_inline
def _popcount(m):
    # Numba types uint32 * uint32 as uint64; the cast cuts the product back to its low word.
    m = m - ((m >> _ONE) & np.uint32(0x55555555))
    m = (m & np.uint32(0x33333333)) + ((m >> np.uint32(2)) & np.uint32(0x33333333))
    m = (m + (m >> np.uint32(4))) & np.uint32(0x0F0F0F0F)
    return np.uint32(m * np.uint32(0x01010101)) >> np.uint32(24)


@_compiled(
    "(uint32[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], uint32[::1], uint8[::1], int64[::1])"
)
def pack_ballots(x, start, length, row, mask_at, sign_at, limits, out, counts):
    # One array for all that is kept per lane: LLVM compares at most eight pairs of pointers before it gives up.
    lanes = np.zeros(4 * LANES, np.uint32)  # masks, signs, overflows, counts of votes
    lane_bytes = lanes.view(np.uint8)
    overflow = _ZERO
    for k in range(start.size):
        base, end = start[k], start[k] + length[k]
        limit = limits[row[k]]
        m_at, s_at = mask_at[k], sign_at[k]
        lanes[3 * LANES :] = 0
        while base + BLOCK <= end:
            block = x[base : base + BLOCK]
            for j in range(LANES):
                m = _mask8(block, j, limit)
                m |= _mask8(block, j + _STRIDE, limit) << np.uint32(8)
                m |= _mask8(block, j + 2 * _STRIDE, limit) << np.uint32(16)
                m |= _mask8(block, j + 3 * _STRIDE, limit) << np.uint32(24)
                s = _sign8(block, j, _ZERO)
                s = _sign8(block, j + _STRIDE, s)
                s = _sign8(block, j + 2 * _STRIDE, s)
                s = _sign8(block, j + 3 * _STRIDE, s)
                w = _overflow8(block, j, lanes[2 * LANES + j])
                w = _overflow8(block, j + _STRIDE, w)
                w = _overflow8(block, j + 2 * _STRIDE, w)
                w = _overflow8(block, j + 3 * _STRIDE, w)
                lanes[j] = m
                lanes[LANES + j] = s & m
                lanes[2 * LANES + j] = w
                lanes[3 * LANES + j] += _popcount(m)
            out[m_at : m_at + _BYTES] = lane_bytes[:_BYTES]
            out[s_at : s_at + _BYTES] = lane_bytes[_BYTES : 2 * _BYTES]
            base += BLOCK
            m_at += _BYTES
            s_at += _BYTES
        num_votes = 0
        while base < end:
            m = np.uint8(0)
            s = np.uint8(0)
            for i in range(min(8, end - base)):
                magnitude = x[base + i] & _MAGNITUDE
                overflow |= magnitude + _EXPONENT_ONE
                if magnitude > limit:
                    m |= np.uint8(1 << i)
                    s |= np.uint8((x[base + i] >> np.uint32(31)) << np.uint32(i))
                    num_votes += 1
            out[m_at] = m
            out[s_at] = s
            base += 8
            m_at += 1
            s_at += 1
        for j in range(LANES):
            num_votes += lanes[3 * LANES + j]
            overflow |= lanes[2 * LANES + j]
        counts[row[k]] += num_votes
    return (overflow & _TOP) == 0


# -------------------------------------------------------------------------------------------------------------- unpack


@_inline
def _store8(out, at, m, s, value):
    """Write eight elements of a lane; `m` and `s` hold the first one's bits lowest."""
    out[at] = (value ^ ((s & _ONE) << np.uint32(31))) if m & _ONE else _ZERO
    out[at + LANES] = (value ^ ((s & np.uint32(2)) << np.uint32(30))) if m & np.uint32(2) else _ZERO
    out[at + 2 * LANES] = (value ^ ((s & np.uint32(4)) << np.uint32(29))) if m & np.uint32(4) else _ZERO
    out[at + 3 * LANES] = (value ^ ((s & np.uint32(8)) << np.uint32(28))) if m & np.uint32(8) else _ZERO
    out[at + 4 * LANES] = (value ^ ((s & np.uint32(16)) << np.uint32(27))) if m & np.uint32(16) else _ZERO
    out[at + 5 * LANES] = (value ^ ((s & np.uint32(32)) << np.uint32(26))) if m & np.uint32(32) else _ZERO
    out[at + 6 * LANES] = (value ^ ((s & np.uint32(64)) << np.uint32(25))) if m & np.uint32(64) else _ZERO
    out[at + 7 * LANES] = (value ^ ((s & np.uint32(128)) << np.uint32(24))) if m & np.uint32(128) else _ZERO


@_compiled("(uint8[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], uint32, uint32[::1], int64[::1])")
def unpack_verdicts(payload, start, length, row, mask_at, sign_at, value, out, counts):
    lanes = np.zeros(2 * LANES, np.uint32)  # masks, signs
    lane_bytes = lanes.view(np.uint8)
    for k in range(start.size):
        count = 0
        base, end = start[k], start[k] + length[k]
        m_at, s_at = mask_at[k], sign_at[k]
        while base + BLOCK <= end:
            lane_bytes[:_BYTES] = payload[m_at : m_at + _BYTES]
            lane_bytes[_BYTES:] = payload[s_at : s_at + _BYTES]
            block = out[base : base + BLOCK]
            for j in range(LANES):
                m = lanes[j]
                s = lanes[LANES + j]
                _store8(block, j, m, s, value)
                _store8(block, j + _STRIDE, m >> np.uint32(8), s >> np.uint32(8), value)
                _store8(block, j + 2 * _STRIDE, m >> np.uint32(16), s >> np.uint32(16), value)
                _store8(block, j + 3 * _STRIDE, m >> np.uint32(24), s >> np.uint32(24), value)
            for j in range(LANES):
                count += np.int64(_popcount(lanes[j]))
            base += BLOCK
            m_at += _BYTES
            s_at += _BYTES
        while base < end:
            m = np.uint32(payload[m_at])
            s = np.uint32(payload[s_at])
            for i in range(min(8, end - base)):
                bit = np.uint32(i)
                out[base + i] = (value ^ (((s >> bit) & _ONE) << np.uint32(31))) if (m >> bit) & _ONE else _ZERO
                count += (m >> bit) & _ONE
            base += 8
            m_at += 1
            s_at += 1
        counts[row[k]] += count


# ------------------------------------------------------------------------------------------------------------- moments


@_inline
def _add8(x, at, s):
    s = s + np.float64(x[at])
    s = s + np.float64(x[at + LANES])
    s = s + np.float64(x[at + 2 * LANES])
    s = s + np.float64(x[at + 3 * LANES])
    s = s + np.float64(x[at + 4 * LANES])
    s = s + np.float64(x[at + 5 * LANES])
    s = s + np.float64(x[at + 6 * LANES])
    s = s + np.float64(x[at + 7 * LANES])
    return s


@_inline
def _add_squares8(x, at, s):
    s = s + np.float64(x[at]) * np.float64(x[at])
    s = s + np.float64(x[at + LANES]) * np.float64(x[at + LANES])
    s = s + np.float64(x[at + 2 * LANES]) * np.float64(x[at + 2 * LANES])
    s = s + np.float64(x[at + 3 * LANES]) * np.float64(x[at + 3 * LANES])
    s = s + np.float64(x[at + 4 * LANES]) * np.float64(x[at + 4 * LANES])
    s = s + np.float64(x[at + 5 * LANES]) * np.float64(x[at + 5 * LANES])
    s = s + np.float64(x[at + 6 * LANES]) * np.float64(x[at + 6 * LANES])
    s = s + np.float64(x[at + 7 * LANES]) * np.float64(x[at + 7 * LANES])
    return s


@_jit
def _halve(lanes):
    width = LANES // 2
    while width:
        for j in range(width):
            lanes[j] = lanes[j] + lanes[j + width]
        width //= 2
    return lanes[0]


@_jit
def _block_sums(x, sums, squares):
    """Sum each block of `x`, and its squares, in the order of `reference._fold`; the last block is padded with 0."""
    lanes = np.empty(LANES, np.float64)
    lanes2 = np.empty(LANES, np.float64)
    num_full = x.size // BLOCK
    for b in range(num_full):
        base = b * BLOCK
        for j in range(LANES):
            at = base + j
            s = _add8(x, at, 0.0)
            s = _add8(x, at + _STRIDE, s)
            s = _add8(x, at + 2 * _STRIDE, s)
            lanes[j] = _add8(x, at + 3 * _STRIDE, s)
            q = _add_squares8(x, at, 0.0)
            q = _add_squares8(x, at + _STRIDE, q)
            q = _add_squares8(x, at + 2 * _STRIDE, q)
            lanes2[j] = _add_squares8(x, at + 3 * _STRIDE, q)
        sums[b] = _halve(lanes)
        squares[b] = _halve(lanes2)
    if x.size > num_full * BLOCK:
        lanes[:] = 0.0
        lanes2[:] = 0.0
        for i in range(num_full * BLOCK, x.size):
            value = np.float64(x[i])
            lanes[i % LANES] += value
            lanes2[i % LANES] += value * value
        sums[num_full] = _halve(lanes)
        squares[num_full] = _halve(lanes2)


@_jit
def _fold(terms):
    unused = np.empty((terms.size + BLOCK - 1) // BLOCK, np.float64)
    while terms.size > 1:
        sums = np.empty((terms.size + BLOCK - 1) // BLOCK, np.float64)
        _block_sums(terms, sums, unused)
        terms = sums
    return terms[0]


@_compiled("(float32[::1], int64[::1], int64[::1], int64[::1], float64[:, ::1])")
def find_moments(x, start, length, row, out):
    for k in range(start.size):
        if length[k]:
            num_blocks = (length[k] + BLOCK - 1) // BLOCK
            sums = np.empty(num_blocks, np.float64)
            squares = np.empty(num_blocks, np.float64)
            _block_sums(x[start[k] : start[k] + length[k]], sums, squares)
            mean = _fold(sums) / length[k]
            variance = _fold(squares) / length[k] - mean * mean
            out[row[k], 0] = mean
            # not (v < 0), so that a NaN stays one
            out[row[k], 1] = 0.0 if variance < 0.0 else np.sqrt(variance)
