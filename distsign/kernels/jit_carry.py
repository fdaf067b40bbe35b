"""The compiled body of packing with a carry, on the CPU; `jit` says how such code has to be written.

A tile of a few blocks goes through a scratch in several short loops, each of one kind of arithmetic, which stays in the
nearest cache. What is kept is written past the caches, a cache line at a time: an ordinary store reads the line from
memory before it overwrites it, and would read as much again as the whole carry. Numba makes 64-bit numbers of sums,
shifts and products of 32-bit ones; a cast at once, wherever that matters, keeps twice as many in a vector.

Numba's cache looks for changes only in the file of the function that it has compiled, so copies of helpers are here.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, no-check-untyped-defs, no-warn-unreachable

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.extending import intrinsic

from distsign.kernels.jit import _compiled, _inline, _jit
from distsign.kernels.spans import BLOCK, LANES

__all__ = ["pack_carried"]

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_EXPONENT_ONE = np.uint32(0x00800000)
_TOP = np.uint32(0x80000000)
_ONE = np.uint32(1)
_ZERO = np.uint32(0)
_STRIDE = BLOCK // 4
_LARGEST = np.float32(3.4028235e38)
_DEAD = np.float32(1e-30)
_NOTHING = np.float32(-0.0)
_LINE = 64
TILE = 4 * BLOCK


# ---------------------------------------------------------------------------------------------------------- past caches


def _line_copier(name, alignment, streamed):
    """Make a function that copies 64 bytes in whole vectors; numbers of any type, places as indices into the arrays."""

    def copy_line(typing_context, into, at, source, source_at):
        def generate(context, builder, signature, args):
            vector = ir.VectorType(ir.IntType(32), 8)
            pointers = []
            for array, index in ((0, 1), (2, 3)):
                data = context.make_array(signature.args[array])(context, builder, args[array]).data
                pointers.append(builder.bitcast(builder.gep(data, [args[index]]), vector.as_pointer()))
            for half in range(2):
                place = ir.Constant(ir.IntType(64), half)
                loaded = builder.load(builder.gep(pointers[1], [place]), align=4)
                stored = builder.store(loaded, builder.gep(pointers[0], [place]), align=alignment)
                if streamed:
                    hint = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
                    stored.set_metadata("nontemporal", hint)
            return context.get_dummy_value()

        return types.void(into, at, source, source_at), generate

    copy_line.__name__ = name
    return intrinsic(copy_line)


_copy_line = _line_copier("_copy_line", 1, False)
_stream_line = _line_copier("_stream_line", 32, True)


@intrinsic
def _fence(typing_context):
    """Make all that was streamed visible before anything that is written later."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@_jit
