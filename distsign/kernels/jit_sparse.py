"""The compiled bodies of the sparse codec on the CPU; `wire.sparse` has the format.

The work is one step a word of 64 positions, and one a vote. Everything is uint64, indices included: Numba makes a
float of an int64 and a uint64, and checks an index that might be negative.
"""

from __future__ import annotations

import numpy as np

from distsign.kernels.jit import _compiled, _jit
from distsign.kernels.jit_bits import copy_bytes, trailing_zeros

__all__ = ["decode_votes", "encode_votes"]

_CHUNK = 512
_WORDS = _CHUNK // 8
_0 = np.uint64(0)
_1 = np.uint64(1)
_3 = np.uint64(3)
_6 = np.uint64(6)
_7 = np.uint64(7)
_63 = np.uint64(63)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)


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


@_compiled("(uint8[::1], uint64, uint64, uint64, int64, uint8[::1])")
def decode_votes(body, num_slots, low_bits, num_high_bits, num_bytes, out):
    """Write both planes into all of `out`; return False if `body` is not the one that `encode_votes` makes of them.

    Whatever the body holds, nothing is read or written elsewhere: a vote beyond the slots ends it before its field is
    read, and one beyond the last position before it is written.
    """
    words = np.zeros(body.size // 8 + 2, np.uint64)
    copy_bytes(words.view(np.uint8), 0, body, 0, body.size)
    out[:] = 0
    end = np.uint64(8 * num_bytes)
    sign_at = np.uint64(num_bytes)
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
                return False
            field = words[field_at >> _6] >> (field_at & _63)
            field |= (words[(field_at >> _6) + _1] << _1) << (_63 - (field_at & _63))
            position = (((first + bit - vote) << low_bits) | (field & low_mask)) + vote
            if position < least or position >= end:
                return False
            least = position + _1
            out[position >> _3] |= np.uint8(1) << np.uint8(position & _7)
            out[sign_at + (position >> _3)] |= np.uint8((field >> low_bits) & _1) << np.uint8(position & _7)
            field_at += low_bits + _1
            vote += _1
    return _all_zero(words, field_at)
