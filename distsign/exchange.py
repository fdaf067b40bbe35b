"""The protocol of a vote: ballots to the owners, verdicts back, every payload held against what was expected.

On CPU it runs on one `ExchangeThread`. On CUDA the same code is enqueued on a side stream and the host waits for
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from distsign.admission import Admission
from distsign.collectives import Link
from distsign.inspection import Inspection
from distsign.kernels import Kernels
from distsign.layout import IntArray
from distsign.owner import Owner
from distsign.payload import Form
from distsign.traffic import ExchangeBytes
from distsign.wire.header import PayloadError

__all__ = ["EXCHANGES", "Verdicts", "VoteExchange"]

EXCHANGES = ("two_phase", "all_gather", "hierarchical")
T = TypeVar("T")


@dataclass(frozen=True)
class Verdicts:
    """What a vote came to, alike on all ranks.

    Attributes:
        planes: uint8 `[layout.buffer_bytes]`, where the group's layout puts them; its headers mean nothing.
        crowded: bool `[num_pieces]`, the census: True where more wanted to vote than fits; None without caps.
        mean: float32 `[num_raw]`, of the components that are averaged.
        poisoned: bool scalar tensor, True if any rank sent poison.
    """

    planes: Tensor
    crowded: Tensor | None
    mean: Tensor
    poisoned: Tensor


class VoteExchange:
    """A vote among the ranks of a link.

    With nodes of several ranks the vote is held between nodes: the ranks of a node average their gradients first, each
    rank for one share of the components, and vote on that share with the ranks of the same number in the other nodes.

    Args:
        link: among the ranks that vote. On a link of one rank there is one voter and nothing travels.
        kind: `"two_phase"` (bytes per rank flat in the number of ranks) or `"all_gather"` (each rank counts all ballots
            itself, so that no owner needs to be trusted).
        ranks_per_node: consecutive ranks that make a node; 1 for a vote of all.
        checksum: whether payloads end with one. A payload that came damaged is then an error; on CUDA it poisons the
            step, and all ranks learn of it by `inspection`.
        admission: whose ballots this rank counts; None: everybody's.

    Attributes:
        admission: the one that was given, or one of its own.
        inspection: what holds payloads against what was expected, and lets all ranks agree at the end of a step.
    """

    def __init__(
        self,
        link: Link,
        kind: str,
        ranks_per_node: int = 1,
        *,
        checksum: bool = False,
        admission: Admission | None = None,
    ) -> None:
        self.kind = kind
        self._all = self._voters = link
        self._node = Link(None)
        if ranks_per_node > 1:
            ranks = list(range(self._all.world_size))
            nodes = [ranks[k : k + ranks_per_node] for k in range(0, len(ranks), ranks_per_node)]
            self._node = self._all.part(nodes)
            columns = [ranks[k::ranks_per_node] for k in range(ranks_per_node)]
            self._voters = self._all.part(columns) if len(nodes) > 1 else Link(None)
        self.admission = admission or Admission(self._voters.world_size)
        # Where every rank gets all ballots, none needs to be told who sent poison.
        tells_poison = self.admission.max_poison_streak is not None and kind != "all_gather"
        self.inspection = Inspection(
            link, self._voters, self._node, self.admission, checksum=checksum, tells_poison=tells_poison
        )

    @property
    def counted(self) -> ExchangeBytes:
        """Bytes sent and received so far, of payloads and, within a node, of gradients."""
        within = self._node
        return ExchangeBytes(
            self._voters.sent_bytes + within.sent_bytes,
            self._voters.received_bytes + within.received_bytes,
            within.sent_bytes,
            within.received_bytes,
        )

    def forget_counts(self) -> None:
        """Count from zero again."""
        self._voters.forget_counts()
        self._node.forget_counts()

    @property
    def world_size(self) -> int:
        """Number of ranks in all."""
        return self._all.world_size

    @property
    def num_voters(self) -> int:
        """Number of those whose ballots meet: all ranks, or one a node."""
        return self._voters.world_size

    @property
    def rank(self) -> int:
        """This rank's number among the voters."""
        return self._voters.rank

    @property
    def local_rank(self) -> int:
        """This rank's number in its node, 0 where nodes do not matter."""
        return self._node.rank

    def close(self) -> None:
        """Give the groups back, with their sockets and threads; the object must not be used afterwards."""
        # torch names the twin of a subgroup by how many groups there are, and would reuse the name of one given back.
        if self._all.is_whole_world:
            for link in (self._voters, self._node, self._all):
                link.close()

    @property
    def _only_mine(self) -> range:
        return range(self.rank, self.rank + 1)

    def describe(self) -> str:
        """Return this rank's place among all ranks in words, for errors."""
        return self._all.describe()

    def gather(self, value: T) -> list[T]:
        """Return every rank's `value`, in order of rank. Blocks."""
        return self._all.gather_values(value)

    def broadcast(self, value: T, source: int) -> T:
        """Return what rank `source` of this group gave; see `Link.broadcast`. Blocks."""
        return self._all.broadcast(value, source)

    def mean_in_node(self, buffer: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return this rank's share of the mean over its node: a reduce-scatter whose order of additions is fixed.

        Args:
            buffer: floating point, the shares of all ranks of the node one after the other.
            sizes: elements of each share.

        Returns:
            float32 `[sizes[local_rank]]`.
        """
        own = sizes[self._node.rank]
        found = self._node.all_to_all(buffer, list(sizes), [own] * self._node.world_size, "the mean within a node")
        return _mean(found.view(self._node.world_size, own).float())

    def share_in_node(self, payloads: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Return what every rank of the node has: each its `payloads`, uint8 of `sizes[local_rank]` bytes."""
        return list(torch.split(self._node.share(payloads, sizes, "verdicts within a node"), list(sizes)))

    def vote(
        self, ballots: Form, verdicts: Form, buffer: Tensor, owner: Owner, starts: IntArray, kernels: Kernels
    ) -> Tensor:
        """Exchange ballots for verdicts.

        Two phases:
        1. all-to-all: this rank's ballots on each shard go to its owner, which checks the headers;
        2. the owner tallies them, and its verdicts go to all voters.

        Args:
            ballots: form of the ballots' payloads.
            verdicts: form of the verdicts' payloads.
            buffer: uint8 `[ballots.buffer_bytes]`, this rank's payloads for all owners.
            owner: what this rank counts with.
            starts: int64 `[num_pieces]`, see `Owner.count`.
            kernels: backend of the buffer's device.

        Returns:
            uint8 `[verdicts.buffer_bytes]`, the payloads of all owners, for `read`.

        Raises:
            PayloadError: if a payload is not what this rank expects.
        """
        if self.kind == "all_gather":
            return self._all_gather(ballots, verdicts, buffer, owner, starts, kernels)
        own = ballots.sizes[self.rank]
        found = self._voters.all_to_all(buffer, list(ballots.sizes), [own] * self.num_voters, "ballots to their owners")
        received = found.view(self.num_voters, own)
        mine = self._only_mine
        flagged = self.inspection.check(ballots, received, mine, self.local_rank, mine)
        poisoned = self.admission.poison(flagged.squeeze(1))
        payload = self._count(ballots, verdicts, self.rank, received, poisoned, owner, starts, kernels)
        return self._voters.share(payload, verdicts.sizes, "verdicts to all ranks")

    def read(self, verdicts: Form, payloads: Tensor, kernels: Kernels, column: int = 0) -> Verdicts:
        """Open what `vote` returned, here or on another rank of the node, the one of number `column`.

        Raises:
            PayloadError: if a payload is not what this rank expects.
        """
        owners = range(len(verdicts.sizes))
        # Where all verdicts are counted here, all are checked: one copy of each is all that there is of it.
        own = self._only_mine if column == self.local_rank and self.kind != "all_gather" else range(0)
        poisoned = self.inspection.check(verdicts, payloads.unsqueeze(0), owners, column, own).any()
        planes, crowded, mean, ok = verdicts.open_all(payloads, kernels)
        return Verdicts(planes, crowded, mean, self.inspection.require(ok, poisoned, "verdicts", column))

    def _all_gather(
        self, ballots: Form, verdicts: Form, buffer: Tensor, owner: Owner, starts: IntArray, kernels: Kernels
    ) -> Tensor:
        received = self._voters.all_gather(buffer, "ballots to all ranks")
        parts = [part.contiguous() for part in torch.split(received, list(ballots.sizes), dim=1)]
        own = range(self.rank * len(parts), (self.rank + 1) * len(parts))
        flagged = self.inspection.check(ballots, received, range(len(parts)), self.local_rank, own)
        poisoned = self.admission.poison(flagged.any(1))
        payloads = []
        for k, mine in enumerate(parts):
            payloads.append(self._count(ballots, verdicts, k, mine, poisoned, owner, starts, kernels))
        # Sealed although nothing travels: so both exchanges come to the same, whatever the caps are.
        return torch.cat(payloads)

    def _count(
        self,
        ballots: Form,
        verdicts: Form,
        shard: int,
        received: Tensor,
        poisoned: Tensor,
        owner: Owner,
        starts: IntArray,
        kernels: Kernels,
    ) -> Tensor:
        """Turn all workers' payloads on one shard into the payload of its verdicts."""
        density, layout = self.admission.max_density, ballots.layout
        most = 0 if density is None else layout.most_votes_of(shard, density)
        found = self.admission.admit(ballots.open(shard, received), most, kernels)
        mean = self.admission.mean(found.raw)
        if mean.numel():  # finite numbers may well have an infinite sum
            poisoned = poisoned | ~mean.isfinite().all()
        planes, too_many, ok = owner.count(found, layout, shard, verdicts.caps, starts, kernels)
        poisoned = self.inspection.require(ok, poisoned, "ballots", self.local_rank)
        crowded = None
        if found.crowded is not None:
            # A minority cannot raise the thresholds of all by claiming to be crowded.
            crowded = too_many | (2 * found.crowded.sum(0) >= self.num_voters)
        payload, fits = verdicts.seal_one(shard, planes, crowded, mean, poisoned, kernels)
        if self.inspection.defers(fits.device):  # the payload carries poison
            self.inspection.require(fits | poisoned, poisoned, "verdicts", self.local_rank)
        elif not (poisoned or fits):
            voters = ballots.overfull(shard, found, kernels)
            liars = ", ".join(str(self.inspection.rank_of(voter, self.local_rank)) for voter in voters)
            raise PayloadError(
                f"rank {self._all.rank} counts more verdicts than a payload has slots for: rank {liars} cast more "
                "ballots on a parameter than its cap allows, which no distsign does"
            )
        return payload


def _mean(rows: Tensor) -> Tensor:
    """Return the mean of the rows, added in order, so that whoever adds them comes to the same bits."""
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total / rows.shape[0]
