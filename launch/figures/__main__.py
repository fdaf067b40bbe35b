"""Draw figures of the signADAM++ paper: a picture, CSV and JSON each.

Options that are not listed here are those of `launch.train` and hold for every model that is trained, such as
`--task fashion-mnist-lenet --epochs 2 --seed 0`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distsign.study.formats import finite, write_csv
from launch.data import DataError
from launch.figures.drawing import draw_landscapes, draw_remaining, draw_sparsity
from launch.figures.gradients import SparsityMeter, remaining_ratio
from launch.figures.landscape import Landscape, distances, filter_normalised, landscape
from launch.figures.training import samples, trained
from launch.options import UsageError

COMMON = ["--batch-size=128", "--lr=1e-3", "--schedule=constant"]
"""As in the paper's runs on MNIST; options of the command line come after these and win."""
SCHEMES = {
    "remaining": {"ADAM": "--optimizer=adam"},
    "sparsity": {"signADAM++": "--optimizer=sign-adam-pp --hook=sign-vote --confidence=adaptive:beta1=0.9,beta2=1"},
    "landscape": {
        "ADAM": "--optimizer=adam --weight-decay=5e-4",
        "signADAM++": "--optimizer=sign-adam-pp --confidence=adaptive:beta1=0.9,beta2=1 --l2=5e-4",
    },
}
"""What is trained for each figure where `--scheme` says nothing else."""
ALPHAS = (0.0, *(round(10.0**exponent * digit, 7) for exponent in (-5, -4, -3, -2, -1) for digit in (1, 2, 5)), 1.0)


def _remaining(options: argparse.Namespace, schemes: dict[str, list[str]]) -> None:
    for name, arguments in schemes.items():
        with trained(arguments, num_samples=options.samples) as trainer:
            found = remaining_ratio(trainer.net, trainer.task, samples(trainer, options.samples), ALPHAS)
            title = f"Remaining ratio of gradients after {_about(trainer.options.task, trainer.num_steps, name)}"
            facts = {"num_correct": found.num_correct, "num_wrong": found.num_wrong, "data": trainer.task.source}
        path = _write(options.out, f"remaining-{name}", found.rows(), facts, arguments)
        draw_remaining(found, title, path)


def _sparsity(options: argparse.Namespace, schemes: dict[str, list[str]]) -> None:
    for name, arguments in schemes.items():
        meter = SparsityMeter()
        with trained(arguments, meter) as trainer:
            title = f"Sparsity of ballots, {_about(trainer.options.task, trainer.num_steps, name)}"
            facts = {"data": trainer.task.source}
        rows = meter.rows()
        draw_sparsity(rows, title, _write(options.out, f"sparsity-{name}", rows, facts, arguments))


def _landscape(options: argparse.Namespace, schemes: dict[str, list[str]]) -> None:
    found: dict[str, Landscape] = {}
    for name, arguments in schemes.items():
        with trained(arguments, num_samples=options.samples) as trainer:
            directions = filter_normalised(trainer.net, seed=1), filter_normalised(trainer.net, seed=2)
            batch = samples(trainer, options.samples)
            found[name] = landscape(trainer.net, trainer.task, batch, directions, options.points, options.reach)
            title = f"Loss around {_about(trainer.options.task, trainer.num_steps, '')}"
            facts = {"centre": found[name].centre, "samples": options.samples, "data": trainer.task.source}
        _write(options.out, f"landscape-{name}", found[name].rows(), facts, arguments)
    draw_landscapes(found, title, options.out / "landscape.png")


FIGURES: dict[str, Callable[[argparse.Namespace, dict[str, list[str]]], None]] = {
    "remaining": _remaining,
    "sparsity": _sparsity,
    "landscape": _landscape,
}


def _about(task: str, num_steps: int, name: str) -> str:
    return ", ".join(filter(None, (task, f"{num_steps} steps", name)))


def _write(out: Path, name: str, rows: list[dict[str, float]], facts: dict[str, Any], arguments: list[str]) -> Path:
    """Write a figure's numbers; return where its picture goes."""
    name = name.replace("+", "p")
    write_csv([finite(row) for row in rows], out / f"{name}.csv")
    text = json.dumps(finite({"options": arguments, **facts, "rows": rows}), indent=1, allow_nan=False)
    (out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    return out / f"{name}.png"


def _schemes(figure: str, given: Sequence[str], common: list[str]) -> dict[str, list[str]]:
    found = dict(SCHEMES[figure])
    if given:
        found = {}
        for each in given:
            name, equals, text = each.partition("=")
            if not equals or not name.strip():
                raise ValueError(f"--scheme must be NAME=OPTIONS, as in 'ADAM=--optimizer adam', got {each!r}")
            found[name.strip()] = text
    return {name: [*COMMON, *shlex.split(text), *common] for name, text in found.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code, 2 for the user's mistakes, which one line on stderr names."""
    parser = argparse.ArgumentParser(prog="launch.figures", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("figure", choices=FIGURES, help="remaining: figure 3; sparsity: figure 5; landscape: two optimizers' losses")
    add("--out", type=Path, default=Path("figures"), help="folder, made where it is missing (figures)")
    add("--scheme", action="append", default=[], metavar="NAME=OPTIONS", help="train this instead; again for more")
    add("--samples", type=int, default=500, help="training images that gradients and losses are of (500)")
    add("--points", type=int, default=21, help="landscape: along each side, odd (21)")
    add("--reach", type=float, default=1.0, help="landscape: how far, in lengths of the filters (1)")
    options, common = parser.parse_known_args(argv)
    try:
        if options.samples < 1:
            raise ValueError(f"--samples must be 1 or more, got {options.samples}")
        distances(options.points, options.reach)
        options.out.mkdir(parents=True, exist_ok=True)
        FIGURES[options.figure](options, _schemes(options.figure, options.scheme, common))
    except (ValueError, UsageError, DataError, OSError) as error:
        sys.stderr.write(f"launch.figures: error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
