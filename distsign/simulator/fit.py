"""From times to costs: least squares, with coefficients that are not negative, over calls of growing sizes.

Calls are split by call, by message, by byte, and by byte where several ranks send to one; once for the clock and once
for the processor's time. What the processor does not explain is the wire's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distsign.simulator.probe import Call
from distsign.simulator.profile import CollectiveCost

__all__ = ["Array", "LinkFit", "bandwidth_of", "fit_collectives", "non_negative_fit"]

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
    is_limit = 1 / bandwidth > 1.2 * stretch * least_cpu
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
