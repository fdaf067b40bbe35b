"""How an exchange group is dealt out: to columns of ranks, to owners, to payloads. From the shapes and options alone.

A *column* is the ranks of the same number in all nodes, which vote on one share of each parameter; without nodes there
is one column, and its share is everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from distsign.kernels import Spans
from distsign.kernels.chunks import upload
from distsign.layout import IntArray, Layout, Shape, shards
from distsign.payload import Form, forms
from distsign.sizes import Density

__all__ = ["COALESCE_BYTES", "Column", "Part", "Plan", "exchange_groups", "fills_group", "part_of"]

COALESCE_BYTES = 512 * 1024
"""Buckets with less to send travel together.

A group costs each rank some milliseconds of a processor, however small it is; 512 KiB take 4 ms each way at 1 Gbit/s.
Larger ones are quicker still on quick links, and overlap less on slow ones (measured: benchmarks/report-2026-11-30.md).
"""


def fills_group(num_elements: int, bits_per_param: float | None) -> bool:
    """Say whether buckets of so many elements have enough to send to travel now.

    Args:
        num_elements: of the buckets that wait.
        bits_per_param: the budget; None is two bits, planes.
    """
    return num_elements * (2.0 if bits_per_param is None else bits_per_param) / 8 >= COALESCE_BYTES


def exchange_groups(bucket_elements: Sequence[int], bits_per_param: float | None) -> list[list[int]]:
    """Return which of a step's buckets travel together, as their numbers.

    Example:
        >>> exchange_groups([800_000, 1_600_000, 2_400_000, 10], bits_per_param=None)
        [[0, 1], [2], [3]]
    """
    groups: list[list[int]] = [[]]
    for number in range(len(bucket_elements)):
        groups[-1].append(number)
        if fills_group(sum(bucket_elements[k] for k in groups[-1]), bits_per_param):
            groups.append([])
    return [group for group in groups if group]


@dataclass(frozen=True)
class Part:
    """A run of neighbouring components of one parameter.

    Args:
        row: of the parameter.
        length: components in it.
        voted: whether they are voted on, else averaged.
        begin: its first component in the parameter.
    """

    row: int
    length: int
    voted: bool
    begin: int = 0


def part_of(part: Part, column: int, num_columns: int) -> Part:
    """Return the share of a whole parameter that one column votes on; it may be empty."""
    for owner, a, b in shards(Shape(part.row, part.length), num_columns):
        if owner == column:
            return replace(part, begin=a, length=b - a)
    return replace(part, length=0)


@dataclass(frozen=True, eq=False)
class Column:
    """One column's share of an exchange group.

    Attributes:
        layout: of its components, where the gradient that is cast lies.
        targets: per bucket, the pieces where they lie in the bucket itself; their rows are their numbers.
        ballots: form of the payloads.
        verdicts: likewise.
        rows: int64 `[num_rows]`, the parameter of each row of the layout.
        lengths: int64 `[num_rows]`.
        piece_row: int64 `[num_pieces]`.
        piece_length: int64 `[num_pieces]`.
        piece_slots: int64 `[num_pieces]`, most verdicts that fit.
        shares: int64 `[num_pieces]`, where the `DensityLadder` keeps each piece.
        voted_runs: `(bucket, start, length)` of every voted part as it lies in the buckets, in order.
        raw_runs: likewise of the averaged ones.
        num_voted: elements of the voted ones, per bucket.
        num_raw: elements of the averaged ones.
    """

    layout: Layout
    targets: tuple[Spans, ...]
    ballots: Form
    verdicts: Form
    rows: Tensor
    lengths: Tensor
    piece_row: Tensor
    piece_length: Tensor
    piece_slots: Tensor
    shares: IntArray
    voted_runs: tuple[tuple[int, int, int], ...]
    raw_runs: tuple[tuple[int, int, int], ...]
    num_voted: tuple[int, ...]
    num_raw: int

    @property
    def num_elements(self) -> int:
        """Components of the share."""
        return sum(self.num_voted) + self.num_raw

    def seen(self, verdicts: Tensor, crowded: Tensor | None) -> Tensor:
        """Return what a vote came to, piece by piece: verdicts, slots, components if it is crowded, components.

        Args:
            verdicts: int64 `[num_pieces]`, those other than 0, as `unpack` counts them on `targets`.
            crowded: bool `[num_pieces]`, the census; None without caps.

        Returns:
            int64 `[4, num_pieces]`.
        """
        full = torch.zeros_like(self.piece_length) if crowded is None else self.piece_length * crowded
        return torch.stack([verdicts, self.piece_slots, full, self.piece_length])

    def by_row(self, seen: Tensor) -> Tensor:
        """Add up what `seen` returned by the rows of the layout, int64 `[4, num_rows]`."""
        return seen.new_zeros(4, self.lengths.numel()).index_add_(1, self.piece_row, seen)

    def coded(self, form: Callable[..., tuple[Form, Form]], density: Density) -> Column:
        """Return the same with payloads that have slots for this density."""
        if isinstance(density, np.ndarray):
            density = density[self.shares]
        ballots, verdicts = form(self.layout, density, num_raw=self.num_raw)
        slots = self.layout.all_pieces.length if verdicts.caps is None else verdicts.caps
        piece_slots = upload(torch.from_numpy(slots), self.piece_length.device)
        return replace(self, ballots=ballots, verdicts=verdicts, piece_slots=piece_slots)


@dataclass(frozen=True, eq=False)
class Plan:
    """An exchange group.

    Attributes:
        columns: the shares of all columns of a node.
        rows: int64, its parameters.
        form: `payload.forms` with the options of the vote.
    """

    columns: tuple[Column, ...]
    rows: Tensor
    form: Callable[..., tuple[Form, Form]]

    def at(self, density: Density) -> Plan:
        """Return the same with payloads that have slots for another density; what lies where stays."""
        return replace(self, columns=tuple(column.coded(self.form, density) for column in self.columns))

    @classmethod
    def build(
        cls,
        buckets: Sequence[Sequence[Part]],
        homes: Sequence[int],
        num_columns: int,
        num_voters: int,
        *,
        density: Density,
        wire: str,
        owner_carry: bool,
        device: torch.device,
        checksum: bool = False,
    ) -> Plan:
        """Deal out a group.

        Args:
            buckets: the parameters of each bucket, in the order in which they lie in its flat gradient.
            homes: per row, the first element of this rank's share in what it keeps.
            num_columns: ranks of a node.
            num_voters: nodes.
            density: share of the components that payloads have slots for: of all, or by `Column.shares`; None without
                a cap.
            wire: see `payload.forms`.
            owner_carry: likewise.
            device: where the gradients are.
            checksum: whether payloads end with one.
        """
        columns = []
        form = partial(forms, wire=wire, owner_carry=owner_carry)
        for column in range(num_columns):
            voted: list[list[tuple[Part, int]]] = []
            raw: list[tuple[int, int, int]] = []
            for index, bucket in enumerate(buckets):
                start = 0
                voted.append([])
                for whole in bucket:
                    part = part_of(whole, column, num_columns)
                    if not part.voted and part.length:
                        raw.append((index, start + part.begin, part.length))
                    elif part.voted and (part.length or num_columns == 1):
                        voted[-1].append((part, start + part.begin))
                    start += whole.length
            shapes = [[Shape(part.row, part.length, homes[part.row]) for part, _ in bucket] for bucket in voted]
            starts = [[start for _, start in bucket] for bucket in voted]
            layout = Layout.build(shapes, num_voters, None if num_columns > 1 else starts, checksum=checksum)
            first_share = np.asarray([(s.index * num_columns + column) * num_voters for s in layout.shapes], np.int64)
            columns.append(_column(layout, first_share, voted, raw, form, device))
        rows = torch.tensor([part.row for bucket in buckets for part in bucket], dtype=torch.int64, device=device)
        return cls(tuple(columns), rows, form).at(density)


def _column(
    layout: Layout,
    first_share: IntArray,
    voted: list[list[tuple[Part, int]]],
    raw: list[tuple[int, int, int]],
    form: Callable[..., tuple[Form, Form]],
    device: torch.device,
) -> Column:
    """Return a column without caps."""
    pieces, num_raw = layout.all_pieces, sum(length for _, _, length in raw)
    lengths = torch.from_numpy(pieces.length).to(device)
    ballots, verdicts = form(layout, None, num_raw=num_raw)
    return Column(
        layout,
        targets=_targets(layout, [[start for _, start in bucket] for bucket in voted]),
        ballots=ballots,
        verdicts=verdicts,
        rows=torch.tensor([shape.index for shape in layout.shapes], dtype=torch.int64, device=device),
        lengths=torch.tensor([shape.num_elements for shape in layout.shapes], dtype=torch.int64, device=device),
        piece_row=torch.from_numpy(pieces.row).to(device),
        piece_length=lengths,
        piece_slots=lengths,
        shares=first_share[pieces.row] + np.concatenate(layout.owners),
        voted_runs=tuple((k, start, part.length) for k, bucket in enumerate(voted) for part, start in bucket),
        raw_runs=tuple(raw),
        num_voted=tuple(sum(part.length for part, _ in bucket) for bucket in voted),
        num_raw=num_raw,
    )


def _targets(layout: Layout, starts: list[list[int]]) -> tuple[Spans, ...]:
    """Return the pieces with the places that they have in the buckets, and their numbers for rows."""
    found, first_row, first = [], 0, 0
    for pieces, params, begins in zip(layout.pieces, layout.params, starts, strict=True):
        shift = np.asarray(begins, dtype=np.int64) - params.start
        numbers = np.arange(first, first + pieces.row.size, dtype=np.int64)
        found.append(replace(pieces, start=pieces.start + shift[pieces.row - first_row], row=numbers))
        first_row, first = first_row + params.start.size, first + numbers.size
    return tuple(found)
