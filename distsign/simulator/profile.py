"""What `distsign calibrate` found on some ranks, as numbers that a simulation needs; a small JSON file."""

from __future__ import annotations

import bisect
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from distsign.simulator.cluster import Link

__all__ = ["COLLECTIVES", "FEW_TENSORS", "KERNELS", "CollectiveCost", "InStep", "KernelCost", "Profile"]

_FORMAT = "distsign-profile"
_VERSION = 1

COLLECTIVES = ("all_reduce_fp32", "all_reduce_bf16", "all_reduce_fp16", "all_to_all", "all_gather")
"""The collectives that schemes call."""

KERNELS = (
    *("to_half", "from_half", "power_sgd", "power_sgd_rank", "top_k_encode", "top_k_decode", "node_mean"),
    *("step_mean", "step_planes", "step_sparse"),
    *(f"{what}_{coded}" for what in ("cast", "count", "read") for coded in ("planes", "sparse")),
)
"""What schemes compute."""

FEW_TENSORS = 4
"""In so many tensors lie the elements of what was timed."""


@dataclass(frozen=True)
class KernelCost:
    """Time of a kernel on one core, or on the device, that has nothing else to do.

    Args:
        points: elements and seconds, at least two, by growing elements: what does not fit into a cache, or is given
            back to the system after each call, costs more by the element than what does.
        tensor_s: of each tensor beyond the first few, where a kernel goes through them one by one.

    Example:
        >>> KernelCost(((1000, 1e-3), (2000, 1.5e-3))).seconds(4000)
        0.0025
    """

    points: tuple[tuple[float, float], ...] = ((0.0, 0.0), (1.0, 0.0))
    tensor_s: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", tuple((float(n), float(seconds)) for n, seconds in self.points))

    @classmethod
    def linear(cls, call_s: float, element_s: float = 0.0) -> KernelCost:
        """Return a cost by call and by element."""
        return cls(((0.0, call_s), (1.0, call_s + element_s)))

    def seconds(self, elements: float, tensors: int = FEW_TENSORS) -> float:
        """Return the time of a call: between two points, or beyond them, by a straight line; on nothing, none."""
        if not elements:
            return 0.0
        sizes = [n for n, _ in self.points]
        right = min(max(bisect.bisect_left(sizes, elements), 1), len(sizes) - 1)
        (low, before), (high, after) = self.points[right - 1 : right + 1]
        found = before + (after - before) * (elements - low) / (high - low)
        return max(0.0, found + self.tensor_s * (tensors - FEW_TENSORS))


@dataclass(frozen=True)
class CollectiveCost:
    """What a collective costs beside the time on the wire.

    Args:
        call_s: waiting in each call.
        message_s: waiting for each message beyond the link's latency.
        call_cpu_s: core-seconds of each call.
        message_cpu_s: core-seconds of each message.
        byte_cpu_s: core-seconds of each byte sent (and received, and reduced).
        wire: how many times longer its bytes take on the link than the link's bandwidth says, at least 1.
        incast: how many times longer still where several ranks send to one at the same time, at least 1: the link's
            queue is now empty and now too long.
    """

    call_s: float = 0.0
    message_s: float = 0.0
    call_cpu_s: float = 0.0
    message_cpu_s: float = 0.0
    byte_cpu_s: float = 0.0
    wire: float = 1.0
    incast: float = 1.0


@dataclass(frozen=True)
class InStep:
    """How much longer things take within training steps than each took alone.

    Args:
        elements: of the model that was trained.
        work: times as long: kernels, optimizer, and the processor's part of collectives.
        wire: times as long: bytes on the link, and waiting.
        rank: of PowerSGD, whose passes over the gradient and whose products are not alike in this.
    """

    elements: float
    work: float = 1.0
    wire: float = 1.0
    rank: int = 1


