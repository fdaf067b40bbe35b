"""What do the checks cost: checksum, caps on density and poison, and the comparison of replicas?

The same vote is taken without checks, with each of them and with all, step by step in turn on the same ranks; without
checks twice, by two trainers alike: what these two differ by is noise, and checks are held against the mean of both.
Two trainers alike may differ for as long as they live, most likely by where their memory lies: so all are made anew
some times, in another order, and the standard error beside the figure of all checks is that of these rounds. All go on
from where a trainer without checks has come to after 100 steps: in the first ones a cap would bind. Comparing replicas
falls due every 100 steps, and is timed apart. Beside the clock's time stands that of all ranks' processors, which does
not count what others do on the machine, nor waiting. `python -m benchmarks.checks` (root, for the lab).
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import mean, median, stdev
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import ranks
from benchmarks.common import Column, Report, Row, parser, summary
from benchmarks.step_schemes import Trainer, Workload, linear_layers, scheme, settings_of
from distsign import ReplicaCheck
from launch.hooks import SignVote

CHECKS = {
    "none": (),
    "none again": (),
    "checksum": ("--checksum",),
    "density": ("--max-density", "{cap}"),
    "poison": ("--max-poison-streak", "10"),
    "all": ("--checksum", "--max-density", "{cap}", "--max-poison-streak", "10"),
}
CAP, CAP_STEPS = 2.5, 100
"""The cap on the density in honest densities, of which `SignVoteState` advises two to three; and steps to see these."""
EVERY = 100
NAMES = ("vote, adaptive, planes", "vote, RMS carry, planes", "vote, RMS, 0.1 bit")
WARM_UP = 5
Begin = tuple[dict[str, Any], dict[str, Any]]
"""States of a model and of its votes."""


def table(ms: str, checks: Sequence[str]) -> tuple[Column, ...]:
    """Return the columns of a table of what some checks add to what a step takes."""
    return (
        Column("rate", "link"),
        Column("name", "scheme"),
        Column("cap", "max density", ".2g"),
        Column("ms", ms, ".1f"),
        Column("spread", "quartiles", ".0%"),
        Column("rounds", "steps", "d"),
        *(Column(name, name, "+.2%") for name in checks if name != "none"),
        Column("error", "± of all", ".2%"),
        Column("replicas_ms", "ms/comparison", ".1f"),
        Column("replicas", "of 100 steps", "+.2%"),
        Column("together", "together", "+.2%"),
    )


def measure(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Run on each rank: return by scheme and checks the milliseconds of each step, by the clock and this processor's.

    Times are by round; `replicas` are those of comparisons of replicas; and `caps`, by scheme, are on the density.
    """
    names, caps = settings["checks"], {}
    found: dict[str, list[dict[str, list[list[float]]]]] = {}
    for name in settings["schemes"]:
        workload = linear_layers(**settings["trainer"])
        caps[name], begin = _warmed_up(Trainer(scheme(name), workload))
        found[name] = []
        for number in range(settings["rounds"]):
            first = number % len(names)
            order = names[first:] + names[:first]
            found[name].append(_round(name, workload, caps[name], begin, order, settings["steps"]))
        ranks.say(name)
    return {"times": found, "caps": caps}


def _round(
    name: str, workload: Workload, cap: float, begin: Begin, names: list[str], num_steps: int
) -> dict[str, list[list[float]]]:
    """Time steps of trainers with these checks, made in this order, and comparisons of replicas."""
    plain, trainers = scheme(name), {}
    for checks in names:
        added = [argument.format(cap=cap) for argument in CHECKS[checks]]
        trainers[checks] = trainer = Trainer(replace(plain, arguments=(*plain.arguments, *added)), workload)
        trainer.model.load_state_dict(begin[0])
        trainer.combiner.load_state_dict(begin[1])
        trainer.num_steps = CAP_STEPS
    replicas = ReplicaCheck(trainers["all"].model, trainers["all"].optimizer)
    times: dict[str, list[list[float]]] = {checks: [] for checks in (*names, "replicas")}
    for step in range(-WARM_UP, num_steps):
        first = step % len(names)  # whoever begins finds other caches: they take turns
        for checks in names[first:] + names[:first]:
            both = _timed(trainers[checks].step)
            if step >= 0:
                times[checks].append(both)
        if step % 10 == 0:
            times["replicas"].append(_timed(replicas.check))
    for trainer in trainers.values():
        trainer.combiner.close()
    return times


def _warmed_up(trainer: Trainer) -> tuple[float, Begin]:
    """Return the cap on the density for votes like this trainer's, alike on all ranks, and its state; it is closed."""
    for _ in range(CAP_STEPS):
        trainer.step()
    assert isinstance(trainer.combiner, SignVote)
    density = torch.tensor(trainer.combiner.state.traffic().ballot_density)
    dist.all_reduce(density, dist.ReduceOp.MAX)
    begin = trainer.model.state_dict(), trainer.combiner.state_dict()
    trainer.combiner.close()
    return min(1.0, float(f"{CAP * float(density):.2g}")), begin


