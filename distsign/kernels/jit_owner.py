"""The compiled bodies of the owners' kernels on the CPU; `jit` says how such code has to be written.

Numba's cache looks for changes only in the file of the function that it has compiled, not in those that it calls:
what runs inside a compiled function is in the same file.
"""

from __future__ import annotations

import numpy as np

from distsign.kernels.jit import _compiled, _jit

__all__ = ["count_ballots"]

_CHUNK = 512
_WORDS = _CHUNK // 8
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)


# --------------------------------------------------------------------------------------------------------------- tally


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


@_compiled("(uint8[:, ::1], int64, int64, int64, int64, int64, uint8[::1])")
def count_ballots(payloads, body_at, num_bytes, up, down, num_places, out):
    """Bit-sliced count, `_CHUNK` bytes of every plane at a time.

    Each worker adds ballot + 1, a two-bit number (mask and not sign; not mask), to a counter whose binary places are
    planes themselves, so that about log2(2 W) word operations count 64 components at once. A verdict is +1 where the
    counter reaches `up = W + margin`, and -1 where it does not exceed `down = W - margin`.
    """
    places = np.empty((num_places, _WORDS), np.uint64)
    high, low = np.zeros(_WORDS, np.uint64), np.zeros(_WORDS, np.uint64)
    greater, equal = np.empty(_WORDS, np.uint64), np.empty(_WORDS, np.uint64)
    mask, negative = np.empty(_WORDS, np.uint64), np.empty(_WORDS, np.uint64)
    high_bytes, low_bytes = high.view(np.uint8), low.view(np.uint8)
    mask_bytes, negative_bytes = mask.view(np.uint8), negative.view(np.uint8)
    for chunk in range(0, num_bytes, _CHUNK):
        size = min(_CHUNK, num_bytes - chunk)
        places[:] = 0
        for w in range(payloads.shape[0]):
            low_bytes[:size] = payloads[w, body_at + chunk : body_at + chunk + size]
            high_bytes[:size] = payloads[w, body_at + num_bytes + chunk : body_at + num_bytes + chunk + size]
            for i in range(_WORDS):
                high[i] = low[i] & ~high[i]
                low[i] = ~low[i]
            _add_two_bits(places, high, low, num_places)
        _compare(places, down, num_places, greater, equal)
        for i in range(_WORDS):
            negative[i] = ~greater[i]
        _compare(places, up, num_places, greater, equal)
        for i in range(_WORDS):
            mask[i] = greater[i] | equal[i] | negative[i]
        out[chunk : chunk + size] = mask_bytes[:size]
        out[num_bytes + chunk : num_bytes + chunk + size] = negative_bytes[:size]
