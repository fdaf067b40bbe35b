"""Fit a profile to what real ranks take for the collectives and kernels that hooks use.

Every figure is a median. What a collective takes is split by least squares with coefficients that are not negative:
by call, by message, by byte, and by byte where several ranks send to one; once for the clock and once for the
processor's time. What the processor does not explain is the wire's.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec

import numpy as np
import numpy.typing as npt
import torch

from distsign.simulator.kernel_probe import MANY_TENSORS, POWER_RANKS, probes
from distsign.simulator.probe import Call, Ranks, joined_ranks, num_ranks
from distsign.simulator.profile import COLLECTIVES, FEW_TENSORS, CollectiveCost, KernelCost, Profile

__all__ = [
    "bandwidth_of",
    "calibrate",
    "calibrate_under_torchrun",
    "fit_collectives",
    "kernel_sizes",
    "non_negative_fit",
]

_SIZES = (1 << 10, 1 << 15, 1 << 17, 1 << 19, 1 << 21, 1 << 23)
_KERNEL_SIZES = (1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
_SIZE_OF_MANY = 1 << 18
_LEAST_PER_RANK = 1 << 11
"""Elements of a kernel's size for each rank, four times that of many tensors: below, no budget leaves each payload its
header and a slot for each tensor."""
_WORK_S = 0.15
_LINK_LIMITED = (0.7, 1.25)
"""Of the nominal bandwidth: below it something else is the limit, and above it the ranks use another link, as ranks of
one machine do; neither says anything of the one that was named."""

Array = npt.NDArray[np.float64]


def non_negative_fit(features: Array, times_s: Array) -> Array:
    """Return the coefficients, none below zero, that explain times best, by their relative errors.

    Args:
        features: `[num_times, num_features]`, few features.
        times_s: `[num_times]`, above zero.

    Example:
        >>> features = np.array([[1.0, 0.0], [1.0, 1e6], [1.0, 2e6]])
        >>> non_negative_fit(features, np.array([0.5, 1.5, 2.5])).round(9).tolist()
        [0.5, 1e-06]
    """
    best, least = np.zeros(features.shape[1]), math.inf
    weighted = features / times_s[:, None]
    scale = np.abs(weighted).max(axis=0)
    scale[scale == 0] = 1.0
    for size in range(1, features.shape[1] + 1):
        for chosen in itertools.combinations(range(features.shape[1]), size):
            columns = list(chosen)
            part, *_ = np.linalg.lstsq(weighted[:, columns] / scale[columns], np.ones(len(times_s)), rcond=None)
            if (part < 0).any():
                continue
            error = float(np.square(weighted[:, columns] / scale[columns] @ part - 1).sum())
            if error < least * (1 - 1e-9):
                least, best = error, np.zeros(features.shape[1])
                best[columns] = part / scale[columns]
    return best


@dataclass(frozen=True)
class LinkFit:
    """What a link was found to be.

    Attributes:
        bandwidth_bytes_per_s: of payload.
        latency_s: of a message.
        is_limit: whether it was the link that kept bytes from being faster, and not the processor.
        collectives: cost of each on it.
    """

    bandwidth_bytes_per_s: float
    latency_s: float
    is_limit: bool
    collectives: dict[str, CollectiveCost]


def fit_collectives(
    calls: Sequence[Call], stretch: float, bandwidth_bytes_per_s: float, nominal_bytes_per_s: float | None = None
) -> LinkFit:
    """Fit a link and the costs of collectives on it.

    Args:
        calls: what was timed, of each kind on several sizes.
        stretch: how many times longer work takes because ranks share cores.
        bandwidth_bytes_per_s: what two ranks got through the link while the others were silent; see `bandwidth_of`.
        nominal_bytes_per_s: what the link is sold as; None where that is not known. It stands where the processor is
            slower, and where the ranks found a link that is faster, and so another.
    """
    walls, cpus = {}, {}
    for kind in dict.fromkeys(call.kind for call in calls):
        mine = [call for call in calls if call.kind == kind]
        ones = np.ones(len(mine))
        messages = np.array([call.messages for call in mine], dtype=np.float64)
        link = np.array([call.link_bytes for call in mine], dtype=np.float64)
        sent = np.array([call.sent_bytes for call in mine], dtype=np.float64)
        wall = np.array([max(call.timing.wall_s, 1e-7) for call in mine])
        cpu = np.array([max(call.timing.cpu_s, 1e-7) for call in mine])
        # Of a ring's messages each has a round of its own, and no rank hears more than one other at a time.
        crowded = link * (messages > 1) * (kind == "all_to_all")
        walls[kind] = non_negative_fit(np.stack([ones, messages, link, crowded], 1), wall)
        cpus[kind] = non_negative_fit(np.stack([ones, messages, sent], 1), cpu)
    bandwidth, least_cpu = bandwidth_bytes_per_s, min(cost[2] for cost in cpus.values())
    is_limit = 1 / bandwidth > 1.2 * least_cpu
    if nominal_bytes_per_s is not None:
        least, most = (share * nominal_bytes_per_s for share in _LINK_LIMITED)
        is_limit = least <= bandwidth <= most
        bandwidth = bandwidth if is_limit else nominal_bytes_per_s
    fastest = max(min(cost[2] for cost in walls.values()), 1 / bandwidth)
    delays = {kind: max(0.0, walls[kind][1] - stretch * cpus[kind][1]) for kind in walls}
    rings = [delay for kind, delay in delays.items() if kind != "all_to_all"]
    latency = min(rings, default=0.0)
    found = {}
    for kind, (call_s, _, byte_s, more_s) in walls.items():
        call_cpu, message_cpu, byte_cpu = cpus[kind]
        if not is_limit:
            # What the process is not charged for is the kernel's work.
            byte_cpu = max(byte_cpu, (byte_s + more_s) / stretch)
        is_ring = kind != "all_to_all"
        found[kind] = CollectiveCost(
            call_s=max(0.0, call_s - stretch * call_cpu - (0.0 if is_ring else latency)),
            message_s=delays[kind] - (latency if is_ring else 0.0),
            call_cpu_s=float(call_cpu),
            message_cpu_s=float(message_cpu),
            byte_cpu_s=float(byte_cpu),
            # Beside the fastest ring, in which each rank hears one other: what both wait for is not the wire's.
            wire=max(1.0, float(byte_s) / fastest) if is_limit else 1.0,
            incast=max(1.0, float(byte_s + more_s) / max(float(byte_s), fastest)) if is_limit else 1.0,
        )
    return LinkFit(float(bandwidth), float(latency), bool(is_limit), found)


def bandwidth_of(calls: Sequence[Call]) -> float:
    """Return the most bytes per second that any collective got through a link.

    By its two largest messages: of a whole call, latency and what each call costs take a part; of the difference
    between two, disturbances do. Both can only be too slow but for what passes a pause unshaped, in which the
    difference has no part: of a collective the lower counts, and the fastest collective for all.

    Args:
        calls: in one group of ranks, two where the link itself is asked for; of each kind on several sizes.
    """
    series: dict[str, list[Call]] = {}
    for call in sorted(calls, key=lambda call: call.link_bytes):
        series.setdefault(call.kind, []).append(call)
    best = 0.0
    for small, large in (each[-2:] for each in series.values() if len(each) > 1):
        longer_s = large.timing.wall_s - small.timing.wall_s
        whole = large.link_bytes / max(large.timing.wall_s, 1e-9)
        best = max(best, min(whole, (large.link_bytes - small.link_bytes) / longer_s) if longer_s > 0 else 0.0)
    return best or 1e12


def calibrate_under_torchrun(
    *, backend: str | None, nominal_bytes_per_s: float | None, ranks_per_machine: int | None, seconds: float
) -> Profile | None:
    """Join the ranks that torchrun has started, and calibrate; see `calibrate`.

    Raises:
        ValueError: if this process was not started by torchrun, or is the only rank.
    """
    return joined_ranks(
        backend,
        lambda: calibrate(
            nominal_bytes_per_s=nominal_bytes_per_s, ranks_per_machine=ranks_per_machine, seconds=seconds
        ),
    )


def calibrate(
    *,
    nominal_bytes_per_s: float | None = None,
    ranks_per_node: int | None = None,
    ranks_per_machine: int | None = None,
    seconds: float = 10.0,
    repeats: int = 5,
) -> Profile | None:
    """Measure links, collectives and kernels on the ranks of the default process group.

    All ranks must call it, on an otherwise quiet machine.

    Args:
        nominal_bytes_per_s: what the link is sold as; the profile then holds for links of other bandwidths too. Ranks
            that all share a machine do not use it: of that link the profile has no more than this figure.
        ranks_per_node: consecutive ranks that share a link; None: `LOCAL_WORLD_SIZE`.
        ranks_per_machine: consecutive ranks that share cores; None: `LOCAL_WORLD_SIZE`.
        seconds: about how long collectives may take, beside kernels, which take half a minute on two cores and more
            where more ranks share them; on slow links, large messages are left out.
        repeats: of each measurement, of which the median counts; fewer of what takes long.

    Returns:
        The profile on rank 0, None on the others.

    Raises:
        ValueError: if the ranks do not divide into nodes.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    per_node, per_machine = ranks_per_node or local, ranks_per_machine or local
    world_size = num_ranks()
    for what, count in (("node", per_node), ("machine", per_machine)):
        if not 1 <= count <= world_size or world_size % count:
            raise ValueError(f"{count} ranks per {what} do not divide the {world_size} ranks")
    ranks = Ranks(per_node, per_machine)
    try:
        return _calibrate(ranks, nominal_bytes_per_s, seconds, repeats)
    finally:
        ranks.close()


