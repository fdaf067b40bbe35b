"""Processes of the shaped-link lab: ranks, jobs of several ranks, and what makes sure that none is left behind.

This module knows nothing of networks. Ranks end with the process that started them, however that ends; a job past its
deadline shows the stacks of Python ranks; and signals that would end the lab let it clean up first.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any, Literal, NoReturn

FAILURE_GRACE_S = 5.0  # for the other ranks to fail by themselves once one has; they are ended then
OUTPUT_TAIL_BYTES = 8000

Output = Literal["capture", "rank0", "all"]


class LabTimeout(TimeoutError):
    """A deadline passed. The ranks are gone; the message has the stacks of those that ran, where they were Python."""


class RankProcess:
    """One rank: a process in the namespace of its node.

    Attributes:
        rank: Its rank.
        node: The node it runs on.
        process: The process; its id is that of the command itself.
    """

    def __init__(
        self,
        rank: int,
        node: int,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: str | os.PathLike[str] | None,
        output: Output,
    ) -> None:
        self.rank = rank
        self.node = node
        self._files: dict[str, IO[bytes]] = {}
        self._written: dict[str, str] = {}
        self._pumps: list[threading.Thread] = []
        if output == "capture" or (output == "rank0" and rank != 0):
            for name in ("stdout", "stderr"):
                self._files[name] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by finish()
        piped = subprocess.PIPE if output == "all" else None
        lifeline, self._lifeline = os.pipe()
        with open(lifeline, "rb"):
            self.process: subprocess.Popen[bytes] = subprocess.Popen(
                command,
                env=env,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=self._files.get("stdout", piped),
                stderr=self._files.get("stderr", piped),
                pass_fds=(lifeline,),
                start_new_session=True,  # Ctrl-C is for us: ranks end when we say so, each with its children
            )
            # We alone hold the other end of the lifeline. When it closes, however we ended, the kernel kills the group.
            fcntl.fcntl(lifeline, fcntl.F_SETOWN, -self.process.pid)
            fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
            fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC)
        for theirs, ours in ((self.process.stdout, sys.stdout), (self.process.stderr, sys.stderr)):
            if theirs is not None:
                self._pumps.append(threading.Thread(target=_pump, args=(theirs, ours, f"[{rank}] "), daemon=True))
                self._pumps[-1].start()

    @property
    def pid(self) -> int:
        """The process id, which is also that of its process group."""
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while the rank runs."""
        return self.process.poll()

    @property
    def stdout(self) -> str:
        """What the rank has written to stdout so far; empty where that was passed on."""
        return self._read("stdout")

    @property
    def stderr(self) -> str:
        """What the rank has written to stderr so far; empty where that was passed on."""
        return self._read("stderr")

    def signal(self, number: int) -> None:
        """Send a signal to the rank and the children in its group."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def finish(self) -> None:
        """Wait for the end and for all output, and close what was opened for the rank. The output can still be read."""
        self.process.wait()
        for pump in self._pumps:
            pump.join(2.0)
        for name, file in self._files.items():
            self._written[name] = self._read(name)
            file.close()
        self._files.clear()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1

    def _read(self, name: str) -> str:
        if name not in self._files:
            return self._written.get(name, "")
        fd = self._files[name].fileno()
        size = os.fstat(fd).st_size
        return os.pread(fd, size, 0).decode(errors="replace")  # seeking would move where the rank writes


class Job:
    """The ranks of one command, running in the lab. ``Lab.start`` makes it.

    Attributes:
        ranks: The processes by rank.
        first_failure: Who ended first with an exit code other than 0, of those that ``wait`` saw end.
        environment: An entry for the environment of the ranks, by which all processes of this job are found.
    """

    def __init__(self, ranks: list[RankProcess], lab_pids: Callable[[], list[int]], *, mark: str) -> None:
        self.ranks = ranks
        self.first_failure: RankProcess | None = None
        self.environment = dict([mark.split("=", 1)])
        self._mark = mark.encode()
        self._lab_pids = lab_pids

    def wait(self, deadline_s: float | None = None, *, stop_on_failure: bool = True) -> list[RankProcess]:
        """Wait for all ranks.

        Args:
            deadline_s: Seconds from now; None waits for ever.
            stop_on_failure: Give the other ranks 5 s once one has failed, then end them. Otherwise they go on.

        Returns:
            The ranks, all ended; ``first_failure`` is the one that failed first, if any did.

        Raises:
            LabTimeout: The deadline passed. All ranks are gone.
        """
        end = None if deadline_s is None else time.monotonic() + deadline_s
        poller = select.poll()
        running: dict[int, RankProcess] = {}
        try:
            for rank in self.ranks:
                if rank.returncode is None:
                    running[fd := os.pidfd_open(rank.pid)] = rank
                    poller.register(fd, select.POLLIN)
                elif rank.returncode != 0 and self.first_failure is None:
                    self.first_failure = rank
            grace_end = time.monotonic() + FAILURE_GRACE_S if stop_on_failure and self.first_failure else None
            while running:
                ends = [each for each in (end, grace_end) if each is not None]
                ended = poller.poll(max(0.0, 1e3 * (min(ends) - time.monotonic())) if ends else None)
                for fd, _ in ended:
                    poller.unregister(fd)
                    os.close(fd)
                    rank = running.pop(fd)
                    if rank.process.wait() != 0 and self.first_failure is None:
                        self.first_failure = rank
                        grace_end = time.monotonic() + FAILURE_GRACE_S if stop_on_failure else None
                if not ended and end is not None and time.monotonic() >= end:
                    raise LabTimeout(self._abort(deadline_s))
                if not ended and grace_end is not None and time.monotonic() >= grace_end:
                    break
        finally:
            for fd in running:
                os.close(fd)
            self.stop()
        return self.ranks

    def stop(self) -> None:
        """End what still runs, first by SIGTERM, after a second by SIGKILL."""
        for rank in self.ranks:
            rank.signal(signal.SIGTERM)
        end = time.monotonic() + 1.0
        for rank in self.ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.process.wait(max(0.0, end - time.monotonic()))
        for rank in self.ranks:
            rank.signal(signal.SIGKILL)
        # What has left its rank's process group; again, since it may be starting another, and takes a moment to go.
        end = time.monotonic() + 5.0
        while (left := [pid for pid in self._lab_pids() if self._is_ours(pid)]) and time.monotonic() < end:
            kill_all(left)
            time.sleep(0.01)
        for rank in self.ranks:
            rank.finish()

    def _is_ours(self, pid: int) -> bool:
        try:
            return self._mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:  # it is gone
            return False

    def _abort(self, deadline_s: float | None) -> str:
        """End all ranks in a way that makes Python ones write their stacks; return a report."""
        late = [rank for rank in self.ranks if rank.returncode is None]
        for rank in late:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(rank.pid, resource.RLIMIT_CORE, (0, 0))  # stacks are wanted, no core files
            rank.signal(signal.SIGABRT)
        end = time.monotonic() + 2.0
        for rank in late:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.process.wait(max(0.0, end - time.monotonic()))
        self.stop()
        names = ", ".join(str(rank.rank) for rank in late)
        lines = [f"deadline of {deadline_s:g} s passed with ranks {names} still running; they were ended"]
        return "\n".join(lines + [tail for rank in late if (tail := output_tail(rank))])


def _pump(source: IO[bytes], target: IO[str], mark: str) -> None:
    """Pass lines on with a mark in front."""
    with source:
        for line in source:
            target.write(f"{mark}{line.decode(errors='replace').rstrip()}\n")
            target.flush()


def output_tail(rank: RankProcess) -> str:
    """Return the end of what a rank wrote, under its name; empty where nothing was kept."""
    text = (rank.stdout[-OUTPUT_TAIL_BYTES:] + rank.stderr[-OUTPUT_TAIL_BYTES:]).rstrip()
    return f"----- rank {rank.rank}, exit code {rank.returncode}\n{text}" if text else ""


def exit_on_signals() -> Callable[[], None]:
    """Turn SIGTERM and SIGHUP into SystemExit, so that ``with`` cleans up, and return what undoes that.

    Handlers that someone else has set are left alone, and only a main thread can set any.
    """
    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                previous[number] = signal.signal(number, _exit)

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    return restore


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def deaf_to_signals() -> Iterator[None]:
    """Let no second Ctrl-C interrupt the clean-up that the first one started."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = [signal.signal(number, signal.SIG_IGN) for number in numbers] if in_main_thread else []
    try:
        yield
    finally:
        for number, handler in zip(numbers, previous, strict=False):
            signal.signal(number, handler)


def kill_all(pids: Sequence[int], number: int = signal.SIGKILL) -> None:
    """Send a signal (SIGKILL by default) to processes, some of which may be gone."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
