"""The compiled bodies of the owners' kernels on the CPU; `jit` says how such code has to be written.

Numba's cache looks for changes only in the file of the function that it has compiled, not in those that it calls: what
runs inside a compiled function is in the same file. `jit_settle` follows on what is here.
"""

from __future__ import annotations

import numpy as np

from distsign.kernels.jit import _compiled, _inline, _jit
from distsign.kernels.jit_bits import copy_bytes, count_ones
from distsign.kernels.spans import BLOCK, LANES

__all__ = ["count_ballots", "count_onto", "count_standing", "count_votes"]

_CHUNK = 512
_WORDS = _CHUNK // 8
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_BLOCK_BYTES = BLOCK // 8
_HALF = BLOCK // 2
_MOST = np.int16(32767)
_LEAST = np.int16(-32767)


# ------------------------------------------------------------------------------------------------ the bit-sliced count


@_jit
def _add_two_bits(places, high, low, num_places):
    """Add the two-bit numbers (high, low) to the counters; `low` is used up as the carry."""
    for i in range(_WORDS):
        carry = places[0, i] & low[i]
        places[0, i] ^= low[i]
        low[i] = (high[i] & carry) | (places[1, i] & (high[i] ^ carry))
        places[1, i] ^= high[i] ^ carry
    for place in range(2, num_places):
        for i in range(_WORDS):
            carry = places[place, i] & low[i]
            places[place, i] ^= low[i]
            low[i] = carry


@_jit
def _compare(places, constant, num_places, greater, equal):
    """Find where the counters are greater than, and where they equal, a constant, from the highest place down."""
    greater[:] = 0
    equal[:] = _ALL
    for place in range(num_places - 1, -1, -1):
        if (constant >> place) & 1:
            for i in range(_WORDS):
                equal[i] &= places[place, i]
        else:
            for i in range(_WORDS):
                greater[i] |= equal[i] & places[place, i]
                equal[i] &= ~places[place, i]


@_jit
def _decide(places, world_size, margin, num_places, mask, negative):
    """Find the verdicts: +1 where a counter reaches `world_size + margin`, -1 down from `world_size - margin`."""
    if margin > world_size:  # no lead can reach it, and the constants would leave the counters' range
        mask[:] = 0
        negative[:] = 0
        return
    greater, equal = np.empty(_WORDS, np.uint64), np.empty(_WORDS, np.uint64)
    _compare(places, world_size - margin, num_places, greater, equal)
    for i in range(_WORDS):
        negative[i] = ~greater[i]
    _compare(places, world_size + margin, num_places, greater, equal)
    for i in range(_WORDS):
        mask[i] = greater[i] | equal[i] | negative[i]


@_compiled("(uint8[:, ::1], int64, int64, int64[::1])")
def count_votes(payloads, body_at, num_bytes, counts):
    """Count the ones of each row's mask plane, of which whole words are vectors' work."""
    whole = num_bytes // 8 * 8
    last = np.zeros(1, np.uint64)
    for w in range(payloads.shape[0]):
        words = payloads[w, body_at : body_at + whole].view(np.uint64)  # x86 and ARM read words wherever they lie
        count = np.int64(0)
        for i in range(words.size):
            count += np.int64(count_ones(words[i]))
        copy_bytes(last.view(np.uint8), 0, payloads[w], body_at + whole, num_bytes - whole)
        counts[w] = count + np.int64(count_ones(last[0]))


