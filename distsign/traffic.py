"""Bytes per rank, from shapes alone: what the hook's counters are held to and what the simulator predicts with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from distsign.layout import IntArray, Shape
from distsign.plan import Part, part_of
from distsign.sizes import payload_sizes

__all__ = [
    "ExchangeBytes",
    "GroupMessages",
    "Traffic",
    "all_gather_bytes",
    "exchange_bytes",
    "power_sgd_elements",
    "report_bytes",
    "ring_all_reduce_bytes",
    "step_bytes",
    "top_k_slots",
]


@dataclass(frozen=True)
class ExchangeBytes:
    """What one rank puts on the wire and takes from it.

    Args:
        sent_bytes: to other ranks; what a rank hands to itself is not on the wire.
        received_bytes: from other ranks.
        sent_within_bytes: of these, to ranks of the same node.
        received_within_bytes: likewise.
    """

    sent_bytes: int = 0
    received_bytes: int = 0
    sent_within_bytes: int = 0
    received_within_bytes: int = 0

    def __add__(self, other: ExchangeBytes) -> ExchangeBytes:
        return ExchangeBytes(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Traffic:
    """What `SignVoteState.traffic()` reports of one rank, over all steps so far.

    Args:
        sent_bytes: payload bytes to other ranks, counted where the collective is called.
        received_bytes: payload bytes from other ranks, likewise.
        sent_within_bytes: of the bytes sent, those to ranks of the same node in the hierarchical exchange; the others
            go between nodes.
        received_within_bytes: likewise.
        fp32_bytes: sent + received bytes of a ring all-reduce of the same elements in fp32.
        bf16_bytes: the same in bf16 (or fp16).
        num_steps: backward passes that exchanged gradients, poisoned ones included.
        num_poisoned_steps: those of them in which some rank's gradient held a NaN or an infinity.
        ballot_density: share of this rank's ballots that are not 0, over the steps that were not poisoned.
        verdict_density: share of the verdicts that are not 0, likewise.
        left_out_ranks: those (of the hierarchical exchange, nodes) whose ballots are left out now because they have
            sent poison step after step; see `max_poison_streak`.
    """

    sent_bytes: int
    received_bytes: int
    sent_within_bytes: int
    received_within_bytes: int
    fp32_bytes: int
    bf16_bytes: int
    num_steps: int
    num_poisoned_steps: int
    ballot_density: float
    verdict_density: float
    left_out_ranks: tuple[int, ...] = ()


def ring_all_reduce_bytes(num_elements: int, bytes_per_element: int, world_size: int) -> int:
    """Return the bytes that one rank sends and receives, added up, in a ring all-reduce.

    A rank sends `2 * (world_size - 1)` chunks of `num_elements / world_size` elements and receives as many (reduce-
    scatter, then all-gather); where the chunks are uneven, this is the mean over the ranks, rounded down.

    Example:
        >>> ring_all_reduce_bytes(1000, bytes_per_element=4, world_size=4)
        12000
    """
    return 4 * num_elements * bytes_per_element * (world_size - 1) // world_size


def exchange_bytes(
    sizes: Sequence[int], rank: int, exchange: str = "two_phase", verdict_sizes: Sequence[int] | None = None
) -> ExchangeBytes:
    """Return what one rank sends and receives in one exchange of payloads.

    Two phases: ballots to each other owner, this rank's verdicts to each other rank; and ballots on this rank's shard
    from each other rank, verdicts from each other owner. All-gather: all ballots to each other rank, and theirs here.

    Args:
        sizes: per owner, bytes of the payload of ballots on its shard, header included.
        rank: the rank in question.
        exchange: `"two_phase"` or `"all_gather"`.
        verdict_sizes: per owner, bytes of its payload of verdicts; None where they are as long as the ballots.

    Example:
        >>> exchange_bytes([108, 108, 58], rank=2)
        ExchangeBytes(sent_bytes=332, received_bytes=332, sent_within_bytes=0, received_within_bytes=0)
    """
    others = len(sizes) - 1
    if exchange == "all_gather":
        return ExchangeBytes(others * sum(sizes), others * sum(sizes))
    back = sizes if verdict_sizes is None else verdict_sizes
    return ExchangeBytes(
        sum(sizes) - sizes[rank] + others * back[rank],
        others * sizes[rank] + sum(back) - back[rank],
    )


def report_bytes(num_voters: int, ranks_per_node: int = 1) -> ExchangeBytes:
    """Return what one rank sends and receives where ranks report damage and poison to each other.

    A report has a byte, and one more for each voter. With `max_poison_streak` (not with `exchange="all_gather"`) they
    travel on the CPU at the end of a poisoned step, and of each while a rank is left out; on CUDA of every step, and
    with a `checksum` too.

    Example:
        >>> report_bytes(num_voters=4)
        ExchangeBytes(sent_bytes=15, received_bytes=15, sent_within_bytes=0, received_within_bytes=0)
    """
    within = (num_voters + 1) * (ranks_per_node - 1)
    total = (num_voters + 1) * (num_voters - 1) + within
    return ExchangeBytes(total, total, within, within)


def top_k_slots(num_elements: int, density: float) -> int:
    """Return how many components of a tensor a top-k scheme sends, each as a float32 and an int32.

    Example:
        >>> top_k_slots(1000, 0.0015)
        2
    """
    return min(num_elements, max(1, math.ceil(density * num_elements)))


def all_gather_bytes(num_bytes: int, world_size: int) -> ExchangeBytes:
    """Return what one rank sends and receives where all ranks get the same number of bytes of each.

    Example:
        >>> all_gather_bytes(8 * top_k_slots(1000, 0.01), world_size=4).sent_bytes
        240
    """
    return ExchangeBytes((world_size - 1) * num_bytes, (world_size - 1) * num_bytes)


def power_sgd_elements(
    shapes: Iterable[Sequence[int]], rank: int, min_compression_rate: float = 2.0
) -> tuple[int, int, int]:
    """Return how many float32 torch's PowerSGD hook reduces of these parameters, in its three all-reduces.

    Args:
        shapes: of the parameters of one bucket.
        rank: of the approximation, as `matrix_approximation_rank`.
        min_compression_rate: matrices that would shrink by less are reduced as they are, like vectors.

    Returns:
        `(whole, p, q)`: elements that are not compressed, and those of the two factors of all the others.

    Example:
        >>> power_sgd_elements([(1024, 512), (1024,)], rank=2)
        (1024, 2048, 1024)
    """
    whole = p = q = 0
    for shape in shapes:
        num_elements = math.prod(shape)
        rows = shape[0] if shape else 1
        columns = num_elements // rows if rows else 0
        least = min(rank, rows, columns)
        if len(shape) >= 2 and (rows + columns) * least * min_compression_rate < num_elements:
            p, q = p + rows * least, q + columns * least
        else:
            whole += num_elements
    return whole, p, q


@dataclass(frozen=True, eq=False)
class GroupMessages:
    """What is on the wire for one exchange group of a vote. A column is the ranks of one number in all nodes.

    Attributes:
        exchange: `"two_phase"` or `"all_gather"`, among the voters of a column.
        gradient_bytes: int64 `[ranks_per_node]`, of each column's share of the gradient, averaged within the node.
        ballots: int64 `[ranks_per_node, num_voters]`, bytes of the payload of ballots to each owner.
        verdicts: likewise of the verdicts.
    """

    exchange: str
    gradient_bytes: IntArray
    ballots: IntArray
    verdicts: IntArray

    @classmethod
    def build(
        cls,
        group: Sequence[Shape],
        world_size: int,
        exchange: str = "two_phase",
        *,
        density: float | None = None,
        wire: str = "auto",
        owner_carry: bool = True,
        ranks_per_node: int = 1,
        bytes_per_element: int = 4,
        checksum: bool = False,
    ) -> GroupMessages:
        """See `step_bytes` for the arguments; `group` are the parameters of one exchange group."""
        num_voters = world_size // ranks_per_node
        elements, ballots, verdicts = [], [], []
        for column in range(ranks_per_node):
            parts = [part_of(Part(s.index, s.num_elements, voted=True), column, ranks_per_node) for s in group]
            shapes = [Shape(part.row, part.length) for part in parts if part.length or ranks_per_node == 1]
            elements.append(sum(shape.num_elements for shape in shapes))
            ballots.append(payload_sizes(shapes, num_voters, density, wire, checksum=checksum))
            # As in `payload.forms`: without a carry at the owner nothing may be left behind there.
            back = ballots[-1]
            if density is not None and not owner_carry:
                back = payload_sizes(shapes, num_voters, density, wire, voters=num_voters, checksum=checksum)
            verdicts.append(back)
        return cls(
            "two_phase" if exchange == "hierarchical" else exchange,
            bytes_per_element * np.asarray(elements, dtype=np.int64),
            np.stack(ballots),
            np.stack(verdicts),
        )

    @property
    def total_bytes(self) -> int:
        """Bytes that all ranks send together, which are those that they receive."""
        per_node, num_voters = self.ballots.shape
        payloads = self.ballots.sum() + self.verdicts.sum()
        if self.exchange == "all_gather":
            payloads = num_voters * self.ballots.sum()
        between = (num_voters - 1) * payloads
        within = num_voters * (per_node - 1) * (self.gradient_bytes.sum() + self.verdicts.sum())
        return int(between + within)

    def of_rank(self, rank: int) -> ExchangeBytes:
        """Return what one rank sends and receives."""
        per_node = self.gradient_bytes.size
        node, column = divmod(rank, per_node)
        sizes, back = self.ballots[column].tolist(), self.verdicts[column].tolist()
        between = exchange_bytes(sizes, node, self.exchange, back)
        if per_node == 1:
            return between
        own, all_back = int(self.gradient_bytes[column]), int(self.verdicts.sum())
        sent = int(self.gradient_bytes.sum()) - own + (per_node - 1) * sum(back)
        received = (per_node - 1) * own + all_back - sum(back)
        return between + ExchangeBytes(sent, received, sent, received)


def step_bytes(
    groups: Sequence[Sequence[Shape]],
    world_size: int,
    rank: int,
    exchange: str = "two_phase",
    *,
    density: float | None = None,
    wire: str = "auto",
    owner_carry: bool = True,
    ranks_per_node: int = 1,
    bytes_per_element: int = 4,
    checksum: bool = False,
) -> ExchangeBytes:
    """Return what one rank sends and receives in one training step, without `report_bytes`.

    Args:
        groups: the parameters of each exchange group.
        world_size: number of ranks.
        rank: the rank in question.
        exchange: `"two_phase"`, `"all_gather"` or `"hierarchical"`.
        density: share of the components that payloads have slots for; None without a cap, planes.
        wire: `"planes"`, `"sparse"` or `"auto"`, with a density.
        owner_carry: whether owners keep what does not fit; else verdicts have slots for the ballots of all.
        ranks_per_node: consecutive ranks that average before they vote, in the hierarchical exchange.
        bytes_per_element: of the gradients that are averaged there.
        checksum: whether a checksum ends each payload.

    Example:
        >>> step_bytes([[Shape(0, 4096), Shape(1, 10)]], world_size=4, rank=0).sent_bytes
        1588
        >>> step_bytes([[Shape(0, 1 << 20)]], world_size=4, rank=0, density=0.01).sent_bytes
        18822
    """
    total = ExchangeBytes()
    for group in groups:
        messages = GroupMessages.build(
            group,
            world_size,
            exchange,
            density=density,
            wire=wire,
            owner_carry=owner_carry,
            ranks_per_node=ranks_per_node,
            bytes_per_element=bytes_per_element,
            checksum=checksum,
        )
        total += messages.of_rank(rank)
    return total
