"""The compiled bodies on the CPU that choose which verdicts are sent, and settle what they decide.

The work is one step a word of 64 components, and one a verdict (see `jit_owner` on what is in one file).
"""

from __future__ import annotations

import numpy as np

from distsign.kernels.jit import _compiled, _jit
from distsign.kernels.jit_bits import copy_bytes, count_ones, trailing_zeros
from distsign.kernels.spans import BLOCK

__all__ = ["settle_standing", "settle_votes"]

_CHUNK = 512
_WORDS = _CHUNK // 8
_1 = np.uint64(1)


@_jit
def _load(planes, at, size, words):
    """Copy at most `_CHUNK` bytes into words, filled up with zeros."""
    as_bytes = words.view(np.uint8)
    as_bytes[size:] = 0
    copy_bytes(as_bytes, 0, planes, at, size)


@_jit
def _count_votes(planes, at, num_bytes, words):
    count = np.uint64(0)
    for chunk in range(0, num_bytes, _CHUNK):
        _load(planes, at + chunk, min(_CHUNK, num_bytes - chunk), words)
        for w in range(_WORDS):
            count += count_ones(words[w])
    return np.int64(count)


@_jit
def _wipe_out(plane, settled):
    for b in range(settled.size):
        plane[b] &= ~settled[b]


@_jit
def _keep_first(planes, mask_at, sign_at, num_bytes, left, words):
    """Keep the first `left` votes and abstain on the others; return how many more could have been kept."""
    for chunk in range(0, num_bytes, _CHUNK):
        size = min(_CHUNK, num_bytes - chunk)
        _load(planes, mask_at + chunk, size, words)
        for w in range(_WORDS):
            votes = np.int64(count_ones(words[w]))
            if votes <= left:
                left -= votes
                words[w] = 0
            else:
                for _ in range(left):
                    words[w] &= words[w] - _1
                left = 0
        dropped = words.view(np.uint8)[:size]
        _wipe_out(planes[mask_at + chunk : mask_at + chunk + size], dropped)
        _wipe_out(planes[sign_at + chunk : sign_at + chunk + size], dropped)
    return left


@_jit
def _keep_votes(planes, mask_at, sign_at, length, cap, start, words):
    """Keep at most `cap` votes of a piece, from byte `start` on and around; return how many there were."""
    num_bytes = (length + 7) // 8
    if length % 8:  # what lies behind the last element is no vote
        planes[mask_at + num_bytes - 1] &= (1 << length % 8) - 1
        planes[sign_at + num_bytes - 1] &= (1 << length % 8) - 1
    count = _count_votes(planes, mask_at, num_bytes, words)
    if count > cap:
        left = _keep_first(planes, mask_at + start, sign_at + start, num_bytes - start, cap, words)
        _keep_first(planes, mask_at, sign_at, start, left, words)
    return count


@_jit
def _take_off(mask, sign, first, full, margin, undecided, home):
    """Take off the votes the verdicts of a chunk, which begins at bit `first` of a plane with `full` bits in blocks."""
    for w in range(_WORDS):
        left = mask[w]
        while left:
            bit = trailing_zeros(left)
            left &= left - _1
            negative = np.int64((sign[w] >> bit) & _1)
            element = first + 64 * w + np.int64(bit)
            if element < full:  # word j, bit i of a block is its element 16 i + j
                element = (element & ~(BLOCK - 1)) | (element & 31) << 4 | ((element >> 5) & 15)
            undecided[home + element] += margin * (2 * negative - 1)


@_jit
def _forget(votes, margin):
    for i in range(votes.size):
        votes[i] = votes[i] * np.int16(abs(votes[i]) < margin)


@_compiled(
    "(uint8[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64, boolean, int16[::1], "
    "int64[::1])"
)
def settle_votes(planes, length, mask_at, sign_at, home, caps, starts, margin, forget, undecided, counts):
    mask, sign = np.empty(_WORDS, np.uint64), np.empty(_WORDS, np.uint64)
    for k in range(length.size):
        counts[k] = _keep_votes(planes, mask_at[k], sign_at[k], length[k], caps[k], starts[k], mask)
        num_bytes = (length[k] + 7) // 8
        for chunk in range(0, num_bytes, _CHUNK):
            size = min(_CHUNK, num_bytes - chunk)
            _load(planes, mask_at[k] + chunk, size, mask)
            _load(planes, sign_at[k] + chunk, size, sign)
            _take_off(mask, sign, 8 * chunk, length[k] // BLOCK * BLOCK, margin, undecided, home[k])
        if forget and counts[k] > caps[k]:
            _forget(undecided[home[k] : home[k] + length[k]], np.int16(margin))


@_compiled("(uint8[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], uint8[:, ::1], int64[::1])")
def settle_standing(planes, length, mask_at, sign_at, caps, starts, standing, counts):
    words = np.empty(_WORDS, np.uint64)
    for k in range(length.size):
        m_at, s_at = mask_at[k], sign_at[k]
        counts[k] = _keep_votes(planes, m_at, s_at, length[k], caps[k], starts[k], words)
        num_bytes = (length[k] + 7) // 8
        verdicts = planes[m_at : m_at + num_bytes]
        for w in range(standing.shape[0]):
            _wipe_out(standing[w, m_at : m_at + num_bytes], verdicts)
            _wipe_out(standing[w, s_at : s_at + num_bytes], verdicts)
