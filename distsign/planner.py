"""The plans of one model's exchange groups, from what is known of its parameters; and the slots that they have."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from distsign import plan
from distsign.ladder import DensityLadder
from distsign.layout import Shape
from distsign.options import VoteOptions
from distsign.plan import Part, Plan, part_of
from distsign.registry import ParameterRegistry
from distsign.sizes import Density, density_for

__all__ = ["GroupPlanner"]


class GroupPlanner:
    """Make each group's plan once, and give its payloads other sizes where slots have changed.

    Args:
        options: what the user chose.
        registry: the model's parameters.
    """

    def __init__(self, options: VoteOptions, registry: ParameterRegistry) -> None:
        self._options = options
        self._registry = registry
        self._num_voters = 1
        self._budgeted: float | None = None
        self._excluded: frozenset[int] = frozenset()
        self._plans: dict[object, tuple[bytes, Plan]] = {}  # of each group, with the densities that it is for

    def meet(self, num_voters: int) -> None:
        """Fix for so many voters what is averaged and how many slots a budget pays for; all parameters are known.

        Raises:
            ValueError: if the budget is too small or too large for them, or `exclude` names one that is not known.
        """
        options = self._options
        self._num_voters = num_voters
        self._excluded = frozenset(self._registry.rows_of(options.exclude))
        if options.bits_per_param is None:
            return
        # The first column's share stands for all: they differ by a few components.
        parts = [part for part in self._parts(column=0) if part.voted]
        shapes = [Shape(part.row, part.length) for part in parts]
        density = density_for(
            options.bits_per_param, shapes, num_voters, plan.COALESCE_BYTES, checksum=options.checksum
        )
        self._budgeted = min(density, options.max_density or 1.0)

    def density(self, ladder: DensityLadder | None) -> Density:
        """Return the share of the components that payloads have slots for in this step."""
        if ladder is None:
            return self._budgeted
        return np.minimum(ladder.densities, self._options.max_density or 1.0)

    def voted_lengths(self, column: int) -> list[int]:
        """Return, of each row, how many components the ranks of a column vote on."""
        return [part.length if part.voted else 0 for part in self._parts(column)]

    def _parts(self, column: int) -> list[Part]:
        return [part_of(self._part(row), column, self._options.ranks_per_node) for row in range(len(self._registry))]

    def _part(self, row: int) -> Part:
        return Part(row, self._registry.num_elements(row), voted=row not in self._excluded)

    def plan(
        self,
        buckets: tuple[tuple[int, ...], ...],
        home: Callable[[int], int],
        density: Density,
        device: torch.device,
    ) -> Plan:
        """Return how an exchange group is dealt out.

        Args:
            buckets: of each bucket, the rows of its parameters in order.
            home: where this rank keeps its share of the parameter in a row.
            density: see `density`.
            device: of the gradients.
        """
        options = self._options
        key = np.asarray(density, dtype=np.float64).tobytes()
        known, plan = self._plans.get(buckets, (key, None))
        if plan is None:
            plan = Plan.build(
                [[self._part(row) for row in rows] for rows in buckets],
                [home(row) for row in range(len(self._registry))],
                options.ranks_per_node,
                self._num_voters,
                density=density,
                wire=options.wire,
                owner_carry=options.owner_carry is not None,
                device=device,
                checksum=options.checksum,
            )
        elif known != key:
            plan = plan.at(density)
        self._plans[buckets] = key, plan
        return plan
