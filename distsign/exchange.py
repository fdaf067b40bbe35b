"""The only file that calls a collective.

`VoteExchange` carries ballots to the owners and verdicts back, and counts every byte of payload where the collective is
called.
On CPU it runs on one `ExchangeThread`, with a process group of its own, because on the default group it would race with
DDP's own collectives (measured facts in DESIGN.md). On CUDA the same code is enqueued on a side stream and the host
waits for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distsign.kernels import Kernels
from distsign.layout import IntArray
from distsign.nest import put_tensors, take_tensors
from distsign.owner import Owner
from distsign.payload import Form
from distsign.traffic import ExchangeBytes
from distsign.wire.header import HEADER_BYTES, POISON_BYTE, POISON_FLAG, Header, PayloadError

__all__ = [
    "EXCHANGES",
    "Verdicts",
    "VoteExchange",
    "all_gather",
    "all_to_all",
    "gather_values",
    "ranks_of",
    "world_size_of",
]

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


def all_to_all(
    target: Tensor, source: Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup | None
) -> None:
    """Send `send[k]` elements of `source` to rank k of the group, and receive `receive[k]` of it into `target`.

    On Gloo message by message, all receives posted before the first send. A Gloo pair sends only what the other side
    has announced that it will receive, and in its all-to-all a rank's announcement may wait in the socket behind what
    the rank sends: the two directions of a link then take turns (measured: 40 against 21 ms for 122 kB between two
    ranks at 50 Mbit/s, 28 against 21 ms for 2.2 MB of each of four at 1 Gbit/s).
    """
    if source.device.type != "cpu":
        dist.all_to_all_single(target, source, receive, send, group=group)
        return
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    into, out = torch.split(target, receive), torch.split(source, send)
    others = [(rank + k) % world_size for k in range(1, world_size)]
    works = [dist.irecv(into[k], group=group, group_src=k) for k in reversed(others)]
    works += [dist.isend(out[k], group=group, group_dst=k) for k in others]
    into[rank].copy_(out[rank])
    for work in works:
        assert work is not None, "this rank is in the group"
        work.wait()


def all_gather(source: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return `source` of all ranks of the group, one row each: `[world_size, n]`, on the device of `source`. Blocks."""
    if world_size_of(group) == 1:
        return source.unsqueeze(0)
    # NCCL carries no tensors of the CPU.
    on_wire = source.cuda() if dist.get_backend(group) == "nccl" else source
    target = on_wire.new_empty(dist.get_world_size(group), source.numel())
    # torch 2.13 calls it all_gather_single and warns about the name that 2.11 has.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(target.view(-1), on_wire, group=group)
    return target.to(source.device)


