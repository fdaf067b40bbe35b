"""Liars among eight workers: accuracy by attack, number of liars and defence, beside averages made to withstand them.

A small LeNet on Fashion-MNIST is trained once for each row and column, all workers in one process
(`distsign.robustness`). Liars know what every honest worker sends. Averages step with Adam, votes with signADAM++; each
cell is one run, so differences of less than about a point are noise.

Cells are written as they come, and a run goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.common import Column, Report, Row, parser
from distsign.robustness import ATTACKS, RULES
from launch import liars
from launch.metrics import read_lines

NUM_WORKERS = 8
RMS = ("--confidence", "rms:k=8,warmup_steps=50", "--lr", "0.016")
# Honest workers of this task vote on 1 % of the components, on more of them early; liars just below the cap pass.
GUARDS = ("--exchange", "all_gather", "--max-density", "0.04", "--max-poison-streak", "5", "--owner-carry", "standing")
DEFENCES: dict[str, tuple[str, ...]] = {
    **{rule: ("--defence", rule) for rule in RULES},
    "planes": ("--confidence", "adaptive", "--lr", "0.005", "--momentum", "0.9"),
    "carry": (*RMS, "--margin", "2", "--owner-carry", "plain"),
    "standing": (*RMS, "--margin", "2", "--owner-carry", "standing"),
    "guarded": (*RMS, *GUARDS),
}
"""By name: averages; bit planes; the recipe, carrying at the owner or with standing ballots; all guards at once."""


@dataclass(frozen=True)
class Cell:
    """One training."""

    attack: str
    num_liars: int
    defence: str


def cells(attacks: Sequence[str] = tuple(ATTACKS)) -> Iterator[Cell]:
    """Yield all of some attacks, those that the threat model rests on first; none is always there."""
    for defence in DEFENCES:
        yield Cell("none", 0, defence)
    for num_liars in (3, 1, 2):
        for attack in attacks:
            if attack != "none":
                yield from (Cell(attack, num_liars, defence) for defence in DEFENCES)


def options_of(cell: Cell, num_steps: int, batch_size: int) -> argparse.Namespace:
    """Return what `launch.liars` is to do; with all guards the margin is one more than there are liars."""
    margin = ("--margin", str(cell.num_liars + 1)) if cell.defence == "guarded" else ()
    sizes = ("--workers", str(NUM_WORKERS), "--steps", str(num_steps), "--batch-size", str(batch_size))
    lies = ("--attack", cell.attack, "--liars", str(cell.num_liars))
    return liars.make_parser().parse_args([*sizes, *lies, *DEFENCES[cell.defence], *margin])


def read(path: Path, num_steps: int, batch_size: int) -> dict[Cell, Row]:
    """Return the cells that are there already, of the same setting."""
    found = {}
    for row in read_lines(path):
        cell = Cell(row["attack"], row["num_liars"], row["defence"])
        if row.get("options") == vars(options_of(cell, num_steps, batch_size)):
            found[cell] = row
    return found


def tables(report: Report, found: Mapping[Cell, Row]) -> None:
    """Print a table for each number of liars; a run that ended early shows what was reached until then."""
    columns = [Column("attack", "attack"), *(Column(name, name, ".1f") for name in DEFENCES)]
    for num_liars in sorted({cell.num_liars for cell in found}):
        rows = []
        mine = {cell: row for cell, row in found.items() if cell.num_liars == num_liars}
        for attack in ATTACKS:
            of_attack = {cell.defence: row for cell, row in mine.items() if cell.attack == attack}
            if of_attack:
                rows.append({"attack": attack, **{d: 100 * row["test_accuracy"] for d, row in of_attack.items()}})
        early = {(cell.attack, row["ended_early"].split(":")[0]) for cell, row in mine.items() if row["ended_early"]}
        note = "\n".join(f"{attack} ended a run: {error}" for attack, error in sorted(early))
        report.table(f"test accuracy (%), {num_liars} liars of {NUM_WORKERS}", columns, rows, note)


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, and print the tables; return the command line's exit code."""
    arguments = parser("robustness", __doc__)
    arguments.add_argument("--minutes", type=float, default=math.inf, help="no new training after so long")
    arguments.add_argument("--attacks", nargs="+", default=list(ATTACKS), choices=ATTACKS, help="only these")
    arguments.add_argument("--steps", type=int, default=300, help="of each training")
    options = arguments.parse_args(argv)
    num_steps, batch_size = (3, 4) if options.quick else (options.steps, 16)
    report = Report("robustness", options)
    log = report.path.with_suffix(".jsonl")
    log.parent.mkdir(parents=True, exist_ok=True)
    found, until = read(log, num_steps, batch_size), time.monotonic() + 60 * options.minutes
    for cell in tqdm([each for each in cells(options.attacks) if each not in found], unit="run"):
        if time.monotonic() > until:
            break
        wanted = options_of(cell, num_steps, batch_size)
        found[cell] = {**asdict(cell), **liars.run(wanted), "options": vars(wanted)}
        with log.open("a") as file:
            file.write(json.dumps(found[cell]) + "\n")
    tables(report, found)
    report.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