def _calibrate(ranks: Ranks, nominal_bytes_per_s: float | None, seconds: float, repeats: int) -> Profile | None:
    on_cpu = ranks.device.type == "cpu"
    plan = [
        (group, kind)
        for group in ranks.groups
        for kind in (COLLECTIVES if group != "one link" else ("all_reduce_fp32", "all_to_all"))
    ]
    with _progress(len(plan) + len(kernel_sizes(ranks.world_size)[0]) + 2, ranks.rank) as advance:
        cores = _cores(ranks, repeats) if on_cpu else math.inf
        stretch = max(1.0, ranks.per_machine / cores)
        advance()
        kernels = _kernels(ranks, 2 * repeats, advance)
        calls: dict[str, list[Call]] = {group: [] for group in ranks.groups}
        for group, kind in plan:
            calls[group] += _calls(ranks, kind, group, 0.6 * seconds / len(plan), repeats)
            advance()
    if ranks.rank != 0:
        return None
    bandwidth = bandwidth_of(calls["one link"])
    outer = fit_collectives([*calls["all"], *calls.get("pairs", [])], stretch, bandwidth, nominal_bytes_per_s)
    inner = fit_collectives(calls["node"], stretch, bandwidth_of(calls["node"])) if "node" in calls else None
    efficiency = 1.0
    if nominal_bytes_per_s is not None and outer.is_limit:
        efficiency = min(1.0, outer.bandwidth_bytes_per_s / nominal_bytes_per_s)
    return Profile(
        outer.collectives,
        kernels,
        device=ranks.device.type,
        cores=cores,
        concurrent=2 if on_cpu else 1,
        bandwidth_bytes_per_s=outer.bandwidth_bytes_per_s,
        latency_s=outer.latency_s,
        efficiency=efficiency,
        node_bandwidth_bytes_per_s=inner.bandwidth_bytes_per_s if inner else None,
        node_latency_s=inner.latency_s if inner else 0.0,
        facts={
            "ranks": ranks.world_size,
            "ranks_per_node": ranks.per_node,
            "ranks_per_machine": ranks.per_machine,
            "torch": torch.__version__,
            "link_is_the_limit": outer.is_limit,
            "when": time.strftime("%Y-%m-%d %H:%M:%S"),
        },
    )


