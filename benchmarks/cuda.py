"""How much of a GPU's bandwidth do the kernels reach, in times of a copy on the device?

`python -m benchmarks.cuda`; without a GPU or Triton it says so in one line and ends well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec

import torch

from benchmarks.common import Column, Report, Row, interleaved, parser
from benchmarks.kernel_cases import COPY, GRANULE, KernelCase, cases

HEAD_START_CYCLES = 2_000_000

TIMES = (
    Column("name", "kernel"),
    Column("ms", "ms", ".3f"),
    Column("spread", "quartiles", ".0%"),
    Column("ratio_to_copy", "x copy", ".2f"),
    Column("gb_per_s", "GB/s", ".0f"),
    Column("share_of_copy_bandwidth", "of the copy's GB/s", ".0%"),
)


def why_not() -> str:
    """Return why nothing can be measured here; empty where it can."""
    if not torch.cuda.is_available():
        return "no CUDA device here: nothing measured"
    if find_spec("triton") is None:
        return "triton is not installed, and without it there are no CUDA kernels: nothing measured"
    return ""


def device_ms(run: Callable[[], object]) -> float:
    """Return the milliseconds that the device is busy with a call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    # While the device waits, the host enqueues all of the call: the device's time is wanted, not that of Python.
    torch.cuda._sleep(HEAD_START_CYCLES)  # type: ignore[no-untyped-call]
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def rows_of(contenders: list[KernelCase], times: dict[str, list[float]]) -> list[Row]:
    """Return a row for each kernel, with its share of the bandwidth that the copy reached."""
    from benchmarks.codec import time_rows

    # The targets are those of the CPU.
    rows = [row | {"target": None, "met": None} for row in time_rows(contenders, times)]
    copied = next(row["gb_per_s"] for row in rows if row["name"] == COPY)
    return [row | {"share_of_copy_bandwidth": row["gb_per_s"] / copied} for row in rows]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    arguments = parser("cuda", __doc__)
    arguments.add_argument("--mib", type=int, default=256, help="size of the gradient, far beyond the device's cache")
    arguments.add_argument("--rounds", type=int, default=31)
    arguments.add_argument("--seconds", type=float, default=120.0, help="after which no round is begun")
    options = arguments.parse_args(argv)
    if reason := why_not():
        print(f"cuda: {reason}")
        return 0
    if options.quick:
        options.mib, options.rounds = 1, 3
    num = max(1, options.mib * 2**18 // GRANULE) * GRANULE
    report = Report("cuda", options)
    contenders = cases(num, "cuda")
    times = interleaved(contenders, rounds=options.rounds, warm_up=3, limit_s=options.seconds, timer=device_ms)
    device = torch.cuda.get_device_name()
    title = f"{device}, CUDA {torch.version.cuda}, {num:,} float32 ({4 * num / 2**20:g} MiB), medians"
    report.table(title, TIMES, [row | {"device": device} for row in rows_of(contenders, times)])
    report.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
