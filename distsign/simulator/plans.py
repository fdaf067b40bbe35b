"""What a step computes and sends, as the simulator sees it: kernels, and collectives round by round.

A step's buckets become *jobs*. A job has a part that runs in the middle of backward, where DDP calls the hook, and
stages that follow it, one after the other: collectives, and kernels between and after them. All bytes are
`distsign.traffic`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from distsign.layout import IntArray
from distsign.simulator.cluster import Cluster
from distsign.simulator.models import Bucket
from distsign.simulator.profile import FEW_TENSORS
from distsign.traffic import ExchangeBytes, GroupMessages, ring_all_reduce_bytes

__all__ = [
    "Collective",
    "Job",
    "Kernel",
    "Plan",
    "node_collectives",
    "ring",
    "ring_all_reduce",
    "vote_collectives",
]


@dataclass(frozen=True)
class Kernel:
    """Work of this rank's processor or device.

    Args:
        name: in `Profile.kernels`.
        elements: that it goes through.
        tensors: in which they lie.
        times: how often it is called; a fraction for a part of it.
    """

    name: str
    elements: float
    tensors: int = FEW_TENSORS
    times: float = 1


@dataclass(frozen=True)
class Collective:
    """A collective as one rank, the busiest, sees it: rounds alike, each of which waits for the one before.

    Args:
        kind: in `Profile.collectives`.
        rounds: a ring of W ranks has W - 1 (all-gather) or 2 (W - 1) (all-reduce); an all-to-all has one.
        between_bytes: per round, what leaves the node, of all its ranks together.
        within_bytes: per round, what this rank sends to ranks of its node.
        sent_bytes: in all, by this rank.
        messages: in all, by this rank.
    """

    kind: str
    rounds: int
    between_bytes: float
    within_bytes: float
    sent_bytes: float
    messages: int


@dataclass(frozen=True)
class Job:
    """One or more buckets on their way.

    Args:
        last_bucket: the one that sets it off.
        hook: kernels in the middle of backward.
        stages: what follows, in order.
    """

    last_bucket: int
    hook: tuple[Kernel, ...]
    stages: tuple[Kernel | Collective, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """A step of one scheme on one cluster, before anything is said of time.

    Args:
        buckets: DDP's.
        jobs: in the order in which they are set off.
        in_order: whether a job begins only when the one before is done, as on the vote's exchange thread; else
            collectives of several jobs may be on their way at once, as many as the backend has threads.
        step_kernel: of the optimizer, in `Profile.kernels`.
        bytes_of_rank: sent and received by each rank.
        total_bytes: sent by all ranks together, and so received.
    """

    buckets: list[Bucket]
    jobs: list[Job]
    in_order: bool
    step_kernel: str
    bytes_of_rank: Callable[[int], ExchangeBytes]
    total_bytes: float

    @property
    def node_bytes(self) -> float:
        """Bytes that leave a node, of all its ranks together."""
        stages = (stage for job in self.jobs for stage in job.stages)
        return sum(each.rounds * each.between_bytes for each in stages if isinstance(each, Collective))


def ring_all_reduce(kind: str, num_elements: int, bytes_per_element: int, cluster: Cluster) -> Collective:
    """Return an all-reduce: reduce-scatter and all-gather in a ring that enters and leaves each node once.

    Example:
        >>> from distsign.simulator.cluster import Link
        >>> ring_all_reduce("all_reduce_fp32", 1000, 4, Cluster(4, Link(1e9))).between_bytes
        1000.0
    """
    world_size = cluster.num_workers
    sent = ring_all_reduce_bytes(num_elements, bytes_per_element, world_size) / 2
    rounds = 2 * (world_size - 1)
    return ring(kind, rounds, sent, cluster)


def ring(kind: str, rounds: int, sent_bytes: float, cluster: Cluster) -> Collective:
    """Return a ring of so many rounds in which each rank sends so many bytes in all."""
    each = sent_bytes / rounds if rounds else 0.0
    between = each if cluster.num_nodes > 1 else 0.0
    within = each if cluster.workers_per_node > 1 else 0.0
    return Collective(kind, rounds, between, within, sent_bytes, rounds)


def _all_to_all(sizes: IntArray, cluster: Cluster) -> Collective:
    """Return one phase of a vote: each rank sends `sizes[k]` bytes to rank k, or as many of its own to all others.

    Both directions have the same messages, the other way round; the busiest rank, and the busiest node, decide.
    """
    per_node = cluster.workers_per_node
    others, away = cluster.num_workers - 1, cluster.num_workers - per_node
    if not others:
        return Collective("all_to_all", 0, 0.0, 0.0, 0.0, 0)
    nodes = sizes.reshape(-1, per_node)
    of_node = nodes.sum(1)
    between = max((per_node * (sizes.sum() - of_node)).max(), (away * of_node).max())
    within = max((of_node[:, None] - nodes).max(), (per_node - 1) * sizes.max())
    sent = max(sizes.sum() - sizes.min(), others * sizes.max())
    return Collective("all_to_all", 1, float(between), float(within), float(sent), others)


def vote_collectives(messages: GroupMessages, cluster: Cluster) -> list[Collective]:
    """Return the all-to-all of ballots and that of verdicts, or the one all-gather."""
    sizes, back = messages.ballots[0], messages.verdicts[0]
    others = cluster.num_workers - 1
    if messages.exchange == "all_gather":
        return [ring("all_gather", others, float(others * sizes.sum()), cluster)]
    return [_all_to_all(sizes, cluster), _all_to_all(back, cluster)]


def node_collectives(messages: GroupMessages, cluster: Cluster) -> tuple[Collective, ...]:
    """Return the mean within a node, both phases of all its columns between nodes, and the sharing within it."""
    per_node, voters = messages.ballots.shape
    share = float(messages.gradient_bytes.max())
    own = float(messages.verdicts.sum(1).max())
    within = [
        Collective("all_to_all", int(per_node > 1), 0.0, (per_node - 1) * n, (per_node - 1) * n, per_node - 1)
        for n in (share, own)
    ]
    between = []
    for sizes in (messages.ballots, messages.verdicts):
        each = (voters - 1) * sizes.max(1)  # per column; together they share the node's link
        sent = float(each.max())
        between.append(Collective("all_to_all", int(voters > 1), float(each.sum()), 0.0, sent, voters - 1))
    return within[0], between[0], between[1], within[1]