def _cores(ranks: Ranks, repeats: int) -> float:
    """Return the cores that the ranks of a machine have together: how much slower they are at once than one alone."""
    if ranks.per_machine == 1:
        return math.inf
    matrix = torch.randn(256, 256)
    once = ranks.time(lambda: torch.mm(matrix, matrix), repeats, alone=True).wall_s
    # Long beside a turn on a core: a rank whose turn comes last looks at the clock only then.
    count = max(1, round(_WORK_S / once))

    def work() -> None:
        for _ in range(count):
            torch.mm(matrix, matrix)

    alone = ranks.time(work, repeats, alone=True).wall_s
    together = ranks.time(work, repeats).wall_s
    return float(min(ranks.per_machine, ranks.per_machine * alone / together))


def _kernels(ranks: Ranks, repeats: int, advance: Callable[[], object]) -> dict[str, KernelCost]:
    """Time each kernel on growing sizes, and on many tensors beside few.

    On CPUs the processor's time counts: the clock also has what ranks wait for each other's cores.
    """
    few: dict[tuple[str, int], list[tuple[int, float]]] = {}
    many: dict[str, tuple[int, float]] = {}
    sizes, size_of_many = kernel_sizes(ranks.world_size)
    for size, num_tensors in [*((size, FEW_TENSORS) for size in sizes), (size_of_many, MANY_TENSORS)]:
        for probe in probes(size, ranks.world_size, ranks.device, ranks.alone, num_tensors):
            if num_tensors > FEW_TENSORS and not (probe.by_tensor and probe.rank == 1):
                continue
            found = ranks.time(probe.run, repeats, cold=True)
            seconds = found.cpu_s if ranks.device.type == "cpu" else found.wall_s
            if num_tensors > FEW_TENSORS:
                many[probe.name] = probe.elements, seconds
            else:
                few.setdefault((probe.name, probe.rank), []).append((probe.elements, seconds))
        advance()
    costs = {name: _kernel_cost(points, many.get(name)) for (name, rank), points in few.items() if rank == 1}
    thickest = max(POWER_RANKS)
    thin, thick = few["power_sgd", 1], few["power_sgd", thickest]
    further = [(n, max(0.0, long - short) / (thickest - 1)) for (n, short), (_, long) in zip(thin, thick, strict=True)]
    return {**costs, "power_sgd_rank": _kernel_cost(further, None)}


