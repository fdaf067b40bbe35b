"""What the Triton kernels share: the fields of a chunk, words of planes at odd places, and counting bits.

Places of planes are byte addresses that need not be multiples of 4. Words are read byte by byte (four reads of the same
sector, of which the cache serves three), and written whole where the place allows.

Names of arguments: `table` see `chunks.Chunks`; `*_at` bytes; pointers by what they point to.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from distsign.kernels.chunks import CHUNK, FIELDS
from distsign.kernels.spans import BLOCK, LANES

__all__ = [
    "OPTIONS",
    "chunk_field",
    "divide",
    "element_of_word",
    "load_word",
    "places_of_bits",
    "popcount",
    "store_word",
]

NUM_FIELDS = tl.constexpr(FIELDS)
BLOCK_ELEMENTS = tl.constexpr(BLOCK)
WORDS_PER_BLOCK = tl.constexpr(LANES)

START = tl.constexpr(0)
LENGTH = tl.constexpr(1)
ROW = tl.constexpr(2)
MASK_AT = tl.constexpr(3)
SIGN_AT = tl.constexpr(4)
HOME = tl.constexpr(5)
PIECE = tl.constexpr(6)
NUMBER = tl.constexpr(7)

WORDS = tl.constexpr(CHUNK // 32)
"""Words of a plane in a chunk."""

TAIL_BYTES = tl.constexpr(BLOCK // 8)
"""Room for the bytes of a tail, of which there is one fewer than of a block at most."""


@triton.jit
def _probe():
    """Tell `OPTIONS` whether this is Triton's interpreter."""


# Each operation is rounded by itself, as the oracle does it. The interpreter never fuses, and knows no such option.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False} if isinstance(_probe, triton.JITFunction) else {}


if OPTIONS:

    @triton.jit
    def divide(x, y):
        """Divide float32 as IEEE 754 has it; by way of libdevice `tl.div_rn` may flush denormals to 0."""
        return tl.inline_asm_elementwise(
            "div.rn.f32 $0, $1, $2;", "=f,f,f", args=[x, y], dtype=tl.float32, is_pure=True, pack=1
        )

else:

    @triton.jit
    def divide(x, y):
        """Do the same in the interpreter, which knows no PTX."""
        return tl.div_rn(x, y)


@triton.jit
def chunk_field(table, field):
    """Return one field of the chunk that this program works on."""
    return tl.load(table + tl.program_id(0).to(tl.int64) * NUM_FIELDS + field)


@triton.jit
def element_of_word(word, bit):
    """Return the element, from the chunk's first, that a bit of a vertical plane's word stands for."""
    return word // WORDS_PER_BLOCK * BLOCK_ELEMENTS + bit * WORDS_PER_BLOCK + word % WORDS_PER_BLOCK


@triton.jit
def load_word(plane, word, there):
    """Read little-endian 32-bit words of a plane that begins at any byte."""
    byte = plane + 4 * word
    found = tl.load(byte, mask=there, other=0).to(tl.uint32)
    found |= tl.load(byte + 1, mask=there, other=0).to(tl.uint32) << 8
    found |= tl.load(byte + 2, mask=there, other=0).to(tl.uint32) << 16
    found |= tl.load(byte + 3, mask=there, other=0).to(tl.uint32) << 24
    return found


@triton.jit
def store_word(plane, word, value, there):
    """Write little-endian 32-bit words of a plane that begins at any byte."""
    if plane.to(tl.int64) % 4 == 0:
        tl.store(plane.to(tl.pointer_type(tl.uint32)) + word, value, mask=there)
    else:
        byte = plane + 4 * word
        tl.store(byte, value.to(tl.uint8), mask=there)
        tl.store(byte + 1, (value >> 8).to(tl.uint8), mask=there)
        tl.store(byte + 2, (value >> 16).to(tl.uint8), mask=there)
        tl.store(byte + 3, (value >> 24).to(tl.uint8), mask=there)


@triton.jit
def popcount(word):
    """Count the ones of each uint32."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    return ((word + (word >> 16)) & 63).to(tl.int32)


@triton.jit
def places_of_bits(byte, bit, num_full_bytes):
    """Return the element, from the chunk's first, that a bit of a byte stands for; full blocks' bytes come first."""
    block = byte // TAIL_BYTES
    in_block = byte % TAIL_BYTES
    vertical = block * BLOCK_ELEMENTS + (8 * (in_block % 4) + bit) * WORDS_PER_BLOCK + in_block // 4
    return tl.where(byte < num_full_bytes, vertical, 8 * byte + bit)
