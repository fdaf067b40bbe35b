"""Where the step of a vote spends its time: timers around the library's functions, for as long as a context lasts.

Two threads are at work: DDP's casts ballots in the middle of backward, the exchange thread does the rest meanwhile. So
parts overlap and do not add up to the step. On fewer cores than ranks the clock also counts waiting for a core, which
the processor's time, of the thread at work, does not.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self
from unittest.mock import patch

from benchmarks.step_schemes import Trainer
from distsign import collectives
from distsign.exchange import VoteExchange
from distsign.kernels import cpu
from distsign.owner import Owner
from distsign.payload import Form
from distsign.voter import Voter

WHOLE, OPTIMIZER, WITHOUT = "whole step", "optimizer", "forward and backward, with what hooks wait for"
SEAL_VERDICTS = "  seal verdicts"

# Indented: part of the one above it.
PLACES: tuple[tuple[str, Any, str], ...] = (
    ("cast ballots (in backward)", Voter, "cast"),
    ("seal payloads (in backward)", Form, "seal"),
    ("exchange (its thread)", VoteExchange, "vote"),
    ("  all-to-all, both", collectives, "all_to_all"),
    ("  open ballots", Form, "open"),
    ("  tally", Owner, "count"),
    (SEAL_VERDICTS, Form, "seal_one"),
    ("open verdicts (its thread)", VoteExchange, "read"),
    ("unpack verdicts (its thread)", cpu, "unpack"),
)


class Parts:
    """Timers on one trainer's step, as a context.

    Args:
        trainer: of a scheme that votes.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._wall_s: dict[str, float] = defaultdict(float)
        self._cpu_s: dict[str, float] = defaultdict(float)
        self._backward = threading.current_thread()
        self._patches = ExitStack()

    def __enter__(self) -> Self:
        for part, owner, name in PLACES:
            self._patches.enter_context(patch.object(owner, name, self._timed(part, getattr(owner, name))))
        optimizer = self._trainer.optimizer
        self._patches.enter_context(patch.object(optimizer, "step", self._timed(OPTIMIZER, optimizer.step)))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._patches.close()

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if part == SEAL_VERDICTS and threading.current_thread() is self._backward:
                return function(*args, **kwargs)  # of ballots, whose time is taken a level above
            wall, own = time.perf_counter(), time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._wall_s[part] += time.perf_counter() - wall
                self._cpu_s[part] += time.thread_time() - own

        return timed

    def step(self) -> None:
        """Take a step."""
        self._timed(WHOLE, self._trainer.step)()

    def per_step(self, num_steps: int) -> dict[str, dict[str, float]]:
        """Return the milliseconds a step of each part: `ms` by the clock, `cpu_ms` of the thread at work."""
        for times in (self._wall_s, self._cpu_s):
            times[WITHOUT] = times[WHOLE] - times[OPTIMIZER]
        order = [WHOLE, WITHOUT, OPTIMIZER, *(part for part, _, _ in PLACES)]
        scale = 1e3 / num_steps
        return {part: {"ms": scale * self._wall_s[part], "cpu_ms": scale * self._cpu_s[part]} for part in order}
