"""What `benchmarks.simulator` measures and predicts: settings, the models and schemes in them, and what was found.

The rule by which settings are held out is in `SETTINGS` and `CALIBRATED_RATES`: no rate is in both.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from benchmarks.common import checked_out_commit
from benchmarks.step_schemes import BF16, BUCKET_MB, FP32, POWER_SGD, byte_gpt, lenet, linear_layers
from distsign.simulator import Cluster, Link, Model, Profile, Scheme, Step
from distsign.simulator.units import parse_bandwidth
from launch.metrics import read_lines

CALIBRATED_RATES, CALIBRATED_RANKS = ("300mbit", "1500mbit", "7gbit"), (2, 4, 8)
"""A profile is that of the user's links: what a byte costs the processor depends on how fast they come."""
MEASURED, CALIBRATED = "simulator-measured.jsonl", "simulator-calibrated.jsonl"

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


class Results:
    """What has been measured so far, a JSON line a setting, with its commit; the profiles, and how long each took.

    Args:
        folder: of all; it is made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.measured: dict[str, dict[str, float]] = {line["key"]: line["ms"] for line in read_lines(folder / MEASURED)}
        self.calibrated: dict[str, float] = {line["key"]: line["s"] for line in read_lines(folder / CALIBRATED)}

    def add(self, key: str, ms: dict[str, float]) -> None:
        """Keep one setting's times, by scheme."""
        self.measured[key] = ms
        self._append(MEASURED, {"key": key, "commit": checked_out_commit(), "ms": ms})

    def add_profile(self, setting: Setting, seconds: float) -> None:
        """Keep how long the profile of a setting took."""
        self.calibrated[profile_name(setting)] = seconds
        self._append(CALIBRATED, {"key": profile_name(setting), "commit": checked_out_commit(), "s": seconds})

    def _append(self, name: str, line: dict[str, object]) -> None:
        with (self.folder / name).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def profile_path(self, setting: Setting) -> Path:
        """Return the file of the profile that a setting takes."""
        return self.folder / f"simulator-profile-{profile_name(setting)}.json"


def calibrated_ranks(setting: Setting) -> int:
    """Return the number of ranks of the profile that a setting takes: as many, or the next that were calibrated."""
    return next(k for k in CALIBRATED_RANKS if k >= setting.num_ranks)


def calibrated_rate(setting: Setting) -> str:
    """Return the link of the profile that a setting takes: the nearest in logarithms."""
    rate = math.log(parse_bandwidth(setting.rate))
    return min(CALIBRATED_RATES, key=lambda each: abs(math.log(parse_bandwidth(each)) - rate))


def profile_name(setting: Setting) -> str:
    """Return the name of the profile that a setting takes."""
    return f"{calibrated_rate(setting)}-{calibrated_ranks(setting)}-{setting.ranks_per_node}"


def schemes_of(setting: Setting) -> dict[str, str]:
    """Return the schemes of a setting, as benchmarks and as the simulator name them."""
    # PowerSGD and all-reduces have no notion of a node; within one, only what does is new.
    return SIMULATED if setting.ranks_per_node == 1 else {**SIMULATED, **HIERARCHICAL}


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
    profile = _profile(results.profile_path(setting))
    if not whole_steps:
        profile = replace(profile, in_step={})
    if cores is not None:
        profile = replace(profile, cores=cores)
    link = Link(parse_bandwidth(setting.rate), profile.latency_s)
    cluster = Cluster(setting.num_ranks, link, setting.ranks_per_node, profile.node_link, setting.num_ranks)
    bucket_mb = 1e4 if name.startswith(POWER_SGD) else BUCKET_MB
    model = _model(setting.workload)
    chosen = Scheme.parse(schemes_of(setting)[name])
    step = Step(model, cluster, chosen, compute_s=compute_s, profile=profile, bucket_mb=bucket_mb)
    return 1e3 * step.on().step_s


@cache
def _profile(path: Path) -> Profile:
    return Profile.load(path)


@cache
def _model(workload: str) -> Model:
    return Model.of(WORKLOADS[workload]().make(), workload)
