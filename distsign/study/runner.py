"""Run the missing cells, a few at a time; a result is kept as soon as its cell has ended."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

from distsign.study import tied
from distsign.study.program import Checked, Program
from distsign.study.store import Result, Store, problem_of_metrics
from distsign.study.version import code_version

__all__ = ["Runner", "last_words"]

POLL_S = 0.05
GRACE_S = 40.0
"""torchrun gives its ranks 30 seconds after SIGTERM."""
NUM_ERROR_LINES = 8


@dataclass(frozen=True)
class _Running:
    checked: Checked
    process: subprocess.Popen[bytes]
    version: str
    began: float
    log: Path
    metrics: Path
    share: int


class Runner:
    """Runs cells as processes of their own and puts their results into a store.

    Args:
        program: what is started.
        store: where results go; its folder also has the logs of the cells that run.
        jobs: so many cells at once, at most.
        deadline: of `time.monotonic()`; cells that still run then are ended and count as missing. None for no limit.
        on_end: called with each cell that has ended, and its result.
        on_wait: called several times a second, with the seconds that are left by estimate, None where nothing is known.
    """

    def __init__(
        self,
        program: Program,
        store: Store,
        *,
        jobs: int = 1,
        deadline: float | None = None,
        on_end: Callable[[Checked, Result], None] = lambda checked, result: None,
        on_wait: Callable[[float | None], None] = lambda seconds: None,
    ) -> None:
        self._program, self._store, self._jobs, self._deadline = program, store, jobs, deadline
        self._on_end, self._on_wait = on_end, on_wait
        self._running: list[_Running] = []
        self._lengths: dict[tuple[Any, ...], list[float]] = {}  # seconds, by kind of work
        for result in store.results:
            self._note_length(result)
        self._folder = store.folder / "running"

    def run(self, cells: Sequence[Checked]) -> None:
        """Run cells to their ends, in order, or to the deadline; whatever ends this ends their processes."""
        self._folder.mkdir(exist_ok=True)
        waiting = list(cells)
        try:
            while True:
                for running in [each for each in self._running if each.process.poll() is not None]:
                    self._running.remove(running)
                    self._keep(running)
                if self._time_left() <= 0:
                    return
                while len(self._running) < self._jobs and (fitting := self._first_that_fits(waiting)) is not None:
                    waiting.remove(fitting)
                    self._running.append(self._start(fitting))
                if not self._running:
                    return
                self._on_wait(self._seconds_left(waiting))
                time.sleep(POLL_S)
        finally:
            self._end_all()
            with contextlib.suppress(OSError):  # the log of a failed cell may be kept by somebody
                self._folder.rmdir()

    def _time_left(self) -> float:
        return math.inf if self._deadline is None else self._deadline - time.monotonic()

    def _first_that_fits(self, waiting: Sequence[Checked]) -> Checked | None:
        """Return the next cell to start: one that would not end in time would be run for nothing."""
        time_left = self._time_left()
        return next((each for each in waiting if (self._expected_s(each) or 0.0) <= time_left), None)

    def _start(self, checked: Checked) -> _Running:
        log, metrics = (self._folder / f"{checked.key}.{ending}" for ending in ("log", "jsonl"))
        metrics.unlink(missing_ok=True)
        ranks = checked.cell.ranks
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += [*self._program.command, *checked.cell.arguments(), f"--metrics={metrics.resolve()}"]
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, str(Path(tied.__file__).resolve()), str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                # torchrun warns at length where this is unset. One thread: each rank sets its share of the cores.
                env={"OMP_NUM_THREADS": "1", **os.environ},
                start_new_session=True,  # Ctrl-C is ours to answer
            )
        share = next(k for k in range(self._jobs) if all(each.share != k for each in self._running))
        self._give_cores(process.pid, share)
        return _Running(checked, process, code_version(self._program.file), time.monotonic(), log, metrics, share)

    def _give_cores(self, pid: int, share: int) -> None:
        """Give a cell that has just begun cores of its own, where others run beside it.

        A rank makes a thread for each core that it sees, and threads that wait for each other on cores which another
        cell has too hardly get on (two LeNets on two cores: 4 steps a second each, with some other work beside them,
        where they take 50 so).
        """
        if self._jobs == 1 or not hasattr(os, "sched_setaffinity"):
            return
        cores = sorted(os.sched_getaffinity(0))
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(pid, cores[share :: self._jobs] or [cores[share % len(cores)]])

    def _keep(self, running: _Running) -> None:
        """Put the result of a cell that has ended into the store, and remove its files."""
        metrics = _read_lines(running.metrics)
        problem = problem_of_metrics(metrics)
        code = running.process.returncode
        error = None
        if code != 0 or problem is not None:
            reason = f"exit code {code}" if code > 0 else f"signal {-code}" if code < 0 else str(problem)
            error = f"{reason}\n{last_words(running.log.read_text(errors='replace'))}".strip()
        result = Result(
            running.checked.key,
            running.checked.configuration,
            running.version,
            datetime.now(UTC).isoformat(timespec="seconds"),
            round(time.monotonic() - running.began, 3),
            self._jobs,
            metrics if error is None else [],
            error,
        )
        self._store.add(result)
        self._note_length(result)
        self._remove(running)
        self._on_end(running.checked, result)

    def _seconds_left(self, waiting: Sequence[Checked]) -> float | None:
        """Estimate from cells that have ended: those of the same task where there are some, else all."""
        now = time.monotonic()
        lengths = [self._expected_s(each) for each in waiting]
        going = [(self._expected_s(each.checked), now - each.began) for each in self._running]
        known = [length for length in (*lengths, *(length for length, _ in going)) if length is not None]
        if not known:
            return None
        total = sum(length or 0.0 for length in lengths)
        total += sum(max(0.0, (length or 0.0) - gone) for length, gone in going)
        return total / self._jobs

    def _expected_s(self, checked: Checked) -> float | None:
        alike = self._lengths.get(_work(checked.configuration)) or list(chain(*self._lengths.values()))
        return sum(alike) / len(alike) if alike else None

    def _note_length(self, result: Result) -> None:
        if result.error is None:
            self._lengths.setdefault(_work(result.configuration), []).append(result.wall_s)

    def _end_all(self) -> None:
        """End what still runs: torchrun ends its ranks when it is asked to."""
        for running in self._running:
            running.process.terminate()
        end = time.monotonic() + GRACE_S
        for running in self._running:
            try:
                running.process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(running.process.pid, signal.SIGKILL)
                running.process.wait()
            self._remove(running)
        self._running.clear()

    @staticmethod
    def _remove(running: _Running) -> None:
        for path in (running.log, running.metrics):
            path.unlink(missing_ok=True)


def _work(configuration: Any) -> tuple[Any, ...]:
    options = configuration["options"]
    return configuration["ranks"], *(options.get(name) for name in ("task", "width", "steps", "epochs", "batch_size"))


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def last_words(log: str) -> str:
    r"""Return the last lines that the ranks themselves have written: neither progress bars nor torchrun's own report.

    Example:
        >>> last_words("  1%| 1/9\nboom\nE1126 18:00:00.1 7 torch/distributed/elastic/api.py:9] failed (exitcode: 1)")
        'boom'
    """
    lines: list[str] = []
    for line in log.splitlines():
        if line[:1] in "EWI" and "torch/distributed/" in line and lines:
            break
        if line.strip() and "%|" not in line:
            lines.append(line.rstrip())
    return "\n".join(lines[-NUM_ERROR_LINES:])
