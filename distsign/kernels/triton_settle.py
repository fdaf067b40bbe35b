"""The compiled bodies that cap how many votes of each piece are sent, on CUDA.

Three launches: count the votes of each chunk, sum those up over the chunks (torch), and then keep each vote whose
number in its piece's turn is below the cap. A turn begins at byte `start` of the plane: a vote there or behind
it has as its number the votes before it less those before the start; one in front of it follows after all of these.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distsign.kernels.chunks import CHUNK
from distsign.kernels.triton_bits import (
    BLOCK_ELEMENTS,
    HOME,
    LENGTH,
    MASK_AT,
    NUMBER,
    PIECE,
    SIGN_AT,
    chunk_field,
    places_of_bits,
    popcount,
)

__all__ = ["CARRY", "NOTHING", "STANDING", "VOTES", "count_kernel", "forget_kernel", "keep_kernel"]

BYTES = tl.constexpr(CHUNK // 8)
ELEMENTS = tl.constexpr(CHUNK)
CARRY = 0
VOTES = 1
STANDING = 2
NOTHING = 3
_CARRY = tl.constexpr(CARRY)
_VOTES = tl.constexpr(VOTES)
_STANDING = tl.constexpr(STANDING)
_NOTHING = tl.constexpr(NOTHING)


@triton.jit
def _load_votes(plane, byte, length):
    """Read a chunk's mask bytes without the bits beyond the end of its piece."""
    votes = tl.load(plane + byte, mask=8 * byte < length, other=0).to(tl.uint32)
    room = tl.minimum(tl.maximum(length - 8 * byte, 0), 8).to(tl.uint32)
    return votes & ~(~tl.zeros_like(votes) << room)


@triton.jit
def count_kernel(planes, table, starts, totals, before, counts):
    """Write each chunk's votes into `totals`, int64, and add them to its piece's `counts`.

    Those in front of the start are added to `before`.
    """
    length = chunk_field(table, LENGTH).to(tl.int32)
    piece = chunk_field(table, PIECE)
    byte = tl.arange(0, BYTES)
    votes = popcount(_load_votes(planes + chunk_field(table, MASK_AT), byte, length))
    total = tl.sum(votes, axis=0).to(tl.int64)
    start = tl.load(starts + piece) - chunk_field(table, NUMBER) * BYTES
    in_front = tl.sum(tl.where(byte < start, votes, 0), axis=0).to(tl.int64)
    tl.store(totals + tl.program_id(0), total)
    tl.atomic_add(counts + piece, total, sem="relaxed")
    tl.atomic_add(before + piece, in_front, sem="relaxed")


@triton.jit
def keep_kernel(
    planes, table, caps, starts, totals, sums, before, counts, memory, live, half, margin,
    WORLD_SIZE: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Keep votes below the cap, and take those that are kept out of `memory`'s spare half.

    `sums` are the running sums of `totals` over all chunks, each chunk's own included.
    """
    length = chunk_field(table, LENGTH).to(tl.int32)
    piece = chunk_field(table, PIECE)
    number = chunk_field(table, NUMBER)
    mask_at = chunk_field(table, MASK_AT)
    sign_at = chunk_field(table, SIGN_AT)
    chunk = tl.program_id(0).to(tl.int64)
    first = chunk - number
    earlier = tl.load(sums + chunk) - tl.load(totals + chunk) - (tl.load(sums + first) - tl.load(totals + first))
    byte = tl.arange(0, BYTES)
    inside = 8 * byte < length
    votes = _load_votes(planes + mask_at, byte, length)
    sign = tl.load(planes + sign_at + byte, mask=inside, other=0).to(tl.uint32)
    ones = popcount(votes)
    turn = earlier + (tl.cumsum(ones, axis=0) - ones).to(tl.int64) - tl.load(before + piece)
    turn += tl.where(byte + number * BYTES < tl.load(starts + piece), tl.load(counts + piece), 0)
    room = tl.minimum(tl.maximum(tl.load(caps + piece) - turn, 0), 8).to(tl.int32)
    bit = tl.arange(0, 8)[:, None]
    lower = (1 << bit.to(tl.uint32)) - 1
    is_vote = ((votes[None, :] >> bit.to(tl.uint32)) & 1) != 0
    is_kept = is_vote & (popcount(votes[None, :] & lower) < room[None, :])
    kept = tl.sum(is_kept.to(tl.uint32) << bit.to(tl.uint32), axis=0)
    tl.store(planes + mask_at + byte, kept.to(tl.uint8), mask=inside)
    tl.store(planes + sign_at + byte, (sign & kept).to(tl.uint8), mask=inside)
    if KIND == _NOTHING:
        return
    spare = memory + (1 - tl.load(live)) * half
    if KIND == _STANDING:
        for _ in range(WORLD_SIZE):
            old_mask = tl.load(spare + mask_at + byte, mask=inside, other=0)
            old_sign = tl.load(spare + sign_at + byte, mask=inside, other=0)
            tl.store(spare + mask_at + byte, old_mask & ~kept.to(tl.uint8), mask=inside)
            tl.store(spare + sign_at + byte, old_sign & ~kept.to(tl.uint8), mask=inside)
            spare += half // WORLD_SIZE
    else:
        num_full_bytes = length // BLOCK_ELEMENTS * BLOCK_ELEMENTS // 8
        place = spare + chunk_field(table, HOME) + places_of_bits(byte[None, :], bit, num_full_bytes)
        if KIND == _VOTES:
            left = tl.load(place, mask=is_kept, other=0).to(tl.int32)
            negative = ((sign[None, :] >> bit.to(tl.uint32)) & 1) != 0
            tl.store(place, tl.where(negative, left + margin, left - margin).to(tl.int16), mask=is_kept)
        else:
            tl.store(place, 0.0, mask=is_kept)


@triton.jit
def forget_kernel(undecided, table, crowded, live, half, margin):
    """Set votes that reach the margin to 0, in the spare half, in pieces that are crowded."""
    element = tl.arange(0, ELEMENTS)
    length = tl.where(tl.load(crowded + chunk_field(table, PIECE)) != 0, chunk_field(table, LENGTH).to(tl.int32), 0)
    inside = element < length
    place = undecided + (1 - tl.load(live)) * half + chunk_field(table, HOME) + element
    votes = tl.load(place, mask=inside, other=0).to(tl.int32)
    reached = (votes >= margin) | (votes <= -margin)
    tl.store(place, tl.zeros_like(votes).to(tl.int16), mask=inside & reached)
