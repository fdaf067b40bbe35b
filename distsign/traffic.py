"""Bytes per rank, from shapes alone: what the hook's counters are held to and what the simulator predicts with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from distsign.layout import Layout, Shape
from distsign.payload import forms

__all__ = ["ExchangeBytes", "Traffic", "exchange_bytes", "ring_all_reduce_bytes", "step_bytes"]


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


def step_bytes(
    groups: Sequence[Sequence[Shape]],
    world_size: int,
    rank: int,
    exchange: str = "two_phase",
    *,
    density: float | None = None,
    wire: str = "auto",
    owner_carry: bool = True,
) -> ExchangeBytes:
    """Return what one rank sends and receives in one training step.

    Args:
        groups: the parameters of each exchange group.
        world_size: number of ranks.
        rank: the rank in question.
        exchange: `"two_phase"` or `"all_gather"`.
        density: share of the components that payloads have slots for; None without a cap, planes.
        wire: `"planes"`, `"sparse"` or `"auto"`, with a density.
        owner_carry: whether owners keep what does not fit; else verdicts have slots for the ballots of all.

    Example:
        >>> step_bytes([[Shape(0, 4096), Shape(1, 10)]], world_size=4, rank=0).sent_bytes
        1588
        >>> step_bytes([[Shape(0, 1 << 20)]], world_size=4, rank=0, density=0.01).sent_bytes
        18822
    """
    total = ExchangeBytes()
    for group in groups:
        ballots, verdicts = forms(Layout.build([group], world_size), density, wire, owner_carry=owner_carry)
        total += exchange_bytes(ballots.sizes, rank, exchange, verdicts.sizes)
    return total
