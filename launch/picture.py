"""Pictures of what was measured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#3b6ea8", "#d1495b", "#2e8b57", "#8d6a9f", "#c98a1b", "#4a4a4a")
"""Told apart by most colour-blind people, and in print by their lightness."""


def draw_accuracy_against_bytes(curves: dict[str, list[dict[str, Any]]], title: str, path: Path) -> None:
    """Draw test accuracy against the bytes that a rank has sent and received by then, a line per scheme.

    Args:
        curves: for each scheme its metric lines, in order of the step. A scheme that has sent nothing is left out.
        title: above the picture.
        path: the PNG file, replaced if it is there.
    """
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    figure = Figure(figsize=(8, 5), dpi=160, layout="constrained")
    axes = figure.subplots()
    drawn: dict[str, list[tuple[float, float]]] = {}
    for name, lines in curves.items():
        points = [(line["sent_bytes"] + line["received_bytes"], 100 * line["test_accuracy"]) for line in lines]
        points = [(num_bytes / 1e6, accuracy) for num_bytes, accuracy in points if num_bytes]
        if points:
            drawn[name] = points
    for index, points in enumerate(drawn.values()):
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, color=COLOURS[index % len(COLOURS)], linewidth=2, marker="o", markersize=4)
    if drawn:
        _frame(axes, [point for points in drawn.values() for point in points])
    for index, (name, points) in enumerate(drawn.items()):
        _label(
            axes,
            f"{name}\n{points[-1][1]:.1f} % for {_megabytes(points[-1][0])}",
            points,
            COLOURS[index % len(COLOURS)],
        )
    axes.set_xlabel("MB sent and received, mean over the ranks (log scale)")
    axes.set_ylabel("test accuracy, %")
    axes.grid(visible=True, which="major", color="#e4e4e4", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Test accuracy against bytes on the link", fontsize=13, fontweight="bold", loc="left", pad=22)
    axes.text(0, 1.02, title, transform=axes.transAxes, fontsize=8, color="#555555")
    figure.savefig(path)


def _frame(axes: Axes, points: list[tuple[float, float]]) -> None:
    """Set the axes close around the data, with room above for the labels; ticks at 1, 2, 5 and 10."""
    from matplotlib.ticker import LogLocator, NullLocator

    xs, ys = zip(*points, strict=True)
    axes.set_xscale("log")
    axes.set_xlim(min(xs) / 1.25, max(xs) * 1.25)
    height = max(max(ys) - min(ys), 1.0)
    axes.set_ylim(min(ys) - 0.06 * height, max(ys) + 0.22 * height)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")


def _label(axes: Axes, text: str, points: list[tuple[float, float]], colour: str) -> None:
    """Name a line above its end, where a rising one leaves room; on white, so that no grid line crosses it."""
    x = points[-1][0]
    low, high = axes.get_xlim()
    place = math.log(x / low) / math.log(high / low)
    axes.annotate(
        text,
        (x, max(accuracy for _, accuracy in points[-3:])),
        xytext=(0, 9),
        textcoords="offset points",
        ha="left" if place < 0.2 else "right" if place > 0.8 else "center",
        va="bottom",
        color=colour,
        fontweight="bold",
        fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
    )


def _megabytes(value: float) -> str:
    return f"{value:,.0f} MB" if value >= 100 else f"{value:.3g} MB"
