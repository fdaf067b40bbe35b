"""What a rank counts of its votes; on the gradients' device, so that counting never waits for it."""

from __future__ import annotations

from collections.abc import Mapping

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
        self._step = torch.zeros(2, dtype=torch.int64)
        # clean steps, their elements, ballots and verdicts
        self._clean = torch.zeros(4, dtype=torch.int64)

    def begin_step(self) -> None:
        """Start a step; what an unfinished one had counted is dropped."""
        self.num_steps += 1
        self._num_elements = 0
        self._step = torch.zeros_like(self._step)

    def ballots(self, num_elements: int, num_ballots: Tensor) -> None:
        """Count one exchange group's elements and this rank's ballots on them."""
        self._num_elements += num_elements
        self._elements_exchanged += num_elements
        self._step = self._step.to(num_ballots.device)
        self._step[0] += num_ballots

    def verdicts(self, num_verdicts: Tensor) -> None:
        """Count the verdicts on one bucket."""
        self._step[1] += num_verdicts

    def end_step(self, poisoned: Tensor) -> None:
        """Add the step to the totals, unless it was poisoned."""
        found = torch.cat([self._step.new_tensor([1, self._num_elements]), self._step])
        self._clean = self._clean.to(found.device) + torch.where(poisoned, torch.zeros_like(found), found)

    def traffic(self, counted: ExchangeBytes, world_size: int) -> Traffic:
        """Return the report. Waits for the device."""
        clean_steps, elements, ballots, verdicts = self._clean.tolist()
        return Traffic(
            sent_bytes=counted.sent_bytes,
            received_bytes=counted.received_bytes,
            fp32_bytes=ring_all_reduce_bytes(self._elements_exchanged, 4, world_size),
            bf16_bytes=ring_all_reduce_bytes(self._elements_exchanged, 2, world_size),
            num_steps=self.num_steps,
            num_poisoned_steps=self.num_steps - clean_steps,
            ballot_density=ballots / elements if elements else 0.0,
            verdict_density=verdicts / elements if elements else 0.0,
        )

    def state_dict(self) -> dict[str, object]:
        """Return the totals."""
        return {"num_steps": self.num_steps, "elements": self._elements_exchanged, "clean": self._clean.tolist()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from `state_dict()`."""
        self.num_steps = int(state["num_steps"])  # type: ignore[call-overload]
        self._elements_exchanged = int(state["elements"])  # type: ignore[call-overload]
        self._clean = torch.tensor(state["clean"], dtype=torch.int64)