def kernel_sizes(num_voters: int) -> tuple[tuple[int, ...], int]:
    """Return the sizes at which kernels are timed, in elements, and the one of many tensors.

    Example:
        >>> [size.bit_length() - 1 for size in kernel_sizes(64)[0]], kernel_sizes(64)[1] == 2**19
        ([18, 20, 22, 24], True)
    """
    least = _LEAST_PER_RANK * num_voters
    sizes = tuple(size for size in _KERNEL_SIZES if size >= least)
    return sizes if len(sizes) > 1 else (least, 4 * least), max(_SIZE_OF_MANY, 4 * least)


def _kernel_cost(points: Sequence[tuple[int, float]], of_many: tuple[int, float] | None) -> KernelCost:
    # More elements do not take less time: what says so is noise.
    seconds = np.maximum.accumulate([seconds for _, seconds in points])
    cost = KernelCost(tuple((float(n), float(s)) for (n, _), s in zip(points, seconds, strict=True)))
    if of_many is None:
        return cost
    elements, seconds_of_many = of_many
    tensor_s = (seconds_of_many - cost.seconds(elements)) / (MANY_TENSORS - FEW_TENSORS)
    return replace(cost, tensor_s=max(0.0, tensor_s))


def _calls(ranks: Ranks, kind: str, group: str, budget_s: float, repeats: int) -> list[Call]:
    """Time one collective on growing sizes, until the next one would take too long."""
    found: list[Call] = []
    begin = before = time.perf_counter()
    for size, after in itertools.pairwise([*_SIZES, 4 * _SIZES[-1]]):
        found.append(ranks.call(kind, size, group, repeats))
        now = time.perf_counter()
        expected_s = (now - before) * after / size
        if len(found) >= 3 and ranks.agreed(now - begin + expected_s) > budget_s:
            break
        before = now
    return found


@contextmanager
def _progress(total: int, rank: int) -> Iterator[Callable[[], object]]:
    """Show a bar on rank 0, where tqdm is installed; yield what moves it on by one."""
    if rank == 0 and find_spec("tqdm") is not None:
        from tqdm import tqdm

        with tqdm(total=total, desc="calibrating", leave=False) as bar:
            yield bar.update
    else:
        yield lambda: None