def _timed(run: Callable[[], object]) -> list[float]:
    """Return the milliseconds of a call that all ranks begin together, by the clock and of all threads' processors."""
    begin = time.process_time()
    by_clock = ranks.timed_together(run)
    dist.barrier()  # until then a rank that has done may still send for others
    return [by_clock, 1e3 * (time.process_time() - begin)]


def row_of(name: str, rounds: Sequence[dict[str, list[float]]]) -> Row:
    """Return a scheme's row: the median of the steps' times, and means over rounds of medians of differences."""
    row: Row = {"name": name, **summary([each for times in rounds for each in times["none"]])}
    longer = [_longer(times) for times in rounds]
    for checks in longer[0]:
        row[checks] = mean(each[checks] for each in longer)
    row["error"] = stdev(each["all"] for each in longer) / math.sqrt(len(longer)) if len(longer) > 1 else math.inf
    row["replicas_ms"] = median(each for times in rounds for each in times["replicas"])
    row["replicas"] = row["replicas_ms"] / (EVERY * row["ms"])
    return {**row, "together": row["all"] + row["replicas"]}


def _longer(times: dict[str, list[float]]) -> dict[str, float]:
    """Return by which share steps take longer with checks, in one round."""
    without = [mean(both) for both in zip(times["none"], times.get("none again", times["none"]), strict=True)]
    found = {}
    for checks in [each for each in times if each != "replicas"]:
        # Neighbours in time are compared, so that a machine that slows down slows both.
        beside = times["none"] if checks == "none again" else without
        longer = [b - a for a, b in zip(beside, times[checks], strict=True)]
        found[checks] = median(longer) / median(times["none"])
    return found


def _over_ranks(of_ranks: Sequence[list[dict[str, list[list[float]]]]], way: int) -> list[dict[str, list[float]]]:
    """Return each step's time: by the clock (0) that of the slowest rank, of processors (1) that of all together."""
    combine = (max, sum)[way]
    return [
        {
            checks: [
                combine(rank[way] for rank in step) for step in zip(*(each[checks] for each in of_round), strict=True)
            ]
            for checks in of_round[0]
        }
        for of_round in zip(*of_ranks, strict=True)
    ]


def _measure_all(options: argparse.Namespace) -> None:
    report = Report("checks", options)
    trainer = settings_of(options.layers, options.width, options.batch_size)
    checks = [name for name in CHECKS if name in {"none", "all", *options.checks}]
    settings = {"schemes": options.schemes, "checks": checks, "rounds": options.rounds, "steps": options.steps}
    settings["trainer"] = trainer
    for rate in options.rates:
        deadline_s = 120 + len(options.schemes) * len(checks) * options.rounds * (options.steps + WARM_UP) * 5.0
        results = ranks.run_on_ranks(
            "benchmarks.checks:measure", settings, num_ranks=options.ranks, rate=rate, deadline_s=deadline_s
        )
        num_params = options.layers * options.width * (options.width + 1)
        title = f"{options.ranks} ranks, {num_params:,} parameters, {rate}"
        for way, (clock, head) in enumerate({"clock": "ms/step", "processors": "processors' ms/step"}.items()):
            rows = [
                {
                    **{"rate": rate, "by": clock, "cap": results[0]["caps"][name]},
                    **row_of(name, _over_ranks([result["times"][name] for result in results], way)),
                }
                for name in options.schemes
            ]
            report.table(f"{title}, by the {clock}", table(head, checks), rows)
    report.write()


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    arguments = parser("checks", __doc__)
    ranks.add_options(arguments, ranks=4, rates=("1gbit",))
    arguments.add_argument("--layers", type=int, default=12)
    arguments.add_argument("--width", type=int, default=1024)
    arguments.add_argument("--batch-size", type=int, default=8)
    arguments.add_argument("--rounds", type=int, default=6, help="with trainers made anew, per scheme")
    arguments.add_argument("--steps", type=int, default=40, help="of each kind in a round")
    arguments.add_argument("--schemes", nargs="*", default=list(NAMES), choices=list(NAMES), help="which to take")
    words = "which to take beside none and all"
    arguments.add_argument("--checks", nargs="*", default=list(CHECKS), choices=list(CHECKS), help=words)
    options = arguments.parse_args(argv)
    if options.quick:
        options.layers, options.width, options.rounds, options.steps = 3, 128, 2, 3
    return ranks.exit_code_of(lambda: _measure_all(options), "checks")


if __name__ == "__main__":
    sys.exit(main())
