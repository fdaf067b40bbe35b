"""Rivals that draw random numbers: apart on each rank, and the same again when a run is resumed."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from distsign.rivals.base import HookRival

__all__ = ["StochasticRival"]


class StochasticRival(HookRival):
    """A scheme that rounds at random, without bias.

    Args:
        seed: of the draws.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = int(seed)

    def uniform(self, name: str, like: Tensor) -> Tensor:
        """Return uniform numbers in [0, 1), float32, in the shape and on the device of a tensor.

        They depend on seed, rank, step and the parameter's name: never on the order in which buckets come, which
        changes after a process's first step.
        """
        key = zlib.crc32(f"{self._seed} {self._link.rank} {self.step} {name}".encode())
        return torch.rand(like.shape, generator=torch.Generator().manual_seed(key)).to(like.device)
