"""The process that ranks of tests are forked from: it has imported what takes seconds, torch and the kernels.

Its children inherit its hash seed. What depends on the order of a set is seen by tests that start ranks by torchrun.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import forkserver
from typing import Any

__all__ = ["context", "start", "stop"]

context = multiprocessing.get_context("forkserver")
"""Starts processes; after `start` they are forks of what has been imported."""

_server: Any = forkserver._forkserver  # type: ignore[attr-defined]
_SETTINGS = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
"""Read when the libraries are loaded; and libgomp's threads would not survive the fork."""
# A child runs the main module once more: that of pytest, or of a soak.
_MODULES = ["distsign.kernels.cpu", "tests.distributed.oracle", "tests.soak_rank", "tests.soak_round", "pytest"]


def start() -> None:
    """Start it, unless it runs.

    Raises:
        RuntimeError: if it has not come up.
    """
    if _server._forkserver_pid is not None:
        return
    before = {name: os.environ.get(name) for name in _SETTINGS}
    os.environ.update(_SETTINGS)
    context.set_forkserver_preload(_MODULES)
    try:
        process = context.Process(target=int)
        process.start()
        process.join()
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
    if process.exitcode != 0:
        raise RuntimeError("the process that ranks are forked from has not started")


def stop() -> None:
    """End it, and wait: first for the end of all its children. By itself it ends after this process."""
    _server._stop()
