"""How long does a whole training step take, optimizer included, beside the usual ways and beside no exchange at all?

Four ranks train 12 x Linear(1024, 1024), 12.6 M parameters, on batches of 8, in buckets of 4 MB. On each rank one
process works through all schemes, several times, the second time backwards. `python -m benchmarks.step` (root, for the
lab); `--profile` says instead where the step of a vote spends its time.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch.distributed as dist

from benchmarks import ranks
from benchmarks.common import Column, Report, Row, parser, ratio, summary
from benchmarks.step_schemes import BF16, FP32, NO_OP, POWER_SGD, SCHEMES, Trainer, linear_layers, scheme, settings_of

MIN_STEPS = 2

TABLE = (
    Column("rate", "link"),
    Column("name", "scheme"),
    Column("ms", "ms/step", ".1f"),
    Column("spread", "quartiles", ".0%"),
    Column("rounds", "steps", "d"),
    Column("ratio_to_no_op", "x no-op", ".2f"),
    Column("ratio_to_fp32", "x fp32", ".3f"),
    Column("ratio_to_bf16", "x bf16", ".3f"),
    Column("ratio_to_power_sgd", "x best PowerSGD", ".2f"),
    Column("counted_mb", "MB counted", ".3f"),
    Column("interface_mb", "MB on interface", ".3f"),
)
PROFILE_TABLE = (
    Column("rate", "link"),
    Column("name", "scheme"),
    Column("part", "part of the step"),
    Column("ms", "ms, clock", ".1f"),
    Column("cpu_ms", "ms, processor", ".1f"),
    Column("share", "of the step", ".0%"),
)


def measure(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Run on each rank: time the steps of all schemes; return times and bytes by scheme."""
    found: dict[str, dict[str, Any]] = {name: {"ms": [], "interface": []} for name in settings["schemes"]}
    for index in range(settings["passes"]):
        # Backwards the second time, so that who comes late in one pass comes early in the next.
        for name in settings["schemes"][:: 1 if index % 2 == 0 else -1]:
            _measure_scheme(name, settings, found[name])
            ranks.say(f"pass {index + 1}: {name}, {found[name]['ms'][-1]:.0f} ms")
    return found


