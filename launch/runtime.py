"""The place of this process among the ranks: environment, device, threads and process group."""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from distsign.collectives import LinkError
from distsign.memory import keep_freed_memory
from launch.options import UsageError

ARRIVAL = timedelta(minutes=30)
"""So long the first ranks wait for the last to start."""
_LOST = ("Connection closed", "Connection reset", "Connection refused", "Broken pipe", "Timed out waiting", "Socket")
"""What Gloo says where another rank has ended or hangs."""


class RankLostError(Exception):
    """Another rank has ended or hangs, or a link to it does."""


def is_of_a_lost_rank(error: RuntimeError) -> bool:
    """Return whether torch, or the hook, raised this because another rank did not answer."""
    causes = error, error.__cause__
    return any(isinstance(each, (LinkError, dist.DistError)) for each in causes) or any(w in str(error) for w in _LOST)


@dataclass(frozen=True)
class Ranks:
    """This process's place, as torchrun tells it; one rank of one where nothing is told.

    Attributes:
        rank: among all processes.
        world_size: number of all processes.
        local_rank: among those of this machine.
        local_world_size: number of those of this machine.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_environment(cls) -> Ranks:
        """Read torchrun's variables.

        Raises:
            UsageError: some are there and others are missing, or one is no number.
        """
        if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
            return cls(0, 1, 0, 1)
        try:
            rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            local_rank = int(os.environ.get("LOCAL_RANK", "0"))
            local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        except (KeyError, ValueError) as error:
            raise UsageError(
                f"RANK and WORLD_SIZE must both be numbers in the environment, got {error}: start ranks by torchrun"
            ) from error
        return cls(rank, world_size, local_rank, local_world_size)

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for all."""
        return self.rank == 0


@contextlib.contextmanager
def watch(ranks: Ranks, doing: Callable[[], str] = lambda: "starting") -> Iterator[None]:
    """Say it in our words where another rank is lost meanwhile.

    Args:
        ranks: this process's place.
        doing: what this rank was at, asked when it is to be said.

    Raises:
        RankLostError: in place of torch's error, or of the vote's.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_of_a_lost_rank(error):
            raise
        raise RankLostError(
            f"rank {ranks.rank} of {ranks.world_size} {doing()}, waited in vain for another rank: {error}"
        ) from error


def choose_device(wanted: str, ranks: Ranks) -> torch.device:
    """Return this rank's device: a GPU of its own, or the CPU.

    Args:
        wanted: `auto`, `cpu` or `cuda`.
        ranks: this process's place.

    Raises:
        UsageError: `cuda` is wanted and there is no GPU for every rank of this machine.
    """
    num_gpus = torch.cuda.device_count() if wanted != "cpu" and torch.cuda.is_available() else 0
    if num_gpus >= ranks.local_world_size:
        return torch.device("cuda", ranks.local_rank)
    if wanted == "cuda":
        raise UsageError(
            f"--device cuda needs a GPU per rank: {ranks.local_world_size} ranks on this machine, {num_gpus} GPUs; "
            "start fewer ranks or take --device cpu"
        )
    return torch.device("cpu")


def start(ranks: Ranks, device: torch.device, timeout_s: float) -> None:
    """Share the machine's cores between its ranks and make the default process group: NCCL on GPUs, else Gloo.

    Memory that is freed is kept, see `distsign.memory`.

    Args:
        ranks: this process's place.
        device: where it computes.
        timeout_s: after which a rank that waits for another in vain raises; not for those that have yet to arrive.
    """
    keep_freed_memory()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks.local_world_size))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    device_id = device if device.type == "cuda" else None
    if ranks.world_size == 1 and "MASTER_ADDR" not in os.environ:
        # A process alone needs no network, but DDP and its hooks need a group.
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, device_id=device_id)
    else:
        store, rank, world_size = next(rendezvous("env://", timeout=ARRIVAL))
        store = meet(store, rank, world_size)
        timeout = timedelta(seconds=timeout_s)
        with watch(ranks):
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=device_id
            )


def meet(store: Store, rank: int, world_size: int, within: timedelta = ARRIVAL) -> Store:
    """Wait until all ranks are here, and return a part of the store where nobody has written before.

    torchrun's store outlives the workers that it restarts, with the addresses of the dead in it, where NCCL and Gloo
    then look for each other in vain; and its count of restarts differs between nodes (pytorch issues 135712, 167288).
    So each process comes with a name of its own. Rank 0 publishes the names that it finds, again whenever one has
    changed, until every rank has found its own in the list.

    Args:
        store: which all ranks share, whatever an earlier life of them has left in it.
        rank: this process's.
        world_size: number of ranks.
        within: they must all come; long, since a machine may still be fetching its data.

    Raises:
        RankLostError: some did not come in time; says which, on rank 0.
    """
    name, until = uuid.uuid4().hex, time.monotonic() + within.total_seconds()
    missing: list[int] = []

    def pause() -> None:
        if time.monotonic() > until:
            who = f"rank(s) {missing}" if missing else "another rank"
            raise RankLostError(f"rank {rank} of {world_size} waited in vain for {who} to start, for {within}")
        time.sleep(0.02)

    def found(key: str) -> str | None:
        return store.get(key).decode() if store.check([key]) else None

    if rank != 0:
        store.set(f"arrived/{rank}", name)
        while len(roster := json.loads(found("roster") or "[]")) != world_size or roster[rank] != name:
            pause()
        store.set(f"seen/{roster[0]}/{rank}", "")
        return PrefixStore(roster[0], store)
    published: list[str | None] = []
    while True:
        arrived = [name, *(found(f"arrived/{k}") for k in range(1, world_size))]
        if None not in arrived and arrived != published:
            published = arrived
            store.set("roster", json.dumps(published))
        missing = [k for k in range(1, world_size) if not store.check([f"seen/{name}/{k}"])]
        if published and not missing:
            return PrefixStore(name, store)
        pause()


def agree(what: str, mine: str, ranks: Ranks, advice: str) -> None:
    """Refuse to go on if a rank has something else than rank 0.

    Raises:
        UsageError: on all ranks alike; names the first rank that differs, what it has and what rank 0 has.
    """
    all_have: list[str | None] = [None] * ranks.world_size
    dist.all_gather_object(all_have, mine)
    for rank, theirs in enumerate(all_have):
        if theirs != all_have[0]:
            raise UsageError(f"{what} differs: rank {rank} has {theirs}, rank 0 has {all_have[0]}; {advice}")
