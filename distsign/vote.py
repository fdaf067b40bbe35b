"""The rule of the vote, in one line of integers: the oracle that every packed tally is held to."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["majority_vote", "require_margin"]


def require_margin(margin: object, world_size: int | None = None) -> int:
    """Return `margin` if a verdict can ever reach it, else raise a `ValueError` that says what it means.

    Args:
        margin: least lead, an integer of at least 1.
        world_size: voters, where they are known: no lead is longer than that.
    """
    if isinstance(margin, bool) or not isinstance(margin, int) or margin < 1:
        raise ValueError(
            f"margin must be an integer of at least 1, got {margin!r}: a verdict needs abs(tally) >= margin, and a tie "
            "is 0"
        )
    if world_size is not None and margin > world_size:
        raise ValueError(
            f"margin must be at most the number of voters, {world_size}, got {margin}: no lead could reach it and no "
            "parameter would ever move"
        )
    return margin


def majority_vote(ballots: Tensor, margin: int = 1) -> Tensor:
    """Return the verdict on each component: `sign(tally)` where `abs(tally) >= margin`, else 0.

    Only integers are counted, so the verdict does not depend on the order of the voters
    (majority vote: Bernstein et al., arXiv 1810.05291; abstention and margin: DESIGN.md).

    Args:
        ballots: int8 `[world_size, num_elements]` of -1, 0, +1.
        margin: least lead for a verdict other than 0; a tie is always 0.

    Returns:
        int8 `[num_elements]`.

    Example:
        >>> majority_vote(torch.tensor([[1, 0, -1], [1, 0, 1], [-1, 1, 0]], dtype=torch.int8))
        tensor([1, 1, 0], dtype=torch.int8)
        >>> majority_vote(torch.tensor([[1, 0, -1], [1, 0, 1], [-1, 1, 0]], dtype=torch.int8), margin=2)
        tensor([0, 0, 0], dtype=torch.int8)
    """
    tally = ballots.to(torch.int32).sum(0)
    return torch.where(tally.abs() >= require_margin(margin), tally.sign(), torch.zeros_like(tally)).to(torch.int8)
