"""How near do predicted steps come to measured ones, and is the scheme that is predicted to be the fastest the fastest?

In the lab, `calibrate` times collectives and kernels alone, and steps of three models of its own (linear layers and
GELU), at 300 Mbit/s and at 4 Gbit/s, on 2, 4 and 8 ranks that share this machine's cores. Everything else is held
out: no model and no rate of the settings below is seen by it. Whole steps of each scheme are then predicted and
measured, on links of 50 Mbit/s to 10 Gbit/s, on 2 to 8 ranks. A setting takes the profile of the nearer of the two
rates (in logarithms), and of as many ranks or the next larger number. Of each model the simulator gets its shapes and
the time of forward and backward without exchange, measured beside.
`python -m benchmarks.simulator` (root, for the lab)

Results are kept as they come in `OUT/simulator-measured.jsonl`; what is there is not measured again, so that a run may
be broken off and gone on with. `--minutes` bounds a run, `--report` only reports; `--earlier FOLDER` says how far the
same steps are from those of an earlier run.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import torch.distributed as dist

from benchmarks import ranks
from benchmarks.common import Column, Report, Row, checked_out_commit, parser
from benchmarks.step_schemes import (
    BF16,
    BUCKET_MB,
    FP32,
    NO_OP,
    POWER_SGD,
    Trainer,
    byte_gpt,
    lenet,
    linear_layers,
    scheme,
)
from distsign.simulator import Cluster, Link, Model, Profile, Scheme, Step
from distsign.simulator.calibrate import calibrate
from distsign.simulator.units import parse_bandwidth
from launch.metrics import read_lines

CALIBRATED_RATES, CALIBRATED_RANKS = ("300mbit", "4gbit"), (2, 4, 8)
"""A profile is that of the user's links: what a byte costs the processor depends on how fast they come."""
WARM_UP = 4
MEASURED = "simulator-measured.jsonl"
LARGEST_ERROR, NEAR_ENOUGH, CORES_MATTER = 0.20, 0.03, 0.05

SIMULATED = {
    FP32: "fp32",
    BF16: "bf16",
    "fp16 hook": "fp16",
    f"{POWER_SGD} rank 1, one bucket": "powersgd:1",
    f"{POWER_SGD} rank 4, one bucket": "powersgd:4",
    "top-k 0.1 %": "topk:0.001",
    "vote, RMS carry, planes": "planes",
    "vote, RMS, 0.1 bit": "sparse:bits=0.1",
}
"""The schemes as the simulator names them."""
HIERARCHICAL = {"vote, RMS, 0.1 bit, hierarchical": "hierarchical:bits=0.1"}

WORKLOADS = {
    "12 x 1024": lambda: linear_layers(12, 1024, 8),
    "4 x 1536": lambda: linear_layers(4, 1536, 16),
    "lenet x 4": lambda: lenet(4, 32),
    "gpt x 3": lambda: byte_gpt(3, 2),
}


@dataclass(frozen=True)
class Setting:
    """Where one step is measured.

    Args:
        num_ranks: in all.
        rate: of the links.
        workload: of `WORKLOADS`.
        ranks_per_node: that share a link.
    """

    num_ranks: int
    rate: str
    workload: str
    ranks_per_node: int = 1

    @property
    def key(self) -> str:
        """Its name in the file of results."""
        return f"{self.num_ranks}/{self.ranks_per_node} {self.rate} {self.workload}"


SETTINGS = (
    # fp32 takes 12 s a step for 12.6 M parameters at 50 Mbit/s: large models are left to faster links.
    *(Setting(k, "50mbit", "lenet x 4") for k in (2, 4)),
    Setting(3, "50mbit", "gpt x 3"),
    *(Setting(k, "200mbit", "lenet x 4") for k in (2, 8)),
    *(Setting(k, "200mbit", "gpt x 3") for k in (3, 4)),
    *(Setting(k, "500mbit", "12 x 1024") for k in (2, 4)),
    *(Setting(k, "500mbit", "lenet x 4") for k in (3, 6)),
    *(Setting(k, "500mbit", "gpt x 3") for k in (4, 8)),
    *(Setting(k, "2gbit", "12 x 1024") for k in (2, 3, 4)),
    *(Setting(k, "2gbit", "4 x 1536") for k in (4, 6)),
    *(Setting(k, "10gbit", "12 x 1024") for k in (2, 4)),
    *(Setting(k, "10gbit", "4 x 1536") for k in (3, 8)),
    *(Setting(k, "10gbit", "lenet x 4") for k in (2, 4)),
    *(Setting(k, "10gbit", "gpt x 3") for k in (2, 4, 6)),
    Setting(4, "500mbit", "12 x 1024", ranks_per_node=2),
    Setting(8, "200mbit", "gpt x 3", ranks_per_node=4),
)
QUICK = (Setting(2, "10gbit", "lenet x 4"), Setting(4, "10gbit", "lenet x 4", ranks_per_node=2))

