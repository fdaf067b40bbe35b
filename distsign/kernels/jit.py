"""The compiled bodies of the CPU kernels: Numba, one core each, without the interpreter lock.

Written so that LLVM vectorises them: the loop that is vectorised runs over the 16 lanes of a block, and what happens to
the 32 bits of a lane's word is unrolled inside it, by helpers that Numba itself inlines (a call left to LLVM stays
scalar). Blocks are sliced out first, because an index that might be negative is checked for wrap-around. Conditions are
arithmetic, because LLVM may split a loop at a branch. `error_model="numpy"` leaves out the check for a zero divisor.
Each of these alone stops vectorisation.

Packing and unpacking a full block are written in LLVM's own vectors, of the 16 lanes: Numba has no words for reading
ahead, nor for a store past the caches. Packing so takes 0.6 of the time of a copy, unpacking 0.4.

Array arguments: `x` float32 gradient as uint32 bits, `start`, `length`, `row`, `mask_at`, `sign_at` as in `Spans`.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic

from distsign.kernels.spans import BLOCK, LANES

__all__ = ["find_moments", "pack_ballots", "unpack_verdicts"]

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_EXPONENT_ONE = np.uint32(0x00800000)
_TOP = np.uint32(0x80000000)
_ONE = np.uint32(1)
_ZERO = np.uint32(0)
_BYTES = LANES * 4
_STRIDE = BLOCK // 4
_LINE = 64
_AHEAD = 4 * BLOCK // LANES  # rows between what is packed and what is fetched into the nearest cache meanwhile

_OPTIONS: Any = {"nogil": True, "error_model": "numpy", "cache": True}
_jit: Any = numba.njit(**_OPTIONS)
_inline: Any = numba.njit(nogil=True, error_model="numpy", inline="always")


def _compiled(*signatures: str) -> Any:
    """Compile at import, before the first collective: later, other ranks would wait for this one under a timeout."""
    return numba.njit(list(signatures), **_OPTIONS)


# ----------------------------------------------------------------------------------------------------- vectors of words

_WORD = ir.IntType(32)
_VECTOR = ir.VectorType(_WORD, LANES)


def _splat(number):
    return ir.Constant(_VECTOR, [number] * LANES)


def _broadcast(builder, word):
    nothing = ir.Constant(_VECTOR, ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(nothing, word, ir.Constant(_WORD, 0)), nothing, _splat(0))


def _vectors(context, builder, array_type, array, at):
    """Return a pointer to the vectors that begin at element `at` of an array."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), _VECTOR.as_pointer())


def _after(builder, pointer, num_vectors):
    return builder.gep(pointer, [ir.Constant(ir.IntType(64), num_vectors)])


def _add_ones(builder, votes_at, mask):
    count_ones = ir.FunctionType(_VECTOR, [_VECTOR])
    count = cgutils.get_or_insert_function(builder.module, count_ones, f"llvm.ctpop.v{LANES}i32")
    votes = builder.add(builder.load(votes_at, align=4), builder.call(count, [mask]))
    builder.store(votes, votes_at, align=4)


def _prefetch(builder, pointer):
    byte, word = ir.IntType(8).as_pointer(), _WORD
    prefetch = builder.module.declare_intrinsic(
        "llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, *[word] * 3])
    )
    read, nearest, data = (ir.Constant(word, number) for number in (0, 3, 1))
    builder.call(prefetch, [builder.bitcast(pointer, byte), read, nearest, data])


