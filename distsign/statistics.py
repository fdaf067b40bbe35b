"""What a rank counts of its votes; on the gradients' device, so that counting never waits for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from distsign.traffic import ExchangeBytes, Traffic, ring_all_reduce_bytes

__all__ = ["VoteCounts", "counts_elsewhere"]


class VoteCounts:
    """Counters over all steps; densities leave out the steps that were poisoned.

    Attributes:
        num_steps: steps begun.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self._elements_exchanged = 0
        self._uncompressed_before = [0, 0]  # bytes of fp32 and bf16 all-reduces among other numbers of ranks
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
            fp32_bytes=self._uncompressed_before[0] + ring_all_reduce_bytes(self._elements_exchanged, 4, world_size),
            bf16_bytes=self._uncompressed_before[1] + ring_all_reduce_bytes(self._elements_exchanged, 2, world_size),
            num_steps=self.num_steps,
            num_poisoned_steps=poisoned_steps,
            ballot_density=ballots / num_cast if num_cast else 0.0,
            verdict_density=verdicts / num_decided if num_decided else 0.0,
            left_out_ranks=left_out,
        )

    def state_dict(self) -> dict[str, object]:
        """Return the totals."""
        return {
            "num_steps": self.num_steps,
            "elements": self._elements_exchanged,
            "uncompressed_before": list(self._uncompressed_before),
            "totals": self._totals.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from `state_dict()`."""
        self.num_steps = int(state["num_steps"])  # type: ignore[call-overload]
        self._elements_exchanged = int(state["elements"])  # type: ignore[call-overload]
        self._uncompressed_before = list(state.get("uncompressed_before", (0, 0)))  # type: ignore[call-overload]
        self._totals = torch.tensor(state["totals"], dtype=torch.int64)


def counts_elsewhere(state: Mapping[str, Any], old: int, *, fresh: bool) -> dict[str, Any]:
    """Return the counts of one of `old` ranks for a rank of another number of them.

    Args:
        state: what `VoteCounts.state_dict` returned.
        old: ranks that there were.
        fresh: whether the rank is a new one, which has sent nothing so far, compressed or not.
    """
    earlier = state.get("uncompressed_before", (0, 0))
    uncompressed = [
        before + ring_all_reduce_bytes(state["elements"], width, old)
        for before, width in zip(earlier, (4, 2), strict=True)
    ]
    return {**state, "elements": 0, "uncompressed_before": [0, 0] if fresh else uncompressed}