TABLE = (
    Column("setting", "ranks/per node, link, model"),
    Column("name", "scheme"),
    Column("predicted_ms", "predicted ms", ".1f"),
    Column("ms", "measured ms", ".1f"),
    Column("error", "error", "+.1%"),
    Column("cores_matter", "cores matter"),
)
PARTS = (
    Column("of", "of"),
    Column("steps", "steps", "d"),
    Column("error", "error", ".1%"),
    Column("error_bias", "bias", "+.1%"),
    Column("error_large", "above 20 %", "d"),
    Column("quick_error", "quick", ".1%"),
    Column("quick_error_bias", "bias", "+.1%"),
    Column("quick_error_large", "above 20 %", "d"),
)
CHOICES = (
    Column("setting", "ranks/per node, link, model"),
    Column("predicted", "predicted fastest"),
    Column("measured", "measured fastest"),
    Column("behind", "behind it by", ".1%"),
)


# ---------------------------------------------------------------------------------------------------------- on a rank


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Run on each rank: return the time of forward and backward alone, and of whole steps by scheme.

    Each scheme has the memory for itself, as in a user's run. Forward and backward are timed before and after all
    others: what the machine does from minute to minute should not look like an error of one scheme.
    """
    found: dict[str, list[float]] = {}
    for name in (NO_OP, *settings["schemes"], NO_OP):
        trainer = Trainer(scheme(name), WORKLOADS[settings["workload"]]())
        run = trainer.compute if name == NO_OP else trainer.step
        for _ in range(WARM_UP):  # makes groups, lets DDP rebuild its buckets, and finds the memory that steps need
            run()
        each_s = ranks.largest(ranks.timed_together(run)) / 1e3
        count = min(max(int(settings["seconds"] / each_s), settings["least"]), settings["most"])
        times = found.setdefault(name, [])
        times += [ranks.timed_together(run) for _ in range(count)]
        ranks.say(f"{name}, {count} steps, {median(times[-count:]):.1f} ms")
        trainer.combiner.close()
        dist.barrier()
        del trainer, run
        gc.collect()
    return found


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


class Results:
    """What has been measured so far: one JSON line a setting, with its commit, and a profile a number of ranks."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._path = folder, folder / MEASURED
        self.measured: dict[str, dict[str, float]] = {line["key"]: line["ms"] for line in read_lines(self._path)}

    def add(self, key: str, ms: dict[str, float]) -> None:
        """Keep one setting's times."""
        self.measured[key] = ms
        with self._path.open("a") as file:
            file.write(json.dumps({"key": key, "commit": checked_out_commit(), "ms": ms}) + "\n")

    def profile_path(self, setting: Setting) -> Path:
        """Return the file of the profile that a setting takes: that of the nearest link and of enough ranks."""
        name = f"simulator-profile-{_calibrated_rate(setting)}-{_calibrated_ranks(setting)}-{setting.ranks_per_node}"
        return self.folder / f"{name}.json"


def _calibrated_ranks(setting: Setting) -> int:
    return next(k for k in CALIBRATED_RANKS if k >= setting.num_ranks)


def _calibrated_rate(setting: Setting) -> str:
    rate = math.log(parse_bandwidth(setting.rate))
    return min(CALIBRATED_RATES, key=lambda each: abs(math.log(parse_bandwidth(each)) - rate))


def _calibrate_for(setting: Setting, results: Results, seconds: float) -> None:
    path, rate, num_ranks = results.profile_path(setting), _calibrated_rate(setting), _calibrated_ranks(setting)
    if path.exists():
        return
    print(f"  calibrating on {num_ranks} ranks, {setting.ranks_per_node} a node, {rate}", file=sys.stderr, flush=True)
    ranks.run_on_ranks(
        "benchmarks.simulator:calibrated",
        {"rate": rate, "ranks_per_node": setting.ranks_per_node, "seconds": seconds, "path": str(path.resolve())},
        num_ranks=num_ranks,
        rate=rate,
        ranks_per_node=setting.ranks_per_node,
        deadline_s=240 + 10 * seconds,
    )