@_compiled("(uint8[:, ::1], int64, int64, int64, int64, uint8[::1])")
def count_ballots(payloads, body_at, num_bytes, margin, num_places, out):
    """Bit-sliced count, `_CHUNK` bytes of every plane at a time.

    Each worker adds ballot + 1, a two-bit number (mask and not sign; not mask), to a counter whose binary places are
    planes themselves, so that about log2(2 W) word operations count 64 components at once.
    """
    places = np.empty((num_places, _WORDS), np.uint64)
    high, low = np.zeros(_WORDS, np.uint64), np.zeros(_WORDS, np.uint64)
    mask, negative = np.empty(_WORDS, np.uint64), np.empty(_WORDS, np.uint64)
    high_bytes, low_bytes = high.view(np.uint8), low.view(np.uint8)
    mask_bytes, negative_bytes = mask.view(np.uint8), negative.view(np.uint8)
    for chunk in range(0, num_bytes, _CHUNK):
        size = min(_CHUNK, num_bytes - chunk)
        places[:] = 0
        for w in range(payloads.shape[0]):
            copy_bytes(low_bytes, 0, payloads[w], body_at + chunk, size)
            copy_bytes(high_bytes, 0, payloads[w], body_at + num_bytes + chunk, size)
            for i in range(_WORDS):
                high[i] = low[i] & ~high[i]
                low[i] = ~low[i]
            _add_two_bits(places, high, low, num_places)
        _decide(places, payloads.shape[0], margin, num_places, mask, negative)
        copy_bytes(out, chunk, mask_bytes, 0, size)
        copy_bytes(out, num_bytes + chunk, negative_bytes, 0, size)


# ---------------------------------------------------------------------------------------------------- standing ballots


@_compiled("(uint8[:, ::1], int64, int64, int64, int64, uint8[:, ::1], uint8[:, ::1], uint8[::1])")
def count_standing(payloads, body_at, num_bytes, margin, num_places, old, new, out):
    """Add each worker's ballots to its standing ballots, `old` to `new`, and count these as `count_ballots` does."""
    places = np.empty((num_places, _WORDS), np.uint64)
    ballots, standing = np.zeros((2, _WORDS), np.uint64), np.zeros((2, _WORDS), np.uint64)  # mask and sign of each
    ballot_bytes, standing_bytes = ballots.view(np.uint8), standing.view(np.uint8)
    high, low = np.empty(_WORDS, np.uint64), np.empty(_WORDS, np.uint64)
    mask, negative = np.empty(_WORDS, np.uint64), np.empty(_WORDS, np.uint64)
    mask_bytes, negative_bytes = mask.view(np.uint8), negative.view(np.uint8)
    for chunk in range(0, num_bytes, _CHUNK):
        size = min(_CHUNK, num_bytes - chunk)
        places[:] = 0
        for w in range(payloads.shape[0]):
            for plane in range(2):
                at = plane * num_bytes + chunk
                copy_bytes(ballot_bytes[plane], 0, payloads[w], body_at + at, size)
                copy_bytes(standing_bytes[plane], 0, old[w], at, size)
            for i in range(_WORDS):
                came, stood = ballots[0, i], standing[0, i]
                came_negative, stood_negative = came & ballots[1, i], stood & standing[1, i]
                stands = (came | stood) & ~(came & stood & (came_negative ^ stood_negative))
                against = stands & (came_negative | stood_negative)
                standing[0, i] = stands
                standing[1, i] = against
                high[i] = stands & ~against
                low[i] = ~stands
            for plane in range(2):
                at = plane * num_bytes + chunk
                copy_bytes(new[w], at, standing_bytes[plane], 0, size)
            _add_two_bits(places, high, low, num_places)
        _decide(places, payloads.shape[0], margin, num_places, mask, negative)
        copy_bytes(out, chunk, mask_bytes, 0, size)
        copy_bytes(out, num_bytes + chunk, negative_bytes, 0, size)


# ----------------------------------------------------------------------------------------------------- undecided votes
#
# A lane's 32-bit word is taken in two halves, so that bits, counts and undecided votes are all 16 bits wide and the 16
# lanes fill one vector. Numba widens what it computes; the casts cut it back, and LLVM sees that it can stay narrow.


