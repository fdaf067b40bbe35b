"""A majority vote of one bit a component and direction: what sign-based rivals combine with."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from distsign.collectives import Link
from distsign.rivals.base import HookRival, Piece
from distsign.traffic import ExchangeBytes, exchange_bytes
from distsign.wire.bits import num_bit_bytes, pack_bits, unpack_bits

__all__ = ["VotingRival"]


class VotingRival(HookRival):
    """A scheme whose ranks vote with signs: each owns one shard of a bucket, counts it and tells the others.

    One bit has no zero: 0 and -0.0 count as positive, and so does a tie. Bytes per rank stay flat as ranks are added
    (the papers have a server). `p.grad` is -1 or +1 afterwards.
    """

    gives = "signs"

    @abstractmethod
    def direction(self, name: str, gradient: Tensor) -> Tensor:
        """Return what this rank votes with the signs of, and take note of the gradient."""

    def combine(self, pieces: Sequence[Piece], link: Link) -> None:
        """See `HookRival`."""
        ballots = torch.cat([(self.direction(p.name, p.gradient) >= 0).reshape(-1) for p in pieces])
        shards = torch.tensor_split(ballots, link.world_size)
        sizes = [num_bit_bytes(shard.numel()) for shard in shards]
        own = sizes[link.rank]
        received = link.all_to_all(torch.cat([pack_bits(shard) for shard in shards]), sizes, [own] * link.world_size)
        rows = received.view(link.world_size, own)
        tally = sum(unpack_bits(row, shards[link.rank].numel()).int() for row in rows)
        verdict = pack_bits(torch.as_tensor(2 * tally >= link.world_size))
        back = link.share(verdict, sizes)
        verdicts = [
            unpack_bits(part, shard.numel()) for part, shard in zip(torch.split(back, sizes), shards, strict=True)
        ]
        found = torch.split(2.0 * torch.cat(verdicts) - 1, [p.gradient.numel() for p in pieces])
        for piece, mine in zip(pieces, found, strict=True):
            piece.gradient.copy_(mine.view_as(piece.gradient))

    def bucket_bytes(self, shapes: Sequence[Sequence[int]], rank: int, world_size: int, step: int) -> ExchangeBytes:
        """See `HookRival`."""
        del step
        least, more = divmod(sum(math.prod(shape) for shape in shapes), world_size)
        return exchange_bytes([num_bit_bytes(least + (k < more)) for k in range(world_size)], rank)
