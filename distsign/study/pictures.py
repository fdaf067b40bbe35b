"""Pictures of a study, as SVG: what is reached for how many bytes, in how much time, and on the way."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from distsign.simulator.axes import log_scale
from distsign.simulator.units import format_bandwidth
from distsign.study.formats import is_share, metric_name
from distsign.study.summary import Row, has_curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_bytes", "draw_times", "draw_training"]

COLOURS = ("#3b6ea8", "#d1495b", "#2e8b57", "#8d6a9f", "#c98a1b", "#4a4a4a", "#17a2b8", "#a0522d", "#e377c2", "#7f9c3b")
MARKERS = "osD^vPX<>*"
DASHES = ("-", "--", ":", "-.")


def draw_bytes(rows: Sequence[Row]) -> str | None:
    """Draw each scheme's metric against the bytes that a rank has sent and received; its front is a dashed line.

    Thin lines are the way there, points the end with its 95 % interval.

    Args:
        rows: of one task and setting.

    Returns:
        The SVG; None where nothing has travelled.
    """
    drawn = [row for row in rows if row.total_bytes and math.isfinite(row.value.mean)]
    if not drawn:
        return None
    figure = _figure(8.5, 4.8)
    axes = figure.subplots()
    for row in drawn:
        colour, marker, dashes = _style(rows, row)
        xs = [value / 1e6 for value in row.curve.sent_and_received_bytes]
        axes.plot(xs, _shown(row, row.curve.metric), color=colour, linestyle=dashes, linewidth=1, alpha=0.5)
        _point(axes, row, row.total_bytes / 1e6, colour, marker)
    front = sorted((row.total_bytes / 1e6, _shown(row, [row.value.mean])[0]) for row in drawn if row.is_on_front)
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), color="#888888", linewidth=1, linestyle="--", zorder=0, label="front")
    log_scale(axes, "x")
    axes.set_xlabel("MB sent and received by a rank (log scale)")
    _finish(axes, drawn, "against bytes on the link")
    return _svg(figure)


def draw_times(rows: Sequence[Row], bandwidths: Mapping[str, float]) -> str | None:
    """Draw each scheme's metric against its time on links of several bandwidths, one beside the other.

    Args:
        rows: of one task and setting.
        bandwidths: in bytes per second, by the name that `Row.simulated_s` has for them.

    Returns:
        The SVG; None where no times are known or nothing has travelled.
    """
    drawn = [row for row in rows if row.step_s is not None and math.isfinite(row.value.mean)]
    if not drawn or not bandwidths or not any(row.total_bytes for row in drawn):
        return None
    figure = _figure(3.4 * len(bandwidths) + 2.4, 4.4)
    all_axes = figure.subplots(1, len(bandwidths), sharey=True, squeeze=False)[0]
    for axes, (name, bandwidth) in zip(all_axes, bandwidths.items(), strict=True):
        for row in drawn:
            seconds = row.simulated_s[name]
            assert seconds is not None
            colour, marker, dashes = _style(rows, row)
            xs = [seconds * step / row.num_steps for step in row.curve.steps]
            axes.plot(xs, _shown(row, row.curve.metric), color=colour, linestyle=dashes, linewidth=1, alpha=0.5)
            _point(axes, row, seconds, colour, marker)
        log_scale(axes, "x")
        axes.set_xlabel(f"seconds at {format_bandwidth(bandwidth)} (log scale)")
        _finish(axes, drawn, "", legend=axes is all_axes[-1])
        axes.set_ylabel(metric_name(rows[0].metric) if axes is all_axes[0] else "")
    return _svg(figure)


def draw_training(rows: Sequence[Row]) -> str | None:
    """Draw training loss against steps and the metric against epochs.

    Args:
        rows: of one task and setting.

    Returns:
        The SVG; None where all were tested once, at their end.
    """
    if not has_curves(rows):
        return None
    figure = _figure(11, 4.4)
    left, right = figure.subplots(1, 2)
    for row in rows:
        colour, marker, dashes = _style(rows, row)
        style = {
            "color": colour,
            "linestyle": dashes,
            "marker": marker,
            "markersize": 3,
            "linewidth": 1.3,
            "label": row.scheme,
        }
        known = [
            (step, loss) for step, loss in zip(row.curve.steps, row.curve.train_loss, strict=True) if loss is not None
        ]
        left.plot([step for step, _ in known], [loss for _, loss in known], **style)
        right.plot(row.curve.epochs, _shown(row, row.curve.metric), **style)
    left.set_xlabel("steps")
    right.set_xlabel("epochs")
    _finish(left, rows, "", legend=False)
    _finish(right, rows, "")
    left.set_ylabel("training loss, nats")
    return _svg(figure)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure  # not pyplot: no window system, no global state
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install 'distsign[launch]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def _style(rows: Sequence[Row], row: Row) -> tuple[str, str, str]:
    """Return the colour, the marker and the dashes of a row."""
    turn, index = divmod([each.scheme for each in rows].index(row.scheme), len(COLOURS))
    # Beyond the last colour the same begin again, with other markers and dashes.
    return COLOURS[index], MARKERS[(index + turn) % len(MARKERS)], DASHES[turn % len(DASHES)]


def _shown(row: Row, values: Sequence[float]) -> list[float]:
    return [100 * value if is_share(row.metric) else value for value in values]


def _point(axes: Axes, row: Row, x: float, colour: str, marker: str) -> None:
    (mean,) = _shown(row, [row.value.mean])
    half = None
    if row.value.half_width is not None:
        (width,) = _shown(row, [row.value.half_width])
        # Of few seeds intervals go beyond all that a share can be.
        half = [[min(width, mean)], [min(width, 100 - mean)]] if is_share(row.metric) else [[width], [width]]
    axes.errorbar(
        *([x], [mean], half), color=colour, marker=marker, markersize=7, capsize=3, linestyle="none", label=row.scheme
    )


def _finish(axes: Axes, rows: Sequence[Row], title: str, *, legend: bool = True) -> None:
    metric = metric_name(rows[0].metric)
    axes.set_ylabel(metric)
    axes.grid(visible=True, which="major", color="#e4e4e4", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if title:
        axes.set_title(f"{rows[0].metric.replace('_', ' ')} {title}", fontsize=11, fontweight="bold", loc="left")
    if legend:
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _svg(figure: Figure) -> str:
    import matplotlib as mpl

    text = io.StringIO()
    # The same results give the same file: no date, and names of parts that do not depend on chance.
    with mpl.rc_context({"svg.hashsalt": "distsign"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()