@_inline
def _deal4(tally, at, half):
    """Double the counts of four elements of a lane and add the next bit to each."""
    tally[at] = np.int16((tally[at] << 1) | (half & 1))
    tally[at + LANES] = np.int16((tally[at + LANES] << 1) | ((half >> 1) & 1))
    tally[at + 2 * LANES] = np.int16((tally[at + 2 * LANES] << 1) | ((half >> 2) & 1))
    tally[at + 3 * LANES] = np.int16((tally[at + 3 * LANES] << 1) | ((half >> 3) & 1))


@_jit
def _deal(tally, halves):
    """Double the counts of a block and add a plane's bits; `halves` are the lower, then the upper of 16 words."""
    for j in range(LANES):
        low, high = halves[j], halves[LANES + j]
        _deal4(tally, j, low)
        _deal4(tally, j + 4 * LANES, np.uint16(low >> 4))
        _deal4(tally, j + 8 * LANES, np.uint16(low >> 8))
        _deal4(tally, j + 12 * LANES, np.uint16(low >> 12))
        _deal4(tally, j + _HALF, high)
        _deal4(tally, j + _HALF + 4 * LANES, np.uint16(high >> 4))
        _deal4(tally, j + _HALF + 8 * LANES, np.uint16(high >> 8))
        _deal4(tally, j + _HALF + 12 * LANES, np.uint16(high >> 12))


@_inline
def _sum(old, tally, world_size):
    """Add the votes of a step, saturating; `tally` counts ballot + 1 of each worker."""
    total = np.int32(old) + np.int32(np.int16(tally - world_size))
    return max(np.int16(min(max(total, np.int32(-32768)), np.int32(32767))), _LEAST)


@_jit
def _add_block(old, tally, world_size, new):
    for i in range(BLOCK):
        new[i] = _sum(old[i], tally[i], world_size)


@_inline
def _reached4(new, at, margin, m):
    """Shift into the top of `m` whether each of four elements of a lane reaches the margin."""
    m = np.uint16((m >> 1) | (np.uint16(abs(new[at]) >= margin) << 15))
    m = np.uint16((m >> 1) | (np.uint16(abs(new[at + LANES]) >= margin) << 15))
    m = np.uint16((m >> 1) | (np.uint16(abs(new[at + 2 * LANES]) >= margin) << 15))
    m = np.uint16((m >> 1) | (np.uint16(abs(new[at + 3 * LANES]) >= margin) << 15))
    return m


@_inline
def _negative4(new, at, s):
    """Shift into the top of `s` the signs of four elements of a lane."""
    s = np.uint16((s >> 1) | (np.uint16(new[at]) & np.uint16(0x8000)))
    s = np.uint16((s >> 1) | (np.uint16(new[at + LANES]) & np.uint16(0x8000)))
    s = np.uint16((s >> 1) | (np.uint16(new[at + 2 * LANES]) & np.uint16(0x8000)))
    s = np.uint16((s >> 1) | (np.uint16(new[at + 3 * LANES]) & np.uint16(0x8000)))
    return s


@_inline
def _verdicts16(new, at, margin, halves, into):
    """Write half a lane's verdicts."""
    m = _reached4(new, at, margin, np.uint16(0))
    m = _reached4(new, at + 4 * LANES, margin, m)
    m = _reached4(new, at + 8 * LANES, margin, m)
    m = _reached4(new, at + 12 * LANES, margin, m)
    s = _negative4(new, at, np.uint16(0))
    s = _negative4(new, at + 4 * LANES, s)
    s = _negative4(new, at + 8 * LANES, s)
    s = _negative4(new, at + 12 * LANES, s)
    halves[into] = m
    halves[into + 2 * LANES] = s & m


@_jit
def _verdicts_block(new, margin, halves):
    """Write the mask's lower and upper halves of 16 words, then the signs'."""
    for j in range(LANES):
        _verdicts16(new, j, margin, halves, j)
        _verdicts16(new, j + _HALF, margin, halves, j + LANES)


