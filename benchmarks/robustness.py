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
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.common import Column, Report, Row, parser
from distsign.robustness import ATTACKS, RULES
from launch import liars

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
    for line in path.read_text().splitlines() if path.exists() else []:
        row = json.loads(line)
        cell = Cell(row["attack"], row["num_liars"], row["defence"])
        if row.pop("options") == vars(options_of(cell, num_steps, batch_size)):
            found[cell] = row
    return found


def tables(report: Report, found: Mapping[Cell, Row]) -> None:
    """Print a table for each number of liars; a run that ended early shows what was reached until then."""
    columns = [Column("attack", "attack"), *(Column(name, name, ".1f") for name in DEFENCES)]
    for num_liars in sorted({cell.num_liars for cell in found}):
        rows = []
        for attack in ATTACKS:
            values = {d: found.get(Cell(attack, num_liars, d)) for d in DEFENCES}
            if any(values.values()):
                rows.append({"attack": attack, **{d: 100 * v["test_accuracy"] for d, v in values.items() if v}})
        report.table(f"test accuracy (%), {num_liars} liars of {NUM_WORKERS}", columns, rows)
    ended = {(c.attack, row["ended_early"].split(":")[0]) for c, row in found.items() if row["ended_early"]}
    densities = [row["ballot_density"] for c, row in found.items() if c.num_liars == 0 and c.defence == "guarded"]
    notes = [f"{attack} ended a run: {error}" for attack, error in sorted(ended)]
    notes += [f"honest workers of guarded voted on {100 * density:.1f} % of the components" for density in densities]
    if notes:
        print("\n".join(notes), flush=True)


def main() -> None:
    """Run what is missing, and print the tables."""
    options_parser = parser("robustness", __doc__)
    options_parser.add_argument("--minutes", type=float, default=math.inf, help="no new cell after so long")
    options_parser.add_argument("--attacks", nargs="+", default=list(ATTACKS), choices=ATTACKS, help="only these")
    options_parser.add_argument("--steps", type=int, default=300, help="of each training")
    run(options_parser.parse_args())


def run(options: argparse.Namespace) -> None:
    """See `main`."""
    num_steps, batch_size = (3, 4) if options.quick else (options.steps, 16)
    report = Report("robustness", options)
    log = Path(options.out) / "robustness.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    found, until = read(log, num_steps, batch_size), time.monotonic() + 60 * options.minutes
    for cell in tqdm([each for each in cells(options.attacks) if each not in found], unit="run"):
        if time.monotonic() > until:
            break
        options_of_cell = options_of(cell, num_steps, batch_size)
        found[cell] = {**asdict(cell), **liars.run(options_of_cell)}
        with log.open("a") as file:
            file.write(json.dumps({**found[cell], "options": vars(options_of_cell)}) + "\n")
    tables(report, found)
    report.write()


if __name__ == "__main__":
    main()
