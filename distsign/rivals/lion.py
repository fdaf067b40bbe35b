"""Distributed Lion with a majority vote."""

from __future__ import annotations

from torch import Tensor

from distsign.rivals.base import require_range
from distsign.rivals.voting import VotingRival

__all__ = ["DistributedLion"]


class DistributedLion(VotingRival):
    """Distributed Lion with majority vote (Liu et al., arXiv 2404.00438, Alg. 1).

        d = sign(b1 m + (1 - b1) g)       m = b2 m + (1 - b2) g       p.grad = sign(sum over the ranks of d)

    Sent: one bit a component to its owner, one bit back. Step on it with `sign-sgd` and its decoupled decay:
    `p -= lr (p.grad + weight_decay p)`.

    Args:
        b1: weight of the average in what is voted.
        b2: of the average.
    """

    def __init__(self, b1: float = 0.9, b2: float = 0.99) -> None:
        super().__init__()
        self.b1, self.b2 = require_range("b1", b1, 0, 1), require_range("b2", b2, 0, 1)

    def direction(self, name: str, gradient: Tensor) -> Tensor:
        """See `VotingRival`."""
        average = self.kept(name, "average", gradient)
        wanted = average.lerp(gradient, 1 - self.b1)
        average.lerp_(gradient, 1 - self.b2)
        return wanted
