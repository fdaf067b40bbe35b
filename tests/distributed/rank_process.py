"""One rank: the process that serves jobs from a pipe, seen from both ends of it, and the ways in which it fails."""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import gc
import os
import pickle
import re
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import IO, Any

from tests.forked import context

# torch is imported inside functions: it takes seconds where a rank is no fork of a process that has imported it.

Environment = dict[str, str]

OUTPUT_LIMIT_BYTES = 20_000


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


def _rank_main(
    rank: int, world_size: int, pipe: Connection, lifeline: Connection, files: tuple[str, str], environment: Environment
) -> None:
    """Serve jobs from the pipe until the parent closes it."""
    os.setsid()  # Ctrl-C is the parent's affair; and the whole group can be killed
    _die_with_parent(lifeline.fileno())
    output, stacks = (os.open(name, os.O_WRONLY | os.O_APPEND) for name in files)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(environment)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)

    import torch

    from distsign import plan
    from tests import GROUP_BYTES

    torch.set_num_threads(1)
    plan.COALESCE_BYTES = GROUP_BYTES
    gc.freeze()  # so that the collection after each job looks at the job's objects only
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


# ------------------------------------------------------------------------------------------------ the parent's side


def file_size(file: IO[bytes]) -> int:
    return os.fstat(file.fileno()).st_size


def _read_from(file: IO[bytes], start: int) -> str:
    """Return what a rank wrote to `file` since `start`, shortened in front."""
    end = file_size(file)
    first = max(start, end - OUTPUT_LIMIT_BYTES)
    text = os.pread(file.fileno(), end - first, first).decode(errors="replace")
    return text if first == start else f"[… {first - start} bytes before this]\n{text}"


class RankProcess:
    """One child process, its pipes, and the files that it writes its output and its stacks to."""

    def __init__(self, rank: int, world_size: int, store_port: int) -> None:
        self.rank = rank
        self.output = tempfile.NamedTemporaryFile()  # noqa: SIM115 - closed by close()
        self.stacks = tempfile.NamedTemporaryFile()  # noqa: SIM115 - closed by close()
        self.output_start = 0
        self.pipe, theirs = context.Pipe()
        lifeline, self.lifeline = context.Pipe(duplex=False)
        environment = dict(
            os.environ,
            # What jobs start finds the parent's modules ('' stands for the working directory).
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
        files = self.output.name, self.stacks.name
        with theirs, lifeline:
            self.process = context.Process(
                target=_rank_main, args=(rank, world_size, theirs, lifeline, files, environment)
            )
            self.process.start()

    @property
    def pid(self) -> int:
        """Its process, and the group of all that its jobs start."""
        assert self.process.pid is not None
        return self.process.pid

    def send(self, request: bytes) -> None:
        self.output_start = file_size(self.output)
        with contextlib.suppress(OSError):  # the rank is dead, which reading its reply will find
            self.pipe.send_bytes(request)

    def receive(self) -> Any:
        """Return the result, or the RankFailure, that the rank's pipe has ready."""
        try:
            succeeded, value = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            self.process.join(5.0)
            return self.failure("RankDied", f"the process ended with {_exit_words(self.process.exitcode)}", "")
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
            os.kill(self.pid, signal.SIGUSR1)
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
        if self.process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def close(self) -> None:
        self.pipe.close()
        self.output.close()
        self.stacks.close()
        self.lifeline.close()


def _exit_words(code: int | None) -> str:
    if code is None:
        return "no exit code yet"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
