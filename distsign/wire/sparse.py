"""Sparse ballots: the positions of the votes as an Elias-Fano index set, with one sign bit a vote.

A payload has a fixed number of slots, agreed beforehand, so that its size is known to both ends and depends on nothing
that was voted. Slots that are not used hold the position after the last one.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SparseCode"]


@dataclass(frozen=True)
class SparseCode:
    """The sizes of one sparse body.

    Args:
        num_bits: positions that a vote can have: bits of a plane, padding of its last bytes included.
        num_slots: most votes that fit.
    """

    num_bits: int
    num_slots: int
