"""Sparse ballots: the positions of the votes as an Elias-Fano index set, with one sign bit a vote.

A body has a fixed number of slots `M`, agreed beforehand, so that its size follows from `M` and the number of positions
`N` and not from what was voted. The votes lie at positions `p_0 < p_1 < ...` of a plane (position = 8 * byte + bit).

**Format.** One stream of bits; the lowest bit of a byte comes first. With `y_i = p_i - i`:

1. `M + ((N - M) >> low_bits)` bits: the bit `(y_i >> low_bits) + i` is 1 for each vote, all others are 0;
2. `M` fields of `low_bits + 1` bits, vote after vote: the lowest bits of `y_i`, lowest first, then 1 if it is negative.

With fewer votes than slots, the fields left are 0, and so is what fills up the last byte. `low_bits` is the smallest
number that makes the body smallest; the body grows with `M` and is empty where `M` is 0.

**Why so.** Elias-Fano stores any sequence that does not decrease. Positions differ, so `y_i`, the positions before vote
`i` without a vote, is one, and its range is shorter by the votes: at a density of 10 % the body takes 7.7 % more than
the entropy instead of 9.9 %, and at 50 % nothing. An unused slot cannot then hold a position after the last one, for
there `y_i` would leave the range; so it holds nothing. The number of votes is that of the ones in section 1, which has
room for any smaller number too. Without padding between the sections a small body is shorter by up to 1 %. A set of
votes has one body, and a reader can refuse every other.

Elias-Fano codes: P. Elias, J. ACM 21 (1974); R. M. Fano, MIT Project MAC Memo 61 (1971).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

__all__ = ["SparseCode"]


@dataclass(frozen=True)
class SparseCode:
    """The sizes of one sparse body.

    Args:
        num_bits: positions that a vote can have: bits of a plane, padding of its last bytes included.
        num_slots: most votes that fit.

    Raises:
        ValueError: if a number is negative, or if there are more slots than positions.

    Example:
        >>> code = SparseCode(num_bits=100_000, num_slots=1000)
        >>> code.num_high_bits, code.low_bits, code.num_bytes
        (2546, 6, 1194)
    """

    num_bits: int
    num_slots: int

    def __post_init__(self) -> None:
        if not 0 <= self.num_slots <= self.num_bits:
            raise ValueError(
                f"a sparse body needs 0 <= num_slots <= num_bits, got num_slots={self.num_slots} and "
                f"num_bits={self.num_bits}: there cannot be more votes than positions"
            )

    def _high_bits(self, low_bits: int) -> int:
        return self.num_slots + ((self.num_bits - self.num_slots) >> low_bits)

    def _bytes(self, low_bits: int) -> int:
        return (self._high_bits(low_bits) + self.num_slots * (low_bits + 1) + 7) // 8

    @cached_property
    def low_bits(self) -> int:
        """Bits of a field in front of the sign."""
        # The best number lies near log2(num_bits / num_slots), and four below where rounding to bytes makes it a tie.
        near = (((self.num_bits - self.num_slots) // self.num_slots) if self.num_slots else self.num_bits).bit_length()
        return min(range(max(0, near - 4), near + 1), key=self._bytes)

    @cached_property
    def num_high_bits(self) -> int:
        """Bits of the first section: where in the body the fields begin."""
        return self._high_bits(self.low_bits)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of the body."""
        return self._bytes(self.low_bits)

    @classmethod
    def slots_for(cls, num_bits: int, num_bytes: int) -> int:
        """Return the largest number of slots whose body fits.

        Args:
            num_bits: positions that a vote can have.
            num_bytes: bytes that there are for the body.

        Raises:
            ValueError: if a number is negative.

        Example:
            >>> SparseCode.slots_for(100_000, 1194)
            1000
        """
        if num_bits < 0 or num_bytes < 0:
            raise ValueError(
                f"num_bits and num_bytes must not be negative, got {num_bits} and {num_bytes}: even a body without "
                "slots needs room for 0 bytes"
            )
        fits, too_many = 0, num_bits + 1
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if cls(num_bits, middle).num_bytes <= num_bytes:
                fits = middle
            else:
                too_many = middle
        return fits
