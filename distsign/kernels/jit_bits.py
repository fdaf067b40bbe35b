"""Instructions on 64-bit words that Numba has no name for.

Numba's cache looks for changes only in the file of the function that it has compiled, not in those that it calls: only
what will never change may be shared between files, as these two.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

__all__ = ["count_ones", "trailing_zeros"]


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
