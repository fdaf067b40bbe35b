"""A command under torchrun, for tests: it ends by its deadline, and leaves no process behind.

``launch`` gives for a whole command the promises that ``ranks.pool`` gives for a job.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tests.distributed.rank_process import OUTPUT_LIMIT_BYTES, file_size
from tests.distributed.ranks import REPOSITORY


@dataclass(frozen=True)
class Launched:
    """What a command left behind: its exit code, and all that it wrote."""

    returncode: int
    stdout: str
    stderr: str


class Launch:
    """A command with `nproc` ranks under torchrun, as a context: what it started is gone when the context ends.

    torchrun puts workers into sessions of their own, so that killing a process group would miss them. All processes of
    one launch carry a mark in their environment instead, by which they are found.
    """

    def __init__(
        self,
        argv: Sequence[str],
        nproc: int,
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        torchrun_args: Sequence[str] = (),
    ) -> None:
        self._mark = f"distsign-{uuid.uuid4().hex}"
        self._stdout = tempfile.TemporaryFile()  # noqa: SIM115 - closed on exit
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed on exit
        path = os.environ.get("PYTHONPATH", "")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *([path] if path else [])]),
            "PYTHONFAULTHANDLER": "1",  # SIGABRT shows the stacks
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            **(env or {}),
            "DISTSIGN_TEST_LAUNCH": self._mark,
        }
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}", *torchrun_args, *argv]
        self.command = " ".join(torchrun)
        self.process = subprocess.Popen(
            [sys.executable, "-c", _EXEC_TIED_TO_PARENT, sys.executable, *torchrun],
            env=environment,
            cwd=cwd or REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=self._stdout,
            stderr=self._stderr,
            start_new_session=True,
        )

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()
        self._stdout.close()
        self._stderr.close()

    def pids(self) -> list[int]:
        """Return the ids of all living processes of this launch, torchrun's first."""
        pids = _pids_with_environment(f"DISTSIGN_TEST_LAUNCH={self._mark}")
        return sorted(pids, key=lambda pid: (pid != self.process.pid, pid))

    def output(self) -> Launched:
        """Return what has been written so far; the exit code is -1 while the command runs."""
        code = self.process.poll()
        written = (os.pread(file.fileno(), file_size(file), 0) for file in (self._stdout, self._stderr))
        stdout, stderr = (text.decode(errors="replace") for text in written)
        return Launched(-1 if code is None else code, stdout, stderr)

    def wait(self, deadline_s: float) -> Launched:
        """Wait for the command's end.

        Raises:
            AssertionError: It still runs after `deadline_s` seconds. All its processes are then gone; the message has
                each one's stacks.
        """
        try:
            self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            pids = self.pids()
            self._abort_one_by_one(pids)
            self.kill()
            seen = self.output()
            raise AssertionError(
                f"{self.command}: deadline of {deadline_s:g} s passed; {len(pids)} processes killed\n"
                f"----- stdout\n{seen.stdout[-OUTPUT_LIMIT_BYTES:]}\n"
                f"----- stderr, with stacks\n{seen.stderr[-OUTPUT_LIMIT_BYTES:]}"
            ) from None
        return self.output()

    def _abort_one_by_one(self, pids: Sequence[int]) -> None:
        """Let each process write its stacks and die, ranks first; at most 3 s in all.

        Stacks are written in many small pieces into one file, so that two processes at a time would mix them, and
        torchrun would end the other ranks as soon as it sees one die: it is stopped meanwhile.
        """
        end = time.monotonic() + 3.0
        _kill(self.process.pid, signal.SIGSTOP)
        for pid in reversed(pids):
            _kill(pid, signal.SIGABRT)
            _kill(pid, signal.SIGCONT)
            while pid in self.pids() and time.monotonic() < end:
                time.sleep(0.02)

    def kill(self) -> None:
        """Kill every process of this launch and wait until they are gone."""
        while pids := self.pids():  # again: a process may have been starting another
            for pid in pids:
                _kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        self.process.wait()


def launch(
    argv: Sequence[str],
    nproc: int,
    deadline_s: float = 120.0,
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    torchrun_args: Sequence[str] = (),
) -> Launched:
    """Run ``torchrun --standalone --nproc-per-node nproc *argv`` to its end and leave no process behind.

    Args:
        argv: Script and options, as after torchrun's own options.
        nproc: Number of ranks.
        deadline_s: Seconds until all its processes are killed.
        env: Added to the parent's environment (whose PYTHONPATH gets the repository in front).
        cwd: Working directory; the repository by default.
        torchrun_args: Further options of torchrun, such as ``["--max-restarts=2"]``.

    Returns:
        torchrun's exit code (1 where a rank failed) with stdout and stderr of all ranks.

    Raises:
        AssertionError: The deadline passed; the message has the output and the stacks.
    """
    with Launch(argv, nproc, env=env, cwd=cwd, torchrun_args=torchrun_args) as running:
        return running.wait(deadline_s)


PR_SET_PDEATHSIG = 1
# torchrun ends its workers on SIGTERM, so that is what it gets when we die. No core files: SIGABRT asks for stacks.
_EXEC_TIED_TO_PARENT = f"""
import ctypes, os, resource, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, signal.SIGTERM)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
os.execv(sys.argv[1], sys.argv[1:])
"""


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _pids_with_environment(entry: str) -> Iterator[int]:
    """Yield the ids of living processes whose environment, as they were started, has `entry` (``NAME=value``)."""
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            with contextlib.suppress(OSError):  # it ended, or is another user's
                if entry.encode() in (directory / "environ").read_bytes().split(b"\0"):
                    yield int(directory.name)
