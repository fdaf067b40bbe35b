"""Top-k: the largest components and where they are, with error feedback."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distsign.rivals.base import GatheringRival, require_range
from distsign.traffic import top_k_slots

__all__ = ["TopK", "add_sparse", "largest"]


class TopK(GatheringRival):
    """Top-k sparsification with memory (Stich, Cordonnier, Jaggi, arXiv 1809.07599, Alg. 1, with the largest).

        u = g + e       sent = the largest |u| of each tensor       e = u where it was not sent, else 0

    Sent: a float32 and an int32 for each of them.

    Args:
        density: share of each tensor that is sent, one component at least.
    """

    def __init__(self, density: float = 0.001) -> None:
        super().__init__()
        self.density = require_range("density", density, 0, 1, low_open=True)

    def encode(self, name: str, gradient: Tensor) -> Tensor:
        """See `GatheringRival`."""
        error = self.kept(name, "error", gradient)
        error += gradient
        where = largest(error, top_k_slots(error.numel(), self.density))
        flat = error.view(-1)
        payload = torch.cat([flat[where].view(torch.uint8), where.int().view(torch.uint8)])
        flat[where] = 0
        return payload

    def accumulate(self, payload: Tensor, total: Tensor) -> None:
        """See `GatheringRival`."""
        add_sparse(payload, total)

    def payload_bytes(self, shape: Sequence[int], step: int) -> int:
        """See `GatheringRival`."""
        del step
        return 8 * top_k_slots(math.prod(shape), self.density)


def largest(values: Tensor, num_slots: int) -> Tensor:
    """Return where the largest absolute values are, int64 `[num_slots]`, in the flat tensor."""
    return values.reshape(-1).abs().topk(num_slots, sorted=False).indices


def add_sparse(payload: Tensor, total: Tensor) -> None:
    """Add a payload of float32 values and int32 places to a tensor, in place."""
    values, where = payload.view(2, -1)
    total.view(-1).index_add_(0, where.view(torch.int32), values.view(torch.float32))
