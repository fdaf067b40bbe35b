"""The compiled bodies of the CUDA moments: float64 sums in the order of `reference`'s fold, level by level.

The first level sums blocks of 512 elements, each of the next ones blocks of 512 sums, until one is left. A row with one
sum already gains only zeros from further levels, which change nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distsign.kernels.chunks import CHUNK
from distsign.kernels.spans import BLOCK, LANES
from distsign.kernels.triton_bits import HOME, LENGTH, START, chunk_field

__all__ = ["finish_kernel", "fold_kernel"]

NUM_BLOCKS = tl.constexpr(CHUNK // BLOCK)
NUM_LANES = tl.constexpr(LANES)
ELEMENTS = tl.constexpr(BLOCK)
SUM_LANES = tl.constexpr(CHUNK // BLOCK * LANES)


@triton.jit
def _halve(lanes):
    """Add the upper half of each block's lanes to the lower until one is left; two terms have no order."""
    width: tl.constexpr = lanes.shape[0] // NUM_BLOCKS
    pairs = tl.reshape(lanes, (NUM_BLOCKS, 2, width // 2))
    return tl.reshape(tl.sum(pairs, axis=1), (NUM_BLOCKS * (width // 2),))


@triton.jit
def _block_sums(lanes):
    return _halve(_halve(_halve(_halve(lanes))))


@triton.jit
def fold_kernel(terms, squares, table, sums, square_sums, FIRST: tl.constexpr):
    """Sum blocks of 512 terms and, apart, their squares; a chunk's `home` is 512 times the place of its first sum."""
    length = chunk_field(table, LENGTH)
    start = chunk_field(table, START)
    lane = tl.arange(0, SUM_LANES)
    element = lane // NUM_LANES * ELEMENTS + lane % NUM_LANES
    total = tl.zeros((SUM_LANES,), tl.float64)
    total2 = tl.zeros((SUM_LANES,), tl.float64)
    for bit in tl.static_range(32):  # unrolled, so that many reads are in flight
        at = element + bit * NUM_LANES
        there = at < length
        if FIRST:
            x = tl.load(terms + start + at, mask=there, other=0.0).to(tl.float64)
            x2 = x * x
        else:
            x = tl.load(terms + start + at, mask=there, other=0.0)
            x2 = tl.load(squares + start + at, mask=there, other=0.0)
        total += x
        total2 += x2
    block = tl.arange(0, NUM_BLOCKS)
    place = chunk_field(table, HOME) // ELEMENTS + block
    wanted = block * ELEMENTS < length
    tl.store(sums + place, _block_sums(total), mask=wanted)
    tl.store(square_sums + place, _block_sums(total2), mask=wanted)


@triton.jit
def finish_kernel(sums, square_sums, lengths, rows, out, first, num_pieces, PIECES: tl.constexpr):
    """Write mean and standard deviation of each piece; `first` is where its sums begin."""
    piece = tl.program_id(0) * PIECES + tl.arange(0, PIECES)
    inside = piece < num_pieces
    length = tl.load(lengths + piece, mask=inside, other=0)
    row = tl.load(rows + piece, mask=inside, other=0)
    wanted = length > 0
    at = tl.load(first + piece, mask=inside, other=0)
    divisor = tl.where(wanted, length, 1).to(tl.float64)
    mean = tl.load(sums + at, mask=wanted, other=0.0) / divisor
    variance = tl.load(square_sums + at, mask=wanted, other=0.0) / divisor - mean * mean
    # Not a maximum, which hides a NaN.
    variance = tl.where(variance < 0.0, 0.0, variance)
    tl.store(out + 2 * row, mean, mask=wanted)
    tl.store(out + 2 * row + 1, tl.sqrt(variance), mask=wanted)
