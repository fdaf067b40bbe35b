"""How many bytes payloads take, from shapes alone: caps, sizes, and the density whose payloads fill a budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from distsign.layout import IntArray, Shape, caps_at, shard_table
from distsign.wire.header import CHECKSUM_BYTES, HEADER_BYTES
from distsign.wire.sparse import SparseCode

__all__ = ["Density", "density_for", "payload_sizes"]

Density = float | npt.NDArray[np.float64] | None
"""Share of the components that payloads have slots for: of all pieces alike, or of each; None without a cap."""


def payload_sizes(
    shapes: Sequence[Shape],
    world_size: int,
    density: float | None,
    wire: str = "auto",
    *,
    voters: int = 1,
    num_raw: int = 0,
    checksum: bool = False,
) -> IntArray:
    """Return the bytes of each owner's payload, int64 `[world_size]`: what `Form.sizes` says, without the layout.

    Args:
        shapes: the parameters of one exchange group.
        world_size: number of owners.
        density: share of the components that payloads have slots for; None without a cap, planes.
        wire: `"planes"`, `"sparse"` or `"auto"`, with a density.
        voters: for how many voters' ballots there are slots, see `caps_at`.
        num_raw: components that are averaged.
        checksum: whether a checksum ends each payload.

    Example:
        >>> payload_sizes([Shape(0, 4096), Shape(1, 10)], world_size=4, density=None).tolist()
        [264, 268, 264, 264]
    """
    sizes = _sizes(*shard_table(shapes, world_size), world_size, density, wire, voters, num_raw)
    return sizes + CHECKSUM_BYTES * checksum


def _sizes(
    owners: IntArray, lengths: IntArray, world_size: int, density: float | None, wire: str, voters: int, num_raw: int
) -> IntArray:
    def per_owner(values: IntArray) -> IntArray:
        return np.bincount(owners, weights=values, minlength=world_size).astype(np.int64)

    planes = per_owner((lengths + 7) // 8)
    raw = 4 * np.diff(np.arange(world_size + 1, dtype=np.int64) * num_raw // world_size)
    body, census = 2 * planes, np.zeros_like(planes)
    if density is not None:
        census = (per_owner(np.ones_like(lengths)) + 7) // 8
        slots = per_owner(caps_at(density, lengths, voters))
        # Thousands of owners have few different shares.
        pairs = list(zip(planes.tolist(), slots.tolist(), strict=True))
        codes = {pair: SparseCode(8 * pair[0], pair[1]).num_bytes for pair in set(pairs)}
        coded = np.asarray([codes[pair] for pair in pairs], dtype=np.int64)
        body = {"planes": body, "sparse": coded, "auto": np.minimum(body, coded)}[wire]
    sizes: IntArray = HEADER_BYTES + census + body + raw
    return sizes


def density_for(
    bits_per_param: float, shapes: Sequence[Shape], world_size: int, coalesce_bytes: int, *, checksum: bool = False
) -> float:
    """Return the density at which the payloads of a whole model fill a budget.

    Args:
        bits_per_param: per direction, headers, census and checksums included.
        shapes: all parameters of the model.
        world_size: number of owners.
        coalesce_bytes: payloads of this size travel apart; each such group has headers of its own.
        checksum: whether a checksum ends each payload.

    Raises:
        ValueError: if even one vote a piece costs more, or if planes would cost less than the budget.
    """
    owners, lengths = shard_table(shapes, world_size)
    total = int(lengths.sum())
    num_elements = max(1, total)
    budget_bytes = int(bits_per_param * total / 8)
    num_groups = max(1, budget_bytes // coalesce_bytes)
    ending = CHECKSUM_BYTES * checksum
    budget_bytes -= (num_groups - 1) * world_size * (HEADER_BYTES + 4 + ending)

    def size(density: float) -> int:
        return int(_sizes(owners, lengths, world_size, density, "sparse", 1, 0).sum()) + world_size * ending

    planes = 8 * int(_sizes(owners, lengths, world_size, None, "planes", 1, 0).sum()) / num_elements
    if bits_per_param > planes:
        raise ValueError(
            f"bits_per_param={bits_per_param:g} is more than the {planes:.4g} bits of two whole planes: leave it out"
        )
    if size(0.0) > budget_bytes:
        raise ValueError(
            f"bits_per_param={bits_per_param:g} is {budget_bytes} bytes for the {num_elements:,} elements of this "
            f"model, but headers and one vote for each piece of a parameter take {size(0.0)}: the least is "
            f"{8 * size(0.0) / num_elements + 1e-4:.4f}, and several times that is where a vote begins to say something"
        )
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if size(middle) <= budget_bytes else (low, middle)
    return low
