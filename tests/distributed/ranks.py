"""Real Gloo ranks for tests: a pool of processes for each world size that lives from test to test.

Eight fresh ranks take seconds to start (each imports torch), so ``pool(8)`` starts them once and hands them job after
job:

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
import contextlib
import faulthandler
import fcntl
import gc
import os
import pickle
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any

# torch is imported inside functions: a rank must arrange for its own end before it spends two seconds on that import.

WORLD_SIZES = (1, 2, 3, 4, 5, 8)
REPOSITORY = Path(__file__).resolve().parents[2]

GROUP_TIMEOUT_S = 20.0  # of the default group: a collective that lacks a rank fails, well before the deadline
START_DEADLINE_S = 180.0  # eight imports of torch on two busy cores
GRACE_S = 3.0  # after one rank raised, for the others to fail too: they may sit in a collective until its timeout
MEMORY_PER_RANK_BYTES = 512 << 20
OUTPUT_LIMIT_BYTES = 20_000

PR_SET_PDEATHSIG = 1


class RankFailure(Exception):
    """How one rank failed: it raised, it died, or it did not answer.

    Attributes:
        rank: Who failed.
        type_name: Name of the exception's class; ``"RankDied"`` where the process ended, ``"RankHung"`` where it did
            not answer.
        type_names: That name and those of its base classes.
        message: ``str`` of the exception.
        details: The formatted traceback, or the stacks of all threads for a rank that hung.
        output: What the rank wrote to stdout and stderr during the job (its last 20 kB).
    """

    def __init__(
        self, rank: int, type_name: str, message: str, *, details: str, output: str, type_names: Sequence[str] = ()
    ) -> None:
        super().__init__(f"rank {rank}: {type_name}: {message}")
        self.rank = rank
        self.type_name = type_name
        self.type_names = tuple(type_names) or (type_name,)
        self.message = message
        self.details = details
        self.output = output

    def matches(self, expected: type[BaseException] | str) -> bool:
        """Say whether this is the failure that a test expects.

        Args:
            expected: An exception class (a base class will do), or a regular expression searched in
                ``"TypeName: message"``.
        """
        if isinstance(expected, str):
            return re.search(expected, f"{self.type_name}: {self.message}") is not None
        return expected.__name__ in self.type_names

    def report(self) -> str:
        """Return the failure with its traceback and output, as a section of a test's report."""
        text = f"===== rank {self.rank}: {self.type_name}: {self.message}\n{self.details.rstrip()}\n"
        if self.output.strip():
            text += f"----- output of rank {self.rank}\n{self.output.rstrip()}\n"
        return text


class RanksFailed(AssertionError):
    """A job failed on at least one rank. The message holds every rank's traceback; ``failures`` has them one by one."""

    def __init__(self, summary: str, failures: Sequence[RankFailure]) -> None:
        super().__init__(summary + "\n" + "\n".join(failure.report() for failure in failures))
        self.failures = list(failures)


# -------------------------------------------------------------------------------------------------- the rank's side


def _die_with_parent(lifeline_fd: int) -> None:
    """Let the kernel kill this process, and what it will have started, as soon as its parent is gone.

    The lifeline is a pipe of which only the parent holds the write end. When that closes, however the parent went, the
    kernel sends SIGKILL to our process group. So even a rank that never lets go of the GIL ends, and so do children of
    jobs, which a death signal from ``prctl`` would not reach.
    """
    fcntl.fcntl(lifeline_fd, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline_fd, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline_fd, fcntl.F_SETFL, os.O_ASYNC)
    if select.select([lifeline_fd], [], [], 0)[0]:  # it was gone before that
        os.killpg(os.getpgrp(), signal.SIGKILL)


def _rank_main(rank: int, world_size: int, fds: tuple[int, int, int]) -> None:
    """Serve jobs from the pipe until the parent closes it."""
    pipe_fd, lifeline_fd, stacks_fd = fds
    _die_with_parent(lifeline_fd)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, file=stacks_fd, all_threads=True)

    import torch

    torch.set_num_threads(1)
    gc.freeze()  # so that the collection after each job looks at the job's objects only
    pipe = Connection(pipe_fd)
    environment = dict(os.environ)
    while True:
        try:
            request = pipe.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)  # Gloo's threads may hold up an ordinary exit
        torch.manual_seed(0)
        reply = _execute(request, rank, world_size)
        gc.collect()
        if dict(os.environ) != environment:
            os.environ.clear()
            os.environ.update(environment)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        pipe.send_bytes(reply)


def _execute(request: bytes, rank: int, world_size: int) -> bytes:
    """Run one pickled job; return it pickled: ``(True, result)`` or ``(False, (type names, message, traceback))``."""
    try:
        fn, args, kwargs = pickle.loads(request)
        return pickle.dumps((True, fn(rank, world_size, *args, **kwargs)))
    except BaseException as error:  # also SystemExit: a command line's exit is something to report, not to obey
        names = [cls.__name__ for cls in type(error).__mro__]
        return pickle.dumps((False, (names, str(error), traceback.format_exc())))


