"""How near do predicted steps come to measured ones, and is the scheme that is predicted to be the fastest the fastest?

In the lab, `calibrate` times collectives and kernels alone, and steps of three models of its own (linear layers and
GELU), at 300 Mbit/s, 1.5 and 7 Gbit/s, on 2, 4 and 8 ranks that share this machine's cores. Everything else is held
out: no model and no rate of the settings is seen by it. Whole steps of each scheme are then predicted and measured, on
links of 50 Mbit/s to 10 Gbit/s, on 2 to 8 ranks. A setting takes the profile of the nearest rate (in logarithms), and
of as many ranks or the next larger number. Of each model the simulator gets its shapes and the time of forward and
backward without exchange, measured right before and after the steps that are predicted. Fixed work, timed after each
calibration and each setting, tells whether the machine was as fast after both.
`python -m benchmarks.simulator` (root, for the lab)

Results are kept as they come in `OUT/simulator-measured.jsonl`; what is there is not measured again, so that a run may
be broken off and gone on with. `--minutes` bounds a run, `--report` only reports; `--earlier FOLDER` says how far the
same steps are from those of an earlier run.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import ranks
from benchmarks.common import parser
from benchmarks.simulator_report import write_report
from benchmarks.simulator_settings import (
    MEASURED,
    QUICK,
    SETTINGS,
    WORKLOADS,
    YARDSTICK,
    Results,
    Setting,
    calibrated_ranks,
    calibrated_rate,
    schemes_of,
)
from benchmarks.step_schemes import NO_OP, Trainer, scheme
from distsign.simulator import Profile
from distsign.simulator.calibrate import calibrate
from distsign.simulator.units import parse_bandwidth

WARM_UP, NUM_ALONE = 4, 3


# ---------------------------------------------------------------------------------------------------------- on a rank


def measure(settings: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Run on each rank: return, by scheme, the times of whole `steps`, and of forward and backward alone (`compute`).

    All schemes are timed twice, as many steps in either turn, the second time in reverse order; forward and backward
    right before and after each. So what the machine does from minute to minute should not look like an error of one
    scheme, or of all in one setting.
    """
    found: dict[str, dict[str, list[float]]] = {"steps": {}, "compute": {}}
    alone = Trainer(scheme(NO_OP), WORKLOADS[settings["workload"]]())
    schemes = settings["schemes"]
    for name in (*schemes, *reversed(schemes)):
        trainer = Trainer(scheme(name), WORKLOADS[settings["workload"]]())
        for _ in range(WARM_UP):  # makes groups, lets DDP rebuild its buckets, and finds the memory that steps need
            trainer.step()
        steps, compute = (found[kind].setdefault(name, []) for kind in ("steps", "compute"))
        if steps:
            count = len(steps)
        else:
            each_s = ranks.largest(ranks.timed_together(trainer.step)) / 1e3
            count = min(max(int(settings["seconds"] / 2 / each_s), settings["least"]), settings["most"])
        compute += _compute_times(alone)
        steps += [ranks.timed_together(trainer.step) for _ in range(count)]
        compute += _compute_times(alone)
        ranks.say(f"{name}, {count} steps, {median(steps[-count:]):.1f} ms, {median(compute[-NUM_ALONE:]):.1f} alone")
        trainer.combiner.close()
        dist.barrier()
        del trainer
        gc.collect()
    alone.combiner.close()
    return found


def _compute_times(alone: Trainer) -> list[float]:
    return [ranks.timed_together(alone.compute) for _ in range(1 + NUM_ALONE)][1:]  # the first finds nothing in caches


def calibrated(settings: dict[str, Any]) -> bool:
    """Run on each rank: calibrate, and let rank 0 write the profile."""
    profile = calibrate(
        nominal_bytes_per_s=parse_bandwidth(settings["rate"]),
        ranks_per_node=settings["ranks_per_node"],
        ranks_per_machine=dist.get_world_size(),
        seconds=settings["seconds"],
    )
    if profile is not None:
        profile.save(settings["path"])
    return True


