"""Tables as text."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["format_table"]


def format_table(cells: Sequence[Sequence[str]]) -> str:
    """Return a table, head first, its first column to the left and the others to the right.

    Example:
        >>> print(format_table([["scheme", "bytes"], ["a", "12 B"]]))
        scheme  bytes
        ------  -----
        a        12 B
    """
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [cells[0], ["-" * width for width in widths], *cells[1:]]
    align = [str.ljust, *[str.rjust] * (len(widths) - 1)]
    return "\n".join(
        "  ".join(put(cell, width) for put, cell, width in zip(align, line, widths, strict=True)).rstrip()
        for line in lines
    )
