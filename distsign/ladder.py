"""How many slots payloads have where no budget says so: by what each piece of a parameter has needed so far.

Nothing here may differ between replicas: it is computed on the host, from the counts of verdicts and from the owners'
census, which all ranks know alike, by comparisons with tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distsign.layout import IntArray

__all__ = ["DensityLadder"]

_OCTAVE = 32
"""Rungs by which the slots double, and the most that a piece moves in a step."""
_LAST_RUNG = 12 * _OCTAVE
# As float32 numbers: the last bit of a power is the processor's, and that of one rank may be another's.
_DENSITIES = (2.0 ** (-np.arange(_LAST_RUNG + 1) / _OCTAVE)).astype(np.float32).astype(np.float64)
_CALM = 4
"""Steps for which a piece may be crowded before it climbs faster and faster."""
_DOWN = 4
"""Rungs that a piece goes down at least where it is not crowded: so it is crowded in four steps of five."""
_FILL = 0.7
"""Share of its slots that the last step's verdicts would have filled where a piece goes down further."""
_ROOM = (2.0 ** ((np.arange(_DOWN, _OCTAVE) + 0.5) / _OCTAVE)).astype(np.float32).astype(np.float64)
_UNSEEN = -1
"""In place of a rung, where no piece has been seen: at first, and for shares that small parameters do not have."""


class DensityLadder:
    """The density of each piece's slots.

    Rungs are a 32nd of an octave apart. A crowded piece climbs a rung, and faster and faster if that goes on; any other
    goes down four, or as far as lets the last step's verdicts fill seven slots in ten. So a piece is crowded in four
    steps of five, and its slots are mostly used. What did not fit waits in the carries, and is not many steps old,
    since what waits crowds the next step too (measured: a GPT of 484,416 parameters has, after 150 steps, the loss of
    uncapped payloads to within 0.04 bits).

    Pieces differ: early in training half of a GPT's ballots are on its embedding, a twentieth of its components. With
    the slots of the average such votes queue until they are too old to be of use (measured: the same GPT is 1.7 bits
    behind after 150 steps).

    Counts come to the host one step late on CUDA, so that it never waits for work in progress.

    Args:
        num_columns: ranks of a node.
        num_voters: owners in a column; a parameter has at most one piece for each column and owner.
        silent_steps: first clean steps in which hardly anybody votes, see `Confidence.silent_steps`. Until then, or
            until a piece is crowded, each has one slot a voter; then one for every component.
    """

    def __init__(self, num_columns: int, num_voters: int, silent_steps: int = 0) -> None:
        self._cut = [num_columns, num_voters]
        self._num_shares = num_columns * num_voters
        self._silence = silent_steps
        self._rungs: IntArray = np.zeros(0, dtype=np.int64)
        self._streaks: IntArray = np.zeros(0, dtype=np.int64)  # steps for which each has been crowded
        self._seen: tuple[IntArray, Tensor, Any] | None = None
        self._shares: list[IntArray] = []
        self._step: list[Tensor] = []

    def grow(self, num_params: int) -> None:
        """Make room for parameters up to `num_params`."""
        missing = num_params * self._num_shares - self._rungs.size
        if missing > 0:
            self._rungs = np.pad(self._rungs, (0, missing), constant_values=_UNSEEN)
            self._streaks = np.pad(self._streaks, (0, missing))

    @property
    def densities(self) -> npt.NDArray[np.float64]:
        """Share of each piece's components that have a slot, float64 `[num_params * num_shares]`."""
        densities: npt.NDArray[np.float64] = _DENSITIES[np.maximum(0, self._rungs)] * (self._silence == 0)
        return densities

    def begin_step(self) -> None:
        """Move by what the last step showed."""
        self._shares.clear()
        self._step.clear()
        if self._seen is None:
            return
        shares, counts, event = self._seen
        self._seen = None
        if event is not None:
            event.synchronize()
        *seen, poisoned = counts.numpy()
        if not poisoned.any():
            self._move(shares, *seen)

    def _move(self, shares: IntArray, verdicts: IntArray, slots: IntArray, full: IntArray, lengths: IntArray) -> None:
        if self._silence:
            self._silence = 0 if full.any() else self._silence - 1
            return
        streaks = np.where(full > 0, self._streaks[shares] + 1, 0)
        up = 2 ** np.clip(streaks - _CALM, 0, _OCTAVE.bit_length() - 1)
        down = _DOWN + np.searchsorted(_ROOM, _FILL * slots / np.maximum(1, verdicts), side="right")
        lowest = np.searchsorted(-_DENSITIES, -1.0 / np.maximum(1, lengths))  # a single slot
        moved = np.maximum(0, self._rungs[shares]) + np.where(full > 0, -up, down)
        self._streaks[shares] = streaks
        self._rungs[shares] = np.clip(moved, 0, np.minimum(lowest, _LAST_RUNG))

    def observe(self, shares: IntArray, seen: Tensor) -> None:
        """Take note of some pieces.

        Args:
            shares: int64 `[num_pieces]`, which they are.
            seen: int64 `[4, num_pieces]`, see `Column.seen`.
        """
        self._shares.append(shares)
        self._step.append(seen)

    def commit(self, poisoned: Tensor) -> None:
        """End the step."""
        seen = torch.cat(self._step, dim=1)
        counts = torch.cat([seen, poisoned.to(seen).expand(1, seen.shape[1])])
        event = None
        if counts.device.type == "cuda":
            counts = counts.to("cpu", non_blocking=True)  # into pinned memory, complete at the event
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._seen = np.concatenate(self._shares), counts, event

    def state_dict(self, names: Mapping[str, int]) -> dict[str, Any]:
        """Return what a resumed run needs, rungs by parameter name."""
        self.begin_step()  # settle what was seen; the next step begins from it in any case

        def by_name(values: IntArray) -> dict[str, list[int]]:
            table = values.reshape(-1, self._num_shares)
            return {name: table[row].tolist() for name, row in names.items() if row < len(table)}

        found = {"rungs": by_name(self._rungs), "streaks": by_name(self._streaks)}
        return {**found, "silence": self._silence, "cut": list(self._cut)}

    def load_state_dict(self, state: Mapping[str, Any], names: Mapping[str, int]) -> None:
        """Go on from `state_dict()`. Cut into other pieces, a parameter's begin from its densest one."""
        self._seen = None
        self._silence = state["silence"]
        self.grow(1 + max((names[name] for name in state["rungs"]), default=-1))
        rungs, streaks = (each.reshape(-1, self._num_shares) for each in (self._rungs, self._streaks))
        same = state["cut"] == self._cut
        for name, kept in state["rungs"].items():
            rungs[names[name]] = kept if same else min((rung for rung in kept if rung != _UNSEEN), default=_UNSEEN)
            streaks[names[name]] = state["streaks"][name] if same else 0
