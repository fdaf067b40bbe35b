"""The compiled bodies of an optimizer's step along sparse verdicts, on the CPU; `jit` says how such code is written.

A gradient of verdicts is zero nearly everywhere. One read of it finds them, and whether all is finite; only the
parameters that a verdict moves are touched then.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, no-check-untyped-defs, no-warn-unreachable

from __future__ import annotations

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.extending import intrinsic

from distsign.kernels.jit import _compiled
from distsign.kernels.jit_bits import trailing_zeros
from distsign.kernels.spans import LANES

__all__ = ["NOT_FINITE", "TOO_MANY", "find_signs", "step_along"]

NOT_FINITE = -1
TOO_MANY = -2

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_EXPONENT_ONE = np.uint32(0x00800000)
_TOP = np.uint32(0x80000000)
_1 = np.uint64(1)
_GROUP = 64  # elements, four rows of lanes
_AHEAD = 64  # rows between what is looked at and what is fetched into the nearest cache meanwhile


@intrinsic
def _nonzeros(typing_context, x, at, largest):
    """Return a bit for each of 64 elements, 1 where it is not a zero; collect the largest magnitude of each lane."""

    def generate(context, builder, signature, args):
        word, wide = ir.IntType(32), ir.IntType(64)
        vector = ir.VectorType(word, LANES)
        zero, magnitudes = ir.Constant(vector, None), ir.Constant(vector, [0x7FFFFFFF] * LANES)
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        to_read = [ir.Constant(word, number) for number in (0, 3, 1)]
        pointers = []
        for array, index in ((0, args[1]), (2, ir.Constant(wide, 0))):
            data = context.make_array(signature.args[array])(context, builder, args[array]).data
            pointers.append(builder.bitcast(builder.gep(data, [index]), vector.as_pointer()))
        most, found = builder.load(pointers[1], align=4), ir.Constant(wide, 0)
        for i in range(_GROUP // LANES):
            ahead = builder.gep(pointers[0], [ir.Constant(wide, _AHEAD + i)])  # beyond the end it does nothing
            builder.call(prefetch, [builder.bitcast(ahead, byte), *to_read])
            row = builder.load(builder.gep(pointers[0], [ir.Constant(wide, i)]), align=4)
            magnitude = builder.and_(row, magnitudes)
            most = builder.select(builder.icmp_signed(">", magnitude, most), magnitude, most)
            bits = builder.bitcast(builder.icmp_unsigned("!=", magnitude, zero), ir.IntType(LANES))
            found = builder.or_(found, builder.shl(builder.zext(bits, wide), ir.Constant(wide, i * LANES)))
        builder.store(most, pointers[1], align=4)
        return found

    return types.uint64(x, types.int64, largest), generate


@_compiled("(uint32[::1], uint64[::1])")
def find_signs(x, votes):
    """Write the place of each number that is not 0, doubled, plus its sign; return how many, or why there are none."""
    largest = np.zeros(LANES, np.uint32)
    count, room = 0, votes.size - _GROUP
    full = x.size // _GROUP * _GROUP
    overflow = np.uint32(0)
    for at in range(0, full, _GROUP):
        left = _nonzeros(x, at, largest)
        if left and count > room:
            return TOO_MANY
        while left:
            place = np.uint64(at) + trailing_zeros(left)
            left &= left - _1
            votes[count] = (place << _1) | np.uint64(x[place] >> np.uint32(31))
            count += 1
    if count > room:
        return TOO_MANY
    for at in range(full, x.size):
        magnitude = x[at] & _MAGNITUDE
        overflow |= magnitude + _EXPONENT_ONE
        if magnitude:
            votes[count] = (np.uint64(at) << _1) | np.uint64(x[at] >> np.uint32(31))
            count += 1
    for j in range(LANES):
        overflow |= largest[j] + _EXPONENT_ONE  # the exponent of NaN and infinities overflows by one into the top bit
    return NOT_FINITE if overflow & _TOP else count


@_compiled("(float32[::1], uint64[::1], float32)")
def step_along(p, votes, rate):
    """Move each number against its vote."""
    for v in range(votes.size):
        place = votes[v] >> _1
        p[place] = p[place] + rate if votes[v] & _1 else p[place] - rate
