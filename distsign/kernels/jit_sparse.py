"""The compiled bodies of the sparse codec on the CPU; `wire.sparse` has the format.

The work is one step a word of 64 positions, and one a vote. Everything is uint64, indices included: Numba makes a
float of an int64 and a uint64, and checks an index that might be negative.
"""

from __future__ import annotations

import numpy as np

from distsign.kernels.jit import _compiled, _jit
from distsign.kernels.jit_bits import copy_bytes, trailing_zeros
from distsign.kernels.spans import BLOCK

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


@_jit
def _load(plane, at, size, words):
    """Copy at most `_CHUNK` bytes into words, filled up with zeros; return whether any is not 0."""
    as_bytes = words.view(np.uint8)
    as_bytes[size:] = 0
    copy_bytes(as_bytes, 0, plane, at, size)
    found = _0
    for w in range(_WORDS):
        found |= words[w]
    return found != _0


@_jit
def _element(bit, full):
    """Return the element of a piece that a bit of its plane stands for; `full` bits are in whole blocks."""
    if bit < full:  # word j, bit i of a block is its element 16 i + j
        return (bit & ~(BLOCK - 1)) | (bit & 31) << 4 | ((bit >> 5) & 15)
    return bit


@_jit
def _catch_up(words, first, length, home, margin, old, new):
    """Make `new` equal `old` again where the last step changed it; leave in `words` where a vote reaches the margin."""
    full = length // BLOCK * BLOCK
    for w in range(_WORDS):
        left = words[w]
        while left:
            bit = trailing_zeros(left)
            left &= left - _1
            place = first + 64 * w + np.int64(bit)
            if place < length:
                at = home + _element(place, full)
                new[at] = old[at]
                if abs(np.int64(old[at])) >= margin:
                    continue
            words[w] &= ~(_1 << bit)


@_jit
def _add(votes, position, size, words, first, length, home, new):
    """Add the votes in a stretch of bytes from a position on; what lies behind the last element is none.

    Sums wrap around, see `_reach`. Returns how many votes lay before the end of the stretch.
    """
    full, end = length // BLOCK * BLOCK, position + 8 * size
    v = 0
    while v < votes.size and np.int64(votes[v] >> _1) < end:
        bit = np.int64(votes[v] >> _1) - position
        if 0 <= bit < length - first:
            new[home + _element(first + bit, full)] += np.int16(1 - 2 * np.int64(votes[v] & _1))
            words[bit >> 6] |= _1 << np.uint64(bit & 63)
        v += 1
    return v


@_jit
def _reach(words, first, length, home, margin, old, new, mask, sign):
    """Saturate the sums and write the verdicts.

    `new` may have wrapped around, but what a step adds is less than half of its range: the difference is exact.
    """
    full = length // BLOCK * BLOCK
    for w in range(_WORDS):
        left = words[w]
        while left:
            bit = first + 64 * w + np.int64(trailing_zeros(left))
            left &= left - _1
            at = home + _element(bit, full)
            total = np.int64(old[at]) + np.int64(np.int16(new[at] - old[at]))
            total = min(max(total, -_MOST), _MOST)
            new[at] = total
            if abs(total) >= margin:
                mask[bit // 8] |= np.uint8(1) << np.uint8(bit & 7)
                sign[bit // 8] |= np.uint8(total < 0) << np.uint8(bit & 7)


@_compiled(
    "(uint8[:, ::1], int64, int64, uint64, uint64, uint64, int64[::1], int64[::1], int64[::1], int64[::1], int64, "
    "int16[::1], int16[::1], uint8[::1], uint8[::1], boolean[::1])"
)
def tally_bodies(
    payloads, body_at, body_bytes, num_slots, low_bits, num_high_bits, length, mask_at, sign_at, home, margin, old, new,
    recent, out, ok,
):  # fmt: skip
    """Touch only what changes: the ballots of this step, the places where the halves differ, and what is left over.

    All workers' ballots on one stretch, which the nearest cache holds, come before the next stretch.
    """
    words = np.empty(_WORDS, np.uint64)
    votes = np.empty((payloads.shape[0], num_slots), np.uint64)
    counts, done = np.zeros(payloads.shape[0], np.int64), np.zeros(payloads.shape[0], np.int64)
    for w in range(payloads.shape[0]):
        body = payloads[w, body_at : body_at + body_bytes]
        counts[w] = _decode(body, num_slots, low_bits, num_high_bits, np.uint64(4 * out.size), votes[w])
        ok[w] = counts[w] >= 0
    if counts.size and counts.min() < 0:
        return
    out[:] = 0
    for k in range(length.size):
        num_bytes = (length[k] + 7) // 8
        mask, sign = out[mask_at[k] : mask_at[k] + num_bytes], out[sign_at[k] : sign_at[k] + num_bytes]
        for chunk in range(0, num_bytes, _CHUNK):
            size = min(_CHUNK, num_bytes - chunk)
            some = _load(recent, home[k] // 8 + chunk, size, words)
            if some:
                _catch_up(words, 8 * chunk, length[k], home[k], margin, old, new)
            for w in range(counts.size):
                of_worker = votes[w, done[w] : counts[w]]
                added = _add(of_worker, 8 * (mask_at[k] + chunk), size, words, 8 * chunk, length[k], home[k], new)
                some |= added != 0
                done[w] += added
            if some:
                _reach(words, 8 * chunk, length[k], home[k], margin, old, new, mask, sign)
                copy_bytes(recent, home[k] // 8 + chunk, words.view(np.uint8), 0, size)
