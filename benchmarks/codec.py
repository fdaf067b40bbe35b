"""How long do the kernels take on one core, in times of a copy of the gradient, and how short are sparse ballots?

A gradient of 64 MiB and warm buffers. `python -m benchmarks.codec`
"""

from __future__ import annotations

import math
import sys

import numpy as np
import torch

from benchmarks.common import Column, Report, Row, interleaved, parser, ratio, summary
from benchmarks.kernel_cases import COPY, DENSITIES, GRANULE, ONE_SIGMA, KernelCase, cases, num_votes, planes_at
from distsign.kernels import kernels_for
from distsign.wire.sparse import SparseCode

TIMES = (
    Column("name", "kernel"),
    Column("ms", "ms", ".2f"),
    Column("spread", "quartiles", ".0%"),
    Column("ratio_to_copy", "x copy", ".2f"),
    Column("target", "target", ".1f"),
    Column("met", "met"),
    Column("gb_per_s", "GB/s", ".1f"),
)
SIZES = (
    Column("name", "sparse body"),
    Column("density", "density", ".4f"),
    Column("bits", "bits/component", ".4f"),
    Column("entropy_bits", "H(p) + p", ".4f"),
    Column("ratio_to_entropy", "x entropy", ".4f"),
    Column("times_fewer_than_planes", "x fewer than planes", ".1f"),
)


def packbits_case(num_elements: int) -> KernelCase:
    """Return the way that NumPy offers: two masks, each packed by `packbits`."""
    grad = torch.randn(num_elements, generator=torch.Generator().manual_seed(0)).numpy()

    def run() -> None:
        mask = np.abs(grad) > ONE_SIGMA
        np.packbits(mask)
        np.packbits(mask & (grad < 0))

    return KernelCase(name="numpy packbits", run=run, num_bytes=num_elements * 17 // 4)


def time_rows(contenders: list[KernelCase], times: dict[str, list[float]]) -> list[Row]:
    """Return a row for each kernel: its time, and that in times of the copy, which was timed in the same rounds."""
    copy_ms = summary(times[COPY])["ms"]
    rows = []
    for case in contenders:
        row: Row = {"name": case.name, **summary(times[case.name]), "target": case.target}
        row["ratio_to_copy"] = ratio(row["ms"], copy_ms)
        row["gb_per_s"] = case.num_bytes / row["ms"] / 1e6
        row["met"] = None if case.target is None else "yes" if row["ratio_to_copy"] <= case.target else "no"
        rows.append(row)
    return rows


def size_rows(num_elements: int) -> list[Row]:
    """Return for each density how long a body with a slot for each vote is, beside the entropy of random votes."""
    kernels, generator = kernels_for("cpu"), torch.Generator().manual_seed(1)
    rows = []
    for density in DENSITIES:
        votes = num_votes(planes_at(kernels, num_elements, density, "cpu", generator))
        p = votes / num_elements
        entropy = p - p * math.log2(p) - (1 - p) * math.log2(1 - p)
        bits = 8 * SparseCode(num_elements, votes).num_bytes / num_elements
        row: Row = {"name": f"p={density:g}", "density": p, "bits": bits, "entropy_bits": entropy}
        rows.append(row | {"ratio_to_entropy": bits / entropy, "times_fewer_than_planes": 2 / bits})
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    arguments = parser("codec", __doc__)
    arguments.add_argument("--mib", type=int, default=64, help="size of the gradient in float32")
    arguments.add_argument("--rounds", type=int, default=21)
    arguments.add_argument("--seconds", type=float, default=120.0, help="after which no round is begun")
    options = arguments.parse_args(argv)
    if options.quick:
        options.mib, options.rounds = 1, 3
    torch.set_num_threads(1)
    num = max(1, options.mib * 2**18 // GRANULE) * GRANULE
    report = Report("codec", options)
    contenders = [*cases(num, "cpu"), packbits_case(num)]
    times = interleaved(contenders, rounds=options.rounds, limit_s=options.seconds)
    title = f"one core, {num:,} float32 ({4 * num / 2**20:g} MiB), medians of {len(times[COPY])} rounds"
    note = "GB/s: least bytes that must be read and written. A W-th: what each of W ranks counts of this gradient."
    report.table(title, TIMES, time_rows(contenders, times), note)
    report.table("sparse bodies with as many slots as votes", SIZES, size_rows(num))
    report.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
