"""Pieces of a flat tensor, and where their planes lie in a payload buffer."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

__all__ = ["BLOCK", "LANES", "Spans", "plane_bytes"]

LANES = 16
"""Neighbouring elements that go to neighbouring words: 16 floats fill one cache line."""

BLOCK = 32 * LANES
"""Elements in a full block of vertical planes."""


def plane_bytes(num_elements: int) -> int:
    """Return the bytes of one plane of `num_elements` bits, without padding beyond the last byte."""
    return (num_elements + 7) // 8


def _no_places() -> npt.NDArray[np.int64]:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Spans:
    """Pieces of a flat tensor, one array entry each.

    Attributes:
        start: first element of the piece in the flat tensor.
        length: elements in the piece.
        row: row of the per-parameter tables (thresholds, counts, moments) that the piece belongs to.
        mask_at: byte in the payload buffer where its confidence mask begins; empty where nothing is packed.
        sign_at: byte in the payload buffer where its sign plane begins.
        home: first element of the piece in what is kept per component; empty where nothing is kept.
    """

    start: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]
    mask_at: npt.NDArray[np.int64] = field(default_factory=_no_places)
    sign_at: npt.NDArray[np.int64] = field(default_factory=_no_places)
    home: npt.NDArray[np.int64] = field(default_factory=_no_places)

    def chosen(self, which: npt.NDArray[np.bool_]) -> Spans:
        """Return some of the pieces, bool `[num_pieces]`."""
        return Spans(*(values[which] if values.size else values for values in vars(self).values()))

    @property
    def num_rows(self) -> int:
        """Rows of the per-parameter tables."""
        return int(self.row.max()) + 1 if self.row.size else 0

    @classmethod
    def whole(cls, lengths: list[int]) -> Spans:
        """Return one span a parameter, for parameters of these lengths that follow each other in the flat tensor."""
        length = np.asarray(lengths, dtype=np.int64)
        return cls(np.cumsum(length) - length, length, np.arange(length.size, dtype=np.int64))
