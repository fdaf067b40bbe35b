"""Who counts what and how much, and where it lies in a payload: from shapes, so that ranks and the simulator agree.

Each parameter is cut into `world_size` fixed shards, one an owner; a small parameter is owned whole. Owner and place in
the parameter do not depend on the bucket, because DDP rebuilds its buckets after the first step, and an owner's memory
of undecided votes must survive that (DESIGN.md, rules of the vote).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distsign.kernels.spans import Spans, plane_bytes
from distsign.wire.header import CHECKSUM_BYTES, HEADER_BYTES

__all__ = ["IntArray", "Layout", "Shape", "caps_at", "shard_table", "shards"]

IntArray = npt.NDArray[np.int64]

_SMALL_ELEMENTS = 1024
_SMALL_SHARD = 32
_ALIGN = 32
"""Shards begin at multiples of this, so that no plane but a parameter's last ends inside a word."""


@dataclass(frozen=True)
class Shape:
    """One parameter as the layout sees it.

    Args:
        index: place of the parameter in the model's order, the same on every rank; decides who owns a small one.
        num_elements: its size.
        home: its first element in what the worker keeps per component.
    """

    index: int
    num_elements: int
    home: int = 0


def shards(shape: Shape, world_size: int) -> list[tuple[int, int, int]]:
    """Return `(owner, start, stop)` for each piece of a parameter, in order, together covering it once.

    Parameters below 1024 elements, or below 32 elements a rank, belong whole to rank `index % world_size`; larger ones
    are cut into `world_size` pieces that differ by fewer than 64 elements.

    Example:
        >>> shards(Shape(index=5, num_elements=10), world_size=4)
        [(1, 0, 10)]
        >>> shards(Shape(index=0, num_elements=4000), world_size=4)
        [(0, 0, 992), (1, 992, 1984), (2, 1984, 2976), (3, 2976, 4000)]
    """
    n = shape.num_elements
    if world_size == 1 or n < max(_SMALL_ELEMENTS, _SMALL_SHARD * world_size):
        return [(shape.index % world_size, 0, n)]
    cuts = [k * n // world_size // _ALIGN * _ALIGN for k in range(world_size)] + [n]
    return [(k, cuts[k], cuts[k + 1]) for k in range(world_size)]


def shard_table(shapes: Sequence[Shape], world_size: int) -> tuple[IntArray, IntArray]:
    """Return owner and length of all pieces of these parameters: what `shards` says, fast for thousands of owners.

    Args:
        shapes: the parameters.
        world_size: number of owners.

    Returns:
        `(owners, lengths)`, int64 `[num_pieces]`; the pieces of small parameters come first.

    Example:
        >>> owners, lengths = shard_table([Shape(0, 4000), Shape(5, 10)], world_size=4)
        >>> owners.tolist(), lengths.tolist()
        ([1, 0, 1, 2, 3], [10, 992, 992, 992, 1024])
    """
    index = np.asarray([shape.index for shape in shapes], dtype=np.int64)
    length = np.asarray([shape.num_elements for shape in shapes], dtype=np.int64)
    small = (length < max(_SMALL_ELEMENTS, _SMALL_SHARD * world_size)) | (world_size == 1)
    whole = length[~small]
    cuts = np.arange(world_size + 1, dtype=np.int64) * whole[:, None] // world_size // _ALIGN * _ALIGN
    cuts[:, -1] = whole
    owners = np.concatenate([index[small] % world_size, np.tile(np.arange(world_size), whole.size)])
    return owners, np.concatenate([length[small], np.diff(cuts, axis=1).ravel()])


def caps_at(density: float | npt.NDArray[np.float64], length: IntArray, voters: int = 1) -> IntArray:
    """Return the most votes of pieces of these lengths: their share by density, at least one each, for all voters.

    `density` is that of all, or float64 `[num_pieces]`.

    Example:
        >>> caps_at(0.01, np.array([10, 1000, 0])).tolist()
        [1, 10, 0]
    """
    one = np.maximum(1, np.floor(density * length)).astype(np.int64)
    capped: IntArray = np.minimum(length, voters * one)
    return capped


@dataclass(frozen=True, eq=False)
class Layout:
    """The payloads of one exchange group: one or more buckets that travel together.

    A group's buffer holds one payload for each owner, one after the other: header, mask planes of all the owner's
    pieces, sign planes of the same, and room for a checksum where it is wanted. Ballots on their way to the owners and
    verdicts on their way back have the same layout.

    Attributes:
        params: per bucket, its parameters as spans of the bucket's flat gradient; rows count through the group.
        pieces: per bucket, its shards as spans with their places in the buffer and their homes.
        owners: per bucket, the owner of each piece.
        shapes: the parameter of each row.
        offsets: per owner, first byte of its payload in the buffer.
        sizes: per owner, bytes of its payload.
        owned_elements: per owner, elements it counts.
        checksum: whether a payload ends with one.
        num_elements: of the whole group.
    """

    params: tuple[Spans, ...]
    pieces: tuple[Spans, ...]
    owners: tuple[IntArray, ...]
    shapes: tuple[Shape, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    owned_elements: tuple[int, ...]
    checksum: bool = False

    @cached_property
    def num_elements(self) -> int:
        """Elements of the whole group."""
        return sum(shape.num_elements for shape in self.shapes)

    @cached_property
    def all_pieces(self) -> Spans:
        """The pieces of all buckets, in order; `start` is of no use in it."""
        return Spans(*(np.concatenate([getattr(p, field.name) for p in self.pieces]) for field in fields(Spans)))

    def most_votes(self, density: float) -> IntArray:
        """Return `caps_at` one density, int64 `[num_pieces]`: made at the first call, and not to be changed."""
        if density not in self._most_votes:
            self._most_votes[density] = caps_at(density, self.all_pieces.length)
        return self._most_votes[density]

    @cached_property
    def _most_votes(self) -> dict[float, IntArray]:
        return {}

    def most_votes_of(self, owner: int, density: float) -> int:
        """Return the sum of `most_votes` over one owner's pieces; kept like them."""
        if (owner, density) not in self._most_votes_of:
            self._most_votes_of[owner, density] = int(self.most_votes(density)[self.owned(owner)[1]].sum())
        return self._most_votes_of[owner, density]

    @cached_property
    def _most_votes_of(self) -> dict[tuple[int, float], int]:
        return {}

    @cached_property
    def _owned(self) -> dict[int, tuple[Spans, IntArray]]:
        return {}

    def owned(self, owner: int) -> tuple[Spans, IntArray]:
        """Return one owner's pieces and their numbers among all of them.

        The places of their planes count from the first byte of the owner's mask planes, and `home` from the first
        element of their parameter.
        """
        if owner in self._owned:
            return self._owned[owner]
        pieces = self.all_pieces
        chosen = np.flatnonzero(np.concatenate(self.owners) == owner)
        body = self.offsets[owner] + HEADER_BYTES
        first = np.asarray([shape.home for shape in self.shapes], dtype=np.int64)[pieces.row[chosen]]
        spans = Spans(
            pieces.start[chosen],
            pieces.length[chosen],
            pieces.row[chosen],
            pieces.mask_at[chosen] - body,
            pieces.sign_at[chosen] - body,
            pieces.home[chosen] - first,
        )
        self._owned[owner] = spans, chosen
        return spans, chosen

    @cached_property
    def tables(self) -> dict[tuple[object, ...], Tensor]:
        """Constants on devices, by names that their users choose: sizes change every step, and these must not."""
        return {}

    def table(
        self, name: tuple[object, ...], make: Callable[[], Sequence[int] | IntArray], device: torch.device
    ) -> Tensor:
        """Return a constant on a device, int64, made at the first call: afterwards nothing is uploaded or waited for.

        Args:
            name: under which it is kept.
            make: returns the numbers.
            device: where it is wanted.
        """
        key = (*name, device)
        if key not in self.tables:
            self.tables[key] = torch.as_tensor(np.asarray(make(), dtype=np.int64)).to(device)
        return self.tables[key]

    def header_places(self, device: torch.device) -> Tensor:
        """Return where in the buffer the bytes of all headers lie, int64 `[num_owners * HEADER_BYTES]`."""
        return self.table(("headers",), self._header_places, device)

    def _header_places(self) -> IntArray:
        return np.add.outer(np.asarray(self.offsets, dtype=np.int64), np.arange(HEADER_BYTES)).ravel()

    def census_places(self, device: torch.device) -> Tensor:
        """Return the bit of each piece in the census of all owners, each padded to bytes; int64 `[num_pieces]`."""
        return self.table(("census",), self._census_places, device)

    def _census_places(self) -> IntArray:
        owners = np.concatenate(self.owners)
        order = np.argsort(owners, kind="stable")
        counts, num_bytes = np.bincount(owners, minlength=len(self.sizes)), np.asarray(self.census_bytes)
        first_piece, first_bit = np.cumsum(counts) - counts, 8 * (np.cumsum(num_bytes) - num_bytes)
        found = np.empty_like(owners)
        found[order] = (first_bit - first_piece)[owners[order]] + np.arange(owners.size)
        return found

    @cached_property
    def census_bytes(self) -> tuple[int, ...]:
        """Per owner, bytes of one bit for each of its pieces."""
        num_pieces = np.bincount(np.concatenate(self.owners), minlength=len(self.sizes))
        return tuple(((num_pieces + 7) // 8).tolist())

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the payloads to all owners together."""
        return sum(self.sizes)

    def plane_bytes(self, owner: int) -> int:
        """Bytes of the mask planes in one owner's payload, which those of the sign planes equal."""
        return (self.sizes[owner] - HEADER_BYTES - CHECKSUM_BYTES * self.checksum) // 2

    @classmethod
    def build(
        cls,
        buckets: Sequence[Sequence[Shape]],
        world_size: int,
        starts: Sequence[Sequence[int]] | None = None,
        *,
        checksum: bool = False,
    ) -> Layout:
        """Lay out a group of buckets.

        Args:
            buckets: the parameters of each bucket in the order in which they lie in its flat gradient.
            world_size: number of owners.
            starts: where each parameter begins in its bucket; None where one follows the other.
            checksum: whether payloads end with one.
        """
        if starts is None:
            starts = [[sum(s.num_elements for s in bucket[:k]) for k in range(len(bucket))] for bucket in buckets]
        # per bucket: start in the bucket, length, row, owner, home
        rows: list[list[tuple[int, int, int, int, int]]] = []
        row = 0
        for bucket, begins in zip(buckets, starts, strict=True):
            rows.append([])
            for shape, start in zip(bucket, begins, strict=True):
                rows[-1] += [
                    (start + a, b - a, row, owner, shape.home + a) for owner, a, b in shards(shape, world_size)
                ]
                row += 1
        planes, elements = [0] * world_size, [0] * world_size
        places: list[list[int]] = []  # per bucket and piece: byte in its owner's mask planes
        for pieces in rows:
            places.append([])
            for _, length, _, owner, _ in pieces:
                places[-1].append(planes[owner])
                planes[owner] += plane_bytes(length)
                elements[owner] += length
        sizes = [HEADER_BYTES + 2 * num_bytes + CHECKSUM_BYTES * checksum for num_bytes in planes]
        offsets = [sum(sizes[:k]) for k in range(world_size)]
        return cls(
            params=tuple(_params(bucket, begins) for bucket, begins in zip(buckets, starts, strict=True)),
            pieces=tuple(_pieces(pieces, place, offsets, planes) for pieces, place in zip(rows, places, strict=True)),
            owners=tuple(np.asarray([piece[3] for piece in pieces], dtype=np.int64) for pieces in rows),
            shapes=tuple(shape for bucket in buckets for shape in bucket),
            offsets=tuple(offsets),
            sizes=tuple(sizes),
            owned_elements=tuple(elements),
            checksum=checksum,
        )


def _params(bucket: Sequence[Shape], starts: Sequence[int]) -> Spans:
    length = np.asarray([shape.num_elements for shape in bucket], dtype=np.int64)
    return Spans(np.asarray(starts, dtype=np.int64), length, np.arange(length.size, dtype=np.int64))


def _pieces(
    pieces: list[tuple[int, int, int, int, int]], places: list[int], offsets: list[int], planes: list[int]
) -> Spans:
    table = np.asarray(pieces, dtype=np.int64).reshape(-1, 5)
    start, length, row, owner, home = (np.ascontiguousarray(column) for column in table.T)
    mask_at = np.asarray(offsets, dtype=np.int64)[owner] + HEADER_BYTES + np.asarray(places, dtype=np.int64)
    sign_at = mask_at + np.asarray(planes, dtype=np.int64)[owner]
    return Spans(start, length, row, mask_at, sign_at, home)
