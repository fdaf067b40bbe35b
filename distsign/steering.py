"""What all ranks know alike of a run, and derive the same from: thresholds and learning rate.

Nothing here may differ between replicas: it is computed from the counts of verdicts and from the owners' census, with
the four operations and comparisons alone, which IEEE arithmetic rounds alike on every device, and from tables made on
the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distsign.confidence import Confidence

__all__ = ["Steering"]

GAIN = 0.05
"""Most that a threshold changes in a step under a budget."""
FILL = 0.8
"""Share of the slots that a budget is steered to fill: fuller, and more would wait than travels."""
LOWEST, HIGHEST = 1.0 / 64.0, 64.0
"""Bounds of the factor on a threshold."""


class Steering:
    """The factors on each parameter's threshold, and on the learning rate.

    Both follow the confidence function's warm-up, a function of the clean steps so far. Under a budget thresholds may
    be steered on top of it, per parameter, so that verdicts fill their slots: lower where the last step's verdicts left
    slots free, higher where they, or the ballots of half of the workers, did not fit.

    Args:
        confidence: the confidence function.
        budgeted: whether the payloads have a fixed size.

    Attributes:
        steered: whether thresholds are.
        scales_lr: whether the factor on the learning rate is ever another than 1.
    """

    def __init__(self, confidence: Confidence, *, budgeted: bool) -> None:
        self.steered = budgeted and confidence.fills_budget
        thresholds, rates = confidence.warm_up(budgeted=budgeted)
        self._thresholds = torch.tensor(thresholds, dtype=torch.float64)
        self._rates = torch.tensor(rates, dtype=torch.float64)
        self.scales_lr = any(rate != 1.0 for rate in rates)
        self.clean_steps = torch.zeros((), dtype=torch.int64)
        self.factors = torch.zeros(0, dtype=torch.float64)
        self._warm = torch.ones((), dtype=torch.float64)
        self.lr_scale = torch.ones((), dtype=torch.float64)
        self._pending: list[tuple[Tensor, Tensor]] = []

    def grow(self, num_params: int, device: torch.device) -> None:
        """Make room for parameters up to `num_params`, on this device."""
        for name in ("_thresholds", "_rates", "clean_steps", "factors", "_warm", "lr_scale"):
            setattr(self, name, getattr(self, name).to(device))
        missing = num_params - self.factors.numel()
        if missing > 0:
            self.factors = torch.cat([self.factors, self.factors.new_ones(missing)])

    def begin_step(self) -> None:
        """Fix the factors of this step; forget what a step that broke off had observed."""
        self._pending.clear()
        # Not `[at]`, which would wait for the device to tell the index.
        self._warm = self._thresholds.take(self.clean_steps.clamp(max=self._thresholds.numel() - 1))
        self.lr_scale = self._rates.take(self.clean_steps.clamp(max=self._rates.numel() - 1))

    def of(self, rows: Tensor) -> Tensor:
        """Return the factors on the thresholds of these parameters in this step, float64."""
        return self.factors[rows] * self._warm

    def observe(self, rows: Tensor, verdicts: Tensor, slots: Tensor, crowded: Tensor) -> None:
        """Take note of how a group's verdicts filled their slots.

        Args:
            rows: int64 `[num_rows]`, the parameters.
            verdicts: int64 `[num_rows]`, verdicts other than 0.
            slots: int64 `[num_rows]`, most that fit.
            crowded: bool `[num_rows]`, whether more wanted to vote.
        """
        if self.steered:
            free = 1.0 - verdicts / (FILL * slots.clamp(min=1))
            free = torch.where(crowded, -1.0, free.clamp(-1.0, 1.0))
            steered = (self.factors[rows] * (1.0 - GAIN * free)).clamp(LOWEST, HIGHEST)
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
