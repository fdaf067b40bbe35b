"""What all benchmarks share: interleaved timing, tables, and results that say where and of what they were measured.

Contenders are timed in turn, round by round, in one process: a machine that slows down meanwhile slows all of them. Of
the rounds the median counts, which a single disturbed one does not move.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numba
import numpy as np

from launch.metrics import describe_machine

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = "runs/benchmarks"
MIN_ROUNDS = 3

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Something to be timed.

    Args:
        name: in the table; no two alike.
        run: what is timed.
        setup: what is done before each run, not timed; None for nothing.
    """

    name: str
    run: Callable[[], object]
    setup: Callable[[], object] | None = None


def wall_ms(run: Callable[[], object]) -> float:
    """Return the milliseconds that a call takes by the clock."""
    begin = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begin)


def interleaved(
    contenders: Sequence[Contender],
    *,
    rounds: int,
    warm_up: int = 2,
    limit_s: float = float("inf"),
    timer: Callable[[Callable[[], object]], float] = wall_ms,
) -> dict[str, list[float]]:
    """Time contenders in turn, and return the milliseconds of each round by name.

    Args:
        contenders: each is run once a round; who begins moves on from round to round, so that nobody always finds the
            caches that the same neighbour left.
        rounds: that count.
        warm_up: rounds before them: compilation, first touch of memory, caches.
        limit_s: no new round is begun after so many seconds, once there are `MIN_ROUNDS`.
        timer: returns the milliseconds of a call.
    """
    found: dict[str, list[float]] = {each.name: [] for each in contenders}
    assert len(found) == len(contenders), "two contenders of one name"
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()  # as timeit does: a collection would fall upon whoever is at work
    begin = time.perf_counter()
    try:
        for index in range(-warm_up, rounds):
            first = index % len(contenders)
            for each in [*contenders[first:], *contenders[:first]]:
                if each.setup is not None:
                    each.setup()
                ms = timer(each.run)
                if index >= 0:
                    found[each.name].append(ms)
            if index + 1 >= MIN_ROUNDS and time.perf_counter() - begin > limit_s:
                break
    finally:
        if was_enabled:
            gc.enable()
    return found


def summary(times_ms: Sequence[float]) -> Row:
    """Return the median of some times, how far apart their quartiles are in units of it, and how many there were."""
    spread = 0.0
    if len(times_ms) > 1:
        low, _, high = quantiles(times_ms, method="inclusive")
        spread = (high - low) / median(times_ms)
    return {"ms": median(times_ms), "spread": spread, "rounds": len(times_ms)}


def ratio(value: float | None, rival: float | None) -> float | None:
    """Return how many times the rival a value is; None where one of them was not measured."""
    return None if value is None or not rival else value / rival


# ------------------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Args:
        key: in a row, and so in the JSON.
        head: above it.
        show: a format such as `.2f`, which is then right-aligned; empty for text.
    """

    key: str
    head: str
    show: str = ""


def format_table(columns: Sequence[Column], rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as an aligned table; what is missing or None is a dash."""
    cells = [[column.head for column in columns]]
    for row in rows:
        values = [row.get(column.key) for column in columns]
        shown = ["-" if v is None else format(v, c.show) for v, c in zip(values, columns, strict=True)]
        cells.append(shown)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    aligned = [str.rjust if column.show else str.ljust for column in columns]
    lines = [
        "  ".join(align(cell, width) for align, cell, width in zip(aligned, line, widths, strict=True)).rstrip()
        for line in cells
    ]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([lines[0], rule, *lines[1:]])


def describe_run() -> Row:
    """Return what a figure depends on: date, code, machine, versions, and how busy the machine is."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": checked_out_commit(),
        **describe_machine(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "load_average": os.getloadavg()[0],
    }


def checked_out_commit() -> str | None:
    """Return the commit that is checked out, marked where tracked files differ from it; None outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


class Report:
    """The results of one benchmark: a head and tables on stdout, the same in `OUT/NAME.json`.

    Args:
        name: of the benchmark.
        options: its command line, kept in the JSON; `out` is the folder.
    """

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.path = Path(options.out) / f"{name}.json"
        settings = {key: value for key, value in vars(options).items() if key != "out"}
        self._facts = {"benchmark": name, **describe_run(), "settings": settings}
        self._rows: list[Row] = []
        self._notes: list[str] = []
        facts = self._facts
        print(f"{name}: {facts['machine']}, load {facts['load_average']:.1f}")
        if options.quick:
            print("quick: tiny sizes, no figure to believe")
        print(f"{facts['date']}, commit {facts['commit']}, torch {facts['torch']}, numba {facts['numba']}", flush=True)

    def table(self, title: str, columns: Sequence[Column], rows: Sequence[Row], note: str = "") -> None:
        """Print a table and keep its rows; the file has them at once, since a later one may fail."""
        print(f"\n{title}\n{format_table(columns, rows)}", flush=True)
        self._rows += rows
        if note:
            print(note, flush=True)
            self._notes.append(note)
        self._save(complete=False)

    def write(self) -> None:
        """Write the file for good, and say where it is."""
        self._save(complete=True)
        print(f"\nwritten to {self.path}", flush=True)

    def _save(self, *, complete: bool) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        facts = {**self._facts, "load_average_after": os.getloadavg()[0], "complete": complete}
        self.path.write_text(json.dumps({**facts, "notes": self._notes, "rows": self._rows}, indent=2) + "\n")


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=(description or "").split("\n\n", maxsplit=1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs, no figure to believe")
    made.add_argument("--out", default=RESULTS, metavar="FOLDER", help="where the JSON goes")
    return made
