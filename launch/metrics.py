"""Metrics as JSON lines: one object a line, written at once, so that a run can be watched and a broken one read."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch


class MetricsFile:
    """A file that lines are appended to.

    A run from its start replaces the file. A resumed one keeps the lines up to the step where it goes on: those that
    the broken run wrote after its last checkpoint will be written again.

    Args:
        path: the file; None to write nothing. Its folder is made where it is missing, but none above it.
        first_step: the number of steps already done.
    """

    def __init__(self, path: str | None, first_step: int = 0) -> None:
        self._path = None if path is None else Path(path)
        if self._path is None:
            return
        self._path.parent.mkdir(exist_ok=True)
        kept = [line for line in read_lines(self._path) if line["event"] == "test" and line["step"] <= first_step]
        starts = [
            line for line in read_lines(self._path) if line["event"] == "start" and line["first_step"] < first_step
        ]
        self._path.write_text("".join(json.dumps(line) + "\n" for line in (*starts, *kept) if first_step))

    def write(self, line: dict[str, Any]) -> None:
        """Append one line."""
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def read_lines(path: Path | str) -> list[dict[str, Any]]:
    """Read a metrics file; empty where there is none. A last line that a crash has cut short is left out."""
    if not Path(path).exists():
        return []
    lines = []
    for text in Path(path).read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def describe_machine() -> dict[str, Any]:
    """Return what a figure depends on: processor, cores and versions."""
    return {
        "machine": f"{platform.system()} {platform.machine()}, {_processor()}, {len(os.sched_getaffinity(0))} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
