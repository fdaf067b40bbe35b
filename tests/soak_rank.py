"""What happens inside a rank of a soak: `launch.train` as it is, watched, and with the faults that no signal makes.

Ranks are forked from a process that has imported this module, since importing torch takes longer than a life. They must
find no thread there: neither libgomp nor Gloo survives a fork.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import sklearn.datasets  # noqa: F401 - imported once, before the fork
import torch
import torch._dynamo  # noqa: F401 - DDP imports it otherwise, in each life
from torch import Tensor
from tqdm import tqdm

import distsign.kernels.cpu  # noqa: F401 - loads the compiled kernels
from distsign.collectives import Link
from launch import checkpoint, runtime, train
from launch.runtime import RankLostError, Ranks
from launch.train import Trainer
from tests.soak_plan import NAN, Fault

torch.set_num_threads(1)

CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1

MET, STARTED, FIRST, STEP, LOST_AT_NS, WRITING, WRITE_NS, ORDER, PLANTED = range(9)
"""A rank's columns of the board: 1 once it has met the others; 1 once it trains; the step that it went on from; steps
done; when it raised that a rank is lost; 1 while it writes a checkpoint; how long the last one took; a fault that it
shall plant; 1 once it has."""
DRAWS = slice(9, 12)
NUM_COLUMNS = 12
ORDER_FLIP, ORDER_WIRE = 1, 2
_DRAW_UNIT = 2**53


class Board:
    """Memory that the driver and the ranks share: a row of numbers a rank."""

    def __init__(self, path: Path, num_ranks: int, *, new: bool = False) -> None:
        mode: Any = "w+" if new else "r+"
        self.cells = np.asarray(np.memmap(path, np.int64, mode, shape=(num_ranks, NUM_COLUMNS)))

    def get(self, rank: int, column: int) -> int:
        return int(self.cells[rank, column])

    def column(self, column: int) -> list[int]:
        """Return what all ranks have there."""
        found: list[int] = self.cells[:, column].tolist()
        return found

    def put(self, rank: int, column: int, value: int) -> None:
        self.cells[rank, column] = value

    def order(self, rank: int, what: int, draws: Sequence[float]) -> None:
        """Let a rank plant a fault in the step that it begins next."""
        self.cells[rank, DRAWS] = [int(draw * _DRAW_UNIT) for draw in draws]
        self.put(rank, ORDER, what)

    def draws(self, rank: int) -> list[float]:
        return [int(value) / _DRAW_UNIT for value in self.cells[rank, DRAWS]]


@dataclass(frozen=True)
class Place:
    """Where a rank is started.

    Attributes:
        rank: its number, of `num_ranks`.
        board: the file of the board.
        output: the file that takes stdout and stderr.
        namespace: the network namespace to enter, a file; None to stay.
        environment: added to what there is.
    """

    rank: int
    num_ranks: int
    board: Path
    output: Path
    namespace: str | None
    environment: Mapping[str, str]


def live(place: Place, argv: list[str], poison: Mapping[int, Fault]) -> NoReturn:
    """Be a rank to its end, which is that of `python launch/train.py`; never returns."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with place.output.open("wb", buffering=0) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    assert len(os.listdir("/proc/self/task")) == 1, "threads do not survive a fork"
    if place.namespace is not None:
        with open(place.namespace, "rb") as namespace:
            if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"cannot enter {place.namespace}")
    os.environ.update(place.environment)
    # In the lab each rank is alone on its machine, and would take all cores; here they are shared.
    torch.set_num_threads = lambda nthreads: None
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a killed process would leave behind
    board = Board(place.board, place.num_ranks)
    _watch(board, place.rank)
    _plant(board, place.rank, poison)
    code = 0
    try:
        train.main(argv)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _watch(board: Board, rank: int) -> None:
    """Write on the board how far this rank is."""
    resume, train_step, run = Trainer._resume, Trainer._train_step, Trainer.run
    start, write = runtime.start, checkpoint.write

    def watched_start(ranks: Ranks, device: torch.device, timeout_s: float) -> None:
        start(ranks, device, timeout_s)
        board.put(rank, MET, 1)

    def watched_resume(self: Trainer) -> None:
        resume(self)
        board.put(rank, FIRST, self.progress.step)
        board.put(rank, STEP, self.progress.step)
        board.put(rank, STARTED, 1)

    def watched_step(self: Trainer) -> None:
        train_step(self)
        board.put(rank, STEP, self.progress.step)

    def watched_run(self: Trainer) -> None:
        try:
            run(self)
        except RankLostError:
            board.put(rank, LOST_AT_NS, time.monotonic_ns())
            raise

    def watched_write(path: str, content: dict[str, Any]) -> None:
        began = time.monotonic_ns()
        board.put(rank, WRITING, 1)
        write(path, content)
        board.put(rank, WRITING, 0)
        board.put(rank, WRITE_NS, time.monotonic_ns() - began)

    Trainer._resume = watched_resume  # type: ignore[method-assign]
    Trainer._train_step = watched_step  # type: ignore[method-assign]
    Trainer.run = watched_run  # type: ignore[method-assign]
    checkpoint.write = watched_write
    train.start = watched_start  # type: ignore[attr-defined]