# ------------------------------------------------------------------------------------------------------- on the outside


def yardstick_ms() -> float:
    """Return the time of fixed work that keeps cores and memory busy: how fast the machine is at this moment."""
    factor, block = torch.ones(512, 512), torch.ones(1 << 23)
    into, times = torch.empty_like(block), []
    for _ in range(41):
        begin = time.perf_counter()
        factor @ factor
        into.copy_(block)
        times.append(1e3 * (time.perf_counter() - begin))
    return median(times[1:])


def _calibrate_for(setting: Setting, results: Results, seconds: float) -> None:
    path, rate, num_ranks = results.profile_path(setting), calibrated_rate(setting), calibrated_ranks(setting)
    if path.exists():
        return
    print(f"  calibrating on {num_ranks} ranks, {setting.ranks_per_node} a node, {rate}", file=sys.stderr, flush=True)
    part = path.with_suffix(".part")
    ranks.run_on_ranks(
        "benchmarks.simulator:calibrated",
        {"rate": rate, "ranks_per_node": setting.ranks_per_node, "seconds": seconds, "path": str(part.resolve())},
        num_ranks=num_ranks,
        rate=rate,
        ranks_per_node=setting.ranks_per_node,
        deadline_s=240 + 10 * seconds,
    )
    profile = Profile.load(part)
    replace(profile, facts={**profile.facts, YARDSTICK: yardstick_ms()}).save(path)
    part.unlink()


def _measure_setting(setting: Setting, results: Results, options: argparse.Namespace) -> None:
    print(f"  {setting.key}", file=sys.stderr, flush=True)
    settings = {"workload": setting.workload, "schemes": list(schemes_of(setting)), "seconds": options.seconds}
    settings |= {"least": 2, "most": 3 if options.quick else 8}
    of_ranks = ranks.run_on_ranks(
        "benchmarks.simulator:measure",
        settings,
        num_ranks=setting.num_ranks,
        rate=setting.rate,
        ranks_per_node=setting.ranks_per_node,
        deadline_s=900,
    )
    step_ms, compute_ms = (
        {name: median(ranks.slowest([each[kind][name] for each in of_ranks])) for name in of_ranks[0][kind]}
        for kind in ("steps", "compute")
    )
    results.add(setting.key, step_ms, compute_ms, yardstick_ms())


def _measure_all(options: argparse.Namespace) -> None:
    settings = QUICK if options.quick else SETTINGS
    results = Results(Path(options.out, "quick") if options.quick else Path(options.out))  # of fewer steps: apart
    end = time.monotonic() + 60 * options.minutes
    left = [setting for setting in settings if not results.is_complete(setting)]
    # Machines are not the same half an hour later: a profile is measured against right after it was made.
    left.sort(key=lambda setting: results.profile_path(setting).name)
    for setting in [] if options.report else left:
        if time.monotonic() > end:
            print(f"  {options.minutes:g} minutes are over; run it again to go on", file=sys.stderr, flush=True)
            break
        _calibrate_for(setting, results, 2.0 if options.quick else 20.0)
        _measure_setting(setting, results, options)
    write_report(options, settings, results)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    arguments = parser("simulator", __doc__)
    arguments.add_argument("--minutes", type=float, default=90.0, help="after which no new setting is begun")
    arguments.add_argument("--seconds", type=float, default=2.0, help="of steps, per scheme and setting, of both turns")
    arguments.add_argument("--report", action="store_true", help="measure nothing, report what is there")
    arguments.add_argument("--earlier", metavar="FOLDER", help="of an earlier run, to compare with")
    options = arguments.parse_args(argv)
    if options.earlier and not Path(options.earlier, MEASURED).is_file():
        arguments.error(f"there is no {MEASURED} in {options.earlier}: --earlier takes the --out of another run")
    if options.quick:
        options.seconds = 0.2
    return ranks.exit_code_of(lambda: _measure_all(options), "simulator")


if __name__ == "__main__":
    sys.exit(main())
