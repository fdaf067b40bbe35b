"""Pictures of what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = ("#3b6ea8", "#d1495b", "#2e8b57", "#8d6a9f", "#c98a1b", "#4a4a4a")
"""Told apart by most colour-blind people, and in print by their lightness."""


def draw_accuracy_against_bytes(curves: dict[str, list[dict[str, Any]]], title: str, path: Path) -> None:
    """Draw test accuracy against the bytes that one rank has sent and received by then, a line per scheme.

    Args:
        curves: for each scheme its metric lines, in order of the step. A scheme that has sent nothing is left out.
        title: above the picture.
        path: the PNG file, replaced if it is there.
    """
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=(8, 5), dpi=160, layout="constrained")
    axes = figure.subplots()
    highest = 0.0
    for (name, lines), colour in zip(curves.items(), COLOURS * (1 + len(curves) // len(COLOURS)), strict=False):
        points = [(line["sent_bytes"] + line["received_bytes"], 100 * line["test_accuracy"]) for line in lines]
        points = [(num_bytes / 1e6, accuracy) for num_bytes, accuracy in points if num_bytes]
        if not points:
            continue
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=colour, linewidth=2, marker="o", markersize=4, label=name)
        axes.annotate(
            f"{ys[-1]:.1f} % for {_megabytes(xs[-1])}",
            (xs[-1], ys[-1]),
            xytext=(4, 9),
            textcoords="offset points",
            ha="right",
            color=colour,
            fontweight="bold",
            fontsize=9,
        )
        highest = max(highest, *ys)
    if highest:
        axes.set_xscale("log")
        axes.legend(frameon=False, loc="lower right")
    axes.margins(x=0.12, y=0.12)
    axes.set_xlabel("MB sent and received per rank (log scale)")
    axes.set_ylabel("test accuracy, %")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Test accuracy against bytes on the link", fontsize=13, fontweight="bold", loc="left", pad=22)
    axes.text(0, 1.02, title, transform=axes.transAxes, fontsize=8.5, color="#555555")
    figure.savefig(path)


def _megabytes(value: float) -> str:
    return f"{value:,.0f} MB" if value >= 100 else f"{value:.3g} MB"
