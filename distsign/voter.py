"""One worker's side of the vote: its confidence, and what it remembers per parameter and per component."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from distsign.ballots import keep_idle_stats
from distsign.confidence import Confidence
from distsign.kernels import CarryRule, Kernels, Memory, dither_at
from distsign.kernels.chunks import upload
from distsign.layout import IntArray, Layout

__all__ = ["Cast", "Voter", "rotating_starts"]

_CALM_STEPS = 4
"""After so many steps in which no ballot was above a cap, the next one is expected to have none either."""
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
    """The planes of one exchange group, about to be written. With caps ballots are counted by piece, else by row."""

    layout: Layout
    out: Tensor
    kernels: Kernels
    caps: IntArray | None
    step: int

    @property
    def row_of_piece(self) -> Tensor:
        return self.layout.table(("rows",), lambda: self.layout.all_pieces.row, self.out.device)

    def pack(self, grads: Sequence[Tensor], thresholds: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `Kernels.pack` does, over all buckets."""
        spans = self.layout.pieces
        if self.caps is not None:
            spans, thresholds = self.layout.apart, thresholds[self.row_of_piece]
        return _summed([self.kernels.pack(g, each, thresholds, self.out) for g, each in zip(grads, spans, strict=True)])

    def pack_carry(
        self, grads: Sequence[Tensor], rule: CarryRule, memory: Memory, *, clear: bool
    ) -> tuple[Tensor, Tensor]:
        """Return what `Kernels.pack_carry` does, over all buckets."""
        spans = self.layout.pieces
        if self.caps is not None:
            spans, rule = self.layout.apart, rule.at(self.row_of_piece)
        pack, out = self.kernels.pack_carry, self.out
        return _summed([pack(g, each, rule, memory, out, clear=clear) for g, each in zip(grads, spans, strict=True)])

    def settle(self, wanted: Tensor, memory: Memory | None) -> tuple[Tensor, Tensor | None]:
        """Keep what fits of packed ballots; return how many of each piece, and which had more (CPU: None for none).

        Args:
            wanted: int64 `[num_pieces]`, what packing has counted.
            memory: whose carry is cleared where a vote is kept; None where packing has cleared it.
        """
        assert self.caps is not None
        fits = wanted.device.type == "cpu" and bool((wanted.numpy() <= self.caps).all())
        limits = torch.from_numpy(self.caps)
        if memory is not None or not fits:
            starts = torch.from_numpy(rotating_starts(self.layout, self.step))
            self.kernels.settle_carry(self.out, self.layout.all_pieces, limits, starts, memory)
        if fits:
            return wanted, None
        limits = upload(limits, wanted.device)
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
        # Steps for which caps still count as ones that leave ballots out.
        self._crowded_steps: WeakKeyDictionary[Layout, int] = WeakKeyDictionary()

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
        crowded = None
        if self.memory is None:
            counts, finite = planes.pack(grads, (alpha * scale).float())
            if caps is not None:
                counts, crowded = planes.settle(counts, None)
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
            if caps is None:
                counts, finite = planes.pack_carry(grads, rule, self.memory, clear=True)
            else:
                counts, finite, crowded = self._pack_within(grads, rule, planes, caps, forget=forget)
        if caps is not None:
            counts = counts.new_zeros(rows.numel()).index_add_(0, planes.row_of_piece, counts)
        if lengths is None:
            lengths = torch.tensor([shape.num_elements for shape in layout.shapes], device=out.device)
        new = self.confidence.observe(new, counts / lengths.clamp(min=1).double())
        self._pending.append((rows, keep_idle_stats(old, new, active)))
        return Cast(counts.sum(), finite, crowded)

    def _pack_within(
        self, grads: Sequence[Tensor], rule: CarryRule, planes: _Planes, caps: IntArray, *, forget: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Pack with a carry what caps allow; return ballots of each piece, whether all is finite, and what was crowded.

        Packing clears the carry of all that votes at once. What caps leave out must keep its own, so that settling
        clears vote by vote; but caps that left none out lately seldom do now, and this is tried first.
        """
        assert self.memory is not None
        layout, on_cpu = planes.layout, planes.out.device.type == "cpu"
        clear = forget or (on_cpu and self._is_calm(layout))
        counts, finite = planes.pack_carry(grads, rule, self.memory, clear=clear)
        if clear and not forget and not (counts.numpy() <= caps).all():
            clear = False  # anew, from the half of the memory that this step does not write
            counts, finite = planes.pack_carry(grads, rule, self.memory, clear=clear)
        kept, crowded = planes.settle(counts, None if clear else self.memory)
        if on_cpu:
            before = self._crowded_steps.get(layout, 0)
            self._crowded_steps[layout] = max(0, before - 1) if crowded is None else _CALM_STEPS
        return kept, finite, crowded

    def _is_calm(self, layout: Layout) -> bool:
        """Return whether caps have left no ballot out in the last steps."""
        return self._crowded_steps.get(layout, 0) == 0

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


def _summed(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    counts, finite = zip(*parts, strict=True)
    return torch.stack(counts).sum(0), torch.stack(finite).all()
