"""Fit a profile to what real ranks take for the collectives and kernels that hooks use.

Every figure is a median. Collectives and kernels are timed alone, by growing sizes; whole steps of small models then
say how much longer all that takes within a step.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import torch

from distsign.memory import keep_freed_memory
from distsign.simulator.fit import bandwidth_of, fit_collectives
from distsign.simulator.kernel_probe import MANY_TENSORS, POWER_RANKS, probes
from distsign.simulator.probe import Call, Ranks, joined_ranks, num_ranks
from distsign.simulator.profile import COLLECTIVES, FEW_TENSORS, KernelCost, Profile
from distsign.simulator.step_probe import in_step_factors, num_steps_timed

__all__ = ["calibrate", "calibrate_under_torchrun", "kernel_sizes"]

_SIZES = (1 << 10, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
"""Of messages. Among 8 ranks on 2 cores 128 kB take as long as 1 kB: what a byte costs is seen beyond."""
_KERNEL_SIZES = (1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22)
_SIZE_OF_MANY = 1 << 18
_LEAST_PER_RANK = 1 << 11
"""Elements of a kernel's size for each rank, four times that of many tensors: below, no budget leaves each payload its
header and a slot for each tensor."""
_WORK_S = 0.15


def calibrate_under_torchrun(
    *,
    backend: str | None,
    nominal_bytes_per_s: float | None,
    ranks_per_machine: int | None,
    seconds: float,
    whole_steps: bool = True,
) -> Profile | None:
    """Join the ranks that torchrun has started, and calibrate; see `calibrate`.

    Freed memory is kept, as `launch.train` keeps it.

    Raises:
        ValueError: if this process was not started by torchrun, or is the only rank.
    """
    keep_freed_memory()
    return joined_ranks(
        backend,
        lambda: calibrate(
            nominal_bytes_per_s=nominal_bytes_per_s,
            ranks_per_machine=ranks_per_machine,
            seconds=seconds,
            whole_steps=whole_steps,
        ),
    )


def calibrate(
    *,
    nominal_bytes_per_s: float | None = None,
    ranks_per_node: int | None = None,
    ranks_per_machine: int | None = None,
    seconds: float = 10.0,
    repeats: int = 5,
    whole_steps: bool = True,
) -> Profile | None:
    """Measure links, collectives and kernels on the ranks of the default process group.

    All ranks must call it, on an otherwise quiet machine.

    Args:
        nominal_bytes_per_s: what the link is sold as; the profile then holds for links of other bandwidths too. Ranks
            that all share a machine do not use it: of that link the profile has no more than this figure.
        ranks_per_node: consecutive ranks that share a link; None: `LOCAL_WORLD_SIZE`.
        ranks_per_machine: consecutive ranks that share cores; None: `LOCAL_WORLD_SIZE`.
        seconds: about how long collectives may take; kernels and whole steps come on top, one to five minutes together
            on two cores that 2 to 8 ranks share. On slow links, large messages are left out, and large models where a
            step would take more than a twelfth of this time.
        repeats: of each measurement, of which the median counts, of steps three times as many; fewer of what takes
            long.
        whole_steps: whether steps of small models are timed too, on CPUs. They take most of the time. Without them
            predictions were 1.4 to 2 times as far off, and of hierarchical votes 20 to 70 % too long
            (`benchmarks/results/simulator`).

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
    begin = time.monotonic()
    ranks = Ranks(per_node, per_machine)
    try:
        found = _calibrate(ranks, nominal_bytes_per_s, seconds, repeats, whole_steps and ranks.device.type == "cpu")
    finally:
        ranks.close()
    if found is None:
        return None
    return replace(found, facts={**found.facts, "seconds": round(time.monotonic() - begin, 1)})


def _calibrate(
    ranks: Ranks, nominal_bytes_per_s: float | None, seconds: float, repeats: int, whole_steps: bool
) -> Profile | None:
    on_cpu = ranks.device.type == "cpu"
    plan = [
        (group, kind)
        for group in ranks.groups
        for kind in (COLLECTIVES if group != "one link" else ("all_reduce_fp32", "all_to_all"))
    ]
    total = len(plan) + len(kernel_sizes(ranks.world_size)[0]) + 2 + (num_steps_timed(ranks) if whole_steps else 0)
    with _progress(total, ranks.rank) as advance:
        cores = _cores(ranks, repeats) if on_cpu else math.inf
        advance()
        kernels = _kernels(ranks, repeats, advance)
        calls: dict[str, list[Call]] = {group: [] for group in ranks.groups}
        for group, kind in plan:
            calls[group] += _calls(ranks, kind, group, seconds / len(plan), repeats)
            advance()
        # Times are those of all ranks together, and so alike on all: each makes the same profile.
        profile = _profile(ranks, calls, kernels, cores, nominal_bytes_per_s)
        if whole_steps:
            profile = replace(profile, in_step=in_step_factors(ranks, profile, repeats, seconds / 12, advance))
    return profile if ranks.rank == 0 else None


def _profile(
    ranks: Ranks,
    calls: Mapping[str, list[Call]],
    kernels: dict[str, KernelCost],
    cores: float,
    nominal_bytes_per_s: float | None,
) -> Profile:
    on_cpu = ranks.device.type == "cpu"
    stretch = max(1.0, ranks.per_machine / cores)
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
        # Where the processor is the limit, what it takes is in the collectives' costs already.
        node_bandwidth_bytes_per_s=inner.bandwidth_bytes_per_s if inner and inner.is_limit else None,
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
    matrix = torch.full((256, 256), 0.01)
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
        ([18, 20, 22], True)
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
    begin = time.perf_counter()
    for size, after in itertools.pairwise([*_SIZES, 4 * _SIZES[-1]]):
        found.append(ranks.call(kind, size, group, repeats))
        expected_s = ranks.expected_s(found[-1].timing.wall_s * after / size, repeats)
        if len(found) >= 3 and ranks.agreed(time.perf_counter() - begin + expected_s) > budget_s:
            break
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
