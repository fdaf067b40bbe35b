"""EF-signSGD: signs times their mean magnitude, with error feedback."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distsign.rivals.base import GatheringRival
from distsign.wire.bits import float_bytes, num_bit_bytes, pack_bits, read_floats, unpack_bits

__all__ = ["EFSignSGD"]


class EFSignSGD(GatheringRival):
    """EF-signSGD (Karimireddy, Rebjock, Stich, Jaggi, arXiv 1901.09847, Alg. 1), scaled by layer.

        u = g + e       sent = (||u||_1 / n) sign(u)       e = u - sent

    Sent: one bit a component, where 0 counts as positive, and one float32 a tensor.

    Departures: the paper adds `lr * g` to the error; a hook knows no learning rate and adds g, which is the same for a
    constant one. Several workers as in the paper's Sec. 6.1: the mean of all, but gathered by each rank.
    """

    def encode(self, name: str, gradient: Tensor) -> Tensor:
        """See `GatheringRival`."""
        error = self.kept(name, "error", gradient)
        wanted = gradient + error
        scale, positive = wanted.abs().mean(), wanted >= 0
        error.copy_(wanted - torch.where(positive, scale, -scale))
        return torch.cat([float_bytes(scale), pack_bits(positive)])

    def accumulate(self, payload: Tensor, total: Tensor) -> None:
        """See `GatheringRival`."""
        scale = read_floats(payload[:4])[0]
        positive = unpack_bits(payload[4:], total.numel()).view_as(total)
        total += torch.where(positive, scale, -scale)

    def payload_bytes(self, shape: Sequence[int], step: int) -> int:
        """See `GatheringRival`."""
        del step
        return 4 + num_bit_bytes(math.prod(shape))
