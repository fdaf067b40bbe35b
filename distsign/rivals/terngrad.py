"""TernGrad: stochastic -1, 0, +1 times the largest component."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distsign.rivals.base import GatheringRival, require_range
from distsign.rivals.stochastic import StochasticRival
from distsign.wire.bits import float_bytes, num_bit_bytes, pack_bits, read_floats, unpack_bits

__all__ = ["TernGrad"]


class TernGrad(StochasticRival, GatheringRival):
    """TernGrad (Wen et al., arXiv 1705.07878, Sec. 3, Eq. 1 to 3), by layer and with gradient clipping.

        s = max |g|       sent = s sign(g) z       z = 1 with probability |g| / s, else 0

    Unbiased but for the clipping, which first limits each tensor to `clip` standard deviations (Eq. 13). A tensor
    without any deviation, as of one element, is not clipped: it would never move.

    Sent: two bits a component and one float32 a tensor; the paper counts log2(3) = 1.58 bits. Each rank has its own
    scale, where the paper may share the largest, so that a server can add integers.

    Args:
        clip: in standard deviations of the tensor; 0 for none.
        seed: of the draws; ranks draw apart.
    """

    def __init__(self, clip: float = 2.5, seed: int = 0) -> None:
        super().__init__(seed)
        self.clip = require_range("clip", clip, 0, math.inf)

    def encode(self, name: str, gradient: Tensor) -> Tensor:
        """See `GatheringRival`."""
        if self.clip:
            limit = self.clip * gradient.std(correction=0)
            gradient = torch.where(limit > 0, gradient.clamp(-limit, limit), gradient)
        scale = gradient.abs().max()
        chosen = self.uniform(name, gradient) * scale < gradient.abs()
        return torch.cat([float_bytes(scale), pack_bits(chosen), pack_bits(gradient > 0)])

    def accumulate(self, payload: Tensor, total: Tensor) -> None:
        """See `GatheringRival`."""
        num_bytes = num_bit_bytes(total.numel())
        chosen = unpack_bits(payload[4 : 4 + num_bytes], total.numel())
        positive = unpack_bits(payload[4 + num_bytes :], total.numel())
        signs = chosen * (2.0 * positive - 1)
        total += (read_floats(payload[:4]) * signs).view_as(total)

    def payload_bytes(self, shape: Sequence[int], step: int) -> int:
        """See `GatheringRival`."""
        del step
        return 4 + 2 * num_bit_bytes(math.prod(shape))
