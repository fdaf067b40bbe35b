"""The protocol of a vote: ballots to the owners, verdicts back, every payload held against what was expected.

On CPU it runs on one `ExchangeThread`. On CUDA the same code is enqueued on a side stream and the host waits for
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from distsign.admission import Admission
from distsign.collectives import Link
from distsign.digest import damaged_numbers, find_damaged
from distsign.kernels import Kernels
from distsign.layout import IntArray
from distsign.owner import Owner
from distsign.payload import Form
from distsign.traffic import ExchangeBytes
from distsign.wire.header import Header, PayloadError

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
        checksum: whether payloads end with one. A payload that is damaged then poisons the step, and all ranks learn
            of it by `tell` and `agree`.
        admission: whose ballots this rank counts; None: everybody's.

    Attributes:
        admission: the one that was given, or one of its own.
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
        self._checksum = checksum
        # Of this step: 1 + the rank that wrote a payload which came here damaged, or 0.
        self._damage = torch.zeros((), dtype=torch.int64)
        self._word: Callable[[], Tensor] | None = None  # of all voters on this step, on its way
        self._ranks_per_node = ranks_per_node
        self._all = self._voters = link
        self._node = Link(None)
        if ranks_per_node > 1:
            ranks = list(range(self._all.world_size))
            nodes = [ranks[k : k + ranks_per_node] for k in range(0, len(ranks), ranks_per_node)]
            self._node = self._all.part(nodes)
            columns = [ranks[k::ranks_per_node] for k in range(ranks_per_node)]
            self._voters = self._all.part(columns) if len(nodes) > 1 else Link(None)
        self.admission = admission or Admission(self._voters.world_size)
        # On CUDA a header that does not fit is found without waiting for the device; it poisons the step at once and is
        # reported by `raise_if_mismatched`.
        self._mismatch: Tensor | None = None

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
        poisoned = self.admission.poison(self._check(ballots, received, mine, self.local_rank, mine).squeeze(1))
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
        poisoned = self._check(verdicts, payloads.unsqueeze(0), owners, column, own).any()
        planes, crowded, mean, ok = verdicts.open_all(payloads, kernels)
        return Verdicts(planes, crowded, mean, self._require(ok, poisoned, "verdicts"))

    def _all_gather(
        self, ballots: Form, verdicts: Form, buffer: Tensor, owner: Owner, starts: IntArray, kernels: Kernels
    ) -> Tensor:
        received = self._voters.all_gather(buffer, "ballots to all ranks")
        parts = [part.contiguous() for part in torch.split(received, list(ballots.sizes), dim=1)]
        own = range(self.rank * len(parts), (self.rank + 1) * len(parts))
        poisoned = self.admission.poison(self._check(ballots, received, range(len(parts)), self.local_rank, own).any(1))
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
        poisoned = self._require(ok, poisoned, "ballots")
        crowded = None
        if found.crowded is not None:
            # A minority cannot raise the thresholds of all by claiming to be crowded.
            crowded = too_many | (2 * found.crowded.sum(0) >= self.num_voters)
        payload, fits = verdicts.seal_one(shard, planes, crowded, mean, poisoned, kernels)
        if fits.device.type == "cpu" and not (poisoned or fits):
            liars = ", ".join(map(str, ballots.overfull(shard, found, kernels)))
            raise PayloadError(
                f"rank {self.rank} counts more verdicts than a payload has slots for: rank {liars} cast more ballots "
                "on a parameter than its cap allows, which no distsign does"
            )
        self._require(fits | poisoned, poisoned, "verdicts")  # on CUDA; the payload carries poison
        return payload

    def _require(self, ok: Tensor, poisoned: Tensor, what: str) -> Tensor:
        """Raise if a body was malformed; on CUDA, where that would wait, poison the step and remember it."""
        if ok.device.type == "cpu":
            # The body of a poisoned payload is void.
            if not (poisoned or ok.all()):
                senders = ", ".join(str(k) for k, fine in enumerate(ok.tolist()) if not fine)
                raise PayloadError(
                    f"rank {self.rank} cannot read the {what} of rank {senders}: the body is not one that this "
                    "distsign writes. It was damaged on its way, or its sender does not run the same distsign"
                )
            return poisoned
        bad = ~ok.all()
        self._mismatch = bad if self._mismatch is None else self._mismatch | bad
        return poisoned | bad

    def _check(self, form: Form, rows: Tensor, owners: Sequence[int], column: int, own: range) -> Tensor:
        """Hold each header and checksum against what is expected; return which payloads carry poison or came damaged.

        Args:
            form: of the payloads.
            rows: uint8 `[num_rows, any]`, in each the payloads on the pieces of these owners: a row for the ballots of
                each voter, or a single one for the verdicts of all owners themselves, in order.
            owners: see above.
            column: number in its node of the ranks that wrote them.
            own: numbers of the payloads that this rank wrote itself, row by row.

        Returns:
            bool `[num_rows, num_owners]`.

        Raises:
            PayloadError: on the CPU, if a header is another than expected. On CUDA, where this would wait, all payloads
                are flagged then, and `raise_if_mismatched` says so later.
        """
        on_cpu = rows.device.type == "cpu"
        self._damage = self._damage.to(rows.device)
        sizes = [form.sizes[owner] for owner in owners]
        if self._checksum and not on_cpu:
            damaged = find_damaged(rows, sizes, own)
            self._note_damage(form, damaged, column)
        else:
            damaged = rows.new_zeros(rows.shape[0], len(owners), dtype=torch.bool)
            if self._checksum and (numbers := damaged_numbers(rows, sizes, own)):
                damaged.view(-1)[numbers] = True
                self._note_damage(form, damaged, column)
        if on_cpu and form.has_usual_headers(rows, owners):
            return damaged
        headers, poisoned, foreign = form.read_headers(rows, owners)
        foreign = foreign & ~damaged  # a damaged header is not to be believed
        if on_cpu:
            if foreign.any():
                k, row = foreign.t().nonzero()[0].tolist()
                sender = owners[k] if form.verdict else row
                data = bytes(headers[row, k].tolist())
                Header.expect(data, form.headers[owners[k]], sender=sender, receiver=self.rank)
            return poisoned | damaged
        bad = foreign.any()  # of what came damaged `agree` takes note
        self._mismatch = bad if self._mismatch is None else self._mismatch | bad
        return poisoned | damaged | bad

    def _note_damage(self, form: Form, damaged: Tensor, column: int) -> None:
        """Remember for `tell` a rank whose payload came damaged, bool `[num_rows, num_owners]` as of `_check`."""
        writers = form.layout.table(
            ("writers", column),
            lambda: [1 + k * self._ranks_per_node + column for k in range(self.num_voters)],
            damaged.device,
        )
        of_each = damaged * (writers if form.verdict else writers.unsqueeze(1))
        self._damage = torch.maximum(self._damage, of_each.max())

    def tell(self) -> None:
        """Send word to all ranks of what this one has seen in the step, whose last payloads it has just read.

        On the CPU it travels while verdicts are written; `agree` waits for that of the others. A rank that fails in
        between, out of memory say, fails alone: the others end this step, and learn of it in the next.
        """
        damage, self._damage = self._damage, torch.zeros_like(self._damage)
        word = [damage.view(1).view(torch.uint8)] * self._checksum
        word += [self.admission.seen.to(torch.uint8)] * self._tells_poison
        if word:
            mine = torch.cat(word)
            self._word = self._voters.begin_share(mine, [mine.numel()] * self.num_voters, "word of damage and poison")

    @property
    def _tells_poison(self) -> bool:
        return self.admission.max_poison_streak is not None and self.kind != "all_gather"

    def agree(self) -> Tensor:
        """Let all ranks learn, at the end of a step, whose payload came damaged, and who sent poison to anybody.

        All must call it, after `tell`. Without it a rank might take a step that another does not: what came damaged to
        one has reached the others well. Who floods with poison is left out by all alike; owners know of what came to
        them alone, and tell; where every rank gets all ballots, none needs to believe it. One message says both.

        Returns:
            bool scalar tensor on the device of the payloads, alike on all ranks: whether the step must be poisoned.

        Raises:
            PayloadError: on the CPU, on all ranks alike, if a payload came damaged; it names who wrote it and who got
                it. On CUDA, where this would wait, `raise_if_mismatched` says so later.
        """
        seen, damage = self.admission.seen, torch.zeros_like(self._damage)
        word, self._word = self._word, None
        assert (word is None) == (not self._checksum and not self._tells_poison), "agree comes after tell"
        of_voters = None if word is None else word()
        if of_voters is not None and not self._says_nothing(of_voters):
            seen, damage = self._agreed(of_voters.view(self.num_voters, -1), seen, damage)
            if self._checksum:
                self._require_undamaged(damage)
        self.admission.commit(seen)
        return (damage != 0).any()

    def _says_nothing(self, word: Tensor) -> bool:
        """Return whether nobody has seen anything, as nearly always; False where looking would wait for a device."""
        return word.device.type == "cpu" and self._node.world_size == 1 and not word.numpy().any()

    def _agreed(self, of_voters: Tensor, seen: Tensor, damage: Tensor) -> tuple[Tensor, Tensor]:
        """Return who was seen to send poison, and each rank's damage in order of rank; or as given, if not told of it.

        Args:
            of_voters: uint8 `[num_voters, any]`, the word of each.
            seen: bool `[num_voters]`.
            damage: int64.
        """
        split = damage.itemsize * self._checksum
        told = of_voters[:, split:].amax(0) if self._tells_poison else of_voters[0, :0]
        in_node = torch.cat([of_voters[:, :split].flatten(), told])
        of_node = self._node.share(in_node, [in_node.numel()] * self._node.world_size, "word of damage and poison")
        of_node = of_node.view(self._node.world_size, -1)
        split *= self.num_voters
        if self._checksum:
            damage = of_node[:, :split].flatten().view(torch.int64).view(of_node.shape[0], -1).t().flatten()
        if self._tells_poison:
            seen = of_node[:, split:].amax(0) != 0
        return seen, damage

    def _require_undamaged(self, everyones: Tensor) -> None:
        bad = (everyones != 0).any()
        if bad.device.type != "cpu":
            self._mismatch = bad if self._mismatch is None else self._mismatch | bad
        elif bad:
            receiver = int(everyones.ne(0).nonzero()[0])
            raise PayloadError(
                f"a payload that rank {int(everyones[receiver]) - 1} wrote did not reach rank {receiver} as it was "
                "written: its checksum does not match. All ranks have left the step out; go on from a checkpoint, and "
                "look at the link between these ranks and at their memory"
            )

    def raise_if_mismatched(self) -> None:
        """Raise what a header check on CUDA has found since. Waits for the device.

        Raises:
            PayloadError: if any payload so far was not what this rank expected.
        """
        if self._mismatch is not None and bool(self._mismatch):
            raise PayloadError(
                f"a payload that reached {self.describe()} had a header other than expected, or there was one whose "
                "checksum did not match; that step was poisoned on all ranks. The ranks do not train the same model "
                "with the same options, or a link or a memory is faulty"
            )


def _mean(rows: Tensor) -> Tensor:
    """Return the mean of the rows, added in order, so that whoever adds them comes to the same bits."""
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total / rows.shape[0]
