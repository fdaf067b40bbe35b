"""signSGD and Signum with a majority vote."""

from __future__ import annotations

from torch import Tensor

from distsign.rivals.base import require_range
from distsign.rivals.voting import VotingRival

__all__ = ["SignSGDVote", "SignumVote"]


class SignSGDVote(VotingRival):
    """signSGD with majority vote (Bernstein, Wang, Azizzadenesheli, Anandkumar, arXiv 1802.04434, Alg. 3).

        p.grad = sign(sum over the ranks of sign(g))

    Sent: one bit a component to its owner, one bit back. Step on it with `sign-sgd`.

    Departure: 0 counts as positive, which one bit must decide (the paper leaves it open).
    """

    def direction(self, name: str, gradient: Tensor) -> Tensor:
        """See `VotingRival`."""
        del name
        return gradient


class SignumVote(VotingRival):
    """Signum with majority vote (Bernstein, Zhao, Azizzadenesheli, Anandkumar, arXiv 1810.05291, Alg. 1).

        m = momentum m + (1 - momentum) g       p.grad = sign(sum over the ranks of sign(m))

    Sent: one bit a component to its owner, one bit back. Step on it with `sign-sgd`, whose decay is decoupled as there.

    Args:
        momentum: of each rank's own average.
    """

    def __init__(self, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = require_range("momentum", momentum, 0, 1)

    def direction(self, name: str, gradient: Tensor) -> Tensor:
        """See `VotingRival`."""
        return self.kept(name, "momentum", gradient).mul_(self.momentum).add_(gradient, alpha=1 - self.momentum)
