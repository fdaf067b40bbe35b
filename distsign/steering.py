"""What all ranks know alike of a run, and derive the same from: thresholds, learning rate and sizes of payloads.

Nothing here may differ between replicas: it is computed from the counts of verdicts and from the owners' census, with
additions, products and comparisons alone, which IEEE arithmetic rounds alike on every device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distsign.confidence import Confidence

__all__ = ["DensityLadder", "Steering"]

GAIN = 0.05
"""Most that a threshold changes in a step under a budget."""
FILL = 0.8
"""Share of the slots that a budget is steered to fill: fuller, and more would wait than travels."""
LOWEST, HIGHEST = 1.0 / 64.0, 64.0
"""Bounds of the factor on a threshold."""


class Steering:
    """The factor on each parameter's threshold, and on its learning rate.

    Without a budget it is the confidence function's warm-up, a function of the clean steps so far. With one it starts
    where the warm-up does, and is then steered per parameter so that verdicts fill their slots: more where the last
    step's verdicts left slots free, less where they, or the ballots of half of the workers, did not fit.

    Args:
        confidence: the confidence function.
        budgeted: whether the payloads have a fixed size.
    """

    def __init__(self, confidence: Confidence, *, budgeted: bool) -> None:
        self.budgeted = budgeted
        self._warm_up = torch.tensor(confidence.warm_up(), dtype=torch.float64)
        self.clean_steps = torch.zeros((), dtype=torch.int64)
        self.factors = torch.zeros(0, dtype=torch.float64)
        self._used = self.factors
        self._pending: list[tuple[Tensor, Tensor]] = []

    def grow(self, num_params: int, device: torch.device) -> None:
        """Make room for parameters up to `num_params`, on this device."""
        if self.factors.device != device:
            self._warm_up, self.clean_steps = self._warm_up.to(device), self.clean_steps.to(device)
            self.factors, self._used = self.factors.to(device), self._used.to(device)
        missing = num_params - self.factors.numel()
        if missing > 0:
            self.factors = torch.cat([self.factors, self._warm_up[0].expand(missing)])
            self._used = torch.cat([self._used, self._warm_up[0].expand(missing)])

    def begin_step(self) -> None:
        """Fix the factors of this step; forget what a step that broke off had observed."""
        self._pending.clear()
        if not self.budgeted:
            at = self.clean_steps.clamp(max=self._warm_up.numel() - 1)
            self.factors = self._warm_up[at].expand_as(self.factors).clone()
        self._used = self.factors

    def of(self, rows: Tensor) -> Tensor:
        """Return the factors of these parameters in this step, float64."""
        return self._used[rows]

    def lr_scale(self, row: int) -> Tensor:
        """Return the factor on a parameter's learning rate in the last step, a float64 scalar tensor."""
        return self._used[row]

    def observe(self, rows: Tensor, verdicts: Tensor, slots: Tensor, crowded: Tensor) -> None:
        """Take note of how a group's verdicts filled their slots.

        Args:
            rows: int64 `[num_rows]`, the parameters.
            verdicts: int64 `[num_rows]`, verdicts other than 0.
            slots: int64 `[num_rows]`, most that fit.
            crowded: bool `[num_rows]`, whether more wanted to vote.
        """
        if self.budgeted:
            free = 1.0 - verdicts / (FILL * slots.clamp(min=1))
            free = torch.where(crowded, -1.0, free.clamp(-1.0, 1.0))
            steered = (self._used[rows] * (1.0 - GAIN * free)).clamp(LOWEST, HIGHEST)
            self._pending.append((rows, steered))

    def commit(self, poisoned: Tensor) -> None:
        """Keep what was observed, or forget it if the step was poisoned (bool scalar tensor)."""
        factors = self.factors.clone()
        for rows, steered in self._pending:
            factors[rows] = torch.where(poisoned, self.factors[rows], steered)
        self.factors, self._pending = factors, []
        self.clean_steps = self.clean_steps + (~poisoned).to(torch.int64)

    def state_dict(self, names: Mapping[str, int]) -> dict[str, Any]:
        """Return what a resumed run needs, factors by parameter name."""
        known = {name: float(self.factors[row]) for name, row in names.items() if row < self.factors.numel()}
        return {"clean_steps": int(self.clean_steps), "factors": known}

    def load_state_dict(self, state: Mapping[str, Any], names: Mapping[str, int]) -> None:
        """Go on from `state_dict()`."""
        self.clean_steps = torch.full_like(self.clean_steps, state["clean_steps"])
        for name, value in state["factors"].items():
            self.factors[names[name]] = value
        self._used = self.factors


class DensityLadder:
    """The density of the slots in payloads whose size no budget fixes, by what all ranks have seen.

    Rungs are a quarter of an octave apart. Where more than a tenth of the components lie in crowded pieces it climbs
    two; where none of late did it goes down one, or four while nearly all slots are free. What did not fit meanwhile
    waits in the carries. Counts come to the host one step late on CUDA, so that it never waits for work in progress.

    Attributes:
        rung: now; 0 is a slot for every component.
    """

    def __init__(self) -> None:
        self.rung = 0
        self._patience = 0
        self._seen: tuple[Tensor, Any] | None = None
        self._step: list[Tensor] = []

    @property
    def density(self) -> float:
        """Share of the components that have a slot."""
        return float(2.0 ** (-self.rung / 4))

    def begin_step(self) -> None:
        """Move by what the last step showed."""
        self._step.clear()
        if self._seen is None:
            return
        counts, event = self._seen
        self._seen = None
        if event is not None:
            event.synchronize()
        poisoned, verdicts, slots, crowded, elements = counts.tolist()
        if poisoned:
            return
        if 10 * crowded > elements:
            self.rung, self._patience = max(0, self.rung - 2), _PATIENCE
        elif self._patience:
            self._patience -= 1
        elif self.rung < _LAST_RUNG:
            self.rung += 4 if 10 * verdicts < slots else 1
            self._patience = _PATIENCE // 4

    def observe(self, verdicts: Tensor, slots: Tensor, crowded: Tensor, lengths: Tensor) -> None:
        """Take note of a group: int64 `[num_rows]` verdicts, slots and sizes, bool `[num_rows]` crowded."""
        self._step.append(torch.stack([verdicts.sum(), slots.sum(), (crowded * lengths).sum(), lengths.sum()]))

    def commit(self, poisoned: Tensor) -> None:
        """End the step."""
        counts = torch.cat([poisoned.to(torch.int64).reshape(1), torch.stack(self._step).sum(0)])
        event = None
        if counts.device.type == "cuda":
            counts = counts.to("cpu", non_blocking=True)  # into pinned memory, complete at the event
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._seen = counts, event

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        self.begin_step()  # settle what was seen; the next step begins from it in any case
        return {"rung": self.rung, "patience": self._patience}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.rung, self._patience, self._seen = state["rung"], state["patience"], None


_PATIENCE = 16
_LAST_RUNG = 48
