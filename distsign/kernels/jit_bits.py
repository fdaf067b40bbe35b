"""Instructions that Numba has no name for, or is slow at.

Numba's cache looks for changes only in the file of the function that it has compiled, not in those that it calls: only
what will never change may be shared between files, as these few.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils, types
from numba.extending import intrinsic

__all__ = ["copy_bytes", "count_ones", "trailing_zeros"]


@intrinsic
def trailing_zeros(typing_context: Any, word: Any) -> Any:
    """Return the place of the lowest 1 of a uint64 that is not 0, as uint64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), generate


@intrinsic
def count_ones(typing_context: Any, word: Any) -> Any:
    """Return how many bits of a uint64 are 1, as uint64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), generate


@intrinsic
def copy_bytes(typing_context: Any, into: Any, at: Any, source: Any, source_at: Any, size: Any) -> Any:
    """Copy bytes from one uint8 array into another, as `memcpy` does; a slice is copied byte by byte, 10 times slower.

    Places and size are int64 and are not checked; the two pieces must not overlap.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointers = [
            builder.gep(
                context.make_array(signature.args[array])(context, builder, args[array]).data, [args[array + 1]]
            )
            for array in (0, 2)
        ]
        cgutils.raw_memcpy(builder, pointers[0], pointers[1], args[4], 1)
        return context.get_dummy_value()

    return types.void(into, types.int64, source, types.int64, types.int64), generate
