"""What do the checks cost: checksum, caps on density and poison, and the comparison of replicas?

The same vote is taken without checks, with each of them and with all, step by step in turn on the same ranks; without
checks twice, by two trainers alike: by how much these two differ is the noise. Comparing replicas falls due every
100 steps, and is timed apart. `python -m benchmarks.checks` (root, for the lab).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from benchmarks import ranks
from benchmarks.common import Column, Report, Row, parser, summary
from benchmarks.step_schemes import Trainer, linear_layers, scheme, settings_of
from distsign import ReplicaCheck

CHECKS = {
    "none": (),
    "none again": (),
    "checksum": ("--checksum",),
    "density": ("--max-density", "0.9"),
    "poison": ("--max-poison-streak", "10"),
    "all": ("--checksum", "--max-density", "0.9", "--max-poison-streak", "10"),
}
EVERY = 100
NAMES = ("vote, adaptive, planes", "vote, RMS carry, planes", "vote, RMS, 0.1 bit")
WARM_UP = 5

TABLE = (
    Column("rate", "link"),
    Column("name", "scheme"),
    Column("ms", "ms/step", ".1f"),
    Column("spread", "quartiles", ".0%"),
    Column("rounds", "steps", "d"),
    *(Column(name, name, "+.2%") for name in CHECKS if name != "none"),
    Column("replicas_ms", "ms/comparison", ".1f"),
    Column("replicas", "of 100 steps", "+.2%"),
    Column("together", "together", "+.2%"),
)


def measure(settings: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Run on each rank: return by scheme the milliseconds of steps by their checks, and of comparisons of replicas."""
    found = {}
    for name in settings["schemes"]:
        plain, workload = scheme(name), linear_layers(**settings["trainer"])
        trainers = {
            checks: Trainer(replace(plain, arguments=(*plain.arguments, *arguments)), workload)
            for checks, arguments in CHECKS.items()
        }
        replicas = ReplicaCheck(trainers["all"].model, trainers["all"].optimizer)
        times: dict[str, list[float]] = {checks: [] for checks in (*CHECKS, "replicas")}
        for step in range(-WARM_UP, settings["steps"]):
            first = step % len(CHECKS)  # whoever begins finds other caches: they take turns
            for checks in [*CHECKS][first:] + [*CHECKS][:first]:
                ms = ranks.timed_together(trainers[checks].step)
                if step >= 0:
                    times[checks].append(ms)
            if step % 10 == 0:
                times["replicas"].append(ranks.timed_together(replicas.check))
        found[name] = times
        ranks.say(name)
        for trainer in trainers.values():
            trainer.combiner.close()
    return found


def row_of(name: str, of_ranks: Sequence[dict[str, list[float]]]) -> Row:
    """Return a scheme's row: of each step the slowest rank's time, medians of the steps' differences and of times."""
    times = {checks: ranks.slowest([each[checks] for each in of_ranks]) for checks in of_ranks[0]}
    row: Row = {"name": name, **summary(times["none"])}
    for checks in CHECKS:
        # Neighbours in time are compared, so that a machine that slows down slows both.
        row[checks] = median(b - a for a, b in zip(times["none"], times[checks], strict=True)) / row["ms"]
    row["replicas_ms"] = median(times["replicas"])
    row["replicas"] = row["replicas_ms"] / (EVERY * row["ms"])
    return {**row, "together": row["all"] + row["replicas"]}


def _measure_all(options: argparse.Namespace) -> None:
    report = Report("checks", options)
    trainer = settings_of(options.layers, options.width, options.batch_size)
    settings = {"schemes": NAMES, "steps": options.steps, "trainer": trainer}
    for rate in options.rates:
        deadline_s = 120 + len(NAMES) * len(CHECKS) * (options.steps + WARM_UP) * 5.0
        results = ranks.run_on_ranks(
            "benchmarks.checks:measure", settings, num_ranks=options.ranks, rate=rate, deadline_s=deadline_s
        )
        rows = [{"rate": rate, **row_of(name, [result[name] for result in results])} for name in results[0]]
        num_params = options.layers * options.width * (options.width + 1)
        report.table(f"{options.ranks} ranks, {num_params:,} parameters, {rate}", TABLE, rows)
    report.write()


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    arguments = parser("checks", __doc__)
    ranks.add_options(arguments, ranks=4, rates=("1gbit",))
    arguments.add_argument("--layers", type=int, default=12)
    arguments.add_argument("--width", type=int, default=1024)
    arguments.add_argument("--batch-size", type=int, default=8)
    arguments.add_argument("--steps", type=int, default=100, help="of each kind, per scheme")
    options = arguments.parse_args(argv)
    if options.quick:
        options.layers, options.width, options.steps = 3, 128, 3
    return ranks.exit_code_of(lambda: _measure_all(options), "checks")


if __name__ == "__main__":
    sys.exit(main())
