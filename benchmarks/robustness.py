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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from tqdm import tqdm

from benchmarks.common import Column, Report, Row, parser
from distsign import AdaptiveConfidence, Confidence, RMSConfidence, SignAdamPP
from distsign.robustness import ATTACKS, RULES, Attack, Averages, Electorate, train
from launch.models import LeNet
from launch.tasks import Batch, ImageTask, Shard

NUM_WORKERS = 8
NUM_STEPS = 300
SEED = 0
GUARDS = {"max_density": 0.04, "max_poison_streak": 5}
"""Honest workers of this task vote on 1 % of the components, on more of them early; liars just below the cap pass."""


@dataclass(frozen=True)
class Vote:
    """A way to vote.

    Attributes:
        confidence: of every worker; makes one for a run of its own.
        lr: of signADAM++.
        options: of the `Electorate`; `margin` may follow from the number of liars.
        momentum: of signADAM++.
    """

    confidence: Callable[[], Confidence]
    lr: float
    options: Callable[[int], Mapping[str, Any]]
    momentum: float = 0.0


def _rms() -> Confidence:
    return RMSConfidence(k=8, warmup_steps=50)


VOTES: dict[str, Vote] = {
    "planes": Vote(AdaptiveConfidence, 0.005, lambda f: {"margin": 1}, momentum=0.9),
    "carry": Vote(_rms, 0.016, lambda f: {"margin": 2, "owner_carry": True}),
    "standing": Vote(_rms, 0.016, lambda f: {"margin": 2, "owner_carry": "standing"}),
    "guarded": Vote(
        _rms, 0.016, lambda f: {"margin": f + 1, "owner_carry": "standing", "exchange": "all_gather", **GUARDS}
    ),
}
"""Ways to vote by name: bit planes; the recipe, carrying at the owner or with standing ballots; all guards at once."""
DEFENCES = [*RULES, *VOTES]


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


class Workers:
    """What the workers of one training share: model, batches, test."""

    def __init__(self, num_steps: int, batch_size: int) -> None:
        self.task = ImageTask(lambda: LeNet(width=1))
        self.num_steps, self.batch_size = num_steps, batch_size

    def batch(self, step: int, worker: int) -> Batch:
        """Return a worker's batch."""
        return self.task.batch(step, Shard(worker, NUM_WORKERS, self.batch_size, SEED))

    def run(self, cell: Cell) -> Row:
        """Train once, and return the accuracy and how it went."""
        torch.manual_seed(SEED)
        model = self.task.build_model()
        attack = ATTACKS[cell.attack]()
        begin = time.perf_counter()
        combiner, optimizer = make(cell, model, attack)
        outcome = train(model, optimizer, combiner, self.batch, self.task.loss, self.num_steps, self._lr_factor)
        right, count = self.task.evaluate(model, 0, 1, torch.device("cpu")).tolist()
        return {**asdict(cell), "accuracy": right / count, **asdict(outcome), "seconds": time.perf_counter() - begin}

    def _lr_factor(self, step: int) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * step / self.num_steps))


def make(cell: Cell, model: torch.nn.Module, attack: Attack) -> tuple[Electorate | Averages, Optimizer]:
    """Return what combines the workers' gradients in a cell, and what steps along it."""
    if cell.defence in RULES:
        combiner = Averages(RULES[cell.defence], NUM_WORKERS, cell.num_liars, attack, seed=SEED)
        return combiner, torch.optim.Adam(model.parameters(), lr=2e-3)
    vote = VOTES[cell.defence]
    electorate = Electorate(
        [p.numel() for p in model.parameters()],
        NUM_WORKERS,
        cell.num_liars,
        attack,
        vote.confidence(),
        seed=SEED,
        **vote.options(cell.num_liars),
    )
    return electorate, SignAdamPP(model.named_parameters(), lr=vote.lr, momentum=vote.momentum)


def setting_of(cell: Cell, num_steps: int, batch_size: int) -> Row:
    """Return what else a cell's result depends on."""
    vote = VOTES.get(cell.defence)
    options = {} if vote is None else {"lr": vote.lr, **vote.options(cell.num_liars)}
    return {"num_steps": num_steps, "batch_size": batch_size, **options}


def read(path: Path, num_steps: int, batch_size: int) -> dict[Cell, Row]:
    """Return the cells that are there already, of the same setting."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        row = json.loads(line)
        cell = Cell(row["attack"], row["num_liars"], row["defence"])
        if row.pop("setting") == setting_of(cell, num_steps, batch_size):
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
                rows.append({"attack": attack, **{d: 100 * v["accuracy"] for d, v in values.items() if v}})
        report.table(f"test accuracy (%), {num_liars} liars of {NUM_WORKERS}", columns, rows)
    ended = {(c.attack, row["error"].split(":")[0]) for c, row in found.items() if row["error"]}
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
    options_parser.add_argument("--steps", type=int, default=NUM_STEPS, help="of each training")
    run(options_parser.parse_args())


def run(options: argparse.Namespace) -> None:
    """See `main`."""
    torch.set_num_threads(1)
    num_steps, batch_size = (3, 4) if options.quick else (options.steps, 16)
    report = Report("robustness", options)
    log = Path(options.out) / "robustness.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    found, until = read(log, num_steps, batch_size), time.monotonic() + 60 * options.minutes
    workers = Workers(num_steps, batch_size)
    for cell in tqdm([each for each in cells(options.attacks) if each not in found], unit="run"):
        if time.monotonic() > until:
            break
        row = workers.run(cell)
        found[cell] = row
        with log.open("a") as file:
            file.write(json.dumps({"setting": setting_of(cell, num_steps, batch_size), **row}) + "\n")
    tables(report, found)
    report.write()


if __name__ == "__main__":
    main()
