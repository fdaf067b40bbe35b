"""The compiled bodies of the sparse codec on CUDA; `wire.sparse` has the format.

The bits of a body, or of planes, are ORed into 32-bit words that began as zeros: every bit is set once, so that no
order matters. A program takes 128 bytes of what is read; `sums` are running sums of the ones in such pieces, each one's
own included, so that a program knows the number of its first vote.

Sizes move from step to step where the slots follow what is voted, and bodies lie at any byte: nothing is compiled for
their values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distsign.kernels.triton_bits import popcount

__all__ = ["PIECE_BYTES", "decode_kernel", "encode_kernel", "ones_kernel", "padding_kernel"]

PIECE_BYTES = 128
BYTES = tl.constexpr(PIECE_BYTES)


@triton.jit
def _first_bits(source, byte, num_bits):
    """Read bytes, without what lies beyond the first `num_bits` bits."""
    found = tl.load(source + byte, mask=8 * byte < num_bits, other=0).to(tl.uint32)
    room = tl.minimum(tl.maximum(num_bits - 8 * byte, 0), 8).to(tl.uint32)
    return found & ~(~tl.zeros_like(found) << room)


@triton.jit(do_not_specialize=["num_bits"], do_not_specialize_on_alignment=["source"])
def ones_kernel(source, num_bits, totals):
    """Count the ones of each piece of the first `num_bits` bits, int64."""
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    ones = tl.sum(popcount(_first_bits(source, byte, num_bits)), axis=0)
    tl.store(totals + tl.program_id(0), ones.to(tl.int64))


@triton.jit
def _numbered(source, byte, num_bits, totals, sums):
    """Return a tile of whether each bit is a one, and of the ones before it in the whole source, int64."""
    found = _first_bits(source, byte, num_bits)
    ones = popcount(found)
    earlier = tl.load(sums + tl.program_id(0)) - tl.load(totals + tl.program_id(0))
    earlier += (tl.cumsum(ones, axis=0) - ones).to(tl.int64)
    bit = tl.arange(0, 8).to(tl.uint32)[:, None]
    number = earlier[None, :] + popcount(found[None, :] & ((1 << bit) - 1)).to(tl.int64)
    return ((found[None, :] >> bit) & 1) != 0, number


@triton.jit
def _set_bits(words, at, value, wanted):
    """OR `value` (uint64) into the stream of bits at bit `at`."""
    low = value << (at & 31).to(tl.uint64)
    # Shifted twice, because a shift by 64 is not defined.
    rest = (value >> 1) >> (63 - (at & 31)).to(tl.uint64)
    word = words + (at >> 5)
    tl.atomic_or(word, low.to(tl.uint32).to(tl.int32, bitcast=True), mask=wanted, sem="relaxed")
    middle = (low >> 32).to(tl.uint32)
    tl.atomic_or(word + 1, middle.to(tl.int32, bitcast=True), mask=wanted & (middle != 0), sem="relaxed")
    top = rest.to(tl.uint32)
    tl.atomic_or(word + 2, top.to(tl.int32, bitcast=True), mask=wanted & (top != 0), sem="relaxed")


@triton.jit(do_not_specialize=["num_bytes", "num_bits", "num_slots", "num_high_bits", "low_bits"])
def encode_kernel(planes, num_bytes, num_bits, totals, sums, words, num_slots, num_high_bits, low_bits):
    """Set the bits of the body, whose first section is `num_high_bits` long."""
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    is_vote, number = _numbered(planes, byte, num_bits, totals, sums)
    bit = tl.arange(0, 8)[:, None]
    sign = tl.load(planes + num_bytes + byte, mask=byte < num_bytes, other=0).to(tl.uint64)
    negative = (sign[None, :] >> bit.to(tl.uint64)) & 1
    y = 8 * byte[None, :] + bit - number
    is_vote &= number < num_slots
    _set_bits(words, (y >> low_bits) + number, tl.full(y.shape, 1, tl.uint64), is_vote)
    low = y - ((y >> low_bits) << low_bits)
    field = low.to(tl.uint64) | (negative << low_bits.to(tl.uint64))
    _set_bits(words, num_high_bits + number * (low_bits + 1), field, is_vote)


@triton.jit
def _bit_of(body, at, wanted):
    return (tl.load(body + (at >> 3), mask=wanted, other=0).to(tl.int64) >> (at & 7)) & 1


@triton.jit
def _field(body, num_bytes, at, width, wanted):
    """Read fields of `width` bits, 32 at most, lowest first: they lie in five bytes, those behind the body's end 0."""
    byte = at >> 3
    value = tl.zeros(at.shape, tl.int64)
    for place in tl.static_range(5):
        found = tl.load(body + byte + place, mask=wanted & (byte + place < num_bytes), other=0)
        value |= found.to(tl.int64) << (8 * place)
    value >>= at & 7
    return value - ((value >> width) << width)


@triton.jit(
    do_not_specialize=["num_bytes", "sign_at", "num_bits", "num_slots", "num_high_bits", "low_bits"],
    do_not_specialize_on_alignment=["body"],
)
def decode_kernel(
    body, num_bytes, totals, sums, words, sign_at, num_bits, num_slots, num_high_bits, low_bits, fine,
):  # fmt: skip
    """Set the bits of planes, the sign plane's from bit `sign_at`; `fine` uint8 is set to 0 where the body is wrong."""
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    is_one, number = _numbered(body, byte, num_high_bits, totals, sums)
    at = 8 * byte[None, :] + tl.arange(0, 8)[:, None]
    has_slot = is_one & (number < num_slots)
    field_at = num_high_bits + number * (low_bits + 1)
    low = _field(body, num_bytes, field_at, low_bits, has_slot)
    position = ((at - number) << low_bits) + low + number
    # Only where the bit before is a one too do two votes share their high bits, and the low bits decide on the order.
    follows = has_slot & (at > 0)
    follows &= _bit_of(body, at - 1, follows) != 0
    wrong = follows & (_field(body, num_bytes, field_at - (low_bits + 1), low_bits, follows) > low)
    wrong |= is_one & ~(has_slot & (position < num_bits))
    if tl.max(tl.max(wrong.to(tl.int32), axis=0), axis=0) != 0:
        tl.store(fine, 0)
    inside = has_slot & (position < num_bits)
    value = tl.full(position.shape, 1, tl.int32) << (position & 31).to(tl.int32)
    tl.atomic_or(words + (position >> 5), value, mask=inside, sem="relaxed")
    negative = inside & (_bit_of(body, field_at + low_bits, inside) != 0)
    position += sign_at
    value = tl.full(position.shape, 1, tl.int32) << (position & 31).to(tl.int32)
    tl.atomic_or(words + (position >> 5), value, mask=negative, sem="relaxed")


@triton.jit(do_not_specialize=["num_bytes", "last", "num_high_bits", "width"], do_not_specialize_on_alignment=["body"])
def padding_kernel(body, num_bytes, sums, last, num_high_bits, width, fine):
    """Set `fine` to 0 where a bit after the last vote's field is one; `last` is the place of the number of votes."""
    used = num_high_bits + tl.load(sums + last) * width
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    there = (8 * byte + 8 > used) & (byte < num_bytes)
    found = tl.load(body + byte, mask=there, other=0).to(tl.uint32)
    behind = found >> tl.minimum(tl.maximum(used - 8 * byte, 0), 8).to(tl.uint32)
    if tl.max(behind.to(tl.int32), axis=0) != 0:
        tl.store(fine, 0)