def _join_default_group(rank: int, world_size: int, port: int, timeout_s: float) -> None:
    """Join the pool's default process group (the first job of every pool)."""
    import torch.distributed as dist

    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=False, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    dist.barrier()


# ------------------------------------------------------------------------------------------------ the parent's side


def file_size(file: IO[bytes]) -> int:
    return os.fstat(file.fileno()).st_size


def _read_from(file: IO[bytes], start: int) -> str:
    """Return what a rank wrote to `file` since `start`, shortened in front.

    ``pread`` is used since the rank shares the file's offset: seeking here would move where it writes.
    """
    end = file_size(file)
    first = max(start, end - OUTPUT_LIMIT_BYTES)
    text = os.pread(file.fileno(), end - first, first).decode(errors="replace")
    return text if first == start else f"[… {first - start} bytes before this]\n{text}"


class _Rank:
    """One child process, its pipes, and the files that it writes its output and its stacks to."""

    def __init__(self, rank: int, world_size: int, store_port: int) -> None:
        self.rank = rank
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self.stacks = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self.output_start = 0
        self.pipe, theirs = Pipe()
        lifeline, self.lifeline = os.pipe()
        environment = dict(
            os.environ,
            # The jobs are found by qualified name, on the parent's path ('' stands for the working directory).
            PYTHONPATH=os.pathsep.join(path or os.getcwd() for path in sys.path),
            PYTHONUNBUFFERED="1",
            GLOO_SOCKET_IFNAME="lo",
            OMP_NUM_THREADS="1",
            RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(store_port),
        )
        fds = (theirs.fileno(), lifeline, self.stacks.fileno())
        call = (rank, world_size, fds)
        with theirs, open(lifeline, "rb"):
            self.process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import _rank_main; _rank_main{call!r}"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=self.output,
                stderr=self.output,
                pass_fds=fds,
                start_new_session=True,  # Ctrl-C is the parent's affair; and the whole group can be killed
            )

    def send(self, request: bytes) -> None:
        self.output_start = file_size(self.output)
        with contextlib.suppress(OSError):  # the rank is dead, which reading its reply will find
            self.pipe.send_bytes(request)

    def receive(self) -> Any:
        """Return the result, or the RankFailure, that the rank's pipe has ready."""
        try:
            succeeded, value = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5.0)
            return self.failure("RankDied", f"the process ended with {_exit_words(self.process.returncode)}", "")
        except Exception as error:  # the result's class cannot be rebuilt here
            return self.failure(type(error).__name__, f"the rank's result cannot be unpickled: {error}", "")
        if succeeded:
            return value
        names, message, details = value
        return self.failure(names[0], message, details, names)

    def failure(self, type_name: str, message: str, details: str, names: Sequence[str] = ()) -> RankFailure:
        output = _read_from(self.output, self.output_start)
        return RankFailure(self.rank, type_name, message, details=details, output=output, type_names=names)

    def request_stacks(self) -> int:
        start = file_size(self.stacks)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGUSR1)
        return start

    def read_stacks(self, start: int, patience_s: float) -> str:
        """Return what the signal handler wrote since `start`; a stopped or unschedulable process writes nothing."""
        end = time.monotonic() + patience_s
        size = start
        while time.monotonic() < end:
            time.sleep(0.05)
            if size == (size := file_size(self.stacks)) > start:
                break
        return _read_from(self.stacks, start) or "(no stack came: the process is stopped, or not yet past its start)"

    def signal_group(self, number: int) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def close(self) -> None:
        self.pipe.close()
        self.output.close()
        self.stacks.close()
        os.close(self.lifeline)


def _exit_words(code: int | None) -> str:
    if code is None:
        return "no exit code yet"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


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
        self._ranks: list[_Rank] = []
        self._store: Any = None

    @property
    def pids(self) -> list[int]:
        """Process ids by rank; empty before the first job and after a failure."""
        return [rank.process.pid for rank in self._ranks]

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
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.process.wait(max(0.0, end - time.monotonic()))
        for rank in ranks:
            rank.signal_group(signal.SIGKILL)
        for rank in ranks:
            rank.process.wait()
            rank.close()
        self._store = None

    def _start(self) -> None:
        import torch.distributed as dist

        _make_room(self)
        # The store lives here, on a port that the kernel picks: no port to guess, and it outlives any rank.
        timeout = timedelta(seconds=GROUP_TIMEOUT_S)
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timeout)
        try:
            for rank in range(self.world_size):
                self._ranks.append(_Rank(rank, self.world_size, self._store.port))
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
