"""Pictures of studies: schemes can be told apart, labels can be read, and nothing is drawn of nothing."""

from __future__ import annotations

from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from distsign.simulator.axes import log_scale
from distsign.study import pictures
from distsign.study.statistics import Interval
from distsign.study.summary import Curve, Row


def row(number: int, num_tests: int = 1) -> Row:
    steps = [10 * (k + 1) for k in range(num_tests)]
    tests = [0.5 + 0.01 * k for k in range(num_tests)]
    known: dict[str, Any] = {"sent_bytes": 1e6 + number, "received_bytes": 1e6, "step_s": 0.1, "ratio_to_fp32": 2.0}
    known |= {"ballot_density": None, "verdict_density": None, "simulated_s": {"1gbit": 5.0 + number}}
    return Row(
        *("task", "", f"scheme {number}", "scheme", [0], 0, "test_accuracy", True, Interval(tests[-1], None), 100),
        num_steps=steps[-1],
        bytes_are="counted",
        is_on_front=False,
        reached={},
        curve=Curve(steps, [1.0] * num_tests, [2e6 * k for k in steps], tests, [0.1] * num_tests),
        **known,
    )


def test_as_many_schemes_as_a_study_may_have_look_different() -> None:
    rows = [row(number) for number in range(40)]
    assert len({pictures._style(rows, each) for each in rows}) == 40


@pytest.mark.parametrize("low", [0.02, 22.0, 330.0, 8e4, 3e5, 9.5e5])
@pytest.mark.parametrize("span", [1.005, 1.02, 1.05, 1.2, 2.0, 3.0, 4.0, 11.0, 40.0, 300.0, 5000.0])
def test_labels_of_a_log_axis_can_be_read(low: float, span: float) -> None:
    """In the narrow pictures that stand side by side."""
    figure = Figure(figsize=(3.4, 4.4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([low, low * span], [0, 1])
    log_scale(axes, "x")
    canvas.draw()
    first, last = axes.get_xlim()
    labels = [each for each in axes.xaxis.get_ticklabels() if first <= each.get_position()[0] <= last]
    boxes = sorted(each.get_window_extent().extents.tolist()[0::2] for each in labels if each.get_text())
    assert len(boxes) >= 2
    assert all(left[1] < right[0] for left, right in zip(boxes, boxes[1:], strict=False))


def test_nothing_is_drawn_of_a_single_test() -> None:
    assert pictures.draw_training([row(0), row(1)]) is None
    assert pictures.draw_training([row(0), row(1, num_tests=3)])
    assert pictures.draw_bytes([row(0), row(1)]) and pictures.draw_times([row(0)], {"1gbit": 1.25e8})