@_jit
def _count_tail(places, bit, margin, world_size, old, new, out, m_at, s_at):
    """Do the same for the elements behind the last full block, whose counts begin at a bit of a chunk."""
    for at in range(0, old.size, 8):
        m, s = 0, 0
        for i in range(min(8, old.size - at)):
            count = 0
            for place in range(places.shape[0]):
                word = places[place, bit >> 6] >> np.uint64(bit & 63)
                count |= np.int64(word & np.uint64(1)) << place
            total = min(max(old[at + i] + count - world_size, np.int64(_LEAST)), np.int64(_MOST))
            new[at + i] = total
            m |= np.int64(abs(total) >= margin) << i
            s |= np.int64(total <= -margin) << i
            bit += 1
        out[m_at + at // 8] = m
        out[s_at + at // 8] = s


@_compiled(
    "(uint8[:, ::1], int64, int64[::1], int64[::1], int64[::1], int64[::1], int64, int64, int16[::1], int16[::1], "
    "uint8[::1])"
)
def count_onto(payloads, body_at, length, mask_at, sign_at, home, margin, num_places, old, new, out):
    """Count bit-sliced, deal the counts out to the elements, and add them to the undecided votes, `old` to `new`.

    `margin` is at most 32767, and `new` other memory than `old`.
    """
    world_size = np.int16(payloads.shape[0])
    least = np.int16(margin)
    places = np.empty((num_places, _WORDS), np.uint64)
    place_halves = places.view(np.uint16)
    high, low = np.zeros(_WORDS, np.uint64), np.zeros(_WORDS, np.uint64)
    high_bytes, low_bytes = high.view(np.uint8), low.view(np.uint8)
    tally = np.empty(BLOCK, np.int16)
    halves = np.empty(4 * LANES, np.uint16)
    pairs = np.empty(4 * LANES, np.uint16)
    pair_bytes = pairs.view(np.uint8)
    for k in range(length.size):
        num_bytes = (length[k] + 7) // 8
        for chunk in range(0, num_bytes, _CHUNK):
            size = min(_CHUNK, num_bytes - chunk)
            m_at, s_at = mask_at[k] + chunk, sign_at[k] + chunk
            base, end = home[k] + 8 * chunk, home[k] + min(length[k], 8 * (chunk + _CHUNK))
            places[:] = 0
            for w in range(payloads.shape[0]):
                copy_bytes(low_bytes, 0, payloads[w], body_at + m_at, size)
                copy_bytes(high_bytes, 0, payloads[w], body_at + s_at, size)
                for i in range(_WORDS):
                    high[i] = low[i] & ~high[i]
                    low[i] = ~low[i]
                _add_two_bits(places, high, low, num_places)
            block = 0
            while base + BLOCK <= end:
                tally[:] = 0
                for place in range(num_places - 1, -1, -1):
                    for j in range(LANES):
                        halves[j] = place_halves[place, 2 * LANES * block + 2 * j]
                        halves[LANES + j] = place_halves[place, 2 * LANES * block + 2 * j + 1]
                    _deal(tally, halves)
                _add_block(old[base : base + BLOCK], tally, world_size, new[base : base + BLOCK])
                _verdicts_block(new[base : base + BLOCK], least, halves)
                for j in range(LANES):
                    pairs[2 * j] = halves[j]
                    pairs[2 * j + 1] = halves[LANES + j]
                    pairs[2 * LANES + 2 * j] = halves[2 * LANES + j]
                    pairs[2 * LANES + 2 * j + 1] = halves[3 * LANES + j]
                copy_bytes(out, m_at, pair_bytes, 0, _BLOCK_BYTES)
                copy_bytes(out, s_at, pair_bytes, _BLOCK_BYTES, _BLOCK_BYTES)
                base += BLOCK
                m_at += _BLOCK_BYTES
                s_at += _BLOCK_BYTES
                block += 1
            _count_tail(places, block * BLOCK, margin, payloads.shape[0], old[base:end], new[base:end], out, m_at, s_at)
