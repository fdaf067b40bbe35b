"""Collectives and kernels timed on real ranks: beside `distsign.collectives` the only file that calls a collective.

It times the calls that the hooks make: all-reduce of floats, all-to-all and all-gather of bytes.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from distsign.collectives import all_gather_into, all_to_all
from distsign.memory import pages_taken

__all__ = ["Call", "Ranks", "Timing", "joined_ranks", "num_ranks"]

T = TypeVar("T")
_CACHE_BYTES = 32 << 20
"""Touched between calls that are to find the caches cold. On a processor that shows 480 MB of them, as many bytes for
all ranks together brought predictions no nearer."""
_WARM_UP = 3
"""Calls that do not count: until then what is freed lies where the next call does not find it, and new memory costs as
much as the work (PowerSGD's hook on 16 M components: 119, 99, 76, then 60 ms)."""
_FEW_PAGES = 256
"""That a rank may take from the system in a call that counts: 1 MiB. After the calls above, PowerSGD's hook on 4 M
components was seen to take 16 MB once more; four of eleven calibrations put it at 33 to 55 ms, and none since at more
than 15 (`benchmarks/results/simulator`)."""
_LEAST_REPEATS, _ENOUGH_S = 3, 0.5
_ROW_S, _LONGEST_ROW = 0.03, 20
_DTYPES = {"all_reduce_fp32": torch.float32, "all_reduce_bf16": torch.bfloat16, "all_reduce_fp16": torch.float16}


@dataclass(frozen=True)
class Timing:
    """What a call took.

    Attributes:
        wall_s: of the slowest rank, median over the repetitions.
        cpu_s: of a rank's process, all its threads, mean over the ranks, median over the repetitions.
    """

    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Call:
    """One collective of one size on one group of ranks, and what it sends.

    Attributes:
        kind: in `Profile.collectives`.
        messages: that a rank sends; as many rounds in a ring.
        sent_bytes: by a rank.
        link_bytes: through the link of a node, of all its ranks together.
        timing: see there.
    """

    kind: str
    messages: int
    sent_bytes: int
    link_bytes: float
    timing: Timing


class Ranks:
    """The ranks of the default process group, and the groups in which collectives are timed.

    Args:
        per_node: consecutive ranks that share a link.
        per_machine: consecutive ranks that share cores.

    Attributes:
        device: where tensors lie.
        alone: a group of this rank only.
    """

    def __init__(self, per_node: int, per_machine: int) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.per_node, self.per_machine = per_node, per_machine
        self.device = torch.device("cpu")
        if dist.get_backend() == "nccl":
            self.device = torch.device("cuda", torch.cuda.current_device())
        on_cuda = self.device.type == "cuda"
        rest = 2 * torch.cuda.get_device_properties(self.device).L2_cache_size if on_cuda else _CACHE_BYTES
        self._rest_of_a_step = torch.zeros(rest, dtype=torch.uint8, device=self.device)
        num_nodes = self.world_size // per_node
        # A second number of ranks tells what each message costs from what each call costs.
        pairs = [[k, k + per_node] for k in range(self.world_size - per_node) if k // per_node % 2 == 0]
        if num_nodes == 1:
            pairs = [[k, k + 1] for k in range(0, self.world_size - 1, 2)]
        self._groups: dict[str, dist.ProcessGroup | None] = {"all": _group([list(range(self.world_size))], self.rank)}
        if self.world_size > 2:
            self._groups["pairs"] = _group(pairs, self.rank)
        # What a link carries is seen where nobody waits for a core.
        self._groups["one link"] = _group([[0, per_node % self.world_size or 1]], self.rank)
        if 1 < per_node < self.world_size:
            nodes = [list(range(k, k + per_node)) for k in range(0, self.world_size, per_node)]
            self._groups["node"] = _group(nodes, self.rank)
        alone = _group([[k] for k in range(self.world_size)], self.rank)
        assert alone is not None
        self.alone = alone

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups: `all`, `pairs` (between nodes where there are some), `one link` (one such), `node`."""
        return tuple(self._groups)

    def close(self) -> None:
        """Give the groups back."""
        for group in self._groups.values():
            if group is not None:
                dist.destroy_process_group(group)
        self._groups.clear()
        dist.destroy_process_group(self.alone)

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def agreed(self, value: float) -> float:
        """Return the largest of all ranks' values."""
        box = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return float(box)

    def time(
        self,
        run: Callable[[], object],
        repeats: int,
        *,
        alone: bool = False,
        takes_part: bool = True,
        cold: bool = False,
    ) -> Timing:
        """Time a call that all ranks begin together.

        Args:
            run: what is timed.
            repeats: how often, after some that do not count; fewer times where that takes long.
            alone: rank 0 runs it while the others wait.
            takes_part: whether this rank runs it.
            cold: caches are emptied before each time, as the rest of a step does it.
        """
        takes_part = takes_part and (not alone or self.rank == 0)
        (found,) = self.time_in_turn([run], repeats, takes_part=takes_part, cold=cold)
        return found

    def time_in_turn(
        self,
        runs: Sequence[Callable[[], object]],
        repeats: int,
        *,
        takes_part: bool = True,
        cold: bool = False,
        enough_s: float = _ENOUGH_S,
    ) -> list[Timing]:
        """Time calls one after the other, again and again, so that a machine that slows down does so for all of them.

        Calls do not count while memory is new to a rank: for the first few, and after them as long as pages are taken.

        Args:
            runs: what is timed.
            repeats: see `time`.
            takes_part: see `time`.
            cold: see `time`.
            enough_s: fewer repeats will do once all times that count have taken so long; and no longer is waited, after
                the first few, for ranks to take no more pages.
        """
        rows: list[list[tuple[float, float, float]]] = []
        counted_s = waited_s = 0.0
        warm_up = _WARM_UP
        while len(rows) < repeats and not (len(rows) >= _LEAST_REPEATS and counted_s > enough_s):  # alike on all ranks
            row = [self._once(run, takes_part, cold) for run in runs]
            row_s = sum(wall_s for wall_s, _, _ in row)
            if warm_up > 0:
                warm_up -= 1
            elif max(pages for _, _, pages in row) > _FEW_PAGES and waited_s < enough_s:
                waited_s += row_s
            else:
                rows.append(row)
                counted_s += row_s
        return [Timing(float(wall_s), float(cpu_s)) for wall_s, cpu_s, _ in np.median(rows, axis=0)]

    def _once(self, run: Callable[[], object], takes_part: bool, cold: bool) -> tuple[float, float, float]:
        """Return a call's time on the slowest rank, its processor's time on the mean rank, and the most pages taken."""
        if cold:
            self._rest_of_a_step.add_(1)
        self.synchronize()
        dist.barrier()
        pages, begin, cpu = pages_taken(), time.perf_counter(), time.process_time()
        if takes_part:
            run()
            self.synchronize()
        spent = [time.perf_counter() - begin, time.process_time() - cpu, pages_taken() - pages, 1.0]
        slowest = torch.tensor(spent, dtype=torch.float64, device=self.device) * takes_part
        total = slowest.clone()
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        dist.all_reduce(total)
        return float(slowest[0]), float(total[1] / total[3]), float(slowest[2])

    def call(self, kind: str, num_bytes: int, group_name: str, repeats: int) -> Call:
        """Time a collective.

        Args:
            kind: in `Profile.collectives`.
            num_bytes: about what a rank sends.
            group_name: one of `groups`.
            repeats: see `time`.
        """
        group = self._groups[group_name]
        # Ranks without a pair wait, and know the size of a pair all the same.
        size = {"all": self.world_size, "pairs": 2, "one link": 2, "node": self.per_node}[group_name]
        takes_part = group is not None
        run, sent, messages = self._prepared(kind, num_bytes, group, size)
        between = (size - self.per_node) / (size - 1) if group_name == "all" and size > self.per_node else 1.0
        together = 1.0 if kind != "all_to_all" and group_name == "all" else float(self.per_node)
        if group_name in ("node", "one link") or self.per_node == self.world_size:
            between = together = 1.0
        timing = self._time_in_a_row(run, repeats, takes_part)
        crossing = between if kind == "all_to_all" else 1.0
        return Call(kind, messages, sent, sent * crossing * together, timing)

    def _time_in_a_row(self, run: Callable[[], object], repeats: int, takes_part: bool) -> Timing:
        """Time short calls several in a row: what the threads of the backend do after a call is part of what it costs.

        Of an all-to-all of 3 kB among 4 ranks on 2 cores that was half of the processor's time. On a device, where
        calls in a row would hide each other's launch, one by one.
        """
        if self.device.type != "cpu":
            return self.time(run, repeats, takes_part=takes_part)
        once = self.time(run, 1, takes_part=takes_part)
        count = min(max(1, int(_ROW_S / max(once.wall_s, 1e-9))), _LONGEST_ROW)

        def row() -> None:
            for _ in range(count):
                run()

        found = self.time(row, repeats, takes_part=takes_part)
        return Timing(found.wall_s / count, found.cpu_s / count)

    def expected_s(self, wall_s: float, repeats: int) -> float:
        """Return about how long `call` takes of a collective that takes `wall_s`."""
        row_s = wall_s if self.device.type != "cpu" else max(wall_s, min(_ROW_S, _LONGEST_ROW * wall_s))
        counted = min(repeats, max(_LEAST_REPEATS, math.ceil(_ENOUGH_S / max(row_s, 1e-9))))
        return (_WARM_UP + 1) * wall_s + (_WARM_UP + counted) * row_s

    def _prepared(
        self, kind: str, num_bytes: int, group: dist.ProcessGroup | None, size: int
    ) -> tuple[Callable[[], object], int, int]:
        """Return the call, the bytes that a rank sends, and in how many messages."""
        if kind in _DTYPES:
            width = _DTYPES[kind].itemsize
            count = max(size, num_bytes * size // (2 * (size - 1) * width))
            values = torch.zeros(count, dtype=_DTYPES[kind], device=self.device)
            return lambda: dist.all_reduce(values, group=group), 2 * count * width * (size - 1) // size, 2 * (size - 1)
        share = max(1, num_bytes // (size - 1))
        if kind == "all_gather":
            own = torch.zeros(share, dtype=torch.uint8, device=self.device)
            rows = torch.empty(size * share, dtype=torch.uint8, device=self.device)
            return lambda: all_gather_into(rows, own, group), (size - 1) * share, size - 1
        source = torch.zeros(size * share, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        shares = [share] * size
        return lambda: all_to_all(target, source, shares, shares, group), (size - 1) * share, size - 1


def _group(parts: list[list[int]], rank: int) -> dist.ProcessGroup | None:
    """Make a group of each part, and return this rank's own; None where it is in no part."""
    mine = None
    for ranks in parts:
        group = dist.new_group(ranks)
        if rank in ranks:
            mine = group
    return mine


def joined_ranks(backend: str | None, run: Callable[[], T]) -> T:
    """Run a function between joining the other ranks of torchrun and leaving them.

    Args:
        backend: `gloo` or `nccl`; None: nccl where there are GPUs.
        run: the function.

    Raises:
        ValueError: if this process was not started by torchrun, or is the only rank.
    """
    if dist.is_initialized():
        return run()
    how = "start it with torchrun --nproc-per-node 4 -m distsign calibrate profile.json"
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise ValueError(f"calibrate measures the links between ranks, and this process is none: {how}")
    if int(os.environ["WORLD_SIZE"]) < 2:
        raise ValueError(f"calibrate measures the links between ranks, and there is one only: {how}")
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    if backend == "nccl":
        if not torch.cuda.is_available():
            raise ValueError("--backend nccl needs GPUs, and torch sees none: leave it out, or take gloo")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(backend)
    try:
        return run()
    finally:
        dist.destroy_process_group()


def num_ranks() -> int:
    """Return the number of ranks of the default process group."""
    return dist.get_world_size()
