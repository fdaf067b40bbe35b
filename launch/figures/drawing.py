"""Pictures of the figures, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.figures.gradients import RemainingRatio
from launch.figures.landscape import Landscape
from launch.picture import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_remaining(found: RemainingRatio, title: str, path: Path) -> None:
    """Draw the remaining ratio against alpha for both kinds of samples."""
    figure = _figure(7, 4.4)
    axes = figure.subplots()
    for colour, name, values, count in (
        (COLOURS[0], "correctly classified", found.correct, found.num_correct),
        (COLOURS[1], "wrongly classified", found.wrong, found.num_wrong),
    ):
        axes.plot(found.alphas, values, color=colour, marker="o", markersize=3, label=f"{name} ({count} samples)")
    positive = [alpha for alpha in found.alphas if alpha > 0]
    if positive:
        axes.set_xscale("symlog", linthresh=min(positive))
    axes.set_ylim(0, 1.05)
    _label(axes, "confidence threshold alpha", "remaining ratio", title)
    axes.legend(frameon=False)
    figure.savefig(path)


def draw_sparsity(rows: Sequence[Mapping[str, float]], title: str, path: Path) -> None:
    """Draw the share of components without a ballot against epochs: weights one by one, and overall."""
    figure = _figure(8, 4.4)
    axes = figure.subplots()
    epochs = [row["epoch"] for row in rows]
    names = [name for name in rows[0] if name not in {"epoch", "overall"} and not name.endswith("bias")]
    shown = names if len(names) <= len(COLOURS) else names[:: -(-len(names) // len(COLOURS))]
    for colour, name in zip(COLOURS, shown, strict=False):
        axes.plot(epochs, [row[name] for row in rows], color=colour, linewidth=1, marker=".", label=name)
    axes.plot(epochs, [row["overall"] for row in rows], color="black", linewidth=2, marker="o", label="overall")
    _label(axes, "epoch", "sparsity, share of zeros", title)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path)


def draw_landscapes(found: Mapping[str, Landscape], title: str, path: Path) -> None:
    """Draw the slices in one picture, and the surface of each beside it, all with the same contours."""
    import numpy as np

    figure = _figure(4.6 * (len(found) + 1), 4.2)
    first, *others = figure.subplots(1, len(found) + 1)
    values = np.concatenate([np.array(each.surface).ravel() for each in found.values()])
    finite = values[np.isfinite(values)]
    levels = np.geomspace(max(finite.min(), 1e-3), max(finite.max(), 2e-3), 16)
    for colour, axes, (name, each) in zip(COLOURS, others, found.items(), strict=False):
        first.plot(each.along, each.slice, color=colour, marker=".", label=f"{name}, centre {each.centre:.3f}")
        drawn = axes.contour(each.along, each.along, np.array(each.surface).T, levels=levels, cmap="viridis")
        axes.clabel(drawn, fontsize=6, fmt="%.2g")
        axes.plot(0, 0, marker="+", color="black")
        axes.set_aspect("equal")
        _label(axes, "first direction, in filter lengths", "second direction", name)
    first.set_yscale("log")
    first.legend(frameon=False, fontsize=8)
    _label(first, "first direction, in filter lengths", "training loss, nats", title)
    figure.savefig(path)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _label(axes: Axes, x: str, y: str, title: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=9, loc="left")
    axes.grid(visible=True, color="#e4e4e4", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
