"""Where a model is trained: workers, the nodes they share, and the links between them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from distsign.simulator.units import parse_bandwidth, parse_seconds

__all__ = ["Cluster", "Link"]


@dataclass(frozen=True)
class Link:
    """A full-duplex link: what a node can send, and receive at the same time.

    Args:
        bandwidth_bytes_per_s: above zero; infinity for a link that is never the limit.
        latency_s: of a message, from one end to the other.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> Link.parse("1gbit", "50us")
        Link(bandwidth_bytes_per_s=125000000.0, latency_s=5e-05)
    """

    bandwidth_bytes_per_s: float
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        if not self.bandwidth_bytes_per_s > 0:
            raise ValueError(f"a link's bandwidth must be above zero bytes/s, got {self.bandwidth_bytes_per_s:g}")
        if not 0 <= self.latency_s < math.inf:
            raise ValueError(f"a link's latency must be zero seconds or more, got {self.latency_s:g}")

    @classmethod
    def parse(cls, bandwidth: str, latency: str = "0s") -> Link:
        """Return a link from quantities with units, see `units.parse_bandwidth` and `units.parse_seconds`."""
        return cls(parse_bandwidth(bandwidth), parse_seconds(latency))


LOCAL = Link(math.inf)


@dataclass(frozen=True)
class Cluster:
    """Workers, numbered node by node as torchrun does.

    Args:
        num_workers: in all.
        link: of each node; the workers of a node share it.
        workers_per_node: workers that share a link; must divide `num_workers`.
        node_link: between workers of one node, for each of them.
        workers_per_machine: workers that share the processor's cores; None: those of a node. In a lab where each rank
            has a link of its own, but all run on one machine, it is all of them.

    Raises:
        ValueError: if a number is out of range, or does not divide the other.

    Example:
        >>> Cluster(num_workers=16, link=Link.parse("25gbit"), workers_per_node=8).num_nodes
        2
    """

    num_workers: int
    link: Link
    workers_per_node: int = 1
    node_link: Link = LOCAL
    workers_per_machine: int | None = None

    def __post_init__(self) -> None:
        if self.num_workers < 1 or self.workers_per_node < 1:
            raise ValueError(
                f"a cluster has at least 1 worker and 1 worker per node, got {self.num_workers} and "
                f"{self.workers_per_node}"
            )
        if self.workers_per_node > self.num_workers:
            raise ValueError(
                f"there are {self.workers_per_node} workers per node, but only {self.num_workers} in all: give at most "
                f"{self.num_workers} per node"
            )
        if self.num_workers % self.workers_per_node:
            raise ValueError(
                f"{self.workers_per_node} workers per node do not divide {self.num_workers} workers: nodes must be of "
                "one size"
            )
        if self.workers_per_machine is not None and not 1 <= self.workers_per_machine <= self.num_workers:
            raise ValueError(
                f"workers_per_machine must be from 1 to the {self.num_workers} workers, got {self.workers_per_machine}"
            )

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return self.num_workers // self.workers_per_node

    @property
    def sharing(self) -> int:
        """Workers that share a machine's cores."""
        return self.workers_per_machine or self.workers_per_node