def gather_values(value: T, group: dist.ProcessGroup | None) -> list[T]:
    """Return every rank's `value`, in order of rank, pickled: for what all ranks of the group may trust. Blocks."""
    if world_size_of(group) == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def ranks_of(group: dist.ProcessGroup | None) -> list[int]:
    """Return the global ranks of a group, None being the default one; `[0]` where no process group was initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        return [0]
    return dist.get_process_group_ranks(group or dist.group.WORLD)


class _Link:
    """A process group through which bytes are sent, and counted.

    Args:
        group: None for a single rank, where nothing travels.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world_size = 1 if group is None else dist.get_world_size(group)
        self.sent_bytes = self.received_bytes = 0

    def all_to_all(self, source: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """Send `send[k]` elements to rank k and receive `receive[k]` from it."""
        if self.group is None:
            return source
        target = source.new_empty(sum(receive))
        all_to_all(target, source, receive, send, self.group)
        self.sent_bytes += (sum(send) - send[self.rank]) * source.itemsize
        self.received_bytes += (sum(receive) - receive[self.rank]) * source.itemsize
        return target

    def all_gather(self, source: Tensor) -> Tensor:
        """Return `source` of all ranks, one row each."""
        if self.group is None:
            return source.unsqueeze(0)
        target = all_gather(source, self.group)
        others = (self.world_size - 1) * source.numel() * source.itemsize
        self.sent_bytes += others
        self.received_bytes += others
        return target


def world_size_of(group: dist.ProcessGroup | None) -> int:
    """Return the number of ranks in a group, None being the default one; 1 where no process group was initialised."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


class VoteExchange:
    """A vote among the ranks of a process group of its own.

    With nodes of several ranks the vote is held between nodes: the ranks of a node average their gradients first, each
    rank for one share of the components, and vote on that share with the ranks of the same number in the other nodes.

    Args:
        process_group: whose ranks vote; None is the default group. Without an initialised process group, or in a group
            of one, there is one voter and nothing travels.
        kind: `"two_phase"` (bytes per rank flat in the number of ranks) or `"all_gather"` (each rank counts all ballots
            itself, so that no owner needs to be trusted).
        ranks_per_node: consecutive ranks that make a node; 1 for a vote of all.
        checksum: whether payloads end with one. A payload that is damaged then poisons the step, and `agree_on_damage`
            tells all ranks.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None,
        kind: str,
        ranks_per_node: int = 1,
        *,
        checksum: bool = False,
    ) -> None:
        self.kind = kind
        self._checksum = checksum
        # Of this step: 1 + the rank that wrote a payload which came here damaged, or 0.
        self._damage = torch.zeros((), dtype=torch.int64)
        self._ranks_per_node = ranks_per_node
        self._all = _Link(None)
        self._node = _Link(None)
        self._voters = self._all
        # On CUDA a header that does not fit is found without waiting for the device; it poisons the step at once and is
        # reported by `raise_if_mismatched`.
        self._mismatch: Tensor | None = None
        if world_size_of(process_group) > 1:
            parent = process_group or dist.group.WORLD
            assert parent is not None
            ranks = dist.get_process_group_ranks(parent)
            self._all = self._voters = _Link(_twin_of(parent, ranks))
            if ranks_per_node > 1:
                nodes = [ranks[k : k + ranks_per_node] for k in range(0, len(ranks), ranks_per_node)]
                self._node = _Link(_group_of(parent, nodes))
                columns = [ranks[k::ranks_per_node] for k in range(ranks_per_node)]
                self._voters = _Link(_group_of(parent, columns) if len(nodes) > 1 else None)

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
        for link in (self._voters, self._node):
            link.sent_bytes = link.received_bytes = 0

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
        links = {id(link.group): link for link in (self._all, self._voters, self._node) if link.group is not None}
        # torch names the twin of a subgroup by how many groups there are, and would reuse the name of one given back.
        if self._all.group is not None and self.world_size == dist.get_world_size():
            for link in links.values():
                dist.destroy_process_group(link.group)
        for link in links.values():
            link.group = None

    def describe(self) -> str:
        """Return the voters in words, for errors."""
        ranks = dist.get_process_group_ranks(self._all.group) if self._all.group is not None else [0]
        return f"rank {self._all.rank} of {self.world_size} (global ranks {ranks})"

    def gather(self, value: T) -> list[T]:
        """Return every rank's `value`, in order of rank. Blocks."""
        return [value] if self._all.group is None else gather_values(value, self._all.group)

    def broadcast(self, value: T, source: int) -> T:
        """Return what rank `source` of this group gave, a nest of dicts, lists and tuples with tensors in it. Blocks.

        Only the nest is pickled; tensors travel as tensors, and arrive on the kind of device that they lay on.
        """
        if self._all.group is None:
            return value
        tensors: list[Tensor] = []
        nest = take_tensors(value, tensors) if self._all.rank == source else None
        box = [(nest, [(tensor.shape, tensor.dtype, tensor.device.type) for tensor in tensors])]
        sender = dist.get_global_rank(self._all.group, source)
        dist.broadcast_object_list(box, sender, group=self._all.group)
        nest, kinds = box[0]
        # NCCL carries no tensors of the CPU, where Adam keeps its step.
        on_wire = "cuda" if dist.get_backend(self._all.group) == "nccl" else None
        arrived = []
        for index, (shape, dtype, device) in enumerate(kinds):
            wire_device = on_wire or device
            if self._all.rank == source:
                tensor = tensors[index].to(wire_device)
            else:
                tensor = torch.empty(shape, dtype=dtype, device=wire_device)
            dist.broadcast(tensor, sender, group=self._all.group)
            arrived.append(tensor.to(device))
        return value if self._all.rank == source else put_tensors(nest, arrived)

    def mean_in_node(self, buffer: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return this rank's share of the mean over its node: a reduce-scatter whose order of additions is fixed.

        Args:
            buffer: floating point, the shares of all ranks of the node one after the other.
            sizes: elements of each share.

        Returns:
            float32 `[sizes[local_rank]]`.
        """
        own = sizes[self._node.rank]
        found = self._node.all_to_all(buffer, list(sizes), [own] * self._node.world_size)
        return _mean(found.view(self._node.world_size, own).float())

    def share_in_node(self, payloads: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Return what every rank of the node has: each its `payloads`, uint8 of `sizes[local_rank]` bytes."""
        copies = payloads.repeat(self._node.world_size)
        found = self._node.all_to_all(copies, [payloads.numel()] * self._node.world_size, list(sizes))
        return list(torch.split(found, list(sizes)))

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
        found = self._voters.all_to_all(buffer, list(ballots.sizes), [own] * self.num_voters)
        received = found.view(self.num_voters, own)
        poisoned = self._check(ballots, {self.rank: received}, self.local_rank)
        payload = self._count(ballots, verdicts, self.rank, received, poisoned, owner, starts, kernels)
        own = verdicts.sizes[self.rank]
        return self._voters.all_to_all(payload.repeat(self.num_voters), [own] * self.num_voters, list(verdicts.sizes))

    def read(self, verdicts: Form, payloads: Tensor, kernels: Kernels, column: int = 0) -> Verdicts:
        """Open what `vote` returned, here or on another rank of the node, the one of number `column`.

        Raises:
            PayloadError: if a payload is not what this rank expects.
        """
        parts = enumerate(torch.split(payloads, list(verdicts.sizes)))
        poisoned = self._check(verdicts, {owner: part.unsqueeze(0) for owner, part in parts}, column)
        planes, crowded, mean, ok = verdicts.open_all(payloads, kernels)
        return Verdicts(planes, crowded, mean, self._require(ok, poisoned, "verdicts"))

    def _all_gather(
        self, ballots: Form, verdicts: Form, buffer: Tensor, owner: Owner, starts: IntArray, kernels: Kernels
    ) -> Tensor:
        received = self._voters.all_gather(buffer)
        parts = [part.contiguous() for part in torch.split(received, list(ballots.sizes), dim=1)]
        poisoned = self._check(ballots, dict(enumerate(parts)), self.local_rank)
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
        found = ballots.open(shard, received)
        mean = _mean(found.raw)
        # Finite numbers may well have an infinite sum.
        poisoned = poisoned | ~mean.isfinite().all()
        planes, too_many, ok = owner.count(found, ballots.layout, shard, verdicts.caps, starts, kernels)
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

    def _check(self, form: Form, payloads: dict[int, Tensor], column: int) -> Tensor:
        """Hold each header against the expected one; return whether any payload carries poison or came damaged.

        Args:
            form: of the payloads.
            payloads: by owner, uint8 `[num_senders, sizes[owner]]`: verdicts of the owner itself, or the ballots of all
                voters.
            column: number in its node of the ranks that wrote them.
        """
        rows = torch.cat([part[:, :HEADER_BYTES] for part in payloads.values()])
        expected = [form.headers[owner] for owner, part in payloads.items() for _ in part]
        senders = [owner if form.verdict else k for owner, part in payloads.items() for k in range(part.shape[0])]
        damaged = torch.cat([form.damaged(part) for part in payloads.values()])
        poisoned = ((rows[:, POISON_BYTE] & POISON_FLAG) != 0).any() | damaged.any()
        if self._checksum:
            writers = torch.tensor([k * self._ranks_per_node + column for k in senders], device=rows.device)
            self._damage = torch.maximum(self._damage.to(rows.device), (damaged * (1 + writers)).max())
        if rows.device.type == "cpu":
            fine = (~damaged).tolist()
            for k, header in enumerate(expected):
                if fine[k]:  # else the header is not to be believed either
                    Header.expect(bytes(rows[k].tolist()), header, sender=senders[k], receiver=self.rank)
            return poisoned
        want = torch.tensor([list(header.encode()) for header in expected], dtype=torch.uint8, device=rows.device)
        keep = torch.full((HEADER_BYTES,), 255, dtype=torch.uint8, device=rows.device)
        keep[POISON_BYTE] = 255 - POISON_FLAG
        bad = (((rows ^ want) & keep) != 0).any() | damaged.any()
        self._mismatch = bad if self._mismatch is None else self._mismatch | bad
        return poisoned | bad

    def agree_on_damage(self) -> Tensor:
        """Let all ranks learn whether a checksum of this step did not match anywhere; all must call it at its end.

        So that no rank takes a step that another does not: what came damaged to one has reached the others well.

        Returns:
            bool scalar tensor on the device of the payloads, alike on all ranks: whether the step must be poisoned.

        Raises:
            PayloadError: on the CPU, on all ranks alike, if a payload came damaged; it names who wrote it and who got
                it. On CUDA, where this would wait, `raise_if_mismatched` says so later.
        """
        damage, self._damage = self._damage, torch.zeros_like(self._damage)
        if not self._checksum:
            return damage != 0
        by_node = self._voters.all_gather(damage.view(1)).view(-1)
        everyones = self._node.all_gather(by_node).t().flatten()  # in order of rank
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
        return bad

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


def _twin_of(parent: dist.ProcessGroup, ranks: list[int]) -> dist.ProcessGroup:
    """Make a group of the same ranks, with the same backend and timeout.

    Raises:
        ValueError: if the ranks of a subgroup know different numbers of groups, so that torch would wait in vain.
    """
    # A group that all ranks make is numbered alike everywhere. Only a subgroup's ranks can make its twin by themselves,
    # and torch then names it by the number of groups that each rank knows.
    if len(ranks) < dist.get_world_size():
        known: list[Any] = [None] * len(ranks)
        dist.all_gather_object(known, len(dist.distributed_c10d._world.pg_names), group=parent)
        if len(set(known)) > 1:
            raise ValueError(
                f"the vote needs a process group of its own among ranks {ranks}, but these are in {known} groups so "
                "far, and torch can make one only where that is the same number: let them all be in as many groups "
                "before the first backward"
            )
    return _group_of(parent, [ranks])


def _group_of(parent: dist.ProcessGroup, parts: list[list[int]]) -> dist.ProcessGroup:
    """Make a group of each part of the parent's ranks, like the parent, and return this rank's own."""
    local = dist.get_world_size(parent) < dist.get_world_size()
    mine: dist.ProcessGroup | None = None
    for ranks in parts:
        if dist.get_rank() in ranks or not local:
            group = dist.new_group(
                ranks, timeout=_timeout_of(parent), backend=dist.get_backend(parent), use_local_synchronization=local
            )
            mine = group if dist.get_rank() in ranks else mine
    assert mine is not None
    return mine


def _mean(rows: Tensor) -> Tensor:
    """Return the mean of the rows, added in order, so that whoever adds them comes to the same bits."""
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total / rows.shape[0]


def _timeout_of(group: dist.ProcessGroup) -> timedelta | None:
    """Return the group's timeout: what a user set on it must hold for our group too."""
    for device_type in ("cpu", "cuda"):
        try:
            options = group._get_backend(torch.device(device_type)).options
        except (RuntimeError, AttributeError):
            continue
        timeout = getattr(options, "_timeout", None)
        if timeout is not None:
            return timeout  # type: ignore[no-any-return]
    return None
