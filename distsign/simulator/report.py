"""Predictions side by side: a table, JSON, CSV, a picture, and one line of advice."""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from distsign.simulator.axes import log_scale
from distsign.simulator.predict import Prediction, Step, break_even
from distsign.simulator.profile import Profile
from distsign.simulator.schemes import Scheme
from distsign.simulator.tables import format_table
from distsign.simulator.units import format_bandwidth, format_bytes, format_seconds

__all__ = ["Comparison", "compare", "draw", "require_drawable"]

BASELINES = ("fp32", "bf16")

WORTH_PERCENT = 1.0
"""Of a step: who gains less has no reason to send less than the whole gradient."""


@dataclass(frozen=True)
class Comparison:
    """Schemes on one cluster.

    Attributes:
        steps: in the order asked for.
        predictions: one a step.
        baselines: of fp32 and bf16, whether asked for or not.
        break_even: bytes per second below which each is faster than both baselines, see `predict.break_even`; None,
            too, for schemes that do not compress.
    """

    steps: tuple[Step, ...]
    predictions: tuple[Prediction, ...]
    baselines: tuple[Prediction, ...]
    break_even: tuple[float | None, ...]

    def rows(self) -> list[dict[str, Any]]:
        """Return what JSON and CSV hold: all of `Prediction`, speed-up against fp32, and break-even bandwidth."""
        fp32_s = self.baselines[0].step_s
        found = []
        for step, each, even in zip(self.steps, self.predictions, self.break_even, strict=True):
            speed_up = fp32_s / each.step_s if each.step_s else 1.0
            found.append(
                {
                    **asdict(each),
                    "speed_up_over_fp32": speed_up,
                    "compresses": step.scheme.compresses,
                    # JSON has no infinity: faster on links of any bandwidth.
                    "break_even_bytes_per_s": "any" if even == math.inf else even,
                }
            )
        return found

    def table(self) -> str:
        """Return a table for people."""
        head = ["scheme", "sent", "received", "off a node", "x fp32", "x bf16"]
        lines = [[*head, "exchange", "hidden", "exposed", "step", "speed-up", "pays below"]]
        for row, step, even in zip(self.rows(), self.steps, self.break_even, strict=True):
            times = (format_seconds(row[f"{name}_s"]) for name in ("exchange", "hidden", "exposed", "step"))
            lines.append(
                [
                    row["scheme"],
                    format_bytes(row["sent_bytes"]),
                    format_bytes(row["received_bytes"]),
                    format_bytes(row["node_bytes"]),
                    f"{row['ratio_to_fp32']:.4g}",
                    f"{row['ratio_to_bf16']:.4g}",
                    *times,
                    f"{row['speed_up_over_fp32']:.2f} x",
                    _even(even) if step.scheme.compresses else "-",
                ]
            )
        return format_table(lines)

    def advice(self) -> str:
        """Return one line: which scheme is fastest here, and by how much; or why not to compress."""
        candidates = {each.scheme: each for each in (*self.baselines, *self.predictions)}
        ranked = sorted(candidates.values(), key=lambda each: each.step_s)
        best = ranked[0]
        compressed = [each for each in ranked if Scheme.parse(each.scheme).compresses]
        if self.steps[0].cluster.num_workers == 1:
            return "do not compress: there is one worker, and nothing to exchange"
        if compressed and best is compressed[0]:
            rival = min(self.baselines, key=lambda each: each.step_s)
            gain = _gain(best, rival)
            if gain < WORTH_PERCENT:
                return f"do not compress: {best.scheme} is faster than {rival.scheme} by {gain:.2g} % only"
            return self._fastest(best, rival, ", the faster of fp32 and bf16")
        if not compressed:
            runner_up = next((each for each in ranked if each is not best), best)
            return self._fastest(best, runner_up)
        why = _reason(best, compressed[0])
        return f"do not compress: {best.scheme} takes {format_seconds(best.step_s)} a step, {why}"

    def _fastest(self, best: Prediction, rival: Prediction, what: str = "") -> str:
        # The less a step computes, the more the fastest scheme seems to gain.
        alone = "" if self.steps[0].compute_s else ", of the exchange alone: a step gains less (--compute)"
        return f"fastest here: {best.scheme}, {_ahead(_gain(best, rival))} {rival.scheme}{what}{alone}"

    def write_json(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        """Write settings, rows and advice."""
        data = {"settings": dict(settings), "rows": self.rows(), "advice": self.advice()}
        Path(path).write_text(json.dumps(data, indent=2) + "\n")

    def write_csv(self, path: str | Path) -> None:
        """Write the rows."""
        rows = self.rows()
        with Path(path).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def _gain(best: Prediction, rival: Prediction) -> float:
    """Return by how many percent a step of the rival is longer."""
    return 100 * (rival.step_s / best.step_s - 1)


def _ahead(percent: float) -> str:
    return f"by {percent:.3g} % over" if percent < 100 else f"{1 + percent / 100:.3g} times as fast as"


def _reason(best: Prediction, rival: Prediction) -> str:
    """Say why the best compressed scheme is not faster."""
    beside = f"{rival.scheme} {format_seconds(rival.step_s)}"
    if best.exposed_s <= 0.01 * best.step_s:
        return f"{beside}, because all but {format_seconds(best.exposed_s)} of its exchange hides behind backward"
    if rival.kernel_s - best.kernel_s > best.exposed_s - rival.exposed_s:
        spared = max(0.0, best.exposed_s - rival.exposed_s)
        more = rival.kernel_s - best.kernel_s
        return f"{beside}, because its kernels cost {format_seconds(more)} more and spare {format_seconds(spared)}"
    return f"{beside}, because waiting for messages, not bytes, takes the time"


def _even(bytes_per_s: float | None) -> str:
    if bytes_per_s is None:
        return "never"
    return "any" if math.isinf(bytes_per_s) else format_bandwidth(bytes_per_s)


def compare(steps: Sequence[Step], baselines: Sequence[Step]) -> Comparison:
    """Time schemes on the link that their cluster has, and find where each begins to pay.

    Args:
        steps: at least one, all of one model and cluster.
        baselines: fp32 and bf16 on the same.
    """
    evens = [break_even(step, baselines) if step.scheme.compresses else None for step in steps]
    return Comparison(
        tuple(steps), tuple(step.on() for step in steps), tuple(step.on() for step in baselines), tuple(evens)
    )


# ------------------------------------------------------------------------------------------------------------- picture


_DASHES = ("-", (0, (5, 3)), (0, (1, 2)), (0, (5, 2, 1, 2)))
"""Lines of schemes that take as long lie on one another, and each is still seen."""


def draw(steps: Sequence[Step], path: str | Path) -> None:
    """Draw step time against bandwidth, and against workers, one line a scheme.

    Args:
        steps: see `compare`.
        path: a picture file, such as .png or .svg.

    Raises:
        ValueError: see `require_drawable`.
    """
    require_drawable(path)
    from matplotlib.figure import Figure  # noqa: PLC0415  (not pyplot: no window system, no global state)
    from matplotlib.ticker import FuncFormatter  # noqa: PLC0415

    cluster = steps[0].cluster
    here = cluster.link.bandwidth_bytes_per_s
    centre = here if math.isfinite(here) else 1.25e9
    bandwidths = [centre * 10 ** (k / 8) for k in range(-16, 17)]
    workers = _worker_counts(cluster.num_workers, cluster.workers_per_node)
    figure = Figure(figsize=(11, 5), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for step, dashes in zip(steps, itertools.cycle(_DASHES), strict=False):
        label = step.scheme.label
        times = [step.on(b).step_s for b in bandwidths]
        left.plot([8 * b / 1e9 for b in bandwidths], times, linestyle=dashes, label=label)
        times = [_at_workers(step, count) for count in workers]
        right.plot(workers, times, linestyle=dashes, marker="o", markersize=3, label=label)
    left.axvline(8 * centre / 1e9, color="#999999", linewidth=0.8)
    left.set_xlabel("bandwidth of a node's link, Gbit/s (log scale; the grey line: as asked)")
    right.set_xlabel("workers (log scale)")
    for axes in (left, right):
        log_scale(axes, "x")
        scale = "log" if axes.dataLim.y0 > 0 else "linear"
        if scale == "log":
            log_scale(axes, "y")
        axes.set_ylabel(f"step, s ({scale} scale)")
        axes.grid(visible=True, color="#e4e4e4")
    right.set_xscale("log", base=2)
    right.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
    left.legend(fontsize=8)
    costs = "the wire alone" if steps[0].profile == Profile.ideal() else "calibrated"
    where = f"{cluster.num_workers} workers, {format_bandwidth(here)}, {format_seconds(cluster.link.latency_s)}"
    figure.suptitle(f"{steps[0].model.name}, compute {format_seconds(steps[0].compute_s)}, {where}, {costs}")
    figure.savefig(path)


def require_drawable(path: str | Path) -> None:
    """Make sure that `draw` can write a file of this name, before anything is computed for it.

    Raises:
        ValueError: if matplotlib is missing, or does not know the kind of file.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase  # noqa: PLC0415  (optional)
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install 'distsign[launch]', or leave --picture out") from None
    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if Path(path).suffix[1:].lower() not in kinds:
        raise ValueError(f"cannot draw {path}: the name of a picture must end with one of {', '.join(kinds)}")


def _worker_counts(num_workers: int, per_node: int) -> list[int]:
    """Return whole nodes, doubling, to the number asked for, and to 32 nodes at least."""
    most = max(num_workers, 32 * per_node)
    counts = [per_node]
    while counts[-1] < most:
        counts.append(min(2 * counts[-1], most))
    return [count for count in counts if count > 1]


def _at_workers(step: Step, num_workers: int) -> float:
    """Return the time of the same step on another number of workers; NaN where a budget is too small for them."""
    machine = step.cluster.workers_per_machine
    cluster = replace(
        step.cluster,
        num_workers=num_workers,
        workers_per_machine=None if machine is None else min(machine, num_workers),
    )
    try:
        moved = Step(
            step.model,
            cluster,
            step.scheme,
            compute_s=step.compute_s,
            profile=step.profile,
            bucket_mb=step.bucket_mb,
        )
    except ValueError:
        return math.nan
    return moved.on().step_s