@intrinsic
def _fence(typing_context):
    """Make all that was streamed visible before anything that is written later."""

    def generate(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


# ---------------------------------------------------------------------------------------------------------------- pack


@intrinsic
def _pack_block(typing_context, x, at, out, m_at, s_at, limit, totals):
    """Write the planes of a full block; collect in `totals`, for each lane, the largest magnitude and then the votes.

    Magnitudes of IEEE floats compare as integers, NaN above infinity, and as signed ones, because their top bit is 0.
    """

    def generate(context, builder, signature, args):
        block, mask_at, sign_at, largest_at = (
            _vectors(context, builder, signature.args[array], args[array], index)
            for array, index in ((0, args[1]), (2, args[3]), (2, args[4]), (6, ir.Constant(ir.IntType(64), 0)))
        )
        for i in range(BLOCK // LANES):
            _prefetch(builder, _after(builder, block, _AHEAD + i))
        limits = _broadcast(builder, args[5])
        largest = builder.load(largest_at, align=4)
        mask, sign = _splat(0), _splat(0)
        for i in range(BLOCK // LANES):
            bits = builder.load(_after(builder, block, i), align=4)
            magnitude = builder.and_(bits, _splat(0x7FFFFFFF))
            largest = builder.select(builder.icmp_signed(">", magnitude, largest), magnitude, largest)
            vote = builder.sext(builder.icmp_signed(">", magnitude, limits), _VECTOR)
            mask = builder.or_(mask, builder.and_(vote, _splat(1 << i)))
            sign = builder.or_(builder.lshr(sign, _splat(1)), builder.and_(bits, _splat(0x80000000)))
        builder.store(mask, mask_at, align=1)
        builder.store(builder.and_(sign, mask), sign_at, align=1)
        builder.store(largest, largest_at, align=4)
        _add_ones(builder, _after(builder, largest_at, 1), mask)
        return context.get_dummy_value()

    return types.void(x, types.int64, out, types.int64, types.int64, types.uint32, totals), generate


@_compiled(
    "(uint32[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], uint32[::1], uint8[::1], int64[::1])"
)
def pack_ballots(x, start, length, row, mask_at, sign_at, limits, out, counts):
    totals = np.zeros(2 * LANES, np.uint32)  # largest magnitudes, counts of votes
    overflow = _ZERO
    for k in range(start.size):
        base, end = start[k], start[k] + length[k]
        limit = limits[row[k]]
        m_at, s_at = mask_at[k], sign_at[k]
        totals[LANES:] = 0
        while base + BLOCK <= end:
            _pack_block(x, base, out, m_at, s_at, limit, totals)
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
            num_votes += totals[LANES + j]
        counts[k] = num_votes
    for j in range(LANES):
        overflow |= totals[j] + _EXPONENT_ONE  # the exponent of NaN and infinities overflows by one into the top bit
    return (overflow & _TOP) == 0


# -------------------------------------------------------------------------------------------------------------- unpack


def _block_writer(name, streamed):
    """Make a function that writes a block of verdicts and adds the votes of each lane to `votes`.

    If `streamed`, it writes past the caches, for which the block has to begin with a cache line: an ordinary store
    reads a line from memory before it overwrites it.
    """

    def write_block(typing_context, payload, m_at, s_at, value, out, at, votes):
        def generate(context, builder, signature, args):
            mask_at, sign_at, block, votes_at = (
                _vectors(context, builder, signature.args[array], args[array], index)
                for array, index in ((0, args[1]), (0, args[2]), (4, args[5]), (6, ir.Constant(ir.IntType(64), 0)))
            )
            mask, sign = builder.load(mask_at, align=1), builder.load(sign_at, align=1)
            values = _broadcast(builder, args[3])
            for i in range(BLOCK // LANES):
                vote = builder.ashr(builder.shl(mask, _splat(31 - i)), _splat(31))  # all ones, or all zeros
                negative = builder.and_(builder.shl(sign, _splat(31 - i)), _splat(0x80000000))
                verdict = builder.and_(builder.xor(values, negative), vote)
                stored = builder.store(verdict, _after(builder, block, i), align=_LINE if streamed else 4)
                if streamed:
                    stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_WORD, 1)]))
            _add_ones(builder, votes_at, mask)
            return context.get_dummy_value()

        return types.void(payload, types.int64, types.int64, types.uint32, out, types.int64, votes), generate

    write_block.__name__ = name
    return intrinsic(write_block)


_write_block = _block_writer("_write_block", streamed=False)
_stream_block = _block_writer("_stream_block", streamed=True)


@_compiled("(uint8[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], uint32, uint32[::1], int64[::1])")
def unpack_verdicts(payload, start, length, row, mask_at, sign_at, value, out, counts):
    votes = np.zeros(LANES, np.uint32)
    for k in range(start.size):
        count = 0
        base, end = start[k], start[k] + length[k]
        m_at, s_at = mask_at[k], sign_at[k]
        aligned = (out.ctypes.data + 4 * base) % _LINE == 0
        votes[:] = 0
        while base + BLOCK <= end:
            if aligned:
                _stream_block(payload, m_at, s_at, value, out, base, votes)
            else:
                _write_block(payload, m_at, s_at, value, out, base, votes)
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
        for j in range(LANES):
            count += votes[j]
        counts[row[k]] += count
    _fence()


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
