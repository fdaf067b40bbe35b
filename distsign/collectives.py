"""Collectives, and the bytes that they put on the wire: the only file that calls one.

A `Link` is a process group of its own, because on the default group its collectives would race with DDP's (measured
facts in DESIGN.md); it counts every byte where the collective is called.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distsign.nest import put_tensors, take_tensors
from distsign.traffic import ring_all_reduce_bytes

__all__ = [
    "Link",
    "LinkError",
    "all_gather",
    "all_gather_into",
    "all_to_all",
    "begin_all_to_all",
    "gather_values",
    "rank_in",
    "ranks_of",
    "world_size_of",
]

T = TypeVar("T")

_TAG = 0
"""Of all messages: two ranks exchange them in the same order."""


def all_to_all(
    target: Tensor, source: Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup | None
) -> None:
    """Send `send[k]` elements of `source` to rank k of the group, and receive `receive[k]` of it into `target`.

    See `begin_all_to_all`.
    """
    for work in begin_all_to_all(target, source, receive, send, group):
        work.wait()


def begin_all_to_all(
    target: Tensor, source: Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup | None
) -> list[dist.Work]:
    """Begin `all_to_all`, and return what has to be waited for; on a device nothing, which keeps the order itself.

    `source` may also be `[world_size, n]`, with a row for each rank: one row that is expanded goes to all uncopied.

    On Gloo message by message, all receives posted before the first send. A Gloo pair sends only what the other side
    has announced that it will receive, and in its all-to-all a rank's announcement may wait in the socket behind what
    the rank sends: the two directions of a link then take turns (measured: 40 against 21 ms for 122 kB between two
    ranks at 50 Mbit/s, 28 against 21 ms for 2.2 MB of each of four at 1 Gbit/s).
    """
    if source.device.type != "cpu":
        dist.all_to_all_single(target, source.reshape(-1), receive, send, group=group)
        return []
    into, out = torch.split(target, receive), torch.split(source, send) if source.dim() == 1 else source.unbind()
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    others = [(rank + k) % world_size for k in range(1, world_size)]
    # The group's own methods: `dist.irecv` and `isend` look up and check on each call what is known here. By a profile
    # of a step of twelve exchanges that was 6 % of what the exchange thread did.
    group = group or dist.group.WORLD
    assert group is not None
    works = [group.recv([into[k]], k, _TAG) for k in reversed(others)]
    works += [group.send([out[k]], k, _TAG) for k in others]
    into[rank].copy_(out[rank])
    return works


def _wire_device(group: dist.ProcessGroup | None) -> torch.device | None:
    """Return the only device whose tensors a group carries; None for Gloo, which carries those of any.

    NCCL carries none of the CPU, where Adam keeps its step.
    """
    if dist.get_backend(group) != "nccl":
        return None
    bound = (group or dist.group.WORLD).bound_device_id  # type: ignore[union-attr]
    return bound or torch.device("cuda", torch.cuda.current_device())


def all_gather_into(target: Tensor, source: Tensor, group: dist.ProcessGroup | None) -> None:
    """Write `source` of all ranks of the group into `target`, one after the other. Blocks."""
    # torch 2.13 calls it all_gather_single and warns about the name that 2.11 has.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(target, source, group=group)


def all_gather(source: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return `source` of all ranks of the group, one row each: `[world_size, n]`, on the device of `source`. Blocks."""
    if world_size_of(group) == 1:
        return source.unsqueeze(0)
    on_wire = source if source.device.type != "cpu" else source.to(_wire_device(group) or source.device)
    target = on_wire.new_empty(dist.get_world_size(group), source.numel())
    all_gather_into(target.view(-1), on_wire, group)
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


def world_size_of(group: dist.ProcessGroup | None) -> int:
    """Return the number of ranks in a group, None being the default one; 1 where no process group was initialised."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank_in(group: dist.ProcessGroup | None) -> int:
    """Return this rank's number in a group, None being the default one; 0 where no process group was initialised."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


class LinkError(RuntimeError):
    """Bytes did not get through between ranks: one has ended or hangs, or a link between them does."""


