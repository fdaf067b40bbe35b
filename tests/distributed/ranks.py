"""Real Gloo ranks for tests: a pool of processes for each world size that lives from test to test.

Ranks are forks of one process that has imported torch and the kernels, and ``pool(8)`` starts them once and hands them
job after job:

>>> from tests.distributed.ranks import pool          # doctest: +SKIP
>>> pool(4).run(my_job, 3, deadline_s=30)             # doctest: +SKIP
[result of rank 0, of rank 1, of rank 2, of rank 3]

``my_job(rank, world_size, 3)`` is a module-level function; it finds ``torch.distributed`` set up with Gloo on loopback.
It cleans up what it makes there (groups from ``new_group``), since the default group stays for the next job. Seed and
environment are reset before each job.

No test hangs for ever and none leaves processes behind: past the deadline the parent asks every rank for its Python
stacks, shows them and kills the ranks; after any failure the ranks are replaced, since a failed collective leaves a
group unusable; and ranks end by themselves when their parent dies. ``torchrun.launch`` promises the same of a command.
"""

from __future__ import annotations

import atexit
import pickle
import signal
import time
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tests import forked

from .rank_process import RankFailure, RankProcess

# torch is imported inside functions: see `rank_process`.

WORLD_SIZES = (1, 2, 3, 4, 5, 8)
REPOSITORY = Path(__file__).resolve().parents[2]

GROUP_TIMEOUT_S = 20.0  # of the default group: a collective that lacks a rank fails, well before the deadline
START_DEADLINE_S = 180.0  # should ranks be no forks, eight imports of torch on two busy cores
GRACE_S = 3.0  # after one rank raised, for the others to fail too: they may sit in a collective until its timeout
MEMORY_PER_RANK_BYTES = 256 << 20  # most of what a rank maps it shares with the others


class RanksFailed(AssertionError):
    """A job failed on at least one rank. The message holds every rank's traceback; ``failures`` has them one by one."""

    def __init__(self, summary: str, failures: Sequence[RankFailure]) -> None:
        super().__init__(summary + "\n" + "\n".join(failure.report() for failure in failures))
        self.failures = list(failures)


