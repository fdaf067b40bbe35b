"""Train one model as its workers would together, with whatever combines their gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distsign.robustness.electorate import Combined
from distsign.wire.header import PayloadError

__all__ = ["Combiner", "Outcome", "train"]

Batch = TypeVar("Batch")


class Combiner(Protocol):
    """An `Electorate`, or `Averages`."""

    num_workers: int

    def combine(self, gradients: Tensor) -> Combined:
        """Return what all workers step along."""


@dataclass(frozen=True)
class Outcome:
    """How a training went.

    Attributes:
        num_steps: steps taken, poisoned ones included.
        num_poisoned_steps: of these, those in which nobody moved.
        ballot_density: mean share of the honest ballots that are not 0.
        error: why it ended early, in words; None where it did not.
    """

    num_steps: int
    num_poisoned_steps: int
    ballot_density: float
    error: str | None


def train(
    model: nn.Module,
    optimizer: Optimizer,
    combiner: Combiner,
    batch: Callable[[int, int], Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
    num_steps: int,
    lr_factor: Callable[[int], float] = lambda _: 1.0,
) -> Outcome:
    """Train for some steps; a step that is poisoned moves nothing.

    Args:
        model: whose parameters move.
        optimizer: of these parameters.
        combiner: what becomes of the workers' gradients.
        batch: of a step and a worker, both from 0.
        loss: of the model on a batch, a scalar.
        num_steps: how many.
        lr_factor: of a step, on the optimizer's learning rates.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    rates = [group["lr"] for group in optimizer.param_groups]
    num_poisoned, densities = 0, 0.0
    for step in range(num_steps):
        rows = []
        for worker in range(combiner.num_workers):
            found = torch.autograd.grad(loss(model, batch(step, worker)), parameters)
            rows.append(torch.cat([gradient.reshape(-1) for gradient in found]))
        try:
            combined = combiner.combine(torch.stack(rows))
        except PayloadError as error:
            return Outcome(step, num_poisoned, densities / max(1, step), str(error))
        densities += combined.ballot_density
        if combined.poisoned:
            num_poisoned += 1
            continue
        parts = torch.split(combined.direction, [p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter).clone()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * lr_factor(step) * combined.lr_scale
        optimizer.step()
    return Outcome(num_steps, num_poisoned, densities / num_steps, None)
