"""From one parameter's gradient to its ballots, without a vote: what a single worker does."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from distsign.confidence import Confidence
from distsign.kernels import Spans, kernels_for

__all__ = ["Kept", "cast_ballots", "cast_with_carry", "keep_idle_stats"]

_LARGEST = torch.finfo(torch.float32).max
_DEAD = 1e-30


@dataclass(frozen=True)
class Kept:
    """What one worker keeps of one parameter between steps.

    Attributes:
        stats: float64 `[num_stats]`, of the confidence function.
        carry: float32 in the shape of the parameter, what has not led to a ballot yet: in gradient units, or, with
            `square`, in units of each component's root mean square.
        square: float32 like `carry`, the running mean of the squared gradient; None where the confidence function has
            no `square_decay`.
    """

    stats: Tensor
    carry: Tensor
    square: Tensor | None


def keep_idle_stats(old: Tensor, new: Tensor, active: Tensor | None) -> Tensor:
    """Return `new`, but `old` in the rows of parameters whose whole gradient is zero (DESIGN.md, rules of the vote).

    Args:
        old: float64 `[num_params, num_stats]` before the step.
        new: the same after it.
        active: bool `[num_params]`, False where the gradient is zero; None where the confidence function does not look
            at the gradient, so that there is nothing to keep.
    """
    return new if active is None else torch.where(active[:, None], new, old)


def cast_ballots(
    confidence: Confidence, grad: Tensor, stats: Tensor, factor: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the ballots of one gradient and the confidence function's stats after them.

    Args:
        confidence: the map that decides which components vote.
        grad: gradient in true units, any shape, floating dtype, finite. Not changed.
        stats: float64 `[num_stats]` after the last step. Not changed.
        factor: on the threshold, `Confidence.warm_up`; a number or a float64 scalar tensor on the gradient's device.

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
    moments = _moments(confidence, flat)
    alpha, new_rows = confidence.thresholds(rows, moments)
    votes = flat.abs() > (alpha * factor).float()
    new_rows = confidence.observe(new_rows, _density(votes))
    ballots = torch.where(votes, flat.sign(), 0.0).to(grad.dtype).reshape(grad.shape)
    active = None if moments is None else (moments != 0).any(1)
    return ballots, keep_idle_stats(rows, new_rows, active).reshape(stats.shape)


def cast_with_carry(
    confidence: Confidence, grad: Tensor, kept: Kept, factor: float | Tensor = 1.0
) -> tuple[Tensor, Kept]:
    """Return the ballots of one gradient on top of the carry, and what is kept after them.

    The arithmetic is that of `Kernels.pack_carry` with `clear`, in plain torch, on any device and without waiting for
    it: `tests/test_ballots.py` holds both equal, bit for bit. A gradient of zeros casts no ballot and changes nothing.

    Args:
        confidence: the map that decides which components vote.
        grad: gradient in true units, any shape, floating dtype, finite. Not changed.
        kept: after the last step, `carry` and `square` in the shape of `grad`. Not changed.
        factor: on the threshold, `Confidence.warm_up`; a number or a float64 scalar tensor on the gradient's device.

    Returns:
        `(ballots, kept)`: -1, 0 or +1 in the shape and dtype of `grad`, and what to keep.

    Example:
        >>> from distsign import RMSConfidence
        >>> kept = Kept(torch.zeros(1, dtype=torch.float64), torch.zeros(2), torch.zeros(2))
        >>> for _ in range(3):  # equal gradients count 1 each, so that the third passes 2.5
        ...     ballots, kept = cast_with_carry(RMSConfidence(k=2.5, start=2.5), torch.tensor([-3.0, 1e-6]), kept)
        ...     print(ballots.tolist())
        [0.0, 0.0]
        [0.0, 0.0]
        [-1.0, 1.0]
    """
    if grad.numel() == 0:
        return torch.zeros_like(grad), kept
    g = grad.detach().float()
    rows = kept.stats.double().reshape(1, -1)
    alpha, new_rows = confidence.thresholds(rows, _moments(confidence, g.reshape(-1)))
    if kept.square is None:
        u, square = kept.carry + g, None
    else:
        decay = confidence.square_decay
        assert decay is not None
        # Each factor is rounded to float32 by itself, and products and sums are operations of their own, as there.
        square = (kept.square * decay + (g * g) * (1.0 - decay)).clamp(max=_LARGEST)
        correction = confidence.corrections(new_rows)
        scaled = g if correction is None else g * correction.float().reshape(())
        u = torch.where(square > _DEAD, kept.carry + scaled / _root(square), kept.carry)
    active = (g != 0).any()
    votes = (u.abs() > (alpha * factor).float().reshape(())) & active
    new_rows = confidence.observe(new_rows, _density(votes))
    ballots = torch.where(votes, u.sign(), 0.0).to(grad.dtype)
    return ballots, Kept(
        keep_idle_stats(rows, new_rows, active.reshape(1)).reshape(kept.stats.shape),
        torch.where(active, torch.where(votes, 0.0, u), kept.carry),
        None if square is None or kept.square is None else torch.where(active, square, kept.square),
    )


def _moments(confidence: Confidence, flat: Tensor) -> Tensor | None:
    return kernels_for(flat.device).moments(flat, _whole(flat.numel())) if confidence.uses_moments else None


@lru_cache(maxsize=4096)
def _whole(num_elements: int) -> Spans:
    """Return the span of a parameter by itself; kept, because kernels keep what they know of it on a device."""
    return Spans.whole([num_elements])


def _density(votes: Tensor) -> Tensor:
    return votes.sum().double().reshape(1) / votes.numel()


def _root(x: Tensor) -> Tensor:
    """Return the correctly rounded root, which torch's own on the CPU is not always."""
    if x.device.type != "cpu":
        return x.sqrt()
    root = x.clone()
    np.sqrt(root.numpy(), out=root.numpy())
    return root
