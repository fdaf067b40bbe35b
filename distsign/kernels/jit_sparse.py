"""The compiled bodies of the sparse codec on the CPU; `wire.sparse` has the format.

The work is one step a word of 64 positions, and one a vote. Everything is uint64, indices included: Numba makes a
float of an int64 and a uint64, and checks an index that might be negative.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic

from distsign.kernels.jit import _compiled, _jit
from distsign.kernels.jit_bits import copy_bytes, trailing_zeros
from distsign.kernels.spans import BLOCK, LANES

__all__ = ["decode_votes", "encode_votes", "tally_bodies"]

_CHUNK = 512
_WORDS = _CHUNK // 8
_0 = np.uint64(0)
_1 = np.uint64(1)
_3 = np.uint64(3)
_6 = np.uint64(6)
_7 = np.uint64(7)
_63 = np.uint64(63)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_MOST = 32767
_STRETCH = 8 * BLOCK


@_compiled("(uint8[::1], int64, uint64, uint64, uint64, uint8[::1])")
def encode_votes(planes, num_bytes, num_slots, low_bits, num_high_bits, out):
    """Write the body of the votes in `planes` into all of `out`; return False if there are more than `num_slots`."""
    words = np.zeros(out.size // 8 + 2, np.uint64)  # a field's end may be written into the word after the last
    mask, sign = np.zeros(_WORDS, np.uint64), np.zeros(_WORDS, np.uint64)
    mask_bytes, sign_bytes = mask.view(np.uint8), sign.view(np.uint8)
    low_mask = (_1 << low_bits) - _1
    field_at = num_high_bits
    vote = _0
    for chunk in range(0, num_bytes, _CHUNK):
        size = min(_CHUNK, num_bytes - chunk)
        mask_bytes[size:] = 0
        copy_bytes(mask_bytes, 0, planes, chunk, size)
        copy_bytes(sign_bytes, 0, planes, num_bytes + chunk, size)
        for w in range(_WORDS):
            left = mask[w]
            first = np.uint64(8 * (chunk + 8 * w))
            while left:
                bit = trailing_zeros(left)
                left &= left - _1
                if vote == num_slots:
                    return False
                y = first + bit - vote
                at = (y >> low_bits) + vote
                words[at >> _6] |= _1 << (at & _63)
                field = (y & low_mask) | (((sign[w] >> bit) & _1) << low_bits)
                words[field_at >> _6] |= field << (field_at & _63)
                words[(field_at >> _6) + _1] |= (field >> _1) >> (_63 - (field_at & _63))
                field_at += low_bits + _1
                vote += _1
    copy_bytes(out, 0, words.view(np.uint8), 0, out.size)
    return True


@_jit
def _all_zero(words, at):
    """Is there nothing but zeros from this bit on?"""
    rest = words[at >> _6] & (_ALL << (at & _63))
    for w in range((at >> _6) + _1, np.uint64(words.size)):
        rest |= words[w]
    return rest == 0


@_jit
def _decode(body, num_slots, low_bits, num_high_bits, num_bits, votes):
    """Write the positions of a body's votes, doubled, plus the sign, into `votes`; return how many.

    -1 if the body is not one that `encode_votes` makes. Whatever it holds, nothing is read or written elsewhere: a vote
    beyond the slots ends it before its field is read.
    """
    words = np.zeros(body.size // 8 + 2, np.uint64)
    copy_bytes(words.view(np.uint8), 0, body, 0, body.size)
    low_mask = (_1 << low_bits) - _1
    field_at = num_high_bits
    vote, least = _0, _0
    for w in range((num_high_bits + _63) >> _6):
        left = words[w]
        first = w << _6
        if num_high_bits - first <= _63:
            left &= (_1 << (num_high_bits - first)) - _1
        while left:
            bit = trailing_zeros(left)
            left &= left - _1
            if vote == num_slots:
                return -1
            field = words[field_at >> _6] >> (field_at & _63)
            field |= (words[(field_at >> _6) + _1] << _1) << (_63 - (field_at & _63))
            position = (((first + bit - vote) << low_bits) | (field & low_mask)) + vote
            if position < least or position >= num_bits:
                return -1
            least = position + _1
            votes[vote] = (position << _1) | ((field >> low_bits) & _1)
            field_at += low_bits + _1
            vote += _1
    return np.int64(vote) if _all_zero(words, field_at) else -1


@_compiled("(uint8[::1], uint64, uint64, uint64, int64, uint8[::1])")
def decode_votes(body, num_slots, low_bits, num_high_bits, num_bytes, out):
    """Write both planes into all of `out`; return False if `body` is not the one that `encode_votes` makes of them."""
    votes = np.empty(num_slots, np.uint64)
    count = _decode(body, num_slots, low_bits, num_high_bits, np.uint64(8 * num_bytes), votes)
    out[:] = 0
    sign_at = np.uint64(num_bytes)
    for v in range(count):
        position = votes[v] >> _1
        out[position >> _3] |= np.uint8(1) << np.uint8(position & _7)
        out[sign_at + (position >> _3)] |= np.uint8(votes[v] & _1) << np.uint8(position & _7)
    return count >= 0


# ----------------------------------------------------------------------------- tally of sparse bodies, without planes


@intrinsic
def _sum_block(typing_context, tally, tally_at, old, new, at, margin, out, m_at, s_at):
    """Add the votes of a step to a block of undecided ones, saturating, and write the planes of what is decided."""

    def generate(context, builder, signature, args):
        half, word, index = ir.IntType(16), ir.IntType(32), ir.IntType(64)
        halves, words = ir.VectorType(half, LANES), ir.VectorType(word, LANES)

        def vectors(array, place, vector):
            data = context.make_array(signature.args[array])(context, builder, args[array]).data
            return builder.bitcast(builder.gep(data, [args[place]]), vector.as_pointer())

        def splat(number, vector):
            return ir.Constant(vector, [number] * LANES)

        tally_at, old_at, new_at = vectors(0, 1, halves), vectors(2, 4, halves), vectors(3, 4, halves)
        binary = ir.FunctionType(halves, [halves, halves])
        add = cgutils.get_or_insert_function(builder.module, binary, f"llvm.sadd.sat.v{LANES}i16")
        nothing = ir.Constant(halves, ir.Undefined)
        margins = builder.insert_element(nothing, builder.trunc(args[5], half), ir.Constant(word, 0))
        margins = builder.shuffle_vector(margins, nothing, splat(0, words))
        least = builder.sub(splat(0, halves), margins)
        yes, no = splat(0, words), splat(0, words)
        for i in range(BLOCK // LANES):
            row = [ir.Constant(index, i)]
            votes = [builder.load(builder.gep(pointer, row), align=2) for pointer in (old_at, tally_at)]
            total = builder.call(add, votes)
            lowest = splat(-_MOST, halves)
            total = builder.select(builder.icmp_signed("<", total, lowest), lowest, total)
            builder.store(total, builder.gep(new_at, row), align=2)
            bit = splat(1 << i, words)
            reached = builder.sext(builder.icmp_signed(">=", total, margins), words)
            yes = builder.or_(yes, builder.and_(reached, bit))
            against = builder.sext(builder.icmp_signed("<=", total, least), words)
            no = builder.or_(no, builder.and_(against, bit))
        builder.store(builder.or_(yes, no), vectors(6, 7, words), align=1)
        builder.store(no, vectors(6, 8, words), align=1)
        return context.get_dummy_value()

    arguments = (tally, types.int64, old, new, types.int64, types.int64, out, types.int64, types.int64)
    return types.void(*arguments), generate


@_jit
def _sum_tail(tally, old, new, margin, out, m_at, s_at):
    """Do the same for the elements behind the last block."""
    for i in range(old.size):
        total = min(max(np.int64(old[i]) + np.int64(tally[i]), -_MOST), _MOST)
        new[i] = total
        if i % 8 == 0:
            out[m_at + i // 8] = 0
            out[s_at + i // 8] = 0
        out[m_at + i // 8] |= np.uint8(abs(total) >= margin) << np.uint8(i % 8)
        out[s_at + i // 8] |= np.uint8(total <= -margin) << np.uint8(i % 8)


@_jit
def _collect(votes, first, num_bits, full, length, tally):
    """Add the votes on a stretch of a piece's plane to its elements' tally; return how many lie before its end.

    Args:
        votes: as `_decode` writes them, none before the stretch but in front of the piece.
        first: position of the stretch.
        num_bits: its length, padding of its last byte included.
        full: elements of it in whole blocks; word j, bit i of such a one is its element 16 i + j.
        length: elements of it; what lies behind the last is no vote.
        tally: changed in place.
    """
    v = 0
    while v < votes.size:
        bit = np.int64(votes[v] >> _1) - first
        if bit >= num_bits:
            break
        if 0 <= bit < length:
            if bit < full:
                bit = (bit & ~(BLOCK - 1)) | (bit & 31) << 4 | ((bit >> 5) & 15)
            tally[bit] += np.int16(1 - 2 * np.int64(votes[v] & _1))
        v += 1
    return v


@_compiled(
    "(uint8[:, ::1], int64, int64, uint64, uint64, uint64, int64[::1], int64[::1], int64[::1], int64[::1], int64, "
    "int16[::1], int16[::1], uint8[::1], boolean[::1])"
)
def tally_bodies(
    payloads, body_at, body_bytes, num_slots, low_bits, num_high_bits, length, mask_at, sign_at, home, margin, old, new,
    out, ok,
):  # fmt: skip
    """Count the votes of all workers on one stretch after the other, which the nearest cache holds."""
    num_workers = payloads.shape[0]
    votes = np.empty((num_workers, num_slots), np.uint64)
    counts, done = np.zeros(num_workers, np.int64), np.zeros(num_workers, np.int64)
    for w in range(num_workers):
        body = payloads[w, body_at : body_at + body_bytes]
        counts[w] = _decode(body, num_slots, low_bits, num_high_bits, np.uint64(4 * out.size), votes[w])
        ok[w] = counts[w] >= 0
        if not ok[w]:
            counts[w] = 0
    tally = np.empty(_STRETCH, np.int16)
    for k in range(length.size):
        for at in range(0, length[k], _STRETCH):
            n = min(_STRETCH, length[k] - at)
            full = n // BLOCK * BLOCK
            m_at, s_at, base = mask_at[k] + at // 8, sign_at[k] + at // 8, home[k] + at
            tally[:] = 0
            for w in range(num_workers):
                left = votes[w, done[w] : counts[w]]
                done[w] += _collect(left, 8 * m_at, (n + 7) // 8 * 8, full, n, tally)
            for block in range(0, full, BLOCK):
                _sum_block(tally, block, old, new, base + block, margin, out, m_at + block // 8, s_at + block // 8)
            end = base + n
            _sum_tail(
                tally[full:n], old[base + full : end], new[base + full : end], margin, out, m_at + full // 8,
                s_at + full // 8,
            )  # fmt: skip
