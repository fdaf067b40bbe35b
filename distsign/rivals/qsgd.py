"""QSGD: stochastic levels of the norm, Elias coded."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distsign.collectives import Link
from distsign.rivals.base import Piece, require_range
from distsign.rivals.elias import read_levels, write_levels
from distsign.rivals.stochastic import StochasticRival
from distsign.wire.bits import float_bytes, read_floats

__all__ = ["QSGD"]


class QSGD(StochasticRival):
    """QSGD (Alistarh, Grubic, Li, Tomioka, Vojnovic, arXiv 1610.02132, Sec. 3.1 and 3.2), by chunks (Sec. 4).

        sent = ||g||_2 sign(g) l / levels       l = floor(levels |g| / ||g||_2 + u), u uniform in [0, 1)

    Unbiased. Sent: the norm of each chunk as a float32; then, for each component that is not 0, its distance from the
    last such one, its sign, and l, distances and l in Elias omega codes (the paper's Code_s, here one stream a tensor).
    Lengths depend on the numbers: ranks tell each other first, in 8 bytes a tensor.

    Coding is done on the CPU, also for a GPU's gradients.

    Args:
        levels: number of levels above 0, the paper's s.
        chunk: components that share a norm, the paper's bucket.
        seed: of the draws; ranks draw apart.
    """

    def __init__(self, levels: int = 7, chunk: int = 512, seed: int = 0) -> None:
        super().__init__(seed)
        self.levels = int(require_range("levels", levels, 1, 2**20))
        self.chunk = int(require_range("chunk", chunk, 1, 2**31))

    def encode(self, name: str, gradient: Tensor) -> Tensor:
        """Return a tensor's payload, uint8: norms, then the stream; on the CPU."""
        flat = gradient.reshape(-1).cpu()
        num_chunks = -(-flat.numel() // self.chunk)
        padded = torch.zeros(num_chunks * self.chunk)
        padded[: flat.numel()] = flat
        norms = padded.view(num_chunks, self.chunk).norm(dim=1)
        scaled = self.levels * flat.abs() / norms.repeat_interleave(self.chunk)[: flat.numel()]
        # A chunk of zeros has norm 0.
        level = (scaled.nan_to_num(0.0) + self.uniform(name, flat)).floor().int()
        stream = write_levels(torch.where(flat < 0, -level, level).numpy())
        return torch.cat([float_bytes(norms), torch.from_numpy(stream)])

    def accumulate(self, payload: Tensor, total: Tensor) -> None:
        """Add what a payload stands for to `total`, in place."""
        num_chunks = -(-total.numel() // self.chunk)
        norms = read_floats(payload[: 4 * num_chunks])
        levels = torch.from_numpy(read_levels(payload[4 * num_chunks :].numpy(), total.numel()))
        found = norms.repeat_interleave(self.chunk)[: total.numel()] * levels / self.levels
        total += found.view_as(total).to(total.device)

    def combine(self, pieces: Sequence[Piece], link: Link) -> None:
        """See `HookRival`: the mean of what the payloads stand for."""
        payloads = [self.encode(piece.name, piece.gradient) for piece in pieces]
        device = pieces[0].gradient.device
        lengths = link.all_gather(torch.tensor([payload.numel() for payload in payloads], device=device)).cpu()
        sizes: list[int] = lengths.sum(1).tolist()
        mine = torch.cat(payloads).to(device)
        everyones = link.share(mine, sizes).cpu()
        parts = iter(torch.split(everyones, lengths.flatten().tolist()))
        for piece in pieces:
            piece.gradient.zero_()
        for _ in range(link.world_size):
            for piece in pieces:
                self.accumulate(next(parts).clone(), piece.gradient)
        for piece in pieces:
            piece.gradient.div_(link.world_size)

    def bucket_bytes(self, shapes: Sequence[Sequence[int]], rank: int, world_size: int, step: int) -> None:
        """See `HookRival`: what has been drawn decides it."""

    def payload_bound_bytes(self, num_elements: int) -> float:
        """Return the paper's bound on the mean length (Thm. 3.2), of one chunk that is the whole tensor.

        `(3 + (3/2 + o(1)) log2(2 (s² + n) / (s (s + sqrt n)))) s (s + sqrt n) + 32` bits; the o(1) is left out.
        """
        s, n = self.levels, num_elements
        dense = s * (s + math.sqrt(n))
        return ((3 + 1.5 * math.log2(2 * (s * s + n) / dense)) * dense + 32) / 8
