"""One worker's side of the vote: its confidence, and what it remembers per parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distsign.ballots import keep_idle_stats
from distsign.confidence import Confidence
from distsign.kernels import Kernels
from distsign.layout import Layout

__all__ = ["Voter"]


class Voter:
    """Turn gradients into ballots, and keep the confidence function's stats per parameter.

    Nothing is remembered of a step before `commit`: a step that was poisoned anywhere must leave no trace, and its
    other buckets may have been voted on before that is known.

    Args:
        confidence: the confidence function.

    Attributes:
        stats: float64 `[num_params, num_stats]`, one row a parameter, on the gradients' device.
    """

    def __init__(self, confidence: Confidence) -> None:
        self.confidence = confidence
        self.stats = confidence.init_stats(0)
        self._pending: list[tuple[Tensor, Tensor]] = []
        # Kept until the next step: on CUDA, `commit` runs on another stream than the one that will reuse their memory.
        self._committed: list[tuple[Tensor, Tensor]] = []

    def grow(self, num_params: int, device: torch.device) -> None:
        """Make room for parameters up to `num_params`, on this device."""
        missing = num_params - self.stats.shape[0]
        self.stats = self.stats.to(device)
        if missing > 0:
            self.stats = torch.cat([self.stats, self.confidence.init_stats(missing, device)])

    def cast(
        self, grads: Sequence[Tensor], layout: Layout, rows: Tensor, *, scale: Tensor, kernels: Kernels, out: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write the ballots of one exchange group into its buffer.

        Args:
            grads: per bucket, its flat gradient in float32, multiplied by the loss scale. Not changed.
            layout: the group's layout.
            rows: int64 `[num_rows]`, for each parameter of the group its row in `stats`.
            scale: float64 scalar tensor, the loss scale.
            kernels: backend of the gradients' device.
            out: uint8 `[layout.buffer_bytes]`, changed where the planes lie.

        Returns:
            `(num_ballots, finite)`, scalar tensors: ballots cast, and False if any gradient held a NaN or an infinity.
        """
        old = self.stats[rows]
        moments = None
        if self.confidence.uses_moments:
            found = [kernels.moments(grad, spans) for grad, spans in zip(grads, layout.params, strict=True)]
            moments = torch.cat(found) / scale
        alpha, new = self.confidence.thresholds(old, moments)
        thresholds = (alpha * scale).float()
        counts = torch.zeros(len(layout.lengths), dtype=torch.int64, device=out.device)
        finite = torch.ones((), dtype=torch.bool, device=out.device)
        for grad, pieces in zip(grads, layout.pieces, strict=True):
            part, ok = kernels.pack(grad, pieces, thresholds, out)
            counts += part
            finite = finite & ok
        lengths = torch.tensor(layout.lengths, dtype=torch.float64, device=out.device)
        new = self.confidence.observe(new, counts / lengths.clamp(min=1.0))
        self._pending.append((rows, keep_idle_stats(old, new, moments)))
        return counts.sum(), finite

    def commit(self, poisoned: Tensor) -> None:
        """Remember what this step's casts have changed, or forget it if the step was poisoned.

        Args:
            poisoned: bool scalar tensor, alike on all ranks.
        """
        for rows, new in self._pending:
            self.stats[rows] = torch.where(poisoned, self.stats[rows], new)
        self._committed, self._pending = self._pending, []

    def begin_step(self) -> None:
        """Drop what the last step cast: it is committed, or the step broke off."""
        self._pending.clear()
        self._committed.clear()
