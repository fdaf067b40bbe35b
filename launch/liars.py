"""`python -m launch.liars`: train a task by workers of whom some lie, all of them in this process, and test it.

Workers vote, or a rule combines their gradients; see `distsign.robustness` and SECURITY.md. A program for studies as
`launch.train` is one, on one rank: `program = "-m launch.liars"`, see `studies/liars.toml`.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim import Adam, Optimizer
from tqdm import tqdm

from distsign import SignAdamPP
from distsign.layout import Shape
from distsign.robustness import ATTACKS, RULES, Averages, Electorate, Outcome, train
from distsign.traffic import ring_all_reduce_bytes, step_bytes
from launch.check import FLAG
from launch.data import DataError
from launch.metrics import MetricsFile, describe_machine
from launch.options import UsageError
from launch.schemes import make_confidence
from launch.tasks import TASKS, Batch, Shard, Task

VOTE = "vote"
OWNER_CARRIES: dict[str, bool | str | None] = {"auto": None, "no": False, "plain": True, "standing": "standing"}


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would exit: a study asks of many command lines at once."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; names are those of `launch.train` where it has them too."""
    out = _Parser(
        prog="launch.liars",
        description=(__doc__ or "").split(": ", 1)[1].split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    out.add_argument("--task", choices=TASKS, default="fashion-mnist-lenet")
    out.add_argument("--width", type=int, default=1, help="of the model")
    out.add_argument("--data", metavar="FOLDER", help="of the task's files")
    out.add_argument("--workers", type=int, default=8, help="in all")
    out.add_argument("--liars", type=int, default=0, help="of them")
    out.add_argument("--attack", choices=ATTACKS, default="none", help="what these do")
    out.add_argument("--defence", choices=[VOTE, *RULES], default=VOTE, help="what becomes of ballots or of gradients")
    out.add_argument("--confidence", default="rms", metavar="SPEC", help="of all workers, as launch.train takes it")
    out.add_argument("--margin", type=int, default=1)
    out.add_argument("--owner-carry", choices=OWNER_CARRIES, default="auto")
    out.add_argument("--exchange", choices=["two_phase", "all_gather"], default="two_phase")
    out.add_argument("--max-density", type=float, metavar="SHARE")
    out.add_argument("--max-poison-streak", type=int, metavar="STEPS")
    out.add_argument("--lr", type=float, default=2e-3, help="of Adam on averages, of signADAM++ on verdicts")
    out.add_argument("--momentum", type=float, default=0.0, help="of signADAM++")
    out.add_argument("--batch-size", type=int, default=16, help="of a worker")
    out.add_argument("--steps", type=int, default=300)
    out.add_argument("--seed", type=int, default=0)
    out.add_argument("--metrics", metavar="FILE", help="JSON lines")
    return out


class Run:
    """One training.

    Args:
        options: of `make_parser`.

    Raises:
        UsageError: if the options do not fit each other.
        DataError: if the task's files are not there.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        for name in ("steps", "batch_size"):
            if getattr(options, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
        if not 0 <= options.liars < options.workers:
            raise UsageError(f"--liars must be 0 to {options.workers - 1}, some of --workers, got {options.liars}")
        if (options.attack == "none") != (options.liars == 0):
            raise UsageError(f"--attack {options.attack} and --liars {options.liars} do not fit: give both or neither")
        torch.manual_seed(options.seed)
        self.task = _task(options.task, options.data, options.width)
        self.model = self.task.build_model()
        try:
            self.combiner, self.optimizer = self._defence()
        except ValueError as error:
            raise UsageError(str(error)) from error

    def _defence(self) -> tuple[Electorate | Averages, Optimizer]:
        o, attack = self.options, ATTACKS[self.options.attack]()
        if o.defence != VOTE:
            averages = Averages(RULES[o.defence], o.workers, o.liars, attack, seed=o.seed)
            return averages, Adam(self.model.parameters(), lr=o.lr)
        electorate = Electorate(
            [p.numel() for p in self.model.parameters()],
            o.workers,
            o.liars,
            attack,
            make_confidence(o.confidence),
            seed=o.seed,
            margin=o.margin,
            owner_carry=OWNER_CARRIES[o.owner_carry],
            exchange=o.exchange,
            max_density=o.max_density,
            max_poison_streak=o.max_poison_streak,
        )
        return electorate, SignAdamPP(self.model.named_parameters(), lr=o.lr, momentum=o.momentum)

    def batch(self, step: int, worker: int) -> Batch:
        """Return a worker's batch."""
        o = self.options
        return self.task.batch(step, Shard(worker, o.workers, o.batch_size, o.seed))

    def train(self, bar: tqdm[Any]) -> Outcome:
        """Train; the learning rate falls to 0 along a cosine."""
        num_steps = self.options.steps

        def lr_factor(step: int) -> float:
            bar.update()
            return 0.5 * (1.0 + math.cos(math.pi * step / num_steps))

        return train(self.model, self.optimizer, self.combiner, self.batch, self._loss, num_steps, lr_factor)

    def _loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return self.task.loss(model, batch)

    def metric(self) -> float:
        """Test the model."""
        self.model.eval()
        total, count = self.task.evaluate(self.model, 0, 1, torch.device("cpu")).tolist()
        self.model.train()
        return float(total / count)

    def bytes_of_step(self) -> tuple[float, float]:
        """Return what a worker would send, and receive, in a step; by formula, ballots as two planes.

        Trimmed means and medians too are taken by owners: gradients to them, results back, as in a ring.
        """
        o, shapes = self.options, [Shape(k, p.numel()) for k, p in enumerate(self.model.parameters())]
        if o.defence != VOTE:
            half = ring_all_reduce_bytes(sum(each.num_elements for each in shapes), 4, o.workers) / 2
            return half, half
        found = step_bytes([shapes], o.workers, 0, o.exchange)
        return float(found.sent_bytes), float(found.received_bytes)


@functools.cache
def _task(name: str, data: str | None, width: int) -> Task:
    """Make a task, once: a study asks of many cells, and a table is made of many runs."""
    return TASKS[name].make(data, width)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train and test once; write metrics; return the last line of them."""
    torch.set_num_threads(1)
    dataset = TASKS[options.task].dataset
    if dataset is not None:
        dataset.fetch(options.data, say=lambda text: print(f"launch.liars: {text}", file=sys.stderr, flush=True))
    this = Run(options)
    metrics, task, num_steps = MetricsFile(options.metrics), this.task, options.steps
    num_parameters = sum(p.numel() for p in this.model.parameters())
    head = {"metric": task.metric, "higher_is_better": task.higher_is_better, "num_steps": num_steps}
    about = {"data": task.source, "options": vars(options), "num_parameters": num_parameters, "first_step": 0}
    metrics.write({"event": "start", **head, **about, **describe_machine()})
    began = time.perf_counter()
    with tqdm(total=num_steps, unit="step", desc=f"{options.defence}, {options.attack}") as bar:
        outcome = this.train(bar)
    done_steps = outcome.num_steps  # fewer than asked where a payload that nobody can read has ended the run
    sent, received = (done_steps * each for each in this.bytes_of_step())
    done: dict[str, Any] = {
        "step": done_steps,
        "epoch": done_steps / this.task.steps_per_epoch(Shard(0, options.workers, options.batch_size, options.seed)),
        task.metric: this.metric(),
        "sent_bytes": sent,
        "received_bytes": received,
        "fp32_bytes": done_steps * ring_all_reduce_bytes(num_parameters, 4, options.workers),
        "kind": "formula",
        "ballot_density": outcome.ballot_density,
        "num_poisoned_steps": outcome.num_poisoned_steps,
        "ended_early": outcome.error,
        "seconds": time.perf_counter() - began,
    }
    metrics.write({"event": "test", **done})
    metrics.write({"event": "end", **done})
    return done


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Return what a study wants to know of its cells: see `distsign.study.program`."""
    cells: list[dict[str, Any]] = []
    for cell in question["cells"]:
        try:
            options = make_parser().parse_args(cell["arguments"])
            if cell["ranks"] != 1:
                raise UsageError(f"all workers are in one process: expected ranks = 1, got {cell['ranks']}")
            Run(options)
            cells.append({"options": {name: value for name, value in vars(options).items() if name != "metrics"}})
        except (UsageError, DataError) as error:
            cells.append({"error": str(error)})
    actions = [each for each in make_parser()._actions if each.dest not in {"help", "metrics"}]
    choices = {each.option_strings[-1][2:]: None if each.choices is None else list(each.choices) for each in actions}
    return {"file": os.path.abspath(__file__), "choices": choices, "cells": cells}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; does not return where the user has made a mistake."""
    given = sys.argv[1:] if argv is None else list(argv)
    if given == [FLAG]:
        print(json.dumps(answer(json.load(sys.stdin))))
        return
    try:
        options = make_parser().parse_args(given)
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UsageError("all workers are in one process: start one rank, and say how many workers by --workers")
        done = run(options)
    except (UsageError, DataError) as error:
        print(f"launch.liars: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps(done))


if __name__ == "__main__":
    main()