def _schemes_of(setting: Setting) -> dict[str, str]:
    # PowerSGD and all-reduces have no notion of a node; within one, only what does is new.
    return SIMULATED if setting.ranks_per_node == 1 else {**SIMULATED, **HIERARCHICAL}


def _measure_setting(setting: Setting, results: Results, options: argparse.Namespace) -> None:
    print(f"  {setting.key}", file=sys.stderr, flush=True)
    settings = {"workload": setting.workload, "schemes": list(_schemes_of(setting)), "seconds": options.seconds}
    settings |= {"least": 2, "most": 3 if options.quick else 15}
    of_ranks = ranks.run_on_ranks(
        "benchmarks.simulator:measure",
        settings,
        num_ranks=setting.num_ranks,
        rate=setting.rate,
        ranks_per_node=setting.ranks_per_node,
        deadline_s=600,
    )
    ms = {name: median(ranks.slowest([each[name] for each in of_ranks])) for name in of_ranks[0]}
    results.add(setting.key, ms)


def predict(
    setting: Setting,
    results: Results,
    name: str,
    compute_s: float,
    *,
    cores: float | None = None,
    whole_steps: bool = True,
) -> float:
    """Return the predicted milliseconds of a step; on request as if no whole steps had been calibrated."""
    profile = Profile.load(results.profile_path(setting))
    if not whole_steps:
        profile = replace(profile, in_step={})
    if cores is not None:
        profile = replace(profile, cores=cores)
    link = Link(parse_bandwidth(setting.rate), profile.latency_s)
    cluster = Cluster(setting.num_ranks, link, setting.ranks_per_node, profile.node_link, setting.num_ranks)
    bucket_mb = 1e4 if name.startswith(POWER_SGD) else BUCKET_MB
    model = Model.of(WORKLOADS[setting.workload]().make(), setting.workload)
    chosen = Scheme.parse(_schemes_of(setting)[name])
    step = Step(model, cluster, chosen, compute_s=compute_s, profile=profile, bucket_mb=bucket_mb)
    return 1e3 * step.on().step_s


def rows_of(setting: Setting, results: Results) -> list[Row]:
    """Return a row for each scheme in one setting."""
    ms = results.measured[setting.key]
    rows = []
    for name in (each for each in _schemes_of(setting) if each in ms):
        predicted = predict(setting, results, name, ms[NO_OP] / 1e3)
        # The same on a machine where nobody waits for a core, forward and backward alone taking as long as they did.
        without = predict(setting, results, name, ms[NO_OP] / 1e3, cores=math.inf)
        row: Row = {"setting": setting.key, "name": name, "predicted_ms": predicted, "ms": ms[name]}
        row |= {"error": predicted / ms[name] - 1, "compute_ms": ms[NO_OP]}
        quick_ms = predict(setting, results, name, ms[NO_OP] / 1e3, whole_steps=False)
        row["quick_error"] = quick_ms / ms[name] - 1
        row["cores_matter"] = "yes" if predicted > (1 + CORES_MATTER) * without else "no"
        rows.append(row)
    return rows


def choice_of(rows: Sequence[Row]) -> Row:
    """Return which scheme would have been chosen in one setting, and how far behind the fastest one it is."""
    chosen = min(rows, key=lambda row: float(row["predicted_ms"]))
    fastest = min(rows, key=lambda row: float(row["ms"]))
    names = {"setting": chosen["setting"], "predicted": chosen["name"], "measured": fastest["name"]}
    return {**names, "behind": chosen["ms"] / fastest["ms"] - 1}


def summary_of(of: str, rows: Sequence[Row]) -> Row:
    """Return how far some steps are off on the whole, to which side, and how far without whole steps."""
    found: Row = {"of": of, "steps": len(rows)}
    for name in ("error", "quick_error"):
        errors = [row[name] for row in rows]
        found |= {name: mean_error(rows, name), f"{name}_bias": sum(errors) / len(errors)}
        found[f"{name}_large"] = sum(abs(error) > LARGEST_ERROR for error in errors)
    return found


def mean_error(rows: Sequence[Row], of: str = "error") -> float:
    """Return the geometric mean of how far predictions are off, as a factor beyond 1, whichever way."""
    return geometric_mean([max(1 + row[of], 1 / (1 + row[of])) for row in rows]) - 1


