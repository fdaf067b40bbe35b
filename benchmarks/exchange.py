"""How long does the exchange alone take, without any backward: votes beside all-reduces, on links of several rates?

Ballots are packed beforehand; the vote includes checks, tally and coding, and ends with the planes of the verdicts. The
gradient travels in one piece, whichever way. `python -m benchmarks.exchange` (root, for the lab)
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import ranks
from benchmarks.common import MIN_ROUNDS, Column, Report, Row, parser, ratio, summary
from distsign.collectives import Link
from distsign.exchange import VoteExchange
from distsign.kernels import kernels_for
from distsign.layout import Layout, Shape
from distsign.owner import make_owner
from distsign.payload import forms
from distsign.sizes import density_for
from distsign.traffic import ring_all_reduce_bytes
from distsign.voter import rotating_starts

NUM_PARAMETERS = 12
FP32 = "fp32 all-reduce"
BARRIERS = "barriers alone"
CONTENDERS = (FP32, "bf16 all-reduce", "planes", "sparse 0.1", "sparse 0.05")

TABLE = (
    Column("rate", "link"),
    Column("name", "exchange"),
    Column("ms", "ms", ".1f"),
    Column("spread", "quartiles", ".0%"),
    Column("ratio_to_fp32", "x fp32", ".3f"),
    Column("ratio_to_bf16", "x bf16", ".3f"),
    Column("counted_mb", "MB counted", ",.3f"),
    Column("interface_mb", "MB on interface", ",.3f"),
    Column("interface_to_counted", "interface / counted", ".3f"),
)


@dataclass(frozen=True)
class Exchange:
    """One way to combine a gradient: the collective calls, and the bytes that each costs this rank, both directions."""

    name: str
    run: Callable[[], object]
    counted_bytes: Callable[[], float]


def all_reduce(name: str, num_elements: int, dtype: torch.dtype) -> Exchange:
    """Return an all-reduce of as many elements; its bytes follow from the ring's formula."""
    gradient = torch.zeros(num_elements, dtype=dtype)  # zeros stay finite however often they are summed
    width, world_size = gradient.element_size(), dist.get_world_size()
    cost = ring_all_reduce_bytes(num_elements, width, world_size)
    return Exchange(name, partial(dist.all_reduce, gradient), lambda: cost)


def vote(name: str, num_elements: int, bits: float | None) -> Exchange:
    """Return a vote on planes, or on sparse ballots that fill four fifths of a budget of bits, as steering aims at."""
    kernels, voting = kernels_for("cpu"), VoteExchange(Link.twin(None), "two_phase")
    length, rest = divmod(num_elements, NUM_PARAMETERS)
    shapes = [Shape(k, length + (rest if k == 0 else 0)) for k in range(NUM_PARAMETERS)]
    density = None if bits is None else density_for(bits, shapes, voting.world_size, num_elements)
    layout = Layout.build([shapes], voting.world_size)
    wire = "planes" if bits is None else "sparse"
    ballots, verdicts = forms(layout, density, wire, owner_carry=bits is not None)
    gradient = torch.randn(num_elements, generator=torch.Generator().manual_seed(dist.get_rank()))
    # Of normal numbers 0.317 lie beyond 1, as with AdaptiveConfidence(beta2=1).
    share = 0.317 if density is None else 0.8 * density
    level = float(torch.special.ndtri(torch.tensor(1 - share / 2, dtype=torch.float64)))
    planes = torch.empty(layout.buffer_bytes, dtype=torch.uint8)
    kernels.pack(gradient, layout.pieces[0], torch.full((NUM_PARAMETERS,), level), planes)
    crowded = None if density is None else torch.zeros(layout.all_pieces.length.size, dtype=torch.bool)
    clean = torch.tensor(False)
    payload = ballots.seal(planes, crowded, torch.zeros(0), clean, kernels)
    owner = make_owner(None if density is None else "plain", 1, voting.world_size)
    starts = rotating_starts(layout, 0)
    num_runs = 0

    def run() -> None:
        nonlocal num_runs
        voting.read(verdicts, voting.vote(ballots, verdicts, payload, owner, starts, kernels), kernels)
        owner.commit(clean)
        num_runs += 1

    return Exchange(name, run, lambda: (voting.counted.sent_bytes + voting.counted.received_bytes) / num_runs)