class Link:
    """A process group through which bytes are sent, and counted.

    Args:
        group: None for a single rank, where nothing travels.

    Attributes:
        sent_bytes: by this rank to others, so far.
        received_bytes: by this rank from others, so far.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world_size = 1 if group is None else dist.get_world_size(group)
        self.sent_bytes = self.received_bytes = 0

    @classmethod
    def twin(cls, process_group: dist.ProcessGroup | None) -> Link:
        """Return a link among the ranks of a group (None: the default one), with the same backend and timeout.

        Without an initialised process group, or in a group of one, it is a link of one rank. All ranks must call it.

        Raises:
            ValueError: if the ranks of a subgroup know different numbers of groups, so that torch would wait in vain.
        """
        if world_size_of(process_group) == 1:
            return cls(None)
        parent = process_group or dist.group.WORLD
        assert parent is not None
        ranks = dist.get_process_group_ranks(parent)
        # A group that all ranks make is numbered alike everywhere. Only a subgroup's ranks can make its twin by
        # themselves, and torch then names it by the number of groups that each rank knows.
        if len(ranks) < dist.get_world_size():
            known: list[Any] = [None] * len(ranks)
            dist.all_gather_object(known, len(dist.distributed_c10d._world.pg_names), group=parent)
            if len(set(known)) > 1:
                raise ValueError(
                    f"the vote needs a process group of its own among ranks {ranks}, but these are in {known} groups "
                    "so far, and torch can make one only where that is the same number: let them all be in as many "
                    "groups before the first backward"
                )
        return cls(_group_of(parent, [ranks]))

    def part(self, parts: list[list[int]]) -> Link:
        """Return a link among those ranks of this one that stand in one list with this rank; all ranks must call it.

        Args:
            parts: numbers in this link, each once.
        """
        if self.group is None:
            return Link(None)
        ranks = ranks_of(self.group)
        return Link(_group_of(self.group, [[ranks[k] for k in part] for part in parts]))

    @property
    def is_whole_world(self) -> bool:
        """Whether it joins all ranks that there are."""
        return self.group is not None and self.world_size == dist.get_world_size()

    def describe(self) -> str:
        """Return this rank's place in words, for errors."""
        ranks = [0] if self.group is None else ranks_of(self.group)
        return f"rank {self.rank} of {self.world_size} (global ranks {ranks})"

    def forget_counts(self) -> None:
        """Count from zero again."""
        self.sent_bytes = self.received_bytes = 0

    def close(self) -> None:
        """Give the group back, with its sockets and threads; the link must not be used afterwards."""
        if self.group is not None:
            dist.destroy_process_group(self.group)
            self.group = None

    def all_to_all(self, source: Tensor, send: list[int], receive: list[int], what: str = "an exchange") -> Tensor:
        """Send `send[k]` elements to rank k and receive `receive[k]` from it; see `all_to_all` above.

        Raises:
            LinkError: on the CPU, within the group's timeout, if they do not get through; it names `what`, and ranks.
        """
        if self.group is None:
            return source.reshape(-1)
        target = source.new_empty(sum(receive))
        with self._watch(what):
            all_to_all(target, source, receive, send, self.group)
        self._count(source, sum(send) - send[self.rank], sum(receive) - receive[self.rank])
        return target

    def share(self, source: Tensor, receive: Sequence[int], what: str = "an exchange") -> Tensor:
        """Return `source` of all ranks, of `receive[k]` elements each, one after the other.

        Raises:
            LinkError: see `all_to_all`.
        """
        rows = source.expand(self.world_size, -1)
        return self.all_to_all(rows, [source.numel()] * self.world_size, list(receive), what)

    def all_gather(self, source: Tensor, what: str = "an exchange") -> Tensor:
        """Return `source` of all ranks, one row each.

        Raises:
            LinkError: see `all_to_all`.
        """
        if self.group is None:
            return source.unsqueeze(0)
        with self._watch(what):
            target = all_gather(source, self.group)
        others = (self.world_size - 1) * source.numel()
        self._count(source, others, others)
        return target

    def all_reduce_mean(self, values: Tensor) -> None:
        """Replace values by their mean over all ranks, in place; counted as a ring.

        Raises:
            LinkError: see `all_to_all`.
        """
        if self.group is None:
            return
        with self._watch("a mean over all ranks"):
            dist.all_reduce(values, group=self.group)
        values /= self.world_size
        both = ring_all_reduce_bytes(values.numel(), values.itemsize, self.world_size)
        self.sent_bytes += both // 2
        self.received_bytes += both - both // 2

    def _count(self, source: Tensor, sent: int, received: int) -> None:
        self.sent_bytes += sent * source.itemsize
        self.received_bytes += received * source.itemsize

    @contextlib.contextmanager
    def _watch(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            assert self.group is not None
            limit = _timeout_of(self.group)
            within = "" if limit is None else f" (timeout {limit.total_seconds():g} s)"
            raise LinkError(
                f"{what} did not get through among ranks {ranks_of(self.group)}, after {time.monotonic() - began:.1f} s"
                f"{within}: {_in_short(error)}"
            ) from error

    def gather_values(self, value: T) -> list[T]:
        """Return every rank's `value`, in order of rank; not counted. Blocks."""
        return [value] if self.group is None else gather_values(value, self.group)

    def broadcast(self, value: T, source: int) -> T:
        """Return what rank `source` gave, a nest of dicts, lists and tuples with tensors in it; not counted. Blocks.

        Only the nest is pickled; tensors travel as tensors, and arrive on the kind of device that they lay on.
        """
        if self.group is None:
            return value
        tensors: list[Tensor] = []
        nest = take_tensors(value, tensors) if self.rank == source else None
        box = [(nest, [(tensor.shape, tensor.dtype, tensor.device.type) for tensor in tensors])]
        sender = dist.get_global_rank(self.group, source)
        dist.broadcast_object_list(box, sender, group=self.group)
        nest, kinds = box[0]
        on_wire = _wire_device(self.group)
        arrived = []
        for index, (shape, dtype, device) in enumerate(kinds):
            wire_device = on_wire or device
            if self.rank == source:
                tensor = tensors[index].to(wire_device)
            else:
                tensor = torch.empty(shape, dtype=dtype, device=wire_device)
            dist.broadcast(tensor, sender, group=self.group)
            arrived.append(tensor if tensor.device.type == device else tensor.to(device))
        return value if self.rank == source else put_tensors(nest, arrived)


def _group_of(parent: dist.ProcessGroup, parts: list[list[int]]) -> dist.ProcessGroup:
    """Make a group of each part of the parent's ranks, like the parent, and return this rank's own."""
    local = dist.get_world_size(parent) < dist.get_world_size()
    mine: dist.ProcessGroup | None = None
    for ranks in parts:
        if dist.get_rank() in ranks or not local:
            try:
                group = _in_time(partial(_new_group, parent, ranks, local=local), parent)
            except (RuntimeError, TimeoutError) as error:
                raise LinkError(f"ranks {ranks} could not make a process group: {_in_short(error)}") from error
            mine = group if dist.get_rank() in ranks else mine
    assert mine is not None
    return mine


def _new_group(parent: dist.ProcessGroup, ranks: list[int], *, local: bool) -> dist.ProcessGroup:
    with _unbound() if local else contextlib.nullcontext():
        group: dist.ProcessGroup = dist.new_group(
            ranks, timeout=_timeout_of(parent), backend=dist.get_backend(parent), use_local_synchronization=local
        )
    return group


def _in_time(make: Callable[[], T], parent: dist.ProcessGroup) -> T:
    """Return what `make` does, or raise TimeoutError half a second after a Gloo group's timeout.

    When torch has waited for its store that long it asks the store to cancel, and waits for the answer for ever: over a
    link that is down it would never come. It is left waiting in a thread.
    """
    limit = _timeout_of(parent)
    if limit is None or dist.get_backend(parent) != "gloo":
        return make()
    found: Future[T] = Future()

    def run() -> None:
        try:
            found.set_result(make())
        except BaseException as error:
            found.set_exception(error)

    Thread(target=run, name="distsign group", daemon=True).start()
    within = limit.total_seconds() + 0.5
    try:
        return found.result(within)
    except TimeoutError:
        raise TimeoutError(f"no answer from the store within {within:g} s") from None


@contextlib.contextmanager
def _unbound() -> Iterator[None]:
    """Let a new group have a communicator of its own.

    Where the default group is bound to a device (`init_process_group(device_id=...)`) torch would split that of the
    default group, which all of its ranks have to join; those outside of the new group do not even know of it.
    """
    world = dist.group.WORLD
    assert world is not None
    bound, world.bound_device_id = world.bound_device_id, None
    try:
        yield
    finally:
        world.bound_device_id = bound


def _in_short(error: Exception) -> str:
    """Return the first sentence of torch's words, without the place in its own sources."""
    text = str(error).partition("] ")[2] or str(error)
    return text.splitlines()[0].partition(". ")[0]


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