class RankPool:
    """`world_size` processes that share a Gloo group on loopback and run one job after another.

    Use ``pool(world_size)``, which keeps one for the whole session. Ranks start at the first job, and again at the next
    job after a failure, so that an object of this class stays usable.
    """

    def __init__(self, world_size: int) -> None:
        if world_size < 1:
            raise ValueError(f"world_size must be at least 1, got {world_size}")
        self.world_size = world_size
        self.last_used = 0.0
        self._ranks: list[RankProcess] = []
        self._store: Any = None

    @property
    def pids(self) -> list[int]:
        """Process ids by rank; empty before the first job and after a failure."""
        return [rank.pid for rank in self._ranks]

    def run(
        self,
        fn: Callable[..., Any],
        *args: Any,
        deadline_s: float = 60.0,
        return_exceptions: bool = False,
        in_step: bool = False,
        may_hang: Collection[int] = (),
        **kwargs: Any,
    ) -> list[Any]:
        """Run ``fn(rank, world_size, *args, **kwargs)`` on every rank and return the results by rank.

        Args:
            fn: A module-level function that ranks can import by its qualified name.
            *args: Passed on, pickled. So are `kwargs` and the results.
            deadline_s: Seconds until the ranks are killed and the job has failed; starting the ranks is not counted.
            return_exceptions: Put a ``RankFailure`` in the place of a rank that raised or died, instead of raising, and
                give every rank the whole deadline. The ranks are then replaced before the next job, unless `in_step`.
            in_step: The test's word that the ranks raised with no collective half done, so that they can be used on.
            may_hang: Ranks that need not answer (a rank that stops itself): once all others have, they are killed, and
                a ``RankFailure`` named ``"RankHung"`` stands in their place.
            **kwargs: Passed on to `fn`.

        Raises:
            RanksFailed: An AssertionError, where a rank raised or died (unless `return_exceptions`) or the deadline
                passed.
            ValueError: `fn` is not a module-level function.
        """
        if getattr(fn, "__qualname__", "<") != getattr(fn, "__name__", ">") or fn.__module__ == "__main__":
            raise ValueError(f"ranks import their job by name: {fn!r} must be a function at the top level of a module")
        request = pickle.dumps((fn, args, kwargs))
        if not self._ranks:
            self._start()
        self.last_used = time.monotonic()
        try:
            outcomes, timed_out = self._collect(request, deadline_s, None if return_exceptions else GRACE_S, may_hang)
        except BaseException:  # Ctrl-C or pytest-timeout: the ranks are in the middle of a job
            self.close(at_once=True)
            raise
        failures = [outcome for outcome in outcomes if isinstance(outcome, RankFailure)]
        if failures and (not in_step or any(failure.type_name in ("RankDied", "RankHung") for failure in failures)):
            self.close(at_once=True)
        if timed_out:
            hung = [failure.rank for failure in failures if failure.type_name == "RankHung"]
            raise RanksFailed(
                f"{_job_name(fn)}: deadline of {deadline_s:g} s passed on {self.world_size} ranks, "
                f"without an answer from rank(s) {hung}; they were killed",
                failures,
            )
        if failures and not return_exceptions:
            names = ", ".join(f"rank {f.rank} ({f.type_name})" for f in failures)
            summary = f"{_job_name(fn)} failed on {len(failures)} of {self.world_size} ranks: {names}"
            raise RanksFailed(summary, failures)
        return outcomes

    def run_expecting(
        self,
        expected: type[BaseException] | str,
        fn: Callable[..., Any],
        *args: Any,
        ranks: Collection[int] | None = None,
        deadline_s: float = 60.0,
        in_step: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Run a job that must fail in a given way on given ranks, and succeed on all others.

        Args:
            expected: An exception class, or a regular expression searched in ``"TypeName: message"`` (``"RankDied"`` is
                the type of a rank whose process ended).
            fn: As for ``run``; so are `args`, `deadline_s`, `in_step` and `kwargs`.
            ranks: Who must fail; None stands for all ranks.

        Returns:
            Results by rank, with a ``RankFailure`` for each rank that failed as expected.

        Raises:
            RanksFailed: Another set of ranks failed, or in another way, or the deadline passed.
        """
        wanted = set(range(self.world_size) if ranks is None else ranks)
        outcomes = self.run(fn, *args, deadline_s=deadline_s, return_exceptions=True, in_step=in_step, **kwargs)
        failures = [outcome for outcome in outcomes if isinstance(outcome, RankFailure)]
        matching = {failure.rank for failure in failures if failure.matches(expected)}
        if matching != wanted or len(failures) != len(wanted):
            what = expected if isinstance(expected, str) else expected.__name__
            raise RanksFailed(
                f"{_job_name(fn)}: expected {what!r} on ranks {sorted(wanted)}; it came on {sorted(matching)}, "
                f"and {sorted({f.rank for f in failures} - matching)} failed otherwise",
                failures,
            )
        return outcomes

    def close(self, at_once: bool = False) -> None:
        """End all ranks and wait for them. The next job starts new ones.

        Args:
            at_once: They may be stuck in a collective: do not wait for them to end by themselves.
        """
        ranks, self._ranks = self._ranks, []
        for rank in ranks:
            rank.pipe.close()  # an idle rank ends at the end of its pipe
            if at_once:
                rank.signal_group(signal.SIGTERM)
        end = time.monotonic() + (1.0 if at_once else 5.0)
        for rank in ranks:
            rank.process.join(max(0.0, end - time.monotonic()))
        for rank in ranks:
            rank.signal_group(signal.SIGKILL)
        for rank in ranks:
            rank.process.join()
            rank.close()
        self._store = None

    def _start(self) -> None:
        import torch.distributed as dist

        forked.start()
        _make_room(self)
        # The store lives here, on a port that the kernel picks: no port to guess, and it outlives any rank.
        timeout = timedelta(seconds=GROUP_TIMEOUT_S)
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timeout)
        try:
            for rank in range(self.world_size):
                self._ranks.append(RankProcess(rank, self.world_size, self._store.port))
            # All must have imported torch and the kernels before the first one waits for the others: the group's
            # timeout is short.
            for job in ((_load_kernels, (), {}), (_join_default_group, (self._store.port, GROUP_TIMEOUT_S), {})):
                outcomes, _ = self._collect(pickle.dumps(job), START_DEADLINE_S, GRACE_S, ())
                failures = [outcome for outcome in outcomes if isinstance(outcome, RankFailure)]
                if failures:
                    raise RanksFailed(f"{self.world_size} ranks could not be started ({job[0].__name__})", failures)
        except BaseException:
            self.close(at_once=True)
            raise

    def _collect(
        self, request: bytes, deadline_s: float, grace_s: float | None, may_hang: Collection[int]
    ) -> tuple[list[Any], bool]:
        """Send one job to all ranks and wait for their outcomes.

        Args:
            request: The pickled job.
            deadline_s: Seconds for all of it.
            grace_s: Seconds that the other ranks have after the first failure; None: until the deadline.
            may_hang: Ranks that are not waited for once all others have answered.

        Returns:
            Outcomes by rank (result or ``RankFailure``), and whether the deadline passed with ranks that had to answer.
        """
        end = time.monotonic() + deadline_s
        for rank in self._ranks:
            rank.send(request)
        waiting = {rank.pipe: rank for rank in self._ranks}
        outcomes: list[Any] = [None] * self.world_size
        gave_up = False
        while any(rank.rank not in may_hang for rank in waiting.values()):
            ready = wait(list(waiting), max(0.0, end - time.monotonic()))
            if not ready:
                gave_up = True
                break
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[call-overload]
                outcomes[rank.rank] = rank.receive()
                if grace_s is not None and isinstance(outcomes[rank.rank], RankFailure):
                    end = min(end, time.monotonic() + grace_s)
        starts = [(rank, rank.request_stacks()) for rank in waiting.values()]
        patience_s = 3.0
        for rank, start in starts:
            begin = time.monotonic()
            stacks = rank.read_stacks(start, patience_s)
            patience_s = max(0.2, patience_s - (time.monotonic() - begin))
            outcomes[rank.rank] = rank.failure("RankHung", "no answer; the stacks of its threads are", stacks)
        someone_else_failed = any(isinstance(o, RankFailure) and o.type_name != "RankHung" for o in outcomes)
        return outcomes, gave_up and (grace_s is None or not someone_else_failed)


def _join_default_group(rank: int, world_size: int, port: int, timeout_s: float) -> None:
    """Join the pool's default process group (the first job of every pool)."""
    import torch.distributed as dist

    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=False, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    dist.barrier()


def _load_kernels(rank: int, world_size: int) -> None:
    """Load what takes long, and answer, which shows that the rank has started."""
    import distsign.kernels.cpu  # noqa: F401, PLC0415 - from Numba's cache, some seconds on a busy machine


def _job_name(fn: Callable[..., Any]) -> str:
    return f"{fn.__module__}.{fn.__qualname__}"


_POOLS: dict[int, RankPool] = {}


def pool(world_size: int) -> RankPool:
    """Return the session's pool of `world_size` ranks; they start at their first job."""
    if world_size not in _POOLS:
        _POOLS[world_size] = RankPool(world_size)
    return _POOLS[world_size]


@atexit.register
def close_pools() -> None:
    """End the ranks of all pools. They start again where one is used after this."""
    for each in _POOLS.values():
        each.close()


def _make_room(newcomer: RankPool) -> None:
    """End idle pools, least recently used first, until the newcomer's ranks fit in memory.

    Memory is the only reason to: idle ranks take no processor time.
    """
    while _available_bytes() < newcomer.world_size * MEMORY_PER_RANK_BYTES:
        idle = [each for each in _POOLS.values() if each is not newcomer and each.pids]
        if not idle:
            return
        min(idle, key=lambda each: each.last_used).close()


def _available_bytes() -> int:
    """Return the machine's available memory in bytes; where the system does not tell it, room for the largest pool."""
    try:
        with open("/proc/meminfo") as meminfo:
            return next(int(line.split()[1]) << 10 for line in meminfo if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return max(WORLD_SIZES) * MEMORY_PER_RANK_BYTES
