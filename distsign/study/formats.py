"""Numbers of a report as people read them, and its table: one place, so that terminal and HTML say the same."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distsign.simulator.units import format_bandwidth, format_bytes, format_seconds
from distsign.study.plan import Study
from distsign.study.statistics import Interval
from distsign.study.summary import Row, Summary

__all__ = ["csv_rows", "finite", "format_value", "metric_name", "table_of", "write_csv"]

FRONT = "*"
"""Marks the Pareto front."""

_COLUMNS = (
    *("num_parameters", "num_steps", "sent_bytes", "received_bytes"),
    *("ratio_to_fp32", "bytes_are", "ballot_density", "verdict_density"),
)


def is_share(metric: str) -> bool:
    """Whether a metric is printed in percent."""
    return metric.endswith(("accuracy", "error"))


def metric_name(metric: str) -> str:
    """Return the metric's name with its unit.

    Example:
        >>> metric_name("test_accuracy"), metric_name("bits_per_byte")
        ('test accuracy, %', 'bits per byte')
    """
    return metric.replace("_", " ") + (", %" if is_share(metric) else "")


def format_value(metric: str, interval: Interval) -> str:
    """Return a mean with its 95 % interval, in percent where the metric is a share.

    Example:
        >>> format_value("test_accuracy", Interval(0.91347, 0.0005)), format_value("bits_per_byte", Interval(2.5, None))
        ('91.35 ± 0.05', '2.500')
    """
    factor, digits = (100, 2) if is_share(metric) else (1, 3)
    mean = f"{factor * interval.mean:.{digits}f}"
    return mean if interval.half_width is None else f"{mean} ± {factor * interval.half_width:.{digits}f}"


TIMES_ON_LINKS = (
    "Times on links are a model: of the whole run, every step as it was measured here, and its bytes on the link after "
    "it; nothing hides behind the backward pass, and latency is left out."
)


def has_times_on_links(rows: Sequence[Row]) -> bool:
    """Return whether the table of these rows has columns of them: not where nothing travels."""
    return any(row.total_bytes for row in rows)


def table_of(study: Study, rows: Sequence[Row]) -> list[list[str]]:
    """Return the table of one task and setting, head first; all rows have one metric."""
    metric = rows[0].metric
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("scheme", lambda row: row.scheme),
        (
            "seeds",
            lambda row: f"{len(row.seeds)}" + (f" of {len(row.seeds) + row.num_missing}" if row.num_missing else ""),
        ),
        (metric_name(metric), lambda row: format_value(metric, row.value)),
        ("bytes", lambda row: format_bytes(row.total_bytes) if row.total_bytes else "-"),
        ("x fp32", lambda row: "-" if row.ratio_to_fp32 is None else f"{row.ratio_to_fp32:.4g}"),
        ("front", lambda row: FRONT if row.is_on_front else ""),
        ("ballots", lambda row: _percent(row.ballot_density)),
        ("step", lambda row: _seconds(row.step_s)),
    ]
    if has_times_on_links(rows):
        columns += [(format_bandwidth(each), _simulated(name)) for name, each in study.bandwidths.items()]
    for reach in study.reach:
        if reach.name in rows[0].reached:
            columns.append((reach.name, _reached(reach.name)))
            if reach.published:
                columns.append((reach.source or "published", _published(reach.name)))
    return [[head for head, _ in columns], *([show(row) for _, show in columns] for row in rows)]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _seconds(value: float | None) -> str:
    return "-" if value is None else format_seconds(value)


def _simulated(bandwidth: str) -> Callable[[Row], str]:
    return lambda row: _seconds(row.simulated_s[bandwidth])


def _reached(target: str) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        reached, num_seeds = row.reached[target], len(row.seeds)
        if reached.mean is None:
            return "never"
        text = f"{reached.mean:.3g}" if reached.mean < 1000 else f"{reached.mean:,.0f}"
        if reached.best is not None:
            text = f"{format_value(row.metric, Interval(reached.best, None))} ({text})"
        return text if reached.num_seeds == num_seeds else f"{text} ({reached.num_seeds} of {num_seeds} seeds)"

    return show


def _published(target: str) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        value = row.reached[target].published
        return "" if value is None else str(value)

    return show


def csv_rows(summary: Summary) -> list[dict[str, Any]]:
    """Return a flat record of each row; what is not known is None."""
    records = []
    for row in summary.rows:
        record: dict[str, Any] = {
            **{name: getattr(row, name) for name in ("task", "setting", "scheme", "metric", "higher_is_better")},
            "num_seeds": len(row.seeds),
            "num_missing": row.num_missing,
            "mean": row.value.mean,
            "half_width_95": row.value.half_width,
            **{name: getattr(row, name) for name in _COLUMNS},
            "is_on_front": row.is_on_front,
            "step_s": row.step_s,
            **{f"simulated_s at {name}": value for name, value in row.simulated_s.items()},
        }
        for name, reached in row.reached.items():
            record |= {name: reached.mean, f"{name}, seeds": reached.num_seeds, f"{name}, published": reached.published}
            if reached.best is not None:
                record[f"{name}, value"] = reached.best
        records.append(finite(record))
    return records


def write_csv(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write records; their columns are all that any of them has."""
    columns = list(dict.fromkeys(name for record in records for name in record))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(records)


def finite(value: Any) -> Any:
    """Return nested values with None in place of what JSON cannot hold.

    Example:
        >>> finite({"loss": [float("nan"), 1.0]})
        {'loss': [None, 1.0]}
    """
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