def make(name: str, num_elements: int) -> Exchange:
    """Return a contender by its name in `CONTENDERS`, or `sparse BITS`."""
    kind, _, bits = name.partition(" ")
    if kind in ("fp32", "bf16"):
        return all_reduce(name, num_elements, torch.float32 if kind == "fp32" else torch.bfloat16)
    return vote(name, num_elements, float(bits) if bits else None)


def measure(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Run on each rank: time the contenders in turn, until the time is over; return times and bytes by name."""
    exchanges = [make(name, settings["num_elements"]) for name in settings["contenders"]]
    exchanges.append(Exchange(BARRIERS, lambda: None, lambda: 0.0))
    found: dict[str, dict[str, Any]] = {each.name: {"ms": [], "interface": []} for each in exchanges}
    begin = time.perf_counter()
    for index in range(-1, settings["max_rounds"]):  # the first one warms up
        first = index % len(exchanges)
        for each in [*exchanges[first:], *exchanges[:first]]:
            dist.barrier()
            before = ranks.interface_bytes()
            ms = ranks.timed_together(each.run)
            passed = ranks.interface_difference(before)
            if index >= 0:
                found[each.name]["ms"].append(ms)
                found[each.name]["interface"].append(passed)
        if index + 1 >= MIN_ROUNDS and ranks.largest(time.perf_counter() - begin) > settings["seconds"]:
            break
    for each in exchanges:
        found[each.name]["counted"] = each.counted_bytes()
    return found


def _mean_interface_mb(results: Sequence[dict[str, dict[str, Any]]], name: str) -> float:
    return fmean(value for result in results for value in result[name]["interface"]) / 1e6


def rows_of(results: Sequence[dict[str, dict[str, Any]]]) -> list[Row]:
    """Return a row for each contender: the slowest rank's time, and bytes as means over the ranks."""
    rows = []
    for name in (each for each in results[0] if each != BARRIERS):
        of_ranks = [result[name] for result in results]
        counted = fmean(each["counted"] for each in of_ranks) / 1e6
        interface = None
        if None not in of_ranks[0]["interface"]:
            # What the barriers around each exchange sent is no part of it, and no small one beside sparse ballots.
            interface = _mean_interface_mb(results, name) - _mean_interface_mb(results, BARRIERS)
        row: Row = {"name": name, **summary(ranks.slowest([each["ms"] for each in of_ranks]))}
        row |= {"counted_mb": counted, "interface_mb": interface, "interface_to_counted": ratio(interface, counted)}
        rows.append(row)
    ms = {row["name"]: row["ms"] for row in rows}
    for row in rows:
        row["ratio_to_fp32"] = ratio(row["ms"], ms.get(FP32))
        row["ratio_to_bf16"] = ratio(row["ms"], ms.get("bf16 all-reduce"))
    return rows


def _measure_all(options: argparse.Namespace) -> None:
    report = Report("exchange", options)
    settings = {"num_elements": options.params, "contenders": CONTENDERS, "max_rounds": options.rounds}
    settings["seconds"] = options.seconds
    for rate in options.rates:
        deadline_s = 240 + 5 * options.seconds
        job = "benchmarks.exchange:measure"
        results = ranks.run_on_ranks(job, settings, num_ranks=options.ranks, rate=rate, deadline_s=deadline_s)
        rows = [{"rate": rate, "ranks": options.ranks, **row} for row in rows_of(results)]
        title = (
            f"{options.ranks} ranks, {options.params:,} parameters, {rate} links; sent and received, mean of the ranks"
        )
        report.table(title, TABLE, rows)
    report.write()


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    arguments = parser("exchange", __doc__)
    ranks.add_options(arguments, ranks=4, rates=("100mbit", "1gbit", "10gbit", "none"))
    arguments.add_argument("--params", type=int, default=12_000_000)
    arguments.add_argument("--rounds", type=int, default=25, help="at most, of each rate")
    arguments.add_argument("--seconds", type=float, default=45.0, help="of each rate, after which no round is begun")
    options = arguments.parse_args(argv)
    if options.quick:
        options.params, options.rounds = 200_000, 3
    return ranks.exit_code_of(lambda: _measure_all(options), "exchange")


if __name__ == "__main__":
    sys.exit(main())
