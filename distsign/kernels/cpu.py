"""The kernels in Numba, one core each, without the interpreter lock.

Written so that LLVM vectorises them: the loop that is vectorised runs over the 16 lanes of a block, and what happens to
the 32 bits of a lane's word is unrolled inside it, by helpers that Numba itself inlines (a call left to LLVM stays
scalar). `error_model="numpy"` leaves out the check for a zero divisor, which would stop vectorisation.
Holds bit for bit with `reference`; `tests/test_kernels.py` keeps it so.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from distsign.kernels.spans import BLOCK, LANES, Spans

__all__ = ["moments", "pack", "tally", "unpack"]

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)
_TOP = np.uint32(0x80000000)
_ONE = np.uint32(1)
_ZERO = np.uint32(0)
_BYTES = LANES * 4
_STRIDE = BLOCK // 4
_CHUNK = 256

_jit: Any = numba.njit(nogil=True, error_model="numpy", cache=True)
_inline: Any = numba.njit(nogil=True, error_model="numpy", inline="always")


# ---------------------------------------------------------------------------------------------------------------- pack


@_inline
def _mask8(x, at, limit):
    """Bit i: does element `at + 16 i` vote? Magnitudes of IEEE floats compare as integers, NaN above infinity."""
    m = _ONE if np.int32(x[at] & _MAGNITUDE) > limit else _ZERO
    m |= np.uint32(2) if np.int32(x[at + LANES] & _MAGNITUDE) > limit else _ZERO
    m |= np.uint32(4) if np.int32(x[at + 2 * LANES] & _MAGNITUDE) > limit else _ZERO
    m |= np.uint32(8) if np.int32(x[at + 3 * LANES] & _MAGNITUDE) > limit else _ZERO
    m |= np.uint32(16) if np.int32(x[at + 4 * LANES] & _MAGNITUDE) > limit else _ZERO
    m |= np.uint32(32) if np.int32(x[at + 5 * LANES] & _MAGNITUDE) > limit else _ZERO
    m |= np.uint32(64) if np.int32(x[at + 6 * LANES] & _MAGNITUDE) > limit else _ZERO
    m |= np.uint32(128) if np.int32(x[at + 7 * LANES] & _MAGNITUDE) > limit else _ZERO
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
def _largest8(x, at, w):
    w = max(w, np.int32(x[at] & _MAGNITUDE))
    w = max(w, np.int32(x[at + LANES] & _MAGNITUDE))
    w = max(w, np.int32(x[at + 2 * LANES] & _MAGNITUDE))
    w = max(w, np.int32(x[at + 3 * LANES] & _MAGNITUDE))
    w = max(w, np.int32(x[at + 4 * LANES] & _MAGNITUDE))
    w = max(w, np.int32(x[at + 5 * LANES] & _MAGNITUDE))
    w = max(w, np.int32(x[at + 6 * LANES] & _MAGNITUDE))
    w = max(w, np.int32(x[at + 7 * LANES] & _MAGNITUDE))
    return w


@_inline
def _popcount(m):
    m = m - ((m >> _ONE) & np.uint32(0x55555555))
    m = (m & np.uint32(0x33333333)) + ((m >> np.uint32(2)) & np.uint32(0x33333333))
    m = (m + (m >> np.uint32(4))) & np.uint32(0x0F0F0F0F)
    return (m * np.uint32(0x01010101)) >> np.uint32(24)


@_jit
def _pack(x, start, length, row, mask_at, sign_at, limits, out, counts):
    masks = np.empty(LANES, np.uint32)
    signs = np.empty(LANES, np.uint32)
    largest = np.zeros(LANES, np.int32)
    votes = np.empty(LANES, np.uint32)
    mask_bytes = masks.view(np.uint8)
    sign_bytes = signs.view(np.uint8)
    worst = np.int32(0)
    for k in range(start.size):
        base, end = start[k], start[k] + length[k]
        limit = limits[row[k]]
        m_at, s_at = mask_at[k], sign_at[k]
        votes[:] = 0
        while base + BLOCK <= end:
            for j in range(LANES):
                at = base + j
                m = _mask8(x, at, limit)
                m |= _mask8(x, at + _STRIDE, limit) << np.uint32(8)
                m |= _mask8(x, at + 2 * _STRIDE, limit) << np.uint32(16)
                m |= _mask8(x, at + 3 * _STRIDE, limit) << np.uint32(24)
                s = _sign8(x, at, _ZERO)
                s = _sign8(x, at + _STRIDE, s)
                s = _sign8(x, at + 2 * _STRIDE, s)
                s = _sign8(x, at + 3 * _STRIDE, s)
                w = _largest8(x, at, largest[j])
                w = _largest8(x, at + _STRIDE, w)
                w = _largest8(x, at + 2 * _STRIDE, w)
                largest[j] = _largest8(x, at + 3 * _STRIDE, w)
                masks[j] = m
                signs[j] = s & m
                votes[j] += _popcount(m)
            for i in range(_BYTES):
                out[m_at + i] = mask_bytes[i]
            for i in range(_BYTES):
                out[s_at + i] = sign_bytes[i]
            base += BLOCK
            m_at += _BYTES
            s_at += _BYTES
        tail_votes = 0
        while base < end:
            m = np.uint8(0)
            s = np.uint8(0)
            for i in range(min(8, end - base)):
                magnitude = np.int32(x[base + i] & _MAGNITUDE)
                worst = max(worst, magnitude)
                if magnitude > limit:
                    m |= np.uint8(1 << i)
                    s |= np.uint8((x[base + i] >> np.uint32(31)) << np.uint32(i))
                    tail_votes += 1
            out[m_at] = m
            out[s_at] = s
            base += 8
            m_at += 1
            s_at += 1
        counts[row[k]] += tail_votes + votes.sum()
    return max(worst, largest.max()) < _INFINITY


def pack(grad: Tensor, spans: Spans, thresholds: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D103
    counts = torch.zeros(thresholds.numel(), dtype=torch.int64)
    finite = _pack(
        grad.numpy().view(np.uint32),
        spans.start,
        spans.length,
        spans.row,
        spans.mask_at,
        spans.sign_at,
        thresholds.numpy().view(np.int32),
        out.numpy(),
        counts.numpy(),
    )
    return counts, torch.tensor(finite)


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


@_jit
def _unpack(payload, start, length, mask_at, sign_at, value, out):
    masks = np.empty(LANES, np.uint32)
    signs = np.empty(LANES, np.uint32)
    votes = np.zeros(LANES, np.int64)
    mask_bytes = masks.view(np.uint8)
    sign_bytes = signs.view(np.uint8)
    count = 0
    for k in range(start.size):
        base, end = start[k], start[k] + length[k]
        m_at, s_at = mask_at[k], sign_at[k]
        while base + BLOCK <= end:
            for i in range(_BYTES):
                mask_bytes[i] = payload[m_at + i]
            for i in range(_BYTES):
                sign_bytes[i] = payload[s_at + i]
            for j in range(LANES):
                at = base + j
                m, s = masks[j], signs[j]
                _store8(out, at, m, s, value)
                _store8(out, at + _STRIDE, m >> np.uint32(8), s >> np.uint32(8), value)
                _store8(out, at + 2 * _STRIDE, m >> np.uint32(16), s >> np.uint32(16), value)
                _store8(out, at + 3 * _STRIDE, m >> np.uint32(24), s >> np.uint32(24), value)
                votes[j] += _popcount(m)
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
    return count + votes.sum()


def unpack(payload: Tensor, spans: Spans, value: Tensor, out: Tensor) -> Tensor:  # noqa: D103
    bits = value.reshape(1).numpy().view(np.uint32)[0]
    count = _unpack(
        payload.numpy(),
        spans.start,
        spans.length,
        spans.mask_at,
        spans.sign_at,
        bits,
        out.numpy().view(np.uint32),
    )
    return torch.tensor(count, dtype=torch.int64)


# --------------------------------------------------------------------------------------------------------------- tally


@_jit
def _tally(payloads, body_at, num_bytes, up, down, num_places, out):
    """Bit-sliced count, a few hundred bytes of every plane at a time.

    Each worker adds ballot + 1, a two-bit number (mask and not sign; not mask), to a counter whose binary places are
    planes themselves, so that about log2(2 W) word operations count eight components at once. Then the counter is
    compared with the two constants `up = W + margin` and `down = W - margin`, place by place from the highest.
    """
    world_size = payloads.shape[0]
    places = np.empty((num_places, _CHUNK), np.uint8)
    high = np.empty(_CHUNK, np.uint8)
    low = np.empty(_CHUNK, np.uint8)
    sure_up = np.empty(_CHUNK, np.uint8)
    sure_down = np.empty(_CHUNK, np.uint8)
    for chunk in range(0, num_bytes, _CHUNK):
        size = min(_CHUNK, num_bytes - chunk)
        places[:] = 0
        for w in range(world_size):
            mask = payloads[w, body_at + chunk : body_at + chunk + size]
            sign = payloads[w, body_at + num_bytes + chunk : body_at + num_bytes + chunk + size]
            for i in range(size):
                high[i] = mask[i] & ~sign[i]
                low[i] = ~mask[i]
            _add_two_bits(places, low, high, size, num_places)
        for i in range(size):
            sure_up[i] = 0
            sure_down[i] = 0
            high[i] = 255  # still equal to `up` in all higher places
            low[i] = 255  # still equal to `down`
        for place in range(num_places - 1, -1, -1):
            bits = places[place]
            if (up >> place) & 1:
                for i in range(size):
                    high[i] &= bits[i]
            else:
                for i in range(size):
                    sure_up[i] |= high[i] & bits[i]
                    high[i] &= ~bits[i]
            if (down >> place) & 1:
                for i in range(size):
                    sure_down[i] |= low[i] & ~bits[i]
                    low[i] &= bits[i]
            else:
                for i in range(size):
                    low[i] &= ~bits[i]
        for i in range(size):
            negative = sure_down[i] | low[i]
            out[chunk + i] = sure_up[i] | high[i] | negative
            out[num_bytes + chunk + i] = negative


@_jit
def _add_two_bits(places, low, high, size, num_places):
    """Add the two-bit numbers (high, low) to the counters; `low` is used up as the carry."""
    for i in range(size):
        carry = places[0, i] & low[i]
        places[0, i] ^= low[i]
        both = (high[i] & carry) | (places[1, i] & (high[i] ^ carry))
        places[1, i] ^= high[i] ^ carry
        low[i] = both
    for place in range(2, num_places):
        for i in range(size):
            carry = places[place, i] & low[i]
            places[place, i] ^= low[i]
            low[i] = carry


def tally(payloads: Tensor, body_at: int, num_bytes: int, margin: int, out: Tensor) -> None:  # noqa: D103
    world_size = payloads.shape[0]
    if margin > world_size:  # no lead can reach it, and the counter's constants would leave their range
        out[: 2 * num_bytes] = 0
        return
    # At least two places: the first worker's two-bit number needs both.
    num_places = max(2, (2 * world_size).bit_length())
    _tally(payloads.numpy(), body_at, num_bytes, world_size + margin, world_size - margin, num_places, out.numpy())


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


@_jit
def _moments(x, start, length, row, out):
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


def moments(grad: Tensor, spans: Spans) -> Tensor:  # noqa: D103
    out = torch.zeros(spans.num_rows, 2, dtype=torch.float64)
    _moments(grad.numpy(), spans.start, spans.length, spans.row, out.numpy())
    return out