def differences(now: dict[str, dict[str, float]], then: dict[str, dict[str, float]]) -> tuple[int, float, float]:
    """Return how many steps two runs share, and by how much their times differ; geometric means, as `mean_error`.

    Args:
        now: by setting and scheme, milliseconds of a step.
        then: likewise, of the other run.

    Returns:
        `(count, difference, beside)`; `beside` is that of times divided by those of forward and backward in their run.
    """
    both = [
        (name, now[key], then[key])
        for key in now
        if key in then
        for name in now[key]
        if name in then[key] and name != NO_OP
    ]
    plain = [a[name] / b[name] for name, a, b in both]
    beside = [ratio * b[NO_OP] / a[NO_OP] for ratio, (_, a, b) in zip(plain, both, strict=True)]
    if not both:
        return 0, 0.0, 0.0
    off, off_beside = (geometric_mean([max(x, 1 / x) for x in each]) - 1 for each in (plain, beside))
    return len(both), off, off_beside


def _report(options: argparse.Namespace, settings: Sequence[Setting], results: Results) -> None:
    report = Report("simulator", options)
    done = [rows_of(setting, results) for setting in settings if setting.key in results.measured]
    rows = [row for each in done for row in each]
    if not rows:
        print("nothing measured yet")
        return
    for title, limited in (("The links are the limit", "no"), ("The cores are the limit, too", "yes")):
        chosen = [row for row in rows if row["cores_matter"] == limited]
        if chosen:
            worst = max(abs(row["error"]) for row in chosen)
            note = f"{len(chosen)} held out: geometric mean error {mean_error(chosen):.1%}, largest {worst:.1%}"
            report.table(title, TABLE, chosen, note)
    choices = [choice_of(each) for each in done]
    right = sum(choice["behind"] <= NEAR_ENOUGH for choice in choices)
    uncompressed = sum(choice["measured"] in (FP32, BF16) for choice in choices)
    note = (
        f"all {len(rows)} held out: geometric mean error {mean_error(rows):.1%}, "
        f"{sum(abs(row['error']) > LARGEST_ERROR for row in rows)} above {LARGEST_ERROR:.0%}; choice right, or within "
        f"{NEAR_ENOUGH:.0%}, in {right} of {len(choices)} settings; fp32 or bf16 was the fastest in {uncompressed}"
    )
    report.table("The choice", CHOICES, choices, note)
    _report_parts(report, options, settings, results, rows)
    report.write()


def _report_parts(
    report: Report, options: argparse.Namespace, settings: Sequence[Setting], results: Results, rows: Sequence[Row]
) -> None:
    parts = {"all": rows}
    parts |= {name: [row for row in rows if row["name"] == name] for name in {**SIMULATED, **HIERARCHICAL}}
    parts |= {each.rate: [row for row in rows if each.rate in row["setting"].split()] for each in settings}
    note = "quick: without whole steps, as calibrate --quick has it"
    if options.earlier:
        shared, difference, beside = differences(results.measured, Results(Path(options.earlier)).measured)
        note += (
            f". {shared} of the steps differ by {difference:.1%} from an earlier run, by {beside:.1%} where forward "
            "and backward of each run are taken as given"
        )
    report.table("By scheme, by link", PARTS, [summary_of(of, part) for of, part in parts.items() if part], note)


def _measure_all(options: argparse.Namespace) -> None:
    settings = QUICK if options.quick else SETTINGS
    results = Results(Path(options.out, "quick") if options.quick else Path(options.out))  # of fewer steps: apart
    end = time.monotonic() + 60 * options.minutes
    left = [setting for setting in settings if setting.key not in results.measured]
    # Machines are not the same half an hour later: a profile is measured against right after it was made.
    left.sort(key=lambda setting: results.profile_path(setting).name)
    for setting in [] if options.report else left:
        if time.monotonic() > end:
            print(f"  {options.minutes:g} minutes are over; run it again to go on", file=sys.stderr, flush=True)
            break
        _calibrate_for(setting, results, 2.0 if options.quick else 20.0)
        _measure_setting(setting, results, options)
    _report(options, settings, results)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    arguments = parser("simulator", __doc__)
    arguments.add_argument("--minutes", type=float, default=90.0, help="after which no new setting is begun")
    arguments.add_argument("--seconds", type=float, default=2.0, help="of steps that count, per scheme and setting")
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
