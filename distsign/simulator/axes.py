"""Axes of pictures: logarithmic, with plain numbers that can be read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["log_scale"]

_LABELLED = (
    (1.0,),
    (1.0, 2.0, 5.0),
    (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0),
    tuple(k / 2 for k in range(2, 20)),
)
"""What may be labelled within a decade, from few to many."""


def log_scale(axes: Axes, which: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, with plain numbers beside it, a few that do not run into each other.

    Args:
        axes: with all that is drawn on them.
        which: axis.
    """
    # Optional, and slow to import.
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter  # noqa: PLC0415

    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    low, high = axis.get_view_interval()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    axis.set_major_locator(MaxNLocator(3))  # where little more than a point is drawn
    for within in _LABELLED:
        if sum(low <= each * 10**k <= high for k in decades for each in within) >= 2:
            axis.set_major_locator(LogLocator(subs=within))
            break
    plain = FuncFormatter(lambda value, _: f"{value:,.10g}")
    axis.set_major_formatter(plain if high < 1e5 else EngFormatter(sep=""))
    axis.set_minor_formatter(NullFormatter())
