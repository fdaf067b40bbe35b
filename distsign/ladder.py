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

_LAST_RUNG = 96
_DENSITIES = 2.0 ** (-np.arange(_LAST_RUNG + 1) / 8)
_FILL = 0.7
"""Share of the slots that the last step's verdicts would have filled where a piece goes down to."""
_MOST = 8
"""Rungs that a piece moves in a step at most: an octave."""
_ROOM = 2.0 ** ((np.arange(1, _MOST) + 0.5) / 8)
"""As many times more room than is filled let a piece go down by two rungs, by three, and so on."""
_PATIENCE = 8
"""Clean steps in which nobody goes down unless somebody has voted: carries need some to pass their thresholds."""


class DensityLadder:
    """The density of each piece's slots.

    Rungs are an eighth of an octave apart. A crowded piece climbs, twice as far each time that this happens again; any
    other goes down to where the last step's verdicts would have filled seven slots in ten, by one rung at least and an
    octave at most, but not beyond a single slot. So in about as many steps a piece has a few slots too few as too many.
    What did not fit meanwhile waits in the carries, and is not many steps old, since what waits crowds the next step
    too. Pieces differ: those of an embedding vote ten times as often as others (rows of rare words are pushed down
    always), and with the slots of the average their votes would queue for ever, too old to be of use (measured: a GPT
    then learned nothing for hundreds of steps).

    Counts come to the host one step late on CUDA, so that it never waits for work in progress.

    Args:
        num_shares: pieces that a parameter has at most, over all columns.
    """

    def __init__(self, num_shares: int) -> None:
        self._num_shares = num_shares
        self._rungs: IntArray = np.zeros(0, dtype=np.int64)
        self._climbed: IntArray = np.zeros(0, dtype=np.int64)
        self._patience = _PATIENCE
        self._seen: tuple[IntArray, Tensor, Any] | None = None
        self._shares: list[IntArray] = []
        self._step: list[Tensor] = []

    def grow(self, num_params: int) -> None:
        """Make room for parameters up to `num_params`; their pieces begin with a slot for every component."""
        missing = num_params * self._num_shares - self._rungs.size
        if missing > 0:
            self._rungs = np.pad(self._rungs, (0, missing))
            self._climbed = np.pad(self._climbed, (0, missing))

    @property
    def densities(self) -> npt.NDArray[np.float64]:
        """Share of each piece's components that have a slot, float64 `[num_params * num_shares]`."""
        densities: npt.NDArray[np.float64] = _DENSITIES[self._rungs]
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
        if not verdicts.any() and self._patience:
            self._patience -= 1
            return
        self._patience = 0
        climbed = np.where(full > 0, np.clip(2 * self._climbed[shares], 1, _MOST), 0)
        room = _FILL * slots / np.maximum(1, verdicts)
        down = np.where(full > 0, 0, 1 + np.searchsorted(_ROOM, room, side="right"))
        lowest = np.searchsorted(-_DENSITIES, -1.0 / np.maximum(1, lengths))
        self._climbed[shares] = climbed
        self._rungs[shares] = np.clip(self._rungs[shares] - climbed + down, 0, np.minimum(lowest, _LAST_RUNG))

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

        return {"rungs": by_name(self._rungs), "climbed": by_name(self._climbed), "patience": self._patience}

    def load_state_dict(self, state: Mapping[str, Any], names: Mapping[str, int]) -> None:
        """Go on from `state_dict()`. Cut into other pieces, a parameter's begin from its densest one."""
        self._seen = None
        self._patience = state["patience"]
        self.grow(1 + max((names[name] for name in state["rungs"]), default=-1))
        rungs, climbed = (each.reshape(-1, self._num_shares) for each in (self._rungs, self._climbed))
        for name, kept in state["rungs"].items():
            same = len(kept) == self._num_shares
            rungs[names[name]] = kept if same else min(kept)
            climbed[names[name]] = state["climbed"][name] if same else 0
