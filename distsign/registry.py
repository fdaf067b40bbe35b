"""Which parameters the hook has seen, their names, and whether their `.grad` still holds a verdict."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

__all__ = ["ParameterRegistry", "VoteError"]


_BUILD = "build the optimizer from model.named_parameters() of the model that DDP wraps"


class VoteError(RuntimeError):
    """A vote could not be held, or its result was used in a way that would train something else."""


class ParameterRegistry:
    """Give each parameter a row, for as long as the process lives, whatever bucket it lies in.

    Rows follow the order of `track`, or else the order in which DDP first shows the parameters; both are the same on
    all ranks, and the same again when a run is resumed.
    """

    def __init__(self) -> None:
        self._parameters: list[Tensor] = []
        self._row_by_id: dict[int, int] = {}
        self._name_by_row: dict[int, str] = {}
        self._row_by_name: dict[str, int] = {}
        self._accumulators: dict[int, Any] = {}
        self._holds_verdict: set[int] = set()

    def __len__(self) -> int:
        return len(self._parameters)

    def track(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Name parameters; those that need no gradient are left out.

        Raises:
            ValueError: if two different parameters have one name.
        """
        for name, parameter in named_parameters:
            if not parameter.requires_grad:
                continue
            row = self._row(parameter)
            if self._row_by_name.setdefault(name, row) != row:
                raise ValueError(
                    f"two parameters are named {name!r}: track the parameters of one model, "
                    "`state.track(model.named_parameters())`, and use one state a model"
                )
            self._name_by_row[row] = name

    def names(self) -> dict[str, int]:
        """Return the row of each name.

        Raises:
            ValueError: if a parameter has no name, or none is known.
        """
        if len(self._name_by_row) < len(self._parameters) or not self._parameters:
            raise ValueError(
                f"{len(self._parameters) - len(self._name_by_row) or 'all'} parameters of this SignVoteState have no "
                "name to be filed under: pass vote_state=state and model.named_parameters() to the optimizer, or call "
                "state.track(model.named_parameters())"
            )
        return {name: row for row, name in self._name_by_row.items()}

    def rows_of(self, names: Iterable[str]) -> list[int]:
        """Return the rows of these names, with or without the `module.` that DDP puts in front.

        Raises:
            ValueError: if a parameter of that name is not known.
        """
        rows = {name.removeprefix("module."): row for name, row in self._row_by_name.items()}
        strangers = [name for name in names if name.removeprefix("module.") not in rows]
        if strangers:
            raise ValueError(
                f"exclude names {strangers[0]!r}, which is none of the {len(rows)} parameters that are known: take "
                "names of model.named_parameters(), and pass vote_state=state and model.named_parameters() to the "
                "optimizer before the first backward"
            )
        return [rows[name.removeprefix("module.")] for name in names]

    @property
    def is_named(self) -> bool:
        """Whether `track` has been called."""
        return bool(self._name_by_row)

    def row(self, parameter: Tensor) -> int | None:
        """Return the row of a parameter that is about to be stepped, None where it has none.

        Raises:
            VoteError: if it has a gradient that the hook has not voted on, although it has on others'.
        """
        row = self._row_by_id.get(id(parameter))
        # Frozen and unused parameters have no gradient; those that DDP exchanges the hook has seen in any case.
        if parameter.grad is not None and self._accumulators and row not in self._accumulators:
            raise VoteError(
                f"the optimizer has a gradient that the hook has not voted on, of {self._describe(row, parameter)}: "
                f"{_BUILD}. A parameter that DDP does not exchange goes into an optimizer without vote_state"
            )
        return row

    def name(self, row: int) -> str | None:
        """Return the name of the parameter in a row, None where it has none."""
        return self._name_by_row.get(row)

    def num_elements(self, row: int) -> int:
        """Return the size of the parameter in a row."""
        return self._parameters[row].numel()

    def see(self, parameter: Tensor) -> int:
        """Return the row of a parameter that DDP exchanges, and watch its `.grad` from now on."""
        row = self._row(parameter)
        if row not in self._accumulators:
            # On the node that adds to .grad, not on the tensor: torch.autograd.grad adds nothing. It keeps its hooks
            # alive, so they must not keep the registry and through it the parameter.
            with torch.enable_grad():
                node = parameter.expand_as(parameter).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
            assert node is not None
            node.register_prehook(partial(_before_accumulation, weakref.ref(self), row))
            self._accumulators[row] = node
        return row

    def mark_verdicts(self, rows: Iterable[int]) -> None:
        """Say that the `.grad` of these parameters holds a verdict, until it is set to None or to zero."""
        self._holds_verdict.update(rows)

    def _row(self, parameter: Tensor) -> int:
        row = self._row_by_id.setdefault(id(parameter), len(self._parameters))
        if row == len(self._parameters):
            self._parameters.append(parameter)
        return row

    def _check_accumulation(self, row: int) -> None:
        """Refuse to add a gradient to a verdict, which would be neither; called just before autograd adds."""
        if row not in self._holds_verdict:
            return
        if self._name_by_row and self._accumulators.keys().isdisjoint(self._name_by_row):
            raise VoteError(
                "the hook votes on none of the parameters that this SignVoteState was told the names of, so that the "
                f"optimizer moves none that are trained: {_BUILD}"
            )
        parameter = self._parameters[row]
        if parameter.grad is not None and bool(parameter.grad.any()):
            stranger = self._name_by_row and row not in self._name_by_row
            raise VoteError(
                f"a second backward reached {self._describe(row, parameter)}, whose .grad still holds the last vote's "
                "verdict: their sum would be neither. Call zero_grad() after each step, and to accumulate "
                "gradients run all but the last backward under model.no_sync()"
                + (f". No optimizer with vote_state=state has this parameter: {_BUILD}" if stranger else "")
            )
        self._holds_verdict.discard(row)

    def _describe(self, row: int | None, parameter: Tensor) -> str:
        name = None if row is None else self._name_by_row.get(row)
        return f"a parameter of shape {tuple(parameter.shape)}" if name is None else f"parameter {name}"


def _before_accumulation(registry: weakref.ref[ParameterRegistry], row: int, gradients: tuple[Tensor, ...]) -> None:
    del gradients
    alive = registry()
    if alive is not None:
        alive._check_accumulation(row)
