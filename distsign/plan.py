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
from distsign.layout import Layout, Shape, shards
from distsign.payload import Form, forms

__all__ = ["COALESCE_BYTES", "Column", "Part", "Plan", "exchange_groups", "fills_group", "part_of"]

COALESCE_BYTES = 64 * 1024
"""Buckets whose payloads are smaller travel together: twelve small exchanges cost about 50 ms more than one."""


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
        >>> exchange_groups([100_000, 200_000, 300_000, 10], bits_per_param=None)
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
        targets: per bucket, the pieces where they lie in the bucket itself.
        ballots: form of the payloads.
        verdicts: likewise.
        rows: int64 `[num_rows]`, the parameter of each row of the layout.
        lengths: int64 `[num_rows]`.
        slots: int64 `[num_rows]`, most verdicts that fit.
        piece_row: int64 `[num_pieces]`.
        piece_length: int64 `[num_pieces]`.
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
    slots: Tensor
    piece_row: Tensor
    piece_length: Tensor
    voted_runs: tuple[tuple[int, int, int], ...]
    raw_runs: tuple[tuple[int, int, int], ...]
    num_voted: tuple[int, ...]
    num_raw: int

    @property
    def num_elements(self) -> int:
        """Components of the share."""
        return sum(self.num_voted) + self.num_raw


@dataclass(frozen=True, eq=False)
class Plan:
    """An exchange group.

    Attributes:
        columns: the shares of all columns of a node.
        rows: int64, its parameters.
    """

    columns: tuple[Column, ...]
    rows: Tensor

    @classmethod
    def build(
        cls,
        buckets: Sequence[Sequence[Part]],
        homes: Sequence[int],
        num_columns: int,
        num_voters: int,
        *,
        density: float | None,
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
            density: see `payload.forms`.
            wire: likewise.
            owner_carry: likewise.
            device: where the gradients are.
            checksum: whether payloads end with one.
        """
        columns = []
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
            form = partial(forms, density=density, wire=wire, owner_carry=owner_carry)
            columns.append(_column(voted, raw, homes, num_voters, num_columns > 1, form, device, checksum=checksum))
        rows = [part.row for bucket in buckets for part in bucket]
        return cls(tuple(columns), torch.tensor(rows, dtype=torch.int64, device=device))


def _column(
    voted: list[list[tuple[Part, int]]],
    raw: list[tuple[int, int, int]],
    homes: Sequence[int],
    num_voters: int,
    gathered: bool,
    form: Callable[..., tuple[Form, Form]],
    device: torch.device,
    *,
    checksum: bool,
) -> Column:
    shapes = [[Shape(part.row, part.length, homes[part.row]) for part, _ in bucket] for bucket in voted]
    starts = [[start for _, start in bucket] for bucket in voted]
    layout = Layout.build(shapes, num_voters, None if gathered else starts, checksum=checksum)
    num_raw = sum(length for _, _, length in raw)
    ballots, verdicts = form(layout, num_raw=num_raw)
    pieces = layout.all_pieces
    lengths = torch.tensor([shape.num_elements for shape in layout.shapes], dtype=torch.int64, device=device)
    piece_row = torch.from_numpy(pieces.row).to(device)
    slots = torch.from_numpy(pieces.length if verdicts.caps is None else verdicts.caps).to(device)
    runs = [(k, start, part.length) for k, bucket in enumerate(voted) for part, start in bucket]
    return Column(
        layout,
        targets=_targets(layout, starts),
        ballots=ballots,
        verdicts=verdicts,
        rows=torch.tensor([shape.index for shape in layout.shapes], dtype=torch.int64, device=device),
        lengths=lengths,
        slots=torch.zeros_like(lengths).index_add_(0, piece_row, slots),
        piece_row=piece_row,
        piece_length=torch.from_numpy(pieces.length).to(device),
        voted_runs=tuple(runs),
        raw_runs=tuple(raw),
        num_voted=tuple(sum(shape.num_elements for shape in bucket) for bucket in shapes),
        num_raw=num_raw,
    )


def _targets(layout: Layout, starts: list[list[int]]) -> tuple[Spans, ...]:
    """Return the pieces with the places that they have in the buckets."""
    found, first_row = [], 0
    for pieces, params, begins in zip(layout.pieces, layout.params, starts, strict=True):
        shift = np.asarray(begins, dtype=np.int64) - params.start
        found.append(replace(pieces, start=pieces.start + shift[pieces.row - first_row]))
        first_row += params.start.size
    return tuple(found)