def _measure_scheme(name: str, settings: dict[str, Any], found: dict[str, Any]) -> None:
    """Add the steps of one scheme in one pass."""
    trainer = Trainer(scheme(name), linear_layers(**settings["trainer"]))
    dist.barrier()
    trainer.step()  # compiles, makes groups, and lets DDP rebuild its buckets
    estimate_ms = ranks.largest(ranks.timed_together(trainer.step))
    num_steps = int(1e3 * settings["seconds"] / estimate_ms)
    num_steps = min(max(num_steps, MIN_STEPS), settings["max_steps"])
    for _ in range(num_steps // 2):  # carries fill, and thresholds find their level
        trainer.step()
    dist.barrier()
    before = ranks.interface_bytes()
    found["ms"] += [ranks.timed_together(trainer.step) for _ in range(num_steps)]
    passed = ranks.interface_difference(before)
    found["interface"].append(None if passed is None else passed / num_steps)
    found["counted"] = trainer.counted_bytes()
    trainer.combiner.close()
    dist.barrier()
    del trainer
    gc.collect()


def profile(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Run on each rank: return for each vote its parts' milliseconds a step, by the clock and of the processor."""
    from benchmarks.parts import Parts

    found: dict[str, dict[str, Any]] = {}
    for name in settings["schemes"]:
        trainer = Trainer(scheme(name), linear_layers(**settings["trainer"]))
        begin = time.perf_counter()
        for _ in range(MIN_STEPS + 1):
            trainer.step()
        each_s = ranks.largest((time.perf_counter() - begin) / (MIN_STEPS + 1))
        num_steps = min(max(int(settings["seconds"] / each_s), MIN_STEPS), settings["max_steps"])
        with Parts(trainer) as parts:
            for _ in range(num_steps):
                dist.barrier()
                parts.step()
        found[name] = parts.per_step(num_steps)
        trainer.combiner.close()
        ranks.say(f"profiled {name}")
    return found


def rows_of(results: Sequence[dict[str, dict[str, Any]]]) -> list[Row]:
    """Return a row for each scheme: the slowest rank's step, and bytes as means over the ranks."""
    rows = []
    for name in results[0]:
        of_ranks = [result[name] for result in results]
        passed = [value for each in of_ranks for value in each["interface"]]
        row: Row = {"name": name, **summary(ranks.slowest([each["ms"] for each in of_ranks]))}
        row["counted_mb"] = fmean(each["counted"] for each in of_ranks) / 1e6
        row["interface_mb"] = None if None in passed else fmean(passed) / 1e6
        rows.append(row)
    ms = {row["name"]: row["ms"] for row in rows}
    best = min((value for name, value in ms.items() if name.startswith(POWER_SGD)), default=None)
    rivals = {"no_op": ms.get(NO_OP), "fp32": ms.get(FP32), "bf16": ms.get(BF16), "power_sgd": best}
    for row in rows:
        row |= {f"ratio_to_{rival}": ratio(row["ms"], rival_ms) for rival, rival_ms in rivals.items()}
    return rows


def profile_rows(results: Sequence[dict[str, dict[str, Any]]]) -> list[Row]:
    """Return a row for each part of each vote's step, means over ranks and steps."""
    rows = []
    for name, parts in results[0].items():
        step_ms = fmean(result[name]["whole step"]["ms"] for result in results)
        for part in parts:
            row: Row = {"name": name, "part": part}
            row |= {key: fmean(result[name][part][key] for result in results) for key in ("ms", "cpu_ms")}
            rows.append(row | {"share": row["ms"] / step_ms})
    return rows


def _measure_all(options: argparse.Namespace) -> None:
    report = Report("step-profile" if options.profile else "step", options)
    votes = [each.name for each in SCHEMES if each.is_vote]
    chosen = votes if options.profile else [each.name for each in SCHEMES]
    settings: dict[str, Any] = {"schemes": [name for name in chosen if options.only is None or options.only in name]}
    settings |= {"passes": options.passes, "seconds": options.seconds, "max_steps": options.steps}
    settings["trainer"] = settings_of(options.layers, options.width, options.batch_size)
    num_params = options.layers * options.width * (options.width + 1)
    job = "benchmarks.step:profile" if options.profile else "benchmarks.step:measure"
    for rate in options.rates:
        print(f"  {rate}", file=sys.stderr, flush=True)
        # On a link a hundred times too slow for it, fp32 takes 6 s a step.
        deadline_s = 120 + options.passes * len(settings["schemes"]) * (2 * options.seconds + 30)
        results = ranks.run_on_ranks(job, settings, num_ranks=options.ranks, rate=rate, deadline_s=deadline_s)
        rows = profile_rows(results) if options.profile else rows_of(results)
        rows = [{"rate": rate, "ranks": options.ranks, **row} for row in rows]
        title = f"{options.ranks} ranks, {num_params:,} parameters, batch {options.batch_size}, {rate}"
        report.table(title, PROFILE_TABLE if options.profile else TABLE, rows)
    report.write()


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    arguments = parser("step", __doc__)
    ranks.add_options(arguments, ranks=4, rates=("100mbit", "1gbit", "10gbit", ranks.LOOPBACK))
    arguments.add_argument("--only", metavar="TEXT", help="only schemes with this in their name")
    arguments.add_argument("--layers", type=int, default=12)
    arguments.add_argument("--width", type=int, default=1024)
    arguments.add_argument("--batch-size", type=int, default=8)
    arguments.add_argument("--passes", type=int, default=2, help="through all schemes")
    arguments.add_argument("--seconds", type=float, default=3.0, help="of steps that count, per scheme and pass")
    arguments.add_argument("--steps", type=int, default=30, help="at most, likewise")
    arguments.add_argument("--profile", action="store_true", help="where a vote's step spends its time")
    options = arguments.parse_args(argv)
    if options.only is not None and not any(options.only in each.name for each in SCHEMES):
        arguments.error(f"--only {options.only} is in no name: {'; '.join(each.name for each in SCHEMES)}")
    if options.quick:
        options.layers, options.width, options.passes, options.steps = 3, 128, 1, 3
    return ranks.exit_code_of(lambda: _measure_all(options), "step")


if __name__ == "__main__":
    sys.exit(main())
