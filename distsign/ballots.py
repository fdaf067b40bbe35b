"""From one parameter's gradient to its ballots, without a vote: what a single worker does."""

from __future__ import annotations

import torch
from torch import Tensor

from distsign.confidence import Confidence
from distsign.kernels import Spans, kernels_for

__all__ = ["cast_ballots", "keep_idle_stats"]


def keep_idle_stats(old: Tensor, new: Tensor, active: Tensor | None) -> Tensor:
    """Return `new`, but `old` in the rows of parameters whose whole gradient is zero (DESIGN.md, rules of the vote).

    Args:
        old: float64 `[num_params, num_stats]` before the step.
        new: the same after it.
        active: bool `[num_params]`, False where the gradient is zero; None where the confidence function does not look
            at the gradient, so that there is nothing to keep.
    """
    return new if active is None else torch.where(active[:, None], new, old)


def cast_ballots(confidence: Confidence, grad: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ballots of one gradient and the confidence function's stats after them.

    Args:
        confidence: the map that decides which components vote.
        grad: gradient in true units, any shape, floating dtype, finite. Not changed.
        stats: float64 `[num_stats]` after the last step. Not changed.

    Returns:
        `(ballots, stats)`: -1, 0 or +1 in the shape and dtype of `grad`, and float64 `[num_stats]`.

    Example:
        >>> from distsign import FixedConfidence
        >>> ballots, _ = cast_ballots(FixedConfidence(0.5), torch.tensor([-1.0, 0.5, 0.0, 2.0]), torch.zeros(0))
        >>> ballots
        tensor([-1.,  0.,  0.,  1.])
    """
    if grad.numel() == 0:
        return torch.zeros_like(grad), stats
    flat = grad.detach().reshape(-1).float()
    rows = stats.double().reshape(1, -1)
    moments = kernels_for(flat.device).moments(flat, Spans.whole([flat.numel()])) if confidence.uses_moments else None
    alpha, new_rows = confidence.thresholds(rows, moments)
    votes = flat.abs() > alpha.float()
    new_rows = confidence.observe(new_rows, votes.sum().double().reshape(1) / flat.numel())
    ballots = torch.where(votes, flat.sign(), 0.0).to(grad.dtype).reshape(grad.shape)
    active = None if moments is None else (moments != 0).any(1)
    return ballots, keep_idle_stats(rows, new_rows, active).reshape(stats.shape)
