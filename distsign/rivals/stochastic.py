"""Rivals that draw random numbers: apart on each rank, and the same again when a run is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
        self._generator = torch.Generator().manual_seed(self._seed)

    def begin(self, rank: int) -> None:
        """See `HookRival`."""
        self._generator.manual_seed(self._seed + 0x9E3779B97F4A7C15 * (rank + 1) % 2**62)

    def uniform(self, like: Tensor) -> Tensor:
        """Return uniform numbers in [0, 1), float32, in the shape and on the device of a tensor."""
        return torch.rand(like.shape, generator=self._generator).to(like.device)

    def state_dict(self) -> dict[str, Any]:
        """See `Rival`."""
        return {**super().state_dict(), "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Rival`."""
        super().load_state_dict(state)
        self._generator.set_state(state["generator"])
