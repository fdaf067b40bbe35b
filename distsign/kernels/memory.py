"""What a worker keeps per component between steps, and by which rule it votes with it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["CarryRule", "Memory", "dither_at"]


@dataclass(frozen=True)
class Memory:
    """A worker's memory of all parameters, flat, in two halves: a step reads one and writes the other.

    Only when the step is known to be clean on all ranks do the halves change their roles. So a poisoned step, or one
    that broke off, leaves no trace, and on CUDA nobody has to wait for the news.

    Attributes:
        carry: float32 or bfloat16 `[2, num_elements]`, what was not sent: in gradient units, or, with `square`, in
            units of each component's root mean square.
        square: like `carry`, the running mean of the squared gradient; None where it is not kept.
        live: int64 scalar tensor on the same device: the half that the last clean step left.
    """

    carry: Tensor
    square: Tensor | None
    live: Tensor


@dataclass(frozen=True)
class CarryRule:
    """How the gradient of a step and the carry become ballots. Tables have one entry a row (parameter).

    Attributes:
        thresholds: float32 `[num_rows]`, at least 0, in the carry's units.
        active: bool `[num_rows]`; where False the row casts no ballot and its memory stays as it is.
        unscale: float32 scalar tensor, `1 / loss_scale`: what the gradient is multiplied with first.
        corrections: float32 `[num_rows]`, `sqrt(1 - decay**t)` with t the row's steps so far, this one included: the
            bias correction of the running mean; None without one.
        decay: of the running mean of squares, a number that float32 rounds; 0 without one.
        dither: in [0, 2**16), see `dither_at`; of use where squares are kept in bfloat16.
    """

    thresholds: Tensor
    active: Tensor
    unscale: Tensor
    corrections: Tensor | None = None
    decay: float = 0.0
    dither: int = 0


def dither_at(step: int) -> int:
    """Return what is added in a step below the last bit of a bfloat16, before what lies below is cut off.

    A running mean of decay 0.99 moves by less than that bit in most steps: rounded to the nearest it would stand still.
    With the multiples of the golden ratio, which lie evenly in any number of steps, it is right on average, and needs
    no random numbers. (`rotating_starts` goes round by the same; what a cap leaves out has no part in the squares.)

    Example:
        >>> [dither_at(step) for step in (0, 1, 2)]
        [0, 40503, 15470]
    """
    return step * 40503 % 2**16