@dataclass(frozen=True)
class Profile:
    """Costs on one kind of machine and link.

    Args:
        collectives: by name, all of `COLLECTIVES`.
        kernels: by name, all of `KERNELS`.
        device: `"cpu"`, where kernels and backward share the cores, or `"cuda"`.
        cores: that the workers of a machine have together, by their measured slow-down; infinity where each has enough.
        concurrent: collectives of one group that are on their way at once: 2 for Gloo's threads, 1 for NCCL's stream.
        bandwidth_bytes_per_s: of the link as measured, by payloads; None where none was.
        latency_s: likewise.
        efficiency: share of a link's nominal bandwidth that payloads get.
        in_step: by the name of a scheme, what becomes of its work within steps of models of some sizes, and PowerSGD's
            of some ranks: by growing ranks, and by growing elements of each. Other options change nothing, and what is
            not named is as it is alone.
        node_bandwidth_bytes_per_s: between ranks of a node, for each of them; None where that was not measured.
        node_latency_s: likewise.
        facts: where and on what it was measured, and how many seconds that took, starting the ranks apart.

    Raises:
        ValueError: if a number is out of range or a cost is missing.

    Example:
        >>> Profile.ideal().kernels["to_half"].seconds(1e9)
        0.0
    """

    collectives: Mapping[str, CollectiveCost]
    kernels: Mapping[str, KernelCost]
    device: str = "cpu"
    cores: float = math.inf
    concurrent: int = 1
    bandwidth_bytes_per_s: float | None = None
    latency_s: float = 0.0
    efficiency: float = 1.0
    in_step: Mapping[str, tuple[InStep, ...]] = field(default_factory=dict)
    node_bandwidth_bytes_per_s: float | None = None
    node_latency_s: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        missing = [name for name in COLLECTIVES if name not in self.collectives]
        missing += [name for name in KERNELS if name not in self.kernels]
        if missing:
            raise ValueError(f"a profile needs the cost of {missing[0]} ({len(missing)} missing): calibrate again")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"a profile's device must be cpu or cuda, got {self.device!r}")
        numbers = {"cores": self.cores, "concurrent": self.concurrent, "efficiency": self.efficiency}
        for name in ("bandwidth_bytes_per_s", "node_bandwidth_bytes_per_s"):
            if getattr(self, name) is not None:
                numbers[name] = getattr(self, name)
        for name, cost in self.collectives.items():
            numbers |= {f"{name}.wire": cost.wire, f"{name}.incast": cost.incast}
        for name, value in numbers.items():
            if not _is_number(value) or value <= 0:
                raise ValueError(f"a profile's {name} must be a number above zero, got {value!r}")
        for name, kernel in self.kernels.items():
            _require_kernel(name, kernel)
        for name, collective in self.collectives.items():
            _require_costs(name, vars(collective))
        for name, points in self.in_step.items():
            _require_in_step(name, points)
        for name in ("latency_s", "node_latency_s"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < math.inf:
                raise ValueError(f"a profile's {name} must be a number of at least 0, got {value!r}")

    @property
    def link(self) -> Link | None:
        """The link that was measured, by its nominal bandwidth; None where none was."""
        if self.bandwidth_bytes_per_s is None:
            return None
        return Link(self.bandwidth_bytes_per_s / self.efficiency, self.latency_s)

    @property
    def node_link(self) -> Link:
        """That between ranks of a node; where it was not measured, of endless bandwidth."""
        return Link(self.node_bandwidth_bytes_per_s or math.inf, self.node_latency_s)

    def in_step_of(self, scheme: str, num_elements: float, rank: int = 1) -> InStep:
        """Return what becomes of a scheme's work in steps of a model of this size: between two, by logarithms.

        Example:
            >>> from dataclasses import replace
            >>> profile = replace(Profile.ideal(), in_step={"planes": (InStep(1e4, 2.0, 1.0), InStep(1e6, 1.0, 1.0))})
            >>> [profile.in_step_of("planes", n).work for n in (1e3, 1e5, 1e7)], profile.in_step_of("fp32", 1e5).work
            ([2.0, 1.5, 1.0], 1.0)
        """
        points = self.in_step.get(scheme) or (InStep(num_elements),)
        by_rank = [list(of_rank) for _, of_rank in itertools.groupby(points, key=lambda point: point.rank)]
        found = [_between([(p.elements, p.work, p.wire) for p in of_rank], num_elements) for of_rank in by_rank]
        ranks = [(of_rank[0].rank, *factors) for of_rank, factors in zip(by_rank, found, strict=True)]
        return InStep(num_elements, *_between(ranks, rank), rank)

    @classmethod
    def ideal(cls) -> Profile:
        """Return the profile of a machine where only the wire takes time: what holds where none was measured."""
        return cls({name: CollectiveCost() for name in COLLECTIVES}, {name: KernelCost() for name in KERNELS})

    def save(self, path: str | Path) -> None:
        """Write it to a file."""
        numbers = asdict(self)
        numbers["cores"] = None if math.isinf(self.cores) else self.cores
        Path(path).write_text(json.dumps({"format": _FORMAT, "version": _VERSION, **numbers}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a file that `save` wrote.

        Raises:
            ValueError: if it cannot be read, is no profile, is damaged, or is of another version.
        """
        again = "write one with distsign calibrate"
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"cannot read the profile {path}: {error.strerror or error}; {again}") from error
        except ValueError as error:
            raise ValueError(f"the profile {path} is damaged, no JSON: {error}; {again}") from error
        if not isinstance(data, dict) or data.pop("format", None) != _FORMAT:
            raise ValueError(f"{path} is no profile of distsign's; {again}")
        version = data.pop("version", None)
        if version != _VERSION:
            raise ValueError(f"the profile {path} is of version {version}, expected {_VERSION}: {again}")
        try:
            cores = data.pop("cores")
            collectives = {name: CollectiveCost(**cost) for name, cost in data.pop("collectives").items()}
            kernels = {name: KernelCost(**cost) for name, cost in data.pop("kernels").items()}
            steps = data.pop("in_step", {}).items()
            in_step = {name: tuple(InStep(**point) for point in points) for name, points in steps}
            return cls(collectives, kernels, in_step=in_step, cores=math.inf if cores is None else cores, **data)
        except (KeyError, TypeError, AttributeError) as error:
            known = ", ".join(each.name for each in fields(cls))
            raise ValueError(f"the profile {path} is damaged ({error}), expected {known}; {again}") from error
        except ValueError as error:
            raise ValueError(f"the profile {path} is damaged: {error}") from error


def _between(rows: Sequence[tuple[float, float, float]], where: float) -> tuple[float, float]:
    """Return the second and the third number of rows where the first is so much, by its logarithm."""
    firsts, *others = np.array(rows).T
    second, third = (float(np.interp(math.log(max(where, 1)), np.log(firsts), other)) for other in others)
    return second, third


def _require_kernel(name: str, cost: KernelCost) -> None:
    _require_costs(name, {"tensor_s": cost.tensor_s})
    for elements, seconds in cost.points:
        _require_costs(name, {"elements": elements, "seconds": seconds})
    sizes = [elements for elements, _ in cost.points]
    if len(sizes) < 2 or any(low >= high for low, high in itertools.pairwise(sizes)):
        raise ValueError(f"the cost of {name} needs two points or more, by growing elements, got {sizes}")


def _require_in_step(scheme: str, points: Sequence[InStep]) -> None:
    for name, value in itertools.chain.from_iterable(vars(point).items() for point in points):
        if not _is_number(value) or not 0 < value < math.inf:
            raise ValueError(f"in_step of {scheme}: {name} must be a number above zero, got {value!r}")
    sizes = [(point.rank, point.elements) for point in points]
    if not sizes or any(low >= high for low, high in itertools.pairwise(sizes)):
        raise ValueError(f"in_step of {scheme} needs points by growing ranks and elements, got {sizes}")


def _require_costs(name: str, values: Mapping[str, object]) -> None:
    for key, value in values.items():
        if not _is_number(value) or not 0 <= value < math.inf:
            raise ValueError(f"{key} of {name} must be a number of at least 0, got {value!r}")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
