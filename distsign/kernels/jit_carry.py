"""The compiled body of packing with a carry, on the CPU; `jit` says how such code has to be written.

A full block goes from the gradient to ballots and to what is kept in one pass through the registers, in LLVM's own
vectors of the 16 lanes. What is kept is written past the caches: an ordinary store reads a cache line from memory
before it overwrites it, and would read as much again as the whole carry. The elements behind the last block, and pieces
whose home does not begin with a cache line, go the ordinary way.

Numba's cache looks for changes only in the file of the function that it has compiled, so copies of helpers are here.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, no-check-untyped-defs, no-warn-unreachable

from __future__ import annotations

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic

from distsign.kernels.jit import _compiled, _jit
from distsign.kernels.spans import BLOCK, LANES

__all__ = ["pack_carried"]

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_EXPONENT_ONE = np.uint32(0x00800000)
_TOP = np.uint32(0x80000000)
_ONE = np.uint32(1)
_ZERO = np.uint32(0)
_LARGEST, _LARGEST_NARROW = np.float32(3.4028235e38), np.float32(3.3895314e38)
_DEAD = np.float32(1e-30)
_LINE = 64
_ROWS = BLOCK // LANES
_AHEAD = 2 * _ROWS  # rows between what is packed and what is fetched into the nearest cache meanwhile

# Places of the numbers in `rule`, as bits, and of the indices in `places`
_LIMIT, _UNSCALE, _CORRECTION, _DECAY, _REST, _KEEP, _DITHER = range(7)
_AT, _HOME, _MASK, _SIGN = range(4)


# ---------------------------------------------------------------------------------------------------------- full blocks

_I64, _WORD, _HALF, _FLOAT, _BYTE = ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.FloatType(), ir.IntType(8)
_PAIRS = ir.VectorType(_WORD, 2 * LANES)
_WORDS, _HALVES, _FLOATS = (ir.VectorType(kind, LANES) for kind in (_WORD, _HALF, _FLOAT))


def _splat(number, vector=_WORDS):
    return ir.Constant(vector, [number] * LANES)


class _Builder:
    """What the block needs of llvmlite, for one call of the intrinsic."""

    streamed = False

    def __init__(self, context, builder, signature, args):
        self.context, self.b, self.signature, self.args = context, builder, signature, args

    def data(self, number):
        """Return the pointer to the data of an array argument."""
        return self.context.make_array(self.signature.args[number])(self.context, self.b, self.args[number]).data

    def number(self, array, place):
        """Return an element of an array argument."""
        return self.b.load(self.b.gep(self.data(array), [ir.Constant(_I64, place)]))

    def vectors(self, array, at, vector):
        """Return a pointer to the vectors that begin at an element of an array argument."""
        return self.b.bitcast(self.b.gep(self.data(array), [at]), vector.as_pointer())

    def all_lanes(self, word, vector):
        """Return a vector with the bits of one word in all lanes."""
        nothing = ir.Constant(_WORDS, ir.Undefined)
        filled = self.b.insert_element(nothing, word, ir.Constant(_WORD, 0))
        return self.b.bitcast(self.b.shuffle_vector(filled, nothing, _splat(0)), vector)

    def row(self, pointer, i):
        return self.b.gep(pointer, [ir.Constant(_I64, i)])

    def prefetch(self, pointer, i):
        byte = _BYTE.as_pointer()
        call = ir.FunctionType(ir.VoidType(), [byte, _WORD, _WORD, _WORD])
        prefetch = self.b.module.declare_intrinsic("llvm.prefetch", [byte], call)
        read, nearest, data = (ir.Constant(_WORD, number) for number in (0, 3, 1))
        self.b.call(prefetch, [self.b.bitcast(self.row(pointer, i), byte), read, nearest, data])

    def call(self, name, vector, value):
        function = cgutils.get_or_insert_function(self.b.module, ir.FunctionType(vector, [vector]), name)
        return self.b.call(function, [value])

    def store(self, value, pointer, align):
        """Store a vector, past the caches where the block is `streamed` and so begins with a cache line."""
        stored = self.b.store(value, pointer, align=_LINE if self.streamed else align)
        if self.streamed:
            stored.set_metadata("nontemporal", self.b.module.add_metadata([ir.Constant(_WORD, 1)]))


class _Block(_Builder):
    """A full block, a row of 16 lanes at a time."""

    def __init__(self, *call, narrow, squares, streamed):
        super().__init__(*call)
        self.narrow, self.squares, self.streamed = narrow, squares, streamed
        self.limit, self.keep, self.dither = (
            self.all_lanes(self.number(7, k), _WORDS) for k in (_LIMIT, _KEEP, _DITHER)
        )
        self.unscale, self.correction, self.decay, self.rest = (
            self.all_lanes(self.number(7, k), _FLOATS) for k in (_UNSCALE, _CORRECTION, _DECAY, _REST)
        )
        home, kept = self.number(6, _HOME), _HALVES if narrow else _FLOATS
        self.grad = self.vectors(0, self.number(6, _AT), _FLOATS)
        self.old, self.new = (self.vectors(array, home, kept) for array in (1, 2))
        self.old_square, self.new_square = (self.vectors(array, home, kept) for array in (3, 4))
        self.last = {}

    def kept(self, old, i):
        """Load a row of what is kept."""
        if not self.narrow:
            self.prefetch(old, _AHEAD + i)
            return self.b.load(self.row(old, i), align=4)
        if i % 2 == 0:
            self.prefetch(old, _AHEAD + i)
        halves = self.b.zext(self.b.load(self.row(old, i), align=2), _WORDS)
        return self.b.bitcast(self.b.shl(halves, _splat(16)), _FLOATS)

    def keep_upper(self, bits, new, i):
        """Write the upper halves of a row, two rows at a time, which fill a cache line."""
        upper = self.b.trunc(self.b.lshr(bits, _splat(16)), _HALVES)
        if i % 2:
            pair = self.b.shuffle_vector(self.last[new], upper, ir.Constant(_PAIRS, list(range(2 * LANES))))
            self.store(pair, self.b.bitcast(self.row(new, i - 1), pair.type.as_pointer()), 2)
        self.last[new] = upper

    def added(self, i, raw):
        """Return what is added to the carry, and keep a row of the squares where there are any."""
        b, g = self.b, self.b.fmul(raw, self.unscale)
        if not self.squares:
            return g
        v = b.fmul(self.decay, self.kept(self.old_square, i))
        v = b.fadd(v, b.fmul(self.rest, b.fmul(g, g)))
        most = _splat(float(_LARGEST_NARROW if self.narrow else _LARGEST), _FLOATS)
        v = b.select(b.fcmp_ordered("<", v, most), v, most)
        if self.narrow:
            self.keep_upper(b.add(b.bitcast(v, _WORDS), self.dither), self.new_square, i)
        else:
            self.store(v, self.row(self.new_square, i), 4)
        alive = b.fcmp_ordered(">", v, _splat(float(_DEAD), _FLOATS))
        quotient = b.fdiv(b.fmul(g, self.correction), self.call(f"llvm.sqrt.v{LANES}f32", _FLOATS, v))
        # -0.0 changes no number that it is added to, not even -0.0.
        return b.select(alive, quotient, _splat(-0.0, _FLOATS))

    def keep_row(self, i, bits, vote):
        """Write a row of the new carry."""
        b = self.b
        left = b.and_(bits, b.or_(b.xor(vote, _splat(0xFFFFFFFF)), self.keep))
        if not self.narrow:
            self.store(b.bitcast(left, _FLOATS), self.row(self.new, i), 4)
            return
        # Rounded to the nearest, and from the middle to the even one.
        even = b.and_(b.lshr(left, _splat(16)), _splat(1))
        self.keep_upper(b.add(b.add(left, _splat(0x7FFF)), even), self.new, i)

    def pack(self):
        """Pack the block."""
        b = self.b
        totals = self.vectors(8, ir.Constant(_I64, 0), _WORDS)
        largest, mask, sign = b.load(totals, align=4), _splat(0), _splat(0)
        for i in range(_ROWS):
            self.prefetch(self.grad, _AHEAD + i)
            raw = b.load(self.row(self.grad, i), align=4)
            magnitude = b.and_(b.bitcast(raw, _WORDS), _splat(0x7FFFFFFF))
            largest = b.select(b.icmp_signed(">", magnitude, largest), magnitude, largest)
            bits = b.bitcast(b.fadd(self.kept(self.old, i), self.added(i, raw)), _WORDS)
            # Magnitudes of IEEE floats compare as integers, and as signed ones, because their top bit is 0.
            vote = b.sext(b.icmp_signed(">", b.and_(bits, _splat(0x7FFFFFFF)), self.limit), _WORDS)
            mask = b.or_(mask, b.and_(vote, _splat(1 << i)))
            sign = b.or_(b.lshr(sign, _splat(1)), b.and_(bits, _splat(0x80000000)))
            self.keep_row(i, bits, vote)
        b.store(mask, self.vectors(5, self.number(6, _MASK), _WORDS), align=1)
        b.store(b.and_(sign, mask), self.vectors(5, self.number(6, _SIGN), _WORDS), align=1)
        b.store(largest, totals, align=4)
        votes = self.row(totals, 1)
        ones = self.call(f"llvm.ctpop.v{LANES}i32", _WORDS, mask)
        b.store(b.add(b.load(votes, align=4), ones), votes, align=4)


def _block_packer(name, **kind):
    """Make a function that does what `Kernels.pack_carry` says with a full block.

    It collects in `totals`, for each lane, the largest magnitude of the gradient and then the votes.
    """

    def pack_block(typing_context, x, old, new, old_square, new_square, out, places, rule, totals):
        def generate(context, builder, signature, args):
            _Block(context, builder, signature, args, narrow=old.dtype == types.uint16, **kind).pack()
            return context.get_dummy_value()

        return types.void(x, old, new, old_square, new_square, out, places, rule, totals), generate

    pack_block.__name__ = name
    return intrinsic(pack_block)


_pack = _block_packer("_pack", squares=False, streamed=False)
_pack_past = _block_packer("_pack_past", squares=False, streamed=True)
_pack_squares = _block_packer("_pack_squares", squares=True, streamed=False)
_pack_squares_past = _block_packer("_pack_squares_past", squares=True, streamed=True)


@intrinsic
def _fence(typing_context):
    """Make all that was streamed visible before anything that is written later."""

    def generate(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@_jit
def _starts_line(array, at):
    return (array.ctypes.data + array.itemsize * at) % _LINE == 0


@_jit
def _pack_blocks(x, carry, square, live, out, places, rule, num_blocks, totals):
    """Pack full blocks, and leave `places` behind them."""
    old, new, old_square, new_square = carry[live], carry[1 - live], square[live], square[1 - live]
    squares, past = square.shape[1] != 0, _starts_line(new, places[_HOME])
    past = past and (not squares or _starts_line(new_square, places[_HOME]))
    for _ in range(num_blocks):
        if squares:
            if past:
                _pack_squares_past(x, old, new, old_square, new_square, out, places, rule, totals)
            else:
                _pack_squares(x, old, new, old_square, new_square, out, places, rule, totals)
        elif past:
            _pack_past(x, old, new, old_square, new_square, out, places, rule, totals)
        else:
            _pack(x, old, new, old_square, new_square, out, places, rule, totals)
        places[_AT] += BLOCK
        places[_HOME] += BLOCK
        places[_MASK] += _LINE
        places[_SIGN] += _LINE


# ----------------------------------------------------------------------------------- the elements behind the last block


@_jit
def _overflow(x):
    """Return in the top bit whether any is NaN or infinite: its exponent overflows by one."""
    w = _ZERO
    for i in range(x.size):
        w = np.uint32(w | ((x[i] & _MAGNITUDE) + _EXPONENT_ONE))
    return w


@intrinsic
def _widened(typing_context, kept):
    """Return a number of the memory, float32 or the bits of a bfloat16, as a float32."""

    def generate(context, builder, signature, args):
        if kept == types.float32:
            return args[0]
        return builder.bitcast(builder.shl(builder.zext(args[0], _WORD), ir.Constant(_WORD, 16)), _FLOAT)

    return types.float32(kept), generate


@intrinsic
def _narrowed(typing_context, bits, add, like):
    """Return a float32, by its bits, as the memory keeps it: in bfloat16 the upper half of `bits + add`."""

    def generate(context, builder, signature, args):
        if like == types.float32:
            return builder.bitcast(args[0], _FLOAT)
        return builder.trunc(builder.lshr(builder.add(args[0], args[1]), ir.Constant(_WORD, 16)), _HALF)

    return like(bits, add, like), generate


@_jit
def _pack_tail(x, carry, square, live, out, places, rule, n):
    """Pack the last elements of a piece; return their votes."""
    numbers, sums = rule.view(np.float32), np.empty(2, np.float32)
    bits = sums.view(np.uint32)
    largest = _LARGEST if square.itemsize == 4 else _LARGEST_NARROW
    count = 0
    for i in range(n):
        home, place = places[_HOME] + i, i // 8
        if i % 8 == 0:
            out[places[_MASK] + place] = 0
            out[places[_SIGN] + place] = 0
        g = x[places[_AT] + i] * numbers[_UNSCALE]
        if square.shape[1]:
            s = numbers[_DECAY] * _widened(square[live, home]) + numbers[_REST] * (g * g)
            sums[1] = s = min(s, largest)
            square[1 - live, home] = _narrowed(bits[1], rule[_DITHER], square[live, home])
            g = (g * numbers[_CORRECTION]) / np.sqrt(s) if s > _DEAD else np.float32(-0.0)
        sums[0] = _widened(carry[live, home]) + g
        b = bits[0]
        if (b & _MAGNITUDE) > rule[_LIMIT]:
            out[places[_MASK] + place] |= np.uint8(1 << i % 8)
            out[places[_SIGN] + place] |= np.uint8((b >> np.uint32(31)) << np.uint32(i % 8))
            count += 1
            b &= rule[_KEEP]
        nearest = np.uint32(np.uint32(0x7FFF) + ((b >> np.uint32(16)) & _ONE))  # from the middle to the even one
        carry[1 - live, home] = _narrowed(np.uint32(b), nearest, carry[live, home])
    return count


def _signature(kept):
    return (
        "(uint32[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], uint32[::1], "
        f"boolean[::1], float32[::1], float32, float32, float32, uint32, {kept}[:, ::1], {kept}[:, ::1], int64, "
        "boolean, uint8[::1], int64[::1])"
    )


@_compiled(_signature("float32"), _signature("uint16"))
def pack_carried(
    x, start, length, row, mask_at, sign_at, home, limits, active, corrections, unscale, decay, rest, dither, carry,
    square, live, clear, out, counts,
):  # fmt: skip
    """Pack with a memory in float32, or in bfloat16, of which the bits are given; `square` may be empty."""
    numbers = x.view(np.float32)
    rule, places = np.zeros(7, np.uint32), np.zeros(4, np.int64)
    of_rule = rule.view(np.float32)
    of_rule[_UNSCALE], of_rule[_DECAY], of_rule[_REST] = unscale, decay, rest
    rule[_KEEP], rule[_DITHER] = _ZERO if clear else np.uint32(0xFFFFFFFF), dither
    totals = np.zeros(2 * LANES, np.uint32)
    overflow = _ZERO
    for k in range(start.size):
        n = length[k]
        if not active[row[k]]:
            overflow |= _overflow(x[start[k] : start[k] + n])
            for memory in (carry, square):
                if memory.shape[1]:
                    memory[1 - live, home[k] : home[k] + n] = memory[live, home[k] : home[k] + n]
            for i in range((n + 7) // 8):
                out[mask_at[k] + i] = 0
                out[sign_at[k] + i] = 0
            continue
        rule[_LIMIT], of_rule[_CORRECTION] = limits[row[k]], corrections[row[k]]
        places[_AT], places[_HOME], places[_MASK], places[_SIGN] = start[k], home[k], mask_at[k], sign_at[k]
        totals[LANES:] = 0
        _pack_blocks(numbers, carry, square, live, out, places, rule, n // BLOCK, totals)
        overflow |= _overflow(x[places[_AT] : start[k] + n])
        counts[k] = _pack_tail(numbers, carry, square, live, out, places, rule, n % BLOCK)
        for j in range(LANES):
            counts[k] += totals[LANES + j]
    for j in range(LANES):
        overflow |= totals[j] + _EXPONENT_ONE
    _fence()
    return (overflow & _TOP) == 0
