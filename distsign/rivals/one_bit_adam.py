"""1-bit Adam: Adam's moments in full precision first, then signs of the momentum with a frozen variance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from distsign.collectives import Link
from distsign.rivals.base import HookRival, Piece, require_range
from distsign.traffic import ExchangeBytes, exchange_bytes, ring_all_reduce_bytes
from distsign.wire.bits import float_bytes, num_bit_bytes, pack_bits, read_floats, unpack_bits

__all__ = ["OneBitAdam"]


class OneBitAdam(HookRival):
    """1-bit Adam (Tang et al., arXiv 2102.02888, Alg. 1), two-way error feedback.

    For `warmup_steps`:   g = mean of the gradients       m = b1 m + (1 - b1) g       v = b2 v + (1 - b2) g²
    Then, v staying:      u = b1 m + (1 - b1) g + e       q = (||u||_1 / n) sign(u)   e = u - q
                          owner: U = mean of q + E        Q = (||U||_1 / n) sign(U)   E = U - Q       m = Q on all ranks
    Both:                 p.grad = m / (sqrt(v) + eps)

    Step on it with `sgd` without momentum: the moments are here. As published there is no bias correction. Sent in the
    warm-up: a float32 all-reduce. Then one bit a component and one float32 a shard of a tensor, to its owner and back.

    Departure: signs give each component of a shard the same size, also those whose v is next to nothing, and then
    m / sqrt(v) has no bound (a LeNet with dead units ends at chance). So `p.grad` is limited to what Adam itself
    can come to, `(1 - b1) / sqrt(1 - b2)` (Kingma and Ba, arXiv 1412.6980, Sec. 2.1), and is 0 where v is 0.

    Args:
        warmup_steps: in full precision; the paper takes a sixth to a quarter of the training.
        b1: of the momentum.
        b2: of the variance.
        eps: added to the root.
    """

    gives = "direction"

    def __init__(self, warmup_steps: int = 200, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> None:
        super().__init__()
        self.warmup_steps = int(require_range("warmup_steps", warmup_steps, 1, 2**31))
        self.b1, self.b2 = require_range("b1", b1, 0, 1), require_range("b2", b2, 0, 1)
        self.eps = require_range("eps", eps, 0, 1, low_open=True)

    def combine(self, pieces: Sequence[Piece], link: Link) -> None:
        """See `HookRival`."""
        if self.step < self.warmup_steps:
            self._warm_up(pieces, link)
        else:
            self._exchange(pieces, link)
        limit = (1 - self.b1) / math.sqrt(1 - self.b2) if self.b2 < 1 else math.inf
        for piece in pieces:
            momentum, variance = (self.kept(piece.name, what, piece.gradient) for what in ("momentum", "variance"))
            torch.div(momentum, variance.sqrt() + self.eps, out=piece.gradient)
            piece.gradient.clamp_(-limit, limit).mul_(variance > 0)

    def _warm_up(self, pieces: Sequence[Piece], link: Link) -> None:
        flat = torch.cat([piece.gradient.reshape(-1) for piece in pieces])
        link.all_reduce_mean(flat)
        for piece, mean in zip(pieces, torch.split(flat, [p.gradient.numel() for p in pieces]), strict=True):
            gradient = mean.view_as(piece.gradient)
            self.kept(piece.name, "momentum", gradient).lerp_(gradient, 1 - self.b1)
            self.kept(piece.name, "variance", gradient).mul_(self.b2).addcmul_(gradient, gradient, value=1 - self.b2)

    def _exchange(self, pieces: Sequence[Piece], link: Link) -> None:
        world_size, rank = link.world_size, link.rank
        payloads = [self.encode(piece.name, piece.gradient, world_size) for piece in pieces]
        sizes = [sum(payload[k].numel() for payload in payloads) for k in range(world_size)]
        own = [payload[rank].numel() for payload in payloads]
        by_owner = [payload[k] for k in range(world_size) for payload in payloads]
        received = link.all_to_all(torch.cat(by_owner), sizes, [sizes[rank]] * world_size).view(world_size, sizes[rank])
        columns = torch.split(received, own, dim=1)
        back = [
            self.answer(piece.name, column, torch.tensor_split(piece.gradient.view(-1), world_size)[rank])
            for piece, column in zip(pieces, columns, strict=True)
        ]
        verdict = torch.cat(back)
        found = link.share(verdict, sizes)
        parts = iter(torch.split(found, [part.numel() for part in by_owner]))
        for k in range(world_size):
            for piece in pieces:
                momentum = self.kept(piece.name, "momentum", piece.gradient).view(-1)
                shard = torch.tensor_split(momentum, world_size)[k]
                shard.copy_(_decode(next(parts), shard.numel()))

    def encode(self, name: str, gradient: Tensor, world_size: int) -> list[Tensor]:
        """Return this rank's payloads for each owner's shard of a parameter, and keep what they do not say."""
        error = self.kept(name, "error", gradient)
        error += self.kept(name, "momentum", gradient).lerp(gradient, 1 - self.b1)
        return [_encode(shard) for shard in torch.tensor_split(error.view(-1), world_size)]

    def answer(self, name: str, received: Tensor, like: Tensor) -> Tensor:
        """Return the owner's payload, from those of all ranks on its shard, `[world_size, n]`; keep the rest."""
        error = self.kept(name, "owner_error", like)
        error += sum(_decode(row, like.numel()) for row in received) / len(received)
        return _encode(error)

    def bucket_bytes(self, shapes: Sequence[Sequence[int]], rank: int, world_size: int, step: int) -> ExchangeBytes:
        """See `HookRival`."""
        counts = [int(np.prod(shape)) for shape in shapes]
        if step < self.warmup_steps:
            both = ring_all_reduce_bytes(sum(counts), 4, world_size)
            return ExchangeBytes(both // 2, both - both // 2)
        sizes = [
            sum(4 + num_bit_bytes(n // world_size + (k < n % world_size)) for n in counts) for k in range(world_size)
        ]
        return exchange_bytes(sizes, rank)


def _encode(wanted: Tensor) -> Tensor:
    """Return signs and their scale, and leave in `wanted` what they do not say."""
    positive = wanted >= 0
    scale = wanted.abs().mean() if wanted.numel() else wanted.new_zeros(())
    wanted -= torch.where(positive, scale, -scale)
    return torch.cat([float_bytes(scale), pack_bits(positive)])


def _decode(payload: Tensor, num_elements: int) -> Tensor:
    scale = read_floats(payload[:4].clone())
    return torch.where(unpack_bits(payload[4:].contiguous(), num_elements), scale, -scale)
