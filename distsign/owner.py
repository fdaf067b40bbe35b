"""An owner's side of the vote: tally, margin, and what it keeps of the votes that have not decided anything yet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from distsign.kernels import Kernels, Spans
from distsign.kernels.chunks import upload
from distsign.layout import IntArray, Layout
from distsign.payload import Opened

__all__ = ["OWNER_CARRIES", "Owner", "Piece", "make_owner"]

Piece = tuple[int, int, int]
"""One owner's part of a parameter: the parameter's index, its first element in it, and its length."""


@dataclass(frozen=True)
class Cut:
    """How many verdicts of each of an owner's pieces may be sent, and where the choice begins; int64 on the CPU."""

    caps: Tensor
    starts: Tensor


class Owner(ABC):
    """Count ballots on the pieces that this rank owns, and keep what they leave.

    Like a worker's memory, what is kept has two halves, of which a step reads one and writes the other; they change
    their roles at `commit`, unless the step was poisoned.

    Args:
        margin: least lead.
        num_voters: workers whose ballots are counted.
        forget: whether decided votes that do not fit are dropped instead of kept for the next step.
    """

    kind: ClassVar[str | None]

    def __init__(self, margin: int, num_voters: int, *, forget: bool = False) -> None:
        self.margin = margin
        self.num_voters = num_voters
        self.forget = forget
        self._live = torch.zeros((), dtype=torch.int64)

    def count(
        self,
        ballots: Opened,
        layout: Layout,
        owner: int,
        caps: IntArray | None,
        starts: IntArray,
        kernels: Kernels,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the verdicts on one owner's pieces.

        Args:
            ballots: of all workers, one row each.
            layout: the group's.
            owner: whose pieces they are.
            caps: int64 `[num_pieces]` of the group, most verdicts of each; None without a cap.
            starts: int64 `[num_pieces]` of the group, the byte of its plane where the choice begins.
            kernels: backend of the device.

        Returns:
            `(planes, crowded, ok)`: uint8 `[2 * plane_bytes]`; bool, True for each of the owner's pieces that would
            have more verdicts than its cap; bool `[num_voters]`, False for a malformed body, with which the step must
            be poisoned.
        """
        spans, numbers = layout.owned(owner)
        limits = torch.from_numpy(spans.length if caps is None else caps[numbers])
        planes = torch.empty(2 * ballots.num_bytes, dtype=torch.uint8, device=ballots.rows.device)
        self._live = self._live.to(planes.device)
        cut = Cut(limits, torch.from_numpy(starts[numbers]))
        pieces = [
            (layout.shapes[row].index, start, length)
            for row, start, length in zip(spans.row.tolist(), spans.home.tolist(), spans.length.tolist(), strict=True)
        ]
        wanted, ok = self._count(ballots, spans, pieces, cut, planes, kernels)
        return planes, wanted > upload(limits, wanted.device), ok

    @abstractmethod
    def _count(
        self, ballots: Opened, spans: Spans, pieces: list[Piece], cut: Cut, planes: Tensor, kernels: Kernels
    ) -> tuple[Tensor, Tensor]:
        """Write the verdicts' planes; return how many each piece would have without a cap, int64, and which are ok."""

    def commit(self, poisoned: Tensor) -> None:
        """Keep what this step's counts left, or forget it if the step was poisoned (bool scalar tensor)."""
        live = self._live.to(poisoned.device)
        self._live = torch.where(poisoned, live, 1 - live)

    def kept(self) -> dict[Piece, Tensor]:
        """Return a copy of what is kept for each piece: int16 `[length]`, or uint8 planes; for checkpoints."""
        return {}

    def keep(self, kept: Mapping[Piece, Tensor], device: torch.device) -> None:
        """Take up what `kept` returned."""
        assert not kept


class Forgetful(Owner):
    """An owner that keeps nothing: the plain majority vote."""

    kind = None

    def _count(
        self, ballots: Opened, spans: Spans, pieces: list[Piece], cut: Cut, planes: Tensor, kernels: Kernels
    ) -> tuple[Tensor, Tensor]:
        del cut  # where nothing is kept nothing may be cut: the caps are those of all voters together
        rows, at, ok = ballots.planes(kernels)
        kernels.tally(rows, at, ballots.num_bytes, self.margin, planes)
        return torch.zeros(spans.start.size, dtype=torch.int64, device=planes.device), ok


class PlainCarry(Owner):
    """An owner that adds each tally to what earlier ones left, and takes `margin` from it for each verdict.

    A liar can save its votes up over steps until they pass any margin (measured facts in DESIGN.md).
    """

    kind = "plain"

    def __init__(self, margin: int, num_voters: int, *, forget: bool = False) -> None:
        super().__init__(margin, num_voters, forget=forget)
        self._homes: dict[Piece, int] = {}
        # Kept, because what kernels know of them on a device is kept with them.
        self._at_home: WeakKeyDictionary[Spans, Spans] = WeakKeyDictionary()
        self._undecided = torch.zeros(2, 0, dtype=torch.int16)

    def _count(
        self, ballots: Opened, spans: Spans, pieces: list[Piece], cut: Cut, planes: Tensor, kernels: Kernels
    ) -> tuple[Tensor, Tensor]:
        self._make_room(pieces, planes.device)
        if spans not in self._at_home:
            home = np.asarray([self._homes[piece] for piece in pieces], dtype=np.int64)
            self._at_home[spans] = replace(spans, home=home)
        spans = self._at_home[spans]
        kept = self.margin, self._undecided, self._live
        if ballots.code is None:
            rows, at, ok = ballots.planes(kernels)
            kernels.tally_carry(rows, at, spans, *kept, planes)
        else:
            ok = kernels.tally_sparse(ballots.rows, ballots.at, ballots.code, spans, *kept, planes)
        return kernels.settle_votes(planes, spans, cut.caps, cut.starts, *kept, forget=self.forget), ok

    def _make_room(self, pieces: list[Piece], device: torch.device) -> None:
        end = before = self._undecided.shape[1]
        for piece in pieces:
            if piece not in self._homes:
                self._homes[piece] = end
                end += piece[2]
        self._undecided = self._undecided.to(device)
        if end > before:
            self._undecided = torch.nn.functional.pad(self._undecided, (0, end - before))

    def kept(self) -> dict[Piece, Tensor]:  # noqa: D102
        live = self._undecided[int(self._live)]
        return {piece: live[home : home + piece[2]].clone() for piece, home in self._homes.items()}

    def keep(self, kept: Mapping[Piece, Tensor], device: torch.device) -> None:  # noqa: D102
        self._homes, self._undecided = {}, self._undecided[:, :0]
        self._at_home.clear()
        self._make_room(list(kept), device)
        for piece, value in kept.items():
            self._undecided[:, self._homes[piece] : self._homes[piece] + piece[2]] = value.to(device)


class StandingBallots(Owner):
    """An owner that lets each worker's last ballot on a component stand until a verdict settles it.

    At most one ballot a worker and component is pending, so the margin's guarantee against liars holds over time.
    """

    kind = "standing"

    def __init__(self, margin: int, num_voters: int, *, forget: bool = False) -> None:
        super().__init__(margin, num_voters, forget=forget)
        self._standing: dict[Piece, Tensor] = {}  # uint8 [2, num_voters, 2, plane_bytes]

    def _count(
        self, ballots: Opened, spans: Spans, pieces: list[Piece], cut: Cut, planes: Tensor, kernels: Kernels
    ) -> tuple[Tensor, Tensor]:
        for piece in pieces:
            if piece not in self._standing:
                self._standing[piece] = torch.zeros(
                    2, self.num_voters, 2, (piece[2] + 7) // 8, dtype=torch.uint8, device=planes.device
                )
            # What a checkpoint brings before the first step lies on the CPU.
            self._standing[piece] = self._standing[piece].to(planes.device)
        rows, at, ok = ballots.planes(kernels)
        kept = [self._standing[piece] for piece in pieces]
        standing = torch.cat([planes.new_zeros(2, self.num_voters, 2, 0), *kept], dim=-1)
        flat = standing.flatten(-2)
        kernels.tally_standing(rows, at, ballots.num_bytes, self.margin, flat, self._live, planes)
        wanted = kernels.settle_standing(planes, spans, cut.caps, cut.starts, flat, self._live)
        parts = torch.split(flat.view_as(standing), [old.shape[-1] for old in kept], dim=-1)
        for old, new in zip(kept, parts, strict=True):
            old.copy_(new)
        return wanted, ok

    def kept(self) -> dict[Piece, Tensor]:  # noqa: D102
        return {piece: halves[int(self._live)].clone() for piece, halves in self._standing.items()}

    def keep(self, kept: Mapping[Piece, Tensor], device: torch.device) -> None:  # noqa: D102
        self._standing = {piece: value.to(device).expand(2, *value.shape).clone() for piece, value in kept.items()}


OWNER_CARRIES: dict[str | None, type[Owner]] = {each.kind: each for each in (Forgetful, PlainCarry, StandingBallots)}
"""What an owner keeps, by name."""


def make_owner(kind: str | None, margin: int, num_voters: int, *, forget: bool = False) -> Owner:
    """Return an owner of a kind of `OWNER_CARRIES`."""
    return OWNER_CARRIES[kind](margin, num_voters, forget=forget)
