"""Write what a study has found: CSV, JSON, pictures and HTML in its folder; the tables as text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distsign.simulator.tables import format_table
from distsign.study.formats import TIMES_ON_LINKS, csv_rows, finite, has_times_on_links, table_of, write_csv
from distsign.study.html import render
from distsign.study.pictures import draw_bytes, draw_times, draw_training
from distsign.study.plan import Study
from distsign.study.summary import Row, Summary

__all__ = ["describe", "write_report"]


def write_report(study: Study, summary: Summary, folder: Path) -> list[Path]:
    """Write `table.csv`, `report.json`, `report.html` and `pictures/`, replacing what is there.

    Returns:
        The files, but for the pictures.

    Raises:
        ValueError: matplotlib or SciPy is missing.
    """
    pictures = {name: list(_pictures(study, rows)) for name, rows in summary.groups().items()}
    (folder / "pictures").mkdir(exist_ok=True)
    for old in (folder / "pictures").glob("*.svg"):
        old.unlink()
    for name, drawn in pictures.items():
        for kind, _, svg in drawn:
            (folder / "pictures" / f"{_file_name(name)}-{kind}.svg").write_text(svg, encoding="utf-8")
    csv, data, html = (folder / name for name in ("table.csv", "report.json", "report.html"))
    write_csv(csv_rows(summary), csv)
    data.write_text(json.dumps(_json(study, summary), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    titled = {name: [(title, svg) for _, title, svg in drawn] for name, drawn in pictures.items()}
    html.write_text(render(study, summary, titled), encoding="utf-8")
    return [csv, data, html]


def describe(study: Study, summary: Summary) -> str:
    """Return the tables as text, one a task and setting, and what must be known before rows are compared."""
    parts = []
    for name, rows in summary.groups().items():
        parts.append(f"{name}, {rows[0].num_steps:,} steps\n\n{format_table(table_of(study, rows))}")
    if has_times_on_links(summary.rows):
        parts.append(TIMES_ON_LINKS)
    parts += [f"note: {note}" for note in summary.notes]
    return "\n\n".join(parts)


def _pictures(study: Study, rows: list[Row]) -> Iterator[tuple[str, str, str]]:
    """Yield each picture's kind, its title and the SVG."""
    metric = rows[0].metric.replace("_", " ")
    drawn = (
        ("bytes", f"{metric} against bytes", draw_bytes(rows)),
        ("time", f"{metric} against simulated time", draw_times(rows, study.bandwidths)),
        ("training", f"training loss against steps, {metric} against epochs", draw_training(rows)),
    )
    yield from ((kind, title, svg) for kind, title, svg in drawn if svg is not None)


def _json(study: Study, summary: Summary) -> dict[str, Any]:
    return {
        "name": study.name,
        "study": study.text,
        "versions": dict(summary.versions),
        "machines": list(summary.machines),
        "notes": list(summary.notes),
        "num_cells": summary.num_cells,
        "num_missing": summary.num_missing,
        "failed": [{"cell": cell.label, "error": error} for cell, error in summary.failed],
        "rows": [finite(asdict(row)) for row in summary.rows],
    }


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-") or "task"