def _keep(into, at, source, source_at, n):
    """Copy `n` numbers of one type; past the caches where there are whole cache lines of them."""
    line = _LINE // into.itemsize
    head = min(n, -(into.ctypes.data // into.itemsize + at) % line)
    for i in range(head):
        into[at + i] = source[source_at + i]
    while head + line <= n:
        _stream_line(into, at + head, source, source_at + head)
        head += line
    for i in range(head, n):
        into[at + i] = source[source_at + i]


@_jit
def _copy_piece(old, new, at, n):
    """Copy a piece from one half to the other, of what there is."""
    if new.size:
        _keep(new, at, old, at, n)


# ----------------------------------------------------------------------------------------------------------- arithmetic


@_jit
def _overflow(x):
    """Return in the top bit whether any is NaN or infinite: its exponent overflows by one."""
    w = _ZERO
    for i in range(x.size):
        w = np.uint32(w | ((x[i] & _MAGNITUDE) + _EXPONENT_ONE))
    return w


@_jit
def _add(x, carry, unscale, u):
    for i in range(x.size):
        u[i] = carry[i] + x[i] * unscale


@_jit
def _add_normalised(x, carry, square, unscale, correction, decay, rest, scratch):
    u = scratch[:TILE]
    v = scratch[TILE:]
    for i in range(x.size):
        g = x[i] * unscale
        s = min(decay * square[i] + rest * (g * g), _LARGEST)
        v[i] = s
        # -0.0 changes no number that it is added to, not even -0.0.
        u[i] = carry[i] + ((g * correction) / np.sqrt(s) if s > _DEAD else _NOTHING)


@_jit
def _add_tile(x, carry, square, unscale, correction, decay, rest, sums):
    if square.size:
        _add_normalised(x, carry, square, unscale, correction, decay, rest, sums)
    else:
        _add(x, carry, unscale, sums)


@_jit
def _widen(narrow, wide):
    for i in range(narrow.size):
        wide[i] = np.uint32(np.uint32(narrow[i]) << np.uint32(16)).view(np.float32)


@_jit
def _narrow(bits, narrow):
    """Round float32 to bfloat16, to the nearest and from the middle to the even one."""
    for i in range(bits.size):
        b = bits[i]
        narrow[i] = np.uint16((b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & _ONE)) >> np.uint32(16))


@_jit
def _keep_sums(new_wide, new_narrow, at, bits, rounded, n):
    if new_wide.size:
        _keep(new_wide, at, bits, 0, n)
    else:
        _narrow(bits[:n], rounded)
        _keep(new_narrow, at, rounded, 0, n)


@_jit
def _clear(bits, limit, rest):
    """Write a zero for each vote. Into another array: in place LLVM makes it a masked store, ten times as slow."""
    for i in range(bits.size):
        vote = np.uint32(np.int32(limit - (bits[i] & _MAGNITUDE)) >> np.int32(31))
        rest[i] = bits[i] & np.uint32(~vote)


# ----------------------------------------------------------------------------------------------------------- planes


@_inline
def _mask8(x, at, limit):
    """Bit i: does element `at + 16 i` vote? Magnitudes of IEEE floats compare as integers."""
    m = np.uint32((x[at] & _MAGNITUDE) > limit)
    m |= np.uint32((x[at + LANES] & _MAGNITUDE) > limit) << np.uint32(1)
    m |= np.uint32((x[at + 2 * LANES] & _MAGNITUDE) > limit) << np.uint32(2)
    m |= np.uint32((x[at + 3 * LANES] & _MAGNITUDE) > limit) << np.uint32(3)
    m |= np.uint32((x[at + 4 * LANES] & _MAGNITUDE) > limit) << np.uint32(4)
    m |= np.uint32((x[at + 5 * LANES] & _MAGNITUDE) > limit) << np.uint32(5)
    m |= np.uint32((x[at + 6 * LANES] & _MAGNITUDE) > limit) << np.uint32(6)
    m |= np.uint32((x[at + 7 * LANES] & _MAGNITUDE) > limit) << np.uint32(7)
    return m


@_inline
def _sign8(x, at, s):
    """Shift the signs of eight elements into the top of `s`, so that after 32 of them bit i is element i's sign."""
    s = (s >> _ONE) | (x[at] & _TOP)
    s = (s >> _ONE) | (x[at + LANES] & _TOP)
    s = (s >> _ONE) | (x[at + 2 * LANES] & _TOP)
    s = (s >> _ONE) | (x[at + 3 * LANES] & _TOP)
    s = (s >> _ONE) | (x[at + 4 * LANES] & _TOP)
    s = (s >> _ONE) | (x[at + 5 * LANES] & _TOP)
    s = (s >> _ONE) | (x[at + 6 * LANES] & _TOP)
    s = (s >> _ONE) | (x[at + 7 * LANES] & _TOP)
    return s


@_inline
def _popcount(m):
    m = np.uint32(m - ((m >> _ONE) & np.uint32(0x55555555)))
    m = np.uint32((m & np.uint32(0x33333333)) + ((m >> np.uint32(2)) & np.uint32(0x33333333)))
    m = np.uint32((m + (m >> np.uint32(4))) & np.uint32(0x0F0F0F0F))
    return np.uint32(m * np.uint32(0x01010101)) >> np.uint32(24)


@_jit
def _pack_blocks(bits, num_blocks, limit, lanes, out, m_at, s_at):
    """Write the planes of full blocks, and add the votes to the last part of `lanes`."""
    limit = limit & _MAGNITUDE  # so that LLVM knows that both sides of a comparison are small enough for a signed one
    for b in range(num_blocks):
        block = bits[b * BLOCK : b * BLOCK + BLOCK]
        for j in range(LANES):
            m = np.uint32(_mask8(block, j, limit))
            m = np.uint32(m | (_mask8(block, j + _STRIDE, limit) << np.uint32(8)))
            m = np.uint32(m | (_mask8(block, j + 2 * _STRIDE, limit) << np.uint32(16)))
            m = np.uint32(m | (_mask8(block, j + 3 * _STRIDE, limit) << np.uint32(24)))
            s = np.uint32(_sign8(block, j, _ZERO))
            s = np.uint32(_sign8(block, j + _STRIDE, s))
            s = np.uint32(_sign8(block, j + 2 * _STRIDE, s))
            s = np.uint32(_sign8(block, j + 3 * _STRIDE, s))
            lanes[j] = m
            lanes[LANES + j] = s & m
            lanes[2 * LANES + j] += _popcount(m)
        _copy_line(out, m_at + b * _LINE, lanes, 0)
        _copy_line(out, s_at + b * _LINE, lanes, LANES)


@_jit
def _pack_tail(bits, limit, out, m_at, s_at):
    count = 0
    for at in range(0, bits.size, 8):
        m = np.uint8(0)
        s = np.uint8(0)
        for i in range(min(8, bits.size - at)):
            if (bits[at + i] & _MAGNITUDE) > limit:
                m |= np.uint8(1 << i)
                s |= np.uint8((bits[at + i] >> np.uint32(31)) << np.uint32(i))
                count += 1
        out[m_at + at // 8] = m
        out[s_at + at // 8] = s
    return count


@_jit
def _pack_planes(bits, limit, lanes, out, m_at, s_at):
    """Write the planes of a tile; return the votes in its tail, as those of blocks are counted in `lanes`."""
    num_blocks = bits.size // BLOCK
    _pack_blocks(bits, num_blocks, limit, lanes, out, m_at, s_at)
    tail = num_blocks * BLOCK
    return _pack_tail(bits[tail:], limit, out, m_at + tail // 8, s_at + tail // 8)


@_compiled(
    "(uint32[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], uint32[::1], boolean[::1], "
    "float32[::1], float32, float32, float32, float32[:, ::1], uint16[:, ::1], float32[:, ::1], int64, boolean, "
    "uint8[::1], int64[::1])"
)
def pack_carried(
    x,
    start,
    length,
    row,
    mask_at,
    sign_at,
    home,
    limits,
    active,
    corrections,
    unscale,
    decay,
    rest,
    wide,
    narrow,
    square,
    live,
    clear,
    out,
    counts,
):
    """One of `wide` (float32) and `narrow` (bfloat16 as bits) is the carry, and the other empty, as `square` may be."""
    numbers = x.view(np.float32)
    sums = np.zeros(2 * TILE, np.float32)  # and the new squares
    bits = sums[:TILE].view(np.uint32)
    other = np.zeros(TILE, np.float32)  # the old carry, where it is not float32; later what is kept of the sums
    other_bits = other.view(np.uint32)
    rounded = np.zeros(TILE, np.uint16)
    lanes = np.zeros(3 * LANES, np.uint32)  # masks, signs, counts of votes
    old_wide, new_wide = wide[live], wide[1 - live].view(np.uint32)
    old_narrow, new_narrow = narrow[live], narrow[1 - live]
    old_square, new_square = square[live], square[1 - live]
    overflow = _ZERO
    for k in range(start.size):
        if not active[row[k]]:
            overflow |= _overflow(x[start[k] : start[k] + length[k]])
            _copy_piece(wide[live].view(np.uint32), new_wide, home[k], length[k])
            _copy_piece(old_narrow, new_narrow, home[k], length[k])
            _copy_piece(old_square, new_square, home[k], length[k])
            for i in range((length[k] + 7) // 8):
                out[mask_at[k] + i] = 0
                out[sign_at[k] + i] = 0
            continue
        limit, correction = limits[row[k]], corrections[row[k]]
        for j in range(LANES):
            lanes[2 * LANES + j] = 0
        for done in range(0, length[k], TILE):
            n = min(TILE, length[k] - done)
            base, at = start[k] + done, home[k] + done
            m_at, s_at = mask_at[k] + done // 8, sign_at[k] + done // 8
            v = old_square[at : at + n]  # empty where there is none
            if new_wide.size:
                _add_tile(numbers[base : base + n], old_wide[at : at + n], v, unscale, correction, decay, rest, sums)
            else:
                _widen(old_narrow[at : at + n], other)
                _add_tile(numbers[base : base + n], other, v, unscale, correction, decay, rest, sums)
            # Only now, when the gradient is near: a loop that waits for memory should wait for all that it can.
            overflow |= _overflow(x[base : base + n])
            if v.size:
                _keep(new_square, at, sums, TILE, n)
            counts[row[k]] += _pack_planes(bits[:n], limit, lanes, out, m_at, s_at)
            if clear:
                _clear(bits[:n], limit, other_bits)
                _keep_sums(new_wide, new_narrow, at, other_bits, rounded, n)
            else:
                _keep_sums(new_wide, new_narrow, at, bits, rounded, n)
        for j in range(LANES):
            counts[row[k]] += lanes[2 * LANES + j]
    _fence()
    return (overflow & _TOP) == 0
