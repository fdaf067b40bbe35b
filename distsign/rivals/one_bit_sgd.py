"""1-bit SGD: signs and two reconstruction values a row, with error feedback."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distsign.rivals.base import GatheringRival
from distsign.wire.bits import float_bytes, num_bit_bytes, pack_bits, read_floats, unpack_bits

__all__ = ["OneBitSGD"]


class OneBitSGD(GatheringRival):
    """1-bit SGD (Seide, Fu, Droppo, Li, Yu, *1-bit stochastic gradient descent*, Interspeech 2014, Sec. 3).

        u = g + e       b = [u >= 0]       q = the mean of those u of its row that have the same bit       e = u - q

    Sent: one bit a component and two float32 a row. A row is what one output unit of a layer learns (the first
    dimension of the parameter; a vector is one row): the paper has columns, of matrices that are stored the other way.

    Departures: ranks gather all payloads, where the paper exchanges shards and quantises their sums again; no
    AdaGrad, which is the optimizer's part; no full-precision start.
    """

    def encode(self, name: str, gradient: Tensor) -> Tensor:
        """See `GatheringRival`."""
        error = self.kept(name, "error", gradient)
        rows = _rows(gradient + error)
        bits = rows >= 0
        means = torch.stack([_mean_where(rows, ~bits), _mean_where(rows, bits)])
        error.copy_((rows - torch.where(bits, means[1], means[0])).view_as(error))
        return torch.cat([float_bytes(means), pack_bits(bits)])

    def accumulate(self, payload: Tensor, total: Tensor) -> None:
        """See `GatheringRival`."""
        rows = _rows(total)
        low, high = read_floats(payload[: 8 * len(rows)]).view(2, -1, 1)
        bits = unpack_bits(payload[8 * len(rows) :], total.numel()).view_as(rows)
        rows += torch.where(bits, high, low)

    def payload_bytes(self, shape: Sequence[int], step: int) -> int:
        """See `GatheringRival`."""
        del step
        num_rows = shape[0] if len(shape) > 1 else 1
        return 8 * num_rows + num_bit_bytes(math.prod(shape))


def _rows(gradient: Tensor) -> Tensor:
    return gradient.view(gradient.shape[0], -1) if gradient.ndim > 1 else gradient.view(1, -1)


def _mean_where(rows: Tensor, chosen: Tensor) -> Tensor:
    """Return the mean of the chosen components of each row, `[rows, 1]`; 0 where there are none."""
    return (rows * chosen).sum(1, keepdim=True) / chosen.sum(1, keepdim=True).clamp(min=1)
