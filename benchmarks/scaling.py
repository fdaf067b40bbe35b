"""Do a rank's bytes stay flat as ranks are added, and what does that do to the time of an exchange?

Two phases cost `(W - 1) / W` of a constant. `python -m benchmarks.scaling` (root, for the lab)
"""

from __future__ import annotations

import argparse
import sys

from benchmarks import ranks
from benchmarks.common import Column, Report, Row, parser, ratio
from benchmarks.exchange import FP32, rows_of

CONTENDERS = (FP32, "planes", "sparse 0.05")
FLAT_WITHIN = 0.01
"""Sparse bodies are whole bytes and whole slots, and their fields whole bits."""

TABLE = (
    Column("name", "exchange"),
    Column("ranks", "W", "d"),
    Column("counted_mb", "MB counted", ".4f"),
    Column("flatness", "x W/(W-1), to the least W", ".4f"),
    Column("interface_mb", "MB on interface", ".4f"),
    Column("interface_flatness", "likewise", ".4f"),
    Column("ms", "ms", ".1f"),
    Column("ratio_to_fp32", "x fp32", ".3f"),
)


def add_flatness(rows: list[Row]) -> None:
    """Add what each row's bytes are without the factor `(W - 1) / W`, in times of the same at the least W."""
    for row in rows:
        for key, target in (("counted_mb", "flatness"), ("interface_mb", "interface_flatness")):
            first = next(other for other in rows if other["name"] == row["name"])
            row[target] = ratio(_without_factor(row, key), _without_factor(first, key))


def _without_factor(row: Row, key: str) -> float | None:
    return None if row[key] is None else float(row[key]) * row["ranks"] / (row["ranks"] - 1)


def _measure_all(options: argparse.Namespace) -> None:
    report = Report("scaling", options)
    settings = {"num_elements": options.params, "contenders": CONTENDERS, "max_rounds": options.rounds}
    settings["seconds"] = options.seconds
    for rate in options.rates:
        rows: list[Row] = []
        for world_size in options.ranks:
            print(f"  {world_size} ranks, {rate}", file=sys.stderr, flush=True)
            deadline_s = 300 + 5 * options.seconds
            job = "benchmarks.exchange:measure"
            results = ranks.run_on_ranks(job, settings, num_ranks=world_size, rate=rate, deadline_s=deadline_s)
            rows += [{"rate": rate, "ranks": world_size, **row} for row in rows_of(results)]
        rows.sort(key=lambda row: (CONTENDERS.index(row["name"]), row["ranks"]))
        add_flatness(rows)
        worst = max(abs(row["flatness"] - 1) for row in rows)
        verdict = "flat" if worst <= FLAT_WITHIN else "NOT flat"
        title = f"{options.params:,} parameters, {rate} links; sent and received, mean of the ranks"
        note = (
            f"{verdict}: counted bytes, times W/(W-1), differ by {worst:.2%} at most. More ranks share the same cores"
        )
        report.table(title, TABLE, rows, note)
    report.write()


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    arguments = parser("scaling", __doc__)
    ranks.add_options(arguments, ranks=None, rates=("1gbit",))
    arguments.add_argument("--ranks", type=int, nargs="+", default=list(range(2, 9)), help="numbers of ranks")
    arguments.add_argument("--params", type=int, default=4_000_000)
    arguments.add_argument("--rounds", type=int, default=11, help="at most, of each number of ranks")
    arguments.add_argument("--seconds", type=float, default=15.0, help="of each, after which no round is begun")
    options = arguments.parse_args(argv)
    if min(options.ranks) < 2:
        arguments.error("--ranks must be 2 or more: one rank sends nothing")
    if options.quick:
        options.params, options.rounds, options.ranks = 200_000, 3, options.ranks[:2]
    options.ranks.sort()
    return ranks.exit_code_of(lambda: _measure_all(options), "scaling")


if __name__ == "__main__":
    sys.exit(main())
