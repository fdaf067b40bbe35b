"""What a rank counts of its votes; on the gradients' device, so that counting never waits for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from distsign.traffic import ExchangeBytes, Traffic, ring_all_reduce_bytes

__all__ = ["VoteCounts"]


class VoteCounts:
    """Counters over all steps; densities leave out the steps that were poisoned.

    Attributes:
        num_steps: steps begun.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self._elements_exchanged = 0
        self._num_elements = 0
        self._step = torch.zeros(3, dtype=torch.int64)
        # poisoned steps; and of the others components cast, ballots, components decided, verdicts
        self._totals = torch.zeros(5, dtype=torch.int64)

    def begin_step(self) -> None:
        """Start a step; what an unfinished one had counted is dropped."""
        self.num_steps += 1
        self._num_elements = 0
        self._step = torch.zeros_like(self._step)

    def exchanged(self, num_elements: int) -> None:
        """Count the components of a group's buckets."""
        self._elements_exchanged += num_elements

    def ballots(self, num_elements: int, num_ballots: Tensor) -> None:
        """Count the components that this rank could vote on in a group, and its ballots on them."""
        self._num_elements += num_elements
        self._step = self._step.to(num_ballots.device)
        self._step[0] += num_ballots

    def verdicts(self, num_elements: Tensor, num_verdicts: Tensor) -> None:
        """Count the components that a group's vote decided on, and the verdicts other than 0."""
        self._step[1] += num_elements
        self._step[2] += num_verdicts

    def end_step(self, poisoned: Tensor) -> None:
        """Add the step to the totals, unless it was poisoned."""
        # Filled in, not uploaded, which would wait for the device.
        clean = torch.cat([self._step.new_zeros(1), self._step.new_full((1,), self._num_elements), self._step])
        bad = torch.zeros_like(clean)
        bad[0] = 1
        self._totals = self._totals.to(clean.device) + torch.where(poisoned, bad, clean)

    def traffic(self, counted: ExchangeBytes, world_size: int, left_out: tuple[int, ...] = ()) -> Traffic:
        """Return the report. Waits for the device."""
        poisoned_steps, num_cast, ballots, num_decided, verdicts = self._totals.tolist()
        return Traffic(
            **asdict(counted),
            fp32_bytes=ring_all_reduce_bytes(self._elements_exchanged, 4, world_size),
            bf16_bytes=ring_all_reduce_bytes(self._elements_exchanged, 2, world_size),
            num_steps=self.num_steps,
            num_poisoned_steps=poisoned_steps,
            ballot_density=ballots / num_cast if num_cast else 0.0,
            verdict_density=verdicts / num_decided if num_decided else 0.0,
            left_out_ranks=left_out,
        )

    def state_dict(self) -> dict[str, object]:
        """Return the totals."""
        return {"num_steps": self.num_steps, "elements": self._elements_exchanged, "totals": self._totals.tolist()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from `state_dict()`."""
        self.num_steps = int(state["num_steps"])  # type: ignore[call-overload]
        self._elements_exchanged = int(state["elements"])  # type: ignore[call-overload]
        self._totals = torch.tensor(state["totals"], dtype=torch.int64)
