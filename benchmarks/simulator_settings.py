"""What `benchmarks.simulator` measures and predicts: settings, the models and schemes in them, and what was found.

The rule by which settings are held out: no rate is in both `SETTINGS` and `CALIBRATED_RATES`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from benchmarks.common import checked_out_commit
from benchmarks.step_schemes import BF16, BUCKET_MB, FP32, NO_OP, POWER_SGD, byte_gpt, lenet, linear_layers
from distsign.simulator import Cluster, Link, Model, Profile, Scheme, Step
from distsign.simulator.units import parse_bandwidth
from launch.metrics import read_lines

CALIBRATED_RATES, CALIBRATED_RANKS = ("300mbit", "1500mbit", "7gbit"), (2, 4, 8)
"""A profile is that of the user's links: what a byte costs the processor depends on how fast they come."""
MEASURED = "simulator-measured.jsonl"
YARDSTICK = "yardstick_ms"
"""By this name profiles and results keep how fast the machine was right after they were measured."""

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
    """What has been measured so far: a JSON line a setting, with its commit; and the profiles.

    Args:
        folder: of all; it is made where it is missing.

    Attributes:
        measured: milliseconds of a step, by setting and scheme.
        compute: of forward and backward alone, beside these steps, likewise.
        commits: by which each setting was measured.
        yardsticks: milliseconds of fixed work right after each setting; None in results of earlier versions.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        lines = read_lines(folder / MEASURED)
        self.measured: dict[str, dict[str, float]] = {line["key"]: line["ms"] for line in lines}
        self.compute: dict[str, dict[str, float]] = {
            # Results of earlier versions have one time for all schemes of a setting.
            line["key"]: line.get("compute_ms") or dict.fromkeys(line["ms"], line["ms"][NO_OP])
            for line in lines
        }
        self.commits: dict[str, str | None] = {line["key"]: line["commit"] for line in lines}
        self.yardsticks: dict[str, float | None] = {line["key"]: line.get(YARDSTICK) for line in lines}

    def add(self, key: str, ms: dict[str, float], compute_ms: dict[str, float], yardstick: float) -> None:
        """Keep one setting's times, by scheme: of steps, and of forward and backward alone; and that of fixed work."""
        commit = checked_out_commit()
        line = {"key": key, "commit": commit, "ms": ms, "compute_ms": compute_ms, YARDSTICK: yardstick}
        self.measured[key], self.compute[key], self.commits[key] = ms, compute_ms, commit
        self.yardsticks[key] = yardstick
        with (self.folder / MEASURED).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def profile_path(self, setting: Setting) -> Path:
        """Return the file of the profile that a setting takes."""
        name = f"{calibrated_rate(setting)}-{calibrated_ranks(setting)}-{setting.ranks_per_node}"
        return self.folder / f"simulator-profile-{name}.json"

    def drift(self, setting: Setting) -> float | None:
        """Return by how much slower the machine was after a setting than after its calibration; None if unknown."""
        then = load_profile(self.profile_path(setting)).facts.get(YARDSTICK)
        now = self.yardsticks[setting.key]
        return None if now is None or then is None else now / then - 1

    def is_complete(self, setting: Setting) -> bool:
        """Return whether a setting has been measured, and has its profile."""
        return setting.key in self.measured and self.profile_path(setting).is_file()


def calibrated_ranks(setting: Setting) -> int:
    """Return the number of ranks of the profile that a setting takes: as many, or the next that were calibrated."""
    return next(k for k in CALIBRATED_RANKS if k >= setting.num_ranks)


def calibrated_rate(setting: Setting) -> str:
    """Return the link of the profile that a setting takes: the nearest in logarithms."""
    rate = math.log(parse_bandwidth(setting.rate))
    return min(CALIBRATED_RATES, key=lambda each: abs(math.log(parse_bandwidth(each)) - rate))


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
    profile = load_profile(results.profile_path(setting))
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
def load_profile(path: Path) -> Profile:
    """Return the profile in a file, read once."""
    return Profile.load(path)


@cache
def _model(workload: str) -> Model:
    return Model.of(WORKLOADS[workload]().make(), workload)