def _plant(board: Board, rank: int, poison: Mapping[int, Fault]) -> None:
    """Plant the faults of gradients by their steps, and others when the driver orders them."""
    train_step = Trainer._train_step
    wire = DamagedWire()

    def step_with_faults(self: Trainer) -> None:
        fault = poison.get(self.progress.step)
        hook = _poison(self, fault) if fault is not None and fault.rank == rank else None
        order = board.get(rank, ORDER)
        if order:
            board.put(rank, ORDER, 0)
            draws = board.draws(rank)
            (flip_bit if order == ORDER_FLIP else wire.arm)(self, draws)
            board.put(rank, PLANTED, 1)
        train_step(self)
        if hook is not None:
            hook()

    Trainer._train_step = step_with_faults  # type: ignore[method-assign]
    Link.all_to_all = wire.in_all_to_all(Link.all_to_all)  # type: ignore[method-assign]
    Link.all_gather = wire.in_all_gather(Link.all_gather)  # type: ignore[method-assign]


def _poison(trainer: Trainer, fault: Fault) -> Callable[[], None]:
    """Put NaN or Inf into one component of one gradient, before DDP sees it; return what ends that."""
    parameters = list(trainer.net.parameters())
    parameter = parameters[int(fault.draws[0] * len(parameters))]
    at = int(fault.draws[1] * parameter.numel())
    value = float("nan") if fault.kind == NAN else float("inf") if fault.draws[2] < 0.5 else float("-inf")

    def poisoned(gradient: Tensor) -> Tensor:
        changed = gradient.clone()
        changed.view(-1)[at] = value
        return changed

    removed: Callable[[], None] = parameter.register_hook(poisoned).remove  # type: ignore[no-untyped-call]
    return removed


def flip_bit(trainer: Trainer, draws: Sequence[float]) -> None:
    """Flip one bit of one parameter, and say of which."""
    parameters = list(trainer.net.named_parameters())
    name, parameter = parameters[int(draws[0] * len(parameters))]
    at, bit = int(draws[1] * parameter.numel()), int(draws[2] * 32)
    words = parameter.data.view(-1).view(torch.int32)
    words[at : at + 1] ^= torch.tensor([1 << bit], dtype=torch.int64).to(torch.int32)
    print(f"soak: flipped bit {bit} of {name}[{at}] before step {trainer.progress.step}", flush=True)


class DamagedWire:
    """Flips one bit of a payload that arrives, once, when it is armed.

    It does so in the rank that receives, since TCP's own checksum would hide damage to a packet.
    """

    def __init__(self) -> None:
        self._draws: Sequence[float] | None = None
        self._phase = ""

    def arm(self, trainer: Trainer, draws: Sequence[float]) -> None:
        self._phase = ("ballots", "verdicts")[draws[0] < 0.5]
        self._draws = draws

    def in_all_to_all(self, all_to_all: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def damaged(link: Link, source: Tensor, send: list[int], receive: list[int], what: str = "") -> Tensor:
            found = all_to_all(link, source, send, receive, what)
            if what.startswith(self._phase):
                self._flip(link, found, receive, self._phase)
            return found

        return damaged

    def in_all_gather(self, all_gather: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Here all that travels are ballots."""

        def damaged(link: Link, source: Tensor, what: str = "") -> Tensor:
            found = all_gather(link, source, what)
            if source.dtype == torch.uint8:
                self._flip(link, found.view(-1), [source.numel()] * link.world_size, "ballots")
            return found

        return damaged

    def _flip(self, link: Link, found: Tensor, receive: list[int], phase: str) -> None:
        senders = [k for k in range(link.world_size) if k != link.rank and receive[k] > 0]
        if self._draws is None or not senders:
            return
        sender = senders[int(self._draws[1] * len(senders))]
        bit = int(self._draws[2] * 8 * receive[sender])
        found[sum(receive[:sender]) + bit // 8] ^= 1 << bit % 8
        self._draws = None
        print(f"soak: flipped bit {bit} of the {phase} that rank {sender} wrote", flush=True)
