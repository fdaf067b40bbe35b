"""The thread on which a CPU's exchanges run, one after the other, while backward goes on.

A second collective started and awaited inside a `Future.then` callback hangs on Gloo (measured facts in DESIGN.md).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue

__all__ = ["ExchangeThread"]


class ExchangeThread:
    """Run jobs one after the other on a thread of its own, in the order in which they were submitted.

    A job must not raise. The thread starts with the first job and ends with `close`, or with the process.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._idle = threading.Condition()
        self._num_open = 0
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Queue a job; does not block."""
        with self._idle:
            self._num_open += 1
        if self._thread is None:
            # The thread must hold no reference to the owner, or an abandoned state would never be freed.
            self._thread = threading.Thread(
                target=_serve, args=(self._jobs, weakref.ref(self)), name=self._name, daemon=True
            )
            self._thread.start()
        self._jobs.put(job)

    def wait(self) -> None:
        """Block until all submitted jobs are done."""
        with self._idle:
            self._idle.wait_for(lambda: self._num_open == 0)

    def close(self) -> None:
        """End the thread after the jobs that are queued."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def _done(self) -> None:
        with self._idle:
            self._num_open -= 1
            self._idle.notify_all()

    def __del__(self) -> None:
        self._jobs.put(None)


def _serve(jobs: SimpleQueue[Callable[[], None] | None], owner: weakref.ref[ExchangeThread]) -> None:
    while (job := jobs.get()) is not None:
        try:
            job()
        finally:
            del job  # it holds a bucket
            thread = owner()
            if thread is not None:
                thread._done()
            del thread
