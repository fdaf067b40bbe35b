"""Means with their uncertainty over seeds, and what is worth its bytes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Interval", "mean_and_interval", "pareto_front"]

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its 95 % confidence interval; None where one value says nothing of the spread."""

    mean: float
    half_width: float | None


def mean_and_interval(values: Sequence[float]) -> Interval:
    """Return the mean and the 95 % interval by Student's t, for few values that are about normally distributed.

    `half_width = t(0.975, n - 1) * s / sqrt(n)`, with s from n - 1; the quantile is SciPy's.

    Args:
        values: at least one.

    Raises:
        ValueError: SciPy is missing.

    Example:
        >>> interval = mean_and_interval([1.0, 2.0, 3.0])
        >>> interval.mean, round(interval.half_width, 3)
        (2.0, 2.484)
    """
    count = len(values)
    mean = statistics.fmean(values)
    if count == 1 or not all(map(math.isfinite, values)):
        return Interval(mean, None)
    try:
        from scipy.special import stdtrit
    except ImportError:
        raise ValueError("intervals need SciPy: pip install 'distsign[launch]'") from None
    quantile = float(stdtrit(count - 1, (1 + LEVEL) / 2))
    return Interval(mean, quantile * statistics.stdev(values) / math.sqrt(count))


def pareto_front(costs: Sequence[float], values: Sequence[float], *, higher_is_better: bool) -> list[bool]:
    """Say of each point whether none is at least as good in both and better in one.

    Args:
        costs: less is better, such as bytes.
        values: as many; NaN is never on the front.
        higher_is_better: which way the values go.

    Example:
        >>> pareto_front([1, 2, 3], [0.5, 0.4, 0.9], higher_is_better=True)
        [True, False, True]
    """
    points = [(cost, -value if higher_is_better else value) for cost, value in zip(costs, values, strict=True)]
    return [
        not math.isnan(mine[1]) and not any(a <= mine[0] and b <= mine[1] and (a, b) != mine for a, b in points)
        for mine in points
    ]
