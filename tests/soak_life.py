"""The ranks of a soak from one start to the next: started, struck by a fault, and seen to end as they must."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from launch.netlab import MASTER_PORT, Lab
from launch.netns import INTERFACE, node_address
from tests.forked import context
from tests.soak_plan import Round
from tests.soak_rank import FIRST, LOST_AT_NS, MET, STARTED, STEP, Board, Place, live

SLACK_S = 20.0
"""What a busy machine may add to the timeout, and the second for the last words, before a rank counts as hanging."""
STARTED_WITHIN_S = 120.0
NAMESPACES = Path("/run/netns")
POLL_S = 0.01
LOST = re.compile(
    r"the vote on .* did not get through among ranks \[[\d, ]+\]|"
    r"rank \d+ of \d+ [\w ]+,( after step \d+,)? waited in vain"
)
"""A rank that has lost another says what it waited for."""


@dataclass(frozen=True)
class End:
    """How a rank ended.

    Attributes:
        rank: which.
        code: its exit code, negative for a signal; None where it did not end by itself.
        words: all that it wrote.
    """

    rank: int
    code: int | None
    words: str


class Life:
    """The ranks of a run between two starts, as a context: none outlives it.

    Args:
        plan: the round.
        number: of the life within its run.
        num_ranks: each on a node of its own.
        argv: options of `launch.train`.
        folder: for the board and what ranks write.
        lab: where they run; None for the loopback.
    """

    def __init__(
        self, plan: Round, number: int, num_ranks: int, argv: Sequence[str], folder: Path, lab: Lab | None
    ) -> None:
        self.num_ranks, self.lab = num_ranks, lab
        board = folder / "board"
        self.board = Board(board, num_ranks, new=True)
        self._outputs = [folder / f"life-{number}-rank-{rank}.txt" for rank in range(num_ranks)]
        port = MASTER_PORT + number % 1000 if lab is not None else _free_port()
        self.processes: list[ForkServerProcess] = []
        for rank in range(num_ranks):
            environment = {
                "RANK": str(rank),
                "WORLD_SIZE": str(num_ranks),
                "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1" if lab is None else node_address(0),
                "MASTER_PORT": str(port),
                "GLOO_SOCKET_IFNAME": "lo" if lab is None else INTERFACE,
            }
            namespace = None if lab is None else str(NAMESPACES / lab.namespace(rank))
            place = Place(rank, num_ranks, board, self._outputs[rank], namespace, environment)
            args = place, list(argv), plan.poison
            self.processes.append(context.Process(target=live, name=f"soak rank {rank}", args=args, daemon=True))

    def __enter__(self) -> Life:
        try:
            for process in self.processes:
                process.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()

    def kill(self) -> None:
        """Kill all ranks, frozen ones too, and wait until they are gone."""
        for rank in range(self.num_ranks):
            self.signal(rank, signal.SIGKILL)
        for process in self.processes:
            if process.pid is not None:
                process.join()

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to a rank that still runs."""
        process = self.processes[rank]
        if process.pid is not None and process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    @property
    def running(self) -> list[int]:
        """The ranks that have not ended."""
        return [rank for rank, process in enumerate(self.processes) if process.exitcode is None]

    @property
    def has_met(self) -> bool:
        """Whether all ranks are in the process group."""
        return all(self.board.column(MET))

    @property
    def first_step(self) -> int | None:
        """The step that it went on from; None where not all ranks have come so far."""
        return self.board.get(0, FIRST) if all(self.board.column(STARTED)) else None

    @property
    def done(self) -> int:
        """Steps that all ranks have done."""
        return min(self.board.column(STEP))

    @property
    def furthest(self) -> int:
        """Steps that some rank has done."""
        return max(self.board.column(STEP))

    def wait_until(self, step: int) -> bool:
        """Wait until all ranks have done so many steps; return whether they have, before any of them has ended.

        Below 0 steps: until all are in the process group, and still prepare the first.

        Raises:
            TimeoutError: they still run, but no step has been done for long.
        """
        seen, until = -1, time.monotonic() + STARTED_WITHIN_S
        sentinels = [process.sentinel for process in self.processes]
        while not connection.wait(sentinels, POLL_S):
            if (self.has_met and step < 0) or (self.first_step is not None and self.done >= step):
                return True
            if self.furthest > seen:
                seen, until = self.furthest, time.monotonic() + STARTED_WITHIN_S
            if time.monotonic() > until:
                raise TimeoutError(f"no step within {STARTED_WITHIN_S:g} s, after step {seen}")
        return False

    def ends(self, within_s: float, but: Sequence[int] = ()) -> list[End]:
        """Wait until all ranks but some have ended by themselves, for so long; return how they did."""
        until = time.monotonic() + within_s
        awaited = [rank for rank in range(self.num_ranks) if rank not in but]
        while left := [self.processes[rank] for rank in awaited if rank in self.running]:
            if (rest := until - time.monotonic()) <= 0:
                break
            connection.wait([process.sentinel for process in left], rest)
        return [End(rank, self.processes[rank].exitcode, self.words(rank)) for rank in awaited]

    def words(self, rank: int) -> str:
        """Return what a rank has written."""
        return self._outputs[rank].read_text(errors="replace") if self._outputs[rank].exists() else ""

    def lost_at(self) -> list[float]:
        """Return when ranks raised that another is lost, by the monotonic clock, in seconds."""
        return [stamp / 1e9 for stamp in self.board.column(LOST_AT_NS) if stamp]


def trouble_of_loss(end: End) -> str | None:
    """Return what was wrong with the end of a rank that has lost another; None where it was as it must be."""
    if end.code is None:
        return f"rank {end.rank} hangs"
    errors = [line for line in end.words.replace("\r", "\n").splitlines() if "launch.train: error: " in line]
    if end.code == 1 and len(errors) == 1 and LOST.search(errors[0]) and "Traceback" not in end.words:
        return None
    return f"rank {end.rank} ended with {end.code}: {end.words[-2000:]}"


def trouble_of_words(end: End, wanted: str) -> str | None:
    """Return what was wrong with the end of a rank that had to say something; None where it has."""
    if end.code is None:
        return f"rank {end.rank} hangs"
    said = re.search(rf"^launch\.train: error: .*{wanted}", end.words, re.MULTILINE)
    if end.code == 1 and said and "Traceback" not in end.words:
        return None
    return f"rank {end.rank} ended with {end.code}, without {wanted!r}: {end.words[-2000:]}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
