"""Loss around a trained model along random directions of its filters' own lengths (Li et al., arXiv 1712.09913)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from launch.figures.training import Batch
from launch.tasks import Task

Direction = list[Tensor]


def filter_normalised(model: nn.Module, seed: int) -> Direction:
    """Return a random direction in which each filter is as long as the model's own (Sec. 4).

    A filter is a slice of a weight along its first dimension. Parameters of one dimension, biases and those of norms,
    do not move, as in the authors' code.

    Args:
        model: trained.
        seed: of the direction: the same for models of one shape, up to the filters' lengths.

    Returns:
        A tensor for each parameter.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = []
    for p in model.parameters():
        d = torch.randn(p.shape, generator=generator)
        if p.ndim < 2:
            direction.append(torch.zeros_like(d))
            continue
        lengths = [each.detach().flatten(1).norm(dim=1) for each in (p, d)]
        scale = lengths[0] / lengths[1].clamp(min=1e-12)
        direction.append(d * scale.view(-1, *[1] * (p.ndim - 1)))
    return direction


@dataclass(frozen=True)
class Landscape:
    """Losses around a model.

    Attributes:
        along: distances, in lengths of the filters; the middle one is 0, where the model itself is.
        surface: mean training loss in nats at (along[i], along[j]) of the two directions.
    """

    along: Sequence[float]
    surface: Sequence[Sequence[float]]

    @property
    def slice(self) -> list[float]:
        """The losses along the first direction alone."""
        middle = len(self.along) // 2
        return [row[middle] for row in self.surface]

    @property
    def centre(self) -> float:
        """The loss of the model itself."""
        middle = len(self.along) // 2
        return self.surface[middle][middle]

    def rows(self) -> list[dict[str, float]]:
        """Return a record for each point."""
        return [
            {"first": x, "second": y, "train_loss": self.surface[i][j]}
            for i, x in enumerate(self.along)
            for j, y in enumerate(self.along)
        ]


def distances(points: int, reach: float) -> list[float]:
    """Return evenly spaced distances from -reach to reach, with 0 in the middle.

    Raises:
        ValueError: `points` is even or below 3, or `reach` is not above 0.
    """
    if points < 3 or points % 2 == 0:
        raise ValueError(f"--points must be odd and at least 3, so that the model itself is one of them, got {points}")
    if not reach > 0:
        raise ValueError(f"--reach must be above 0, got {reach:g}")
    return [reach * index / (points // 2) for index in range(-(points // 2), points // 2 + 1)]


@torch.no_grad()
def landscape(
    model: nn.Module, task: Task, batch: Batch, directions: tuple[Direction, Direction], points: int, reach: float = 1.0
) -> Landscape:
    """Return the loss at `w + x d1 + y d2` on a square grid; the model is as it was when this returns.

    Args:
        model: trained, in `eval()`.
        task: its loss.
        batch: all samples that the loss is the mean of.
        directions: see `filter_normalised`.
        points: along each side, odd, so that the model itself is one of them.
        reach: how far to go from it, in lengths of the filters.

    Raises:
        ValueError: see `distances`.
    """
    along = distances(points, reach)
    parameters = list(model.parameters())
    start = [p.clone() for p in parameters]
    try:
        surface = []
        for x in along:
            row = []
            for y in along:
                for p, w, d1, d2 in zip(parameters, start, *directions, strict=True):
                    p.copy_(w + x * d1 + y * d2)
                row.append(task.loss(model, batch).item())
            surface.append(row)
    finally:
        for p, w in zip(parameters, start, strict=True):
            p.copy_(w)
    return Landscape(along, surface)
