"""One worker's side of the vote: its confidence, and what it remembers per parameter and per component."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distsign.ballots import keep_idle_stats
from distsign.confidence import Confidence
from distsign.kernels import CarryRule, Kernels, Memory, dither_at
from distsign.kernels.chunks import upload
from distsign.layout import IntArray, Layout

__all__ = ["Cast", "Voter", "rotating_starts"]

_Pieces = npt.NDArray[np.bool_]
"""Some of a layout's pieces, bool `[num_pieces]`."""
_ALIGN = 32
"""Elements; 64 bytes in half precision."""


@dataclass(frozen=True)
class Cast:
    """What came of casting one exchange group's ballots.

    Attributes:
        num_ballots: int64 scalar tensor, ballots written.
        finite: bool scalar tensor, False if any gradient held a NaN or an infinity.
        crowded: bool `[num_pieces]`, True where more wanted to vote than fits; None without caps, and
            on the CPU where all fit.
    """

    num_ballots: Tensor
    finite: Tensor
    crowded: Tensor | None


def rotating_starts(layout: Layout, step: int) -> IntArray:
    """Return for each piece the byte of its plane where a step's choice begins, int64 `[num_pieces]`.

    Steps go round by the golden ratio, so that after any number of them the starts lie evenly spread; each parameter is
    turned against the others.
    """
    pieces = layout.all_pieces
    index = np.asarray([shape.index for shape in layout.shapes], dtype=np.int64)[pieces.row]
    turn = ((step + 7 * index) * 2654435769) % 2**32
    starts: IntArray = turn * ((pieces.length + 7) // 8) >> 32
    return starts


@dataclass(frozen=True, eq=False)
class _Planes:
    """The planes of one exchange group, about to be written, and the caps on their votes. Counts are by piece."""

    layout: Layout
    out: Tensor
    kernels: Kernels
    caps: IntArray | None
    step: int

    def pack(self, grads: Sequence[Tensor], thresholds: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `Kernels.pack` does, over all buckets."""
        pack, spans = self.kernels.pack, self.layout.pieces
        return _together([pack(grad, each, thresholds, self.out) for grad, each in zip(grads, spans, strict=True)])

    def pack_carry(
        self, grads: Sequence[Tensor], rule: CarryRule, memory: Memory, *, clear: bool, which: _Pieces | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what `Kernels.pack_carry` does, over all buckets, of some pieces or of all; 0 for the others."""
        pack, out, spans = self.kernels.pack_carry, self.out, self.layout.pieces
        if which is not None:
            parts = np.split(which, np.cumsum([each.row.size for each in spans])[:-1])
            spans = tuple(each.chosen(part) for each, part in zip(spans, parts, strict=True))
        counts, finite = _together(
            [pack(grad, each, rule, memory, out, clear=clear) for grad, each in zip(grads, spans, strict=True)]
        )
        if which is not None:
            counts = torch.zeros(which.size, dtype=torch.int64).masked_scatter_(torch.from_numpy(which), counts)
        return counts, finite

    def settle(self, memory: Memory | None, which: _Pieces | None = None) -> None:
        """Leave out the packed ballots that do not fit, of some pieces or of all.

        Args:
            memory: whose carry is cleared where a vote is kept; None where packing has cleared it.
            which: bool `[num_pieces]`.
        """
        assert self.caps is not None
        pieces, caps, starts = self.layout.all_pieces, self.caps, rotating_starts(self.layout, self.step)
        if which is not None:
            pieces, caps, starts = pieces.chosen(which), caps[which], starts[which]
        self.kernels.settle_carry(self.out, pieces, torch.from_numpy(caps), torch.from_numpy(starts), memory)

    def cut(self, wanted: Tensor, *, is_settled: bool) -> tuple[Tensor, Tensor | None]:
        """Return how many ballots of each piece fit, int64 `[num_pieces]`, and which had more (CPU: None for none).

        Args:
            wanted: int64 `[num_pieces]`, ballots that packing has counted.
            is_settled: whether the others are left out already.
        """
        assert self.caps is not None
        which = None
        if wanted.device.type == "cpu":
            which = wanted.numpy() > self.caps
            if not which.any():
                return wanted, None
        if not is_settled:
            self.settle(None, which)
        limits = upload(torch.from_numpy(self.caps), wanted.device)
        return torch.minimum(wanted, limits), wanted > limits


class Voter:
    """Turn gradients into ballots, and keep the confidence function's stats and the carry.

    Nothing is remembered of a step before `commit`: a step that was poisoned anywhere must leave no trace, and its
    other buckets may have been voted on before that is known.

    Args:
        confidence: the confidence function.
        carry: the dtype in which what was not sent is kept for the next step, and the running mean of squares where
            the confidence function has one: float32 or bfloat16; None keeps nothing.

    Attributes:
        stats: float64 `[num_params, num_stats]`, one row a parameter, on the gradients' device.
        memory: what is kept per component; None without a carry.
    """

    def __init__(self, confidence: Confidence, carry: torch.dtype | None = None) -> None:
        self.confidence = confidence
        self.stats = confidence.init_stats(0)
        self.memory: Memory | None = None
        if carry is not None:
            squares = confidence.square_decay is not None
            self.memory = Memory(
                torch.zeros(2, 0, dtype=carry),
                torch.zeros(2, 0, dtype=carry) if squares else None,
                torch.zeros((), dtype=torch.int64),
            )
        self._homes: list[int] = []
        self._lengths: list[int] = []
        self._pending: list[tuple[Tensor, Tensor]] = []
        # Kept until the next step: on CUDA, `commit` runs on another stream than the one that will reuse their memory.
        self._committed: list[tuple[Tensor, Tensor]] = []
        # Which had more ballots than their caps in the last step.
        self._crowded: WeakKeyDictionary[Layout, _Pieces] = WeakKeyDictionary()

    def grow(self, lengths: Sequence[int], device: torch.device) -> None:
        """Make room for all parameters, whose sizes are given, on this device."""
        known = len(self._homes)
        if len(lengths) == known and self.stats.device == device:
            return
        for length in lengths[known:]:
            self._homes.append(self._end)
            self._lengths.append(length)
        self.stats = torch.cat([self.stats.to(device), self.confidence.init_stats(len(lengths) - known, device)])
        if self.memory is not None:
            square = None if self.memory.square is None else self._grown(self.memory.square, device)
            self.memory = Memory(self._grown(self.memory.carry, device), square, self.memory.live.to(device))

    def _grown(self, halves: Tensor, device: torch.device) -> Tensor:
        return torch.nn.functional.pad(halves.to(device), (0, self._end - halves.shape[1]))

    @property
    def _end(self) -> int:
        """Where the next parameter begins: with a cache line, as those that are written past the caches have to."""
        return -(-(self._homes[-1] + self._lengths[-1]) // _ALIGN) * _ALIGN if self._homes else 0

    def home(self, row: int) -> int:
        """Return the first element of a parameter in the memory."""
        return self._homes[row]

    def _part(self, row: int) -> slice:
        return slice(self._homes[row], self._homes[row] + self._lengths[row])

    def cast(
        self,
        grads: Sequence[Tensor],
        layout: Layout,
        rows: Tensor,
        *,
        scale: Tensor,
        kernels: Kernels,
        out: Tensor,
        step: int,
        factors: Tensor | None = None,
        caps: IntArray | None = None,
        forget: bool = False,
        lengths: Tensor | None = None,
    ) -> Cast:
        """Write the ballots of one exchange group into its buffer.

        Args:
            grads: per bucket, its flat gradient in float32, multiplied by the loss scale. Not changed.
            layout: the group's layout.
            rows: int64 `[num_rows]`, for each parameter of the group its row in `stats`.
            scale: float64 scalar tensor, the loss scale.
            kernels: backend of the gradients' device.
            out: uint8 `[layout.buffer_bytes]`, changed where the planes lie.
            step: alike on all ranks; it decides where a cap's choice begins and how bfloat16 squares are rounded.
            factors: float64 `[num_rows]` on the thresholds; None is 1.
            caps: int64 `[num_pieces]`, most ballots of each piece; the others wait in the carry, or are lost where
                there is none. None: no cap.
            forget: whether the carry is cleared too where a ballot did not fit.
            lengths: int64 `[num_rows]`, elements of each parameter; None: as the layout has them.
        """
        old = self.stats[rows]
        moments = None
        if self.confidence.uses_moments:
            found = [kernels.moments(grad, spans) for grad, spans in zip(grads, layout.params, strict=True)]
            moments = torch.cat(found) / scale
        alpha, new = self.confidence.thresholds(old, moments)
        if factors is not None:
            alpha = alpha * factors
        planes = _Planes(layout, out, kernels, caps, step)
        keeps = self.memory is not None and caps is not None and not forget  # what is left out, in the carry
        if self.memory is None:
            counts, finite = planes.pack(grads, (alpha * scale).float())
            active = None if moments is None else (moments != 0).any(1)
        else:
            active = torch.cat([kernels.active(grad, spans) for grad, spans in zip(grads, layout.params, strict=True)])
            corrections = self.confidence.corrections(new)
            rule = CarryRule(
                alpha.float(),
                active,
                scale.reciprocal().float(),
                None if corrections is None else corrections.float(),
                self.confidence.square_decay or 0.0,
                dither_at(step),
            )
            if keeps:
                counts, finite = self._pack_within(grads, rule, planes, self.memory)
            else:
                counts, finite = planes.pack_carry(grads, rule, self.memory, clear=True)
        crowded = None
        if caps is not None:
            counts, crowded = planes.cut(counts, is_settled=keeps)
        row_of_piece = layout.table(("rows",), lambda: layout.all_pieces.row, out.device)
        counts = counts.new_zeros(rows.numel()).index_add_(0, row_of_piece, counts)
        if lengths is None:
            lengths = torch.tensor([shape.num_elements for shape in layout.shapes], device=out.device)
        new = self.confidence.observe(new, counts / lengths.clamp(min=1).double())
        self._pending.append((rows, keep_idle_stats(old, new, active)))
        return Cast(counts.sum(), finite, crowded)

    def _pack_within(
        self, grads: Sequence[Tensor], rule: CarryRule, planes: _Planes, memory: Memory
    ) -> tuple[Tensor, Tensor]:
        """Pack with a carry, and settle what caps leave out; return as `Kernels.pack_carry` does, by piece.

        Packing clears the carry of all that votes at once. What a cap leaves out must keep its own, so that settling
        clears vote by vote, which takes longer. On the CPU this is done of pieces that were crowded in the last step,
        and, packed anew, of those that turn out to be.
        """
        assert planes.caps is not None
        if planes.out.device.type != "cpu":
            counts, finite = planes.pack_carry(grads, rule, memory, clear=False)
            planes.settle(memory)
            return counts, finite
        crowded = self._crowded.get(planes.layout)
        if crowded is None:
            crowded = np.zeros(planes.caps.size, dtype=np.bool_)
        counts, finite = planes.pack_carry(grads, rule, memory, clear=True, which=~crowded if crowded.any() else None)
        now = counts.numpy() > planes.caps
        by_vote = crowded | now
        if by_vote.any():  # from the half of the memory that this step does not write
            found = planes.pack_carry(grads, rule, memory, clear=False, which=by_vote)
            counts, finite = torch.where(torch.from_numpy(by_vote), found[0], counts), finite & found[1]
            planes.settle(memory, by_vote)
            now = counts.numpy() > planes.caps
        self._crowded[planes.layout] = now
        return counts, finite

    def commit(self, poisoned: Tensor) -> None:
        """Remember what this step's casts have changed, or forget it if the step was poisoned.

        Args:
            poisoned: bool scalar tensor, alike on all ranks.
        """
        for rows, new in self._pending:
            self.stats[rows] = torch.where(poisoned, self.stats[rows], new)
        if self.memory is not None:
            live = self.memory.live.to(poisoned.device)
            self.memory = Memory(self.memory.carry, self.memory.square, torch.where(poisoned, live, 1 - live))
        self._committed, self._pending = self._pending, []

    def begin_step(self) -> None:
        """Drop what the last step cast: it is committed, or the step broke off."""
        self._pending.clear()
        self._committed.clear()

    def kept(self, row: int) -> dict[str, Tensor]:
        """Return a copy of what is remembered of one parameter, for checkpoints."""
        found = {"stats": self.stats[row].clone()}
        if self.memory is not None:
            live, part = int(self.memory.live), self._part(row)
            found["carry"] = self.memory.carry[live, part].clone()
            if self.memory.square is not None:
                found["square"] = self.memory.square[live, part].clone()
        return found

    def keep(self, row: int, kept: Mapping[str, Tensor]) -> None:
        """Take up what `kept` returned; what was kept in another dtype is rounded to the nearest."""
        self.stats[row] = kept["stats"].to(self.stats.device)
        if self.memory is not None:
            part = self._part(row)
            self.memory.carry[:, part] = kept["carry"].to(self.stats.device)
            if self.memory.square is not None:
                most = torch.finfo(self.memory.square.dtype).max  # of float32, what is larger would become infinite
                self.memory.square[:, part] = kept["square"].to(self.stats.device).clamp(max=most)


def _together(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the counts of all buckets one after the other, and whether all of them are finite."""
    if len(parts) == 1:  # nearly always
        return parts[0]
    counts, finite = zip(*parts, strict=True)
    return torch.cat(counts), torch.stack(finite).all()
