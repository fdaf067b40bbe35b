"""Deep gradient compression: top-k of an accumulated momentum."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distsign.rivals.base import GatheringRival, require_range
from distsign.rivals.top_k import add_sparse, largest
from distsign.traffic import top_k_slots

__all__ = ["DGC"]

WARM_UP_DENSITIES = (0.25, 0.0625, 0.015625, 0.004)
"""Of the four parts of the warm-up (the paper's Sec. 3.3 has an epoch for each)."""


class DGC(GatheringRival):
    """Deep gradient compression (Lin, Han, Mao, Wang, Dally, arXiv 1712.01887, Alg. 4; momentum factor masking).

        u = momentum u + g       v = v + u       sent = the largest |v| of each tensor;       u = v = 0 where sent

    Momentum is corrected locally, so that the optimizer must have none. The density falls in four equal parts of the
    warm-up to its last value. Sent: a float32 and an int32 for each component.

    Departures: the largest are found exactly, not from a sample; local clipping, to `clip / sqrt(world_size)` of the
    norm as in the paper's Sec. 3.2, is by tensor, since a hook sees one bucket at a time.

    Args:
        density: share of each tensor that is sent in the end, one component at least.
        momentum: of the local average.
        warmup_steps: over which the density falls; 0 for none.
        clip: of the gradient's norm, for one rank; 0 for none.
    """

    gives = "direction"

    def __init__(
        self, density: float = 0.001, momentum: float = 0.9, warmup_steps: int = 200, clip: float = 0.0
    ) -> None:
        super().__init__()
        self.density = require_range("density", density, 0, 1, low_open=True)
        self.momentum = require_range("momentum", momentum, 0, 1)
        self.warmup_steps = int(require_range("warmup_steps", warmup_steps, 0, 2**31))
        self.clip = require_range("clip", clip, 0, math.inf)

    def density_at(self, step: int) -> float:
        """Return the share that is sent at a step."""
        if step >= self.warmup_steps:
            return self.density
        return max(self.density, WARM_UP_DENSITIES[4 * step // self.warmup_steps])

    def encode(self, name: str, gradient: Tensor) -> Tensor:
        """See `GatheringRival`."""
        if self.clip:
            limit = self.clip / math.sqrt(self._link.world_size)
            gradient = gradient * (limit / gradient.norm().clamp(min=limit))
        momentum, velocity = self.kept(name, "momentum", gradient), self.kept(name, "velocity", gradient)
        momentum.mul_(self.momentum).add_(gradient)
        velocity += momentum
        where = largest(velocity, top_k_slots(velocity.numel(), self.density_at(self.step)))
        flat = velocity.view(-1)
        payload = torch.cat([flat[where].view(torch.uint8), where.int().view(torch.uint8)])
        flat[where] = 0
        momentum.view(-1)[where] = 0
        return payload

    def accumulate(self, payload: Tensor, total: Tensor) -> None:
        """See `GatheringRival`."""
        add_sparse(payload, total)

    def payload_bytes(self, shape: Sequence[int], step: int) -> int:
        """See `GatheringRival`."""
        return 8 * top_k_slots(math.prod(shape), self.density_at(step))
