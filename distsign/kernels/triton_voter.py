"""The compiled bodies of the voter's CUDA kernels: from gradients to planes, and from planes to verdicts.

A program works on one chunk, a tile of 32 bits by 128 words: thread `w` owns word `w` of each plane, so that a word's
bits come together in one thread's registers, while at each bit a warp's threads read neighbouring elements, two runs of
64 bytes. All of a tile is read before the first of it is used, which keeps enough reads in flight.

The tail of a piece, at most 511 elements in plain order, is a second, small tile of 8 bits by 64 bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distsign.kernels.triton_bits import (
    BLOCK_ELEMENTS,
    HOME,
    LENGTH,
    MASK_AT,
    PIECE,
    ROW,
    SIGN_AT,
    START,
    TAIL_BYTES,
    WORDS,
    WORDS_PER_BLOCK,
    chunk_field,
    divide,
    element_of_word,
    load_word,
    popcount,
    store_word,
)

__all__ = ["carry_kernel", "find_active_kernel", "pack_kernel", "unpack_kernel"]

MAGNITUDE = tl.constexpr(0x7FFFFFFF)
INFINITY = tl.constexpr(0x7F800000)
LARGEST = tl.constexpr(3.4028234663852886e38)
LARGEST_BFLOAT16 = tl.constexpr(3.3895313892515355e38)
DEAD = tl.constexpr(1e-30)
CHUNK_ELEMENTS = tl.constexpr(WORDS.value * 32)
ROWS_AT_A_TIME = tl.constexpr(8)


@triton.jit
def _bits(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def _vote(x, limit, bit):
    """Return mask and sign bits of a tile, ORed over its first axis, and the largest magnitudes along it."""
    magnitude = x & MAGNITUDE
    votes = (magnitude > limit).to(tl.uint32)
    # Bits at different places: their sum is their OR.
    mask = tl.sum(votes << bit, axis=0)
    sign = tl.sum((x >> 31) << bit, axis=0) & mask
    return mask, sign, tl.max(magnitude.to(tl.int32), axis=0)


@triton.jit
def _pack_tail(x, limit, mask_plane, sign_plane, byte, bit, length):
    """Write the bytes of a tail; return its votes per byte and its largest magnitudes per byte."""
    mask, sign, largest = _vote(x, limit, bit)
    there = 8 * byte < length
    tl.store(mask_plane + byte, mask.to(tl.uint8), mask=there)
    tl.store(sign_plane + byte, sign.to(tl.uint8), mask=there)
    return popcount(mask), largest


@triton.jit
def pack_kernel(grad, table, thresholds, out, counts, finite):
    """`counts` int64 are added to; `finite` uint8 is set to 0 where it is not."""
    length = chunk_field(table, LENGTH).to(tl.int32)
    row = chunk_field(table, ROW)
    x_at = grad + chunk_field(table, START)
    mask_plane = out + chunk_field(table, MASK_AT)
    sign_plane = out + chunk_field(table, SIGN_AT)
    limit = _bits(tl.load(thresholds + row)) & MAGNITUDE  # the bits of -0.0 would be the largest integer
    num_full = length // BLOCK_ELEMENTS
    num_votes = tl.zeros((), tl.int32)
    largest = tl.zeros((), tl.int32)
    if num_full > 0:
        word = tl.arange(0, WORDS)
        bit = tl.arange(0, 32)
        there = word < num_full * WORDS_PER_BLOCK
        element = element_of_word(word[None, :], bit[:, None])
        x = _bits(tl.load(x_at + element, mask=there[None, :], other=0.0))
        mask, sign, magnitude = _vote(x, limit, bit.to(tl.uint32)[:, None])
        store_word(mask_plane, word, mask, there)
        store_word(sign_plane, word, sign, there)
        num_votes += tl.sum(popcount(mask), axis=0)
        largest = tl.maximum(largest, tl.max(magnitude, axis=0))
    done = num_full * BLOCK_ELEMENTS
    if length > done:
        byte = tl.arange(0, TAIL_BYTES)
        bit8 = tl.arange(0, 8)
        element8 = done + 8 * byte[None, :] + bit8[:, None]
        x8 = _bits(tl.load(x_at + element8, mask=element8 < length, other=0.0))
        votes8, largest8 = _pack_tail(
            x8, limit, mask_plane + done // 8, sign_plane + done // 8, byte, bit8.to(tl.uint32)[:, None], length - done
        )
        num_votes += tl.sum(votes8, axis=0)
        largest = tl.maximum(largest, tl.max(largest8, axis=0))
    tl.atomic_add(counts + chunk_field(table, PIECE), num_votes.to(tl.int64), sem="relaxed")
    if largest >= INFINITY:
        tl.store(finite, 0)


@triton.jit
def _verdict(mask, sign, bit, value):
    """Return the float32 bits of each verdict; an abstention is +0.0 whatever the value is."""
    return tl.where((mask >> bit) & 1 != 0, value ^ (((sign >> bit) & 1) << 31), 0)


@triton.jit
def unpack_kernel(payload, table, value, out, counts):
    """`counts` int64 are added to; `out` are the float32's bits, as uint32."""
    length = chunk_field(table, LENGTH).to(tl.int32)
    out_at = out + chunk_field(table, START)
    mask_plane = payload + chunk_field(table, MASK_AT)
    sign_plane = payload + chunk_field(table, SIGN_AT)
    value = _bits(tl.load(value))
    num_full = length // BLOCK_ELEMENTS
    num_votes = tl.zeros((), tl.int32)
    if num_full > 0:
        word = tl.arange(0, WORDS)
        bit = tl.arange(0, 32)
        there = word < num_full * WORDS_PER_BLOCK
        mask = load_word(mask_plane, word, there)
        sign = load_word(sign_plane, word, there)
        element = element_of_word(word[None, :], bit[:, None])
        x = _verdict(mask[None, :], sign[None, :], bit.to(tl.uint32)[:, None], value)
        tl.store(out_at + element, x.to(tl.int32, bitcast=True), mask=there[None, :])
        num_votes += tl.sum(popcount(mask), axis=0)
    done = num_full * BLOCK_ELEMENTS
    if length > done:
        byte = tl.arange(0, TAIL_BYTES)
        bit8 = tl.arange(0, 8)
        element8 = done + 8 * byte[None, :] + bit8[:, None]
        inside = done + 8 * byte < length
        mask8 = tl.load(mask_plane + done // 8 + byte, mask=inside, other=0).to(tl.uint32)
        sign8 = tl.load(sign_plane + done // 8 + byte, mask=inside, other=0).to(tl.uint32)
        x8 = _verdict(mask8[None, :], sign8[None, :], bit8.to(tl.uint32)[:, None], value)
        tl.store(out_at + element8, x8.to(tl.int32, bitcast=True), mask=element8 < length)
        # Bits beyond the end, which only a liar sets, are no verdicts.
        num_votes += tl.sum(popcount(mask8 & ~(~tl.zeros_like(mask8) << _room(length - done, byte))), axis=0)
    tl.atomic_add(counts + chunk_field(table, ROW), num_votes.to(tl.int64), sem="relaxed")


@triton.jit
def _room(length, byte):
    """Return how many of each byte's bits lie within a tail of this length."""
    return tl.minimum(tl.maximum(length - 8 * byte, 0), 8).to(tl.uint32)


@triton.jit
def find_active_kernel(grad, table, found):
    """Set `found` uint8 to 1 where a row holds anything but zeros; `grad` are the float32's bits, as int32."""
    row = chunk_field(table, ROW)
    # A chunk that another has made needless is not read. A stale 0 costs a read and no more.
    if tl.load(found + row, volatile=True) == 0:
        element = tl.arange(0, CHUNK_ELEMENTS)
        there = element < chunk_field(table, LENGTH)
        x = tl.load(grad + chunk_field(table, START) + element, mask=there, other=0)
        if tl.max(x & MAGNITUDE, axis=0) != 0:
            tl.store(found + row, 1)


@triton.jit
def _from_bfloat16(bits):
    return (bits.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _to_bfloat16(x):
    """Round to the nearest, ties to even, by hand: Triton's interpreter cuts off. Return int16."""
    bits = _bits(x)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = tl.where((bits & MAGNITUDE) > INFINITY, 0x7FC0, rounded)
    return rounded.to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def _carried(
    grad, unscale, carry, square, v_out, r_out, element, there, active,
    threshold, correction, keep, add, dither, bit,
    SQUARE: tl.constexpr, CLEAR: tl.constexpr, HALF_PRECISION: tl.constexpr,
):  # fmt: skip
    """Read a tile of gradient and memory and write the new memory.

    Return, along the first axis, mask and sign bits, ORed, and the largest magnitude of the gradient.
    """
    raw = tl.load(grad + element, mask=there, other=0.0)
    old = tl.load(carry + element, mask=there, other=0)
    if SQUARE:
        old_v = tl.load(square + element, mask=there, other=0)
    g = raw * unscale
    r = old
    if HALF_PRECISION:
        r = _from_bfloat16(old)
    if SQUARE:
        most = LARGEST
        v = old_v
        if HALF_PRECISION:
            most = LARGEST_BFLOAT16
            v = _from_bfloat16(old_v)
        v = keep * v + add * (g * g)
        # Not tl.minimum, which hides a NaN.
        v = tl.where(v > most, most, v)
        alive = v > DEAD
        u = tl.where(alive, r + divide(g * correction, tl.sqrt_rn(tl.where(alive, v, 1.0))), r)
        if HALF_PRECISION:
            v = ((_bits(v) + dither) >> 16).to(tl.uint16).to(tl.int16, bitcast=True)
        tl.store(v_out + element, tl.where(active, v, old_v), mask=there)
    else:
        u = r + g
    votes = active & (tl.abs(u) > threshold)
    rest = u
    if CLEAR:
        rest = tl.where(votes, 0.0, u)
    if HALF_PRECISION:
        rest = _to_bfloat16(rest)
    tl.store(r_out + element, tl.where(active, rest, old), mask=there)
    ones = votes.to(tl.uint32)
    mask = tl.sum(ones << bit, axis=0)
    sign = tl.sum((_bits(u) >> 31) << bit, axis=0) & mask
    magnitude = (_bits(raw) & MAGNITUDE).to(tl.int32)
    return mask, sign, tl.max(magnitude, axis=0)


@triton.jit(do_not_specialize=["dither"])  # another number in each step
def carry_kernel(
    grad, table, thresholds, active, unscale, corrections, keep, add, dither, carry, square, live, half, out, counts,
    finite,
    SQUARE: tl.constexpr, CORRECT: tl.constexpr, CLEAR: tl.constexpr, HALF_PRECISION: tl.constexpr,
):  # fmt: skip
    """Do `pack_carry` for one chunk.

    `keep` and `add` are the decay and one minus it; with `HALF_PRECISION` carry and square are bfloat16, whose bits
    come as int16; `half` is the number of elements of a half.
    """
    length = chunk_field(table, LENGTH).to(tl.int32)
    row = chunk_field(table, ROW)
    start = chunk_field(table, START)
    mask_plane = out + chunk_field(table, MASK_AT)
    sign_plane = out + chunk_field(table, SIGN_AT)
    old_at = tl.load(live) * half + chunk_field(table, HOME)
    new_at = (1 - tl.load(live)) * half + chunk_field(table, HOME)
    votes_here = tl.load(active + row) != 0
    threshold = tl.load(thresholds + row)
    to_units = tl.load(unscale)
    correction = 1.0
    if CORRECT:
        correction = tl.load(corrections + row)
    num_full = length // BLOCK_ELEMENTS
    num_votes = tl.zeros((), tl.int32)
    largest = tl.zeros((), tl.int32)
    r_in = carry + old_at
    r_out = carry + new_at
    v_in = square + old_at
    v_out = square + new_at
    if num_full > 0:
        word = tl.arange(0, WORDS)
        there = word < num_full * WORDS_PER_BLOCK
        mask = tl.zeros((WORDS,), tl.uint32)
        sign = tl.zeros((WORDS,), tl.uint32)
        magnitude = tl.zeros((WORDS,), tl.int32)
        for first in tl.static_range(0, 32, ROWS_AT_A_TIME):
            bit = first + tl.arange(0, ROWS_AT_A_TIME)
            m, s, magnitudes = _carried(
                grad + start, to_units, r_in, v_in, v_out, r_out, element_of_word(word[None, :], bit[:, None]),
                there[None, :], votes_here, threshold, correction, keep, add, dither, bit.to(tl.uint32)[:, None],
                SQUARE, CLEAR, HALF_PRECISION,
            )  # fmt: skip
            mask |= m
            sign |= s
            magnitude = tl.maximum(magnitude, magnitudes)
        store_word(mask_plane, word, mask, there)
        store_word(sign_plane, word, sign, there)
        num_votes += tl.sum(popcount(mask), axis=0)
        largest = tl.maximum(largest, tl.max(magnitude, axis=0))
    done = num_full * BLOCK_ELEMENTS
    if length > done:
        byte = tl.arange(0, TAIL_BYTES)
        bit8 = tl.arange(0, 8)
        element8 = done + 8 * byte[None, :] + bit8[:, None]
        m8, s8, magnitude8 = _carried(
            grad + start, to_units, r_in, v_in, v_out, r_out, element8, element8 < length, votes_here, threshold,
            correction, keep, add, dither, bit8.to(tl.uint32)[:, None],
            SQUARE, CLEAR, HALF_PRECISION,
        )  # fmt: skip
        inside = done + 8 * byte < length
        tl.store(mask_plane + done // 8 + byte, m8.to(tl.uint8), mask=inside)
        tl.store(sign_plane + done // 8 + byte, s8.to(tl.uint8), mask=inside)
        num_votes += tl.sum(popcount(m8), axis=0)
        largest = tl.maximum(largest, tl.max(magnitude8, axis=0))
    tl.atomic_add(counts + chunk_field(table, PIECE), num_votes.to(tl.int64), sem="relaxed")
    if largest >= INFINITY:
        tl.store(finite, 0)
