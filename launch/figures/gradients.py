"""What a confidence keeps of gradients: the paper's figures 3 (remaining ratio) and 5 (sparsity against epochs)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from launch.figures.training import Batch
from launch.tasks import Task
from launch.train import Trainer


@dataclass(frozen=True)
class RemainingRatio:
    """What remains of a sample's gradient against alpha, means over samples.

    Attributes:
        alphas: in gradient units.
        correct: of the samples that the model classifies rightly, at each alpha; NaN where there are none.
        wrong: of the others.
        num_correct: samples.
        num_wrong: samples.
    """

    alphas: Sequence[float]
    correct: Sequence[float]
    wrong: Sequence[float]
    num_correct: int
    num_wrong: int

    def rows(self) -> list[dict[str, float]]:
        """Return a record for each alpha."""
        columns = zip(self.alphas, self.correct, self.wrong, strict=True)
        return [{"alpha": alpha, "correct": correct, "wrong": wrong} for alpha, correct, wrong in columns]


def remaining_ratio(model: nn.Module, task: Task, batch: Batch, alphas: Sequence[float]) -> RemainingRatio:
    """Return `||g where |g| > alpha||_2 / ||g||_2` of each sample's gradient over all parameters (paper, Sec. 3.1).

    The fraction that the paper prints is upside down against its own figure.

    Args:
        model: that classifies, in the state that is wanted (trained, `eval()`).
        task: its loss.
        batch: samples and their classes.
        alphas: at least one, each 0 or more.
    """
    by_sample: dict[bool, list[Tensor]] = {True: [], False: []}
    inputs, targets = batch
    parameters = [p for p in model.parameters() if p.requires_grad]
    for x, y in zip(torch.split(inputs, 1), torch.split(targets, 1), strict=True):
        gradients = torch.autograd.grad(task.loss(model, (x, y)), parameters)
        with torch.no_grad():
            g = torch.cat([each.flatten() for each in gradients]).double().abs()
            norm = g.norm()
            if norm == 0:  # a loss of exactly zero in float32: there is nothing that could remain
                continue
            is_correct = bool(model(x).argmax(dim=1) == y)
            kept = [g[g > alpha].norm() / norm for alpha in alphas]
            by_sample[is_correct].append(torch.stack(kept))
    means = {
        key: torch.stack(each).mean(dim=0) if each else torch.full((len(alphas),), float("nan"))
        for key, each in by_sample.items()
    }
    return RemainingRatio(
        *(list(alphas), means[True].tolist(), means[False].tolist()), len(by_sample[True]), len(by_sample[False])
    )


@dataclass
class SparsityMeter:
    """The share of components without a ballot, per parameter and epoch; call it before each step of the optimizer.

    Under the hook of one rank the gradients are that rank's ballots themselves.

    Attributes:
        zeros: for each epoch (from 0) and parameter: sum over its steps of the share of zeros.
        num_steps: of each epoch.
        sizes: number of elements by parameter.
    """

    zeros: dict[int, dict[str, float]] = field(default_factory=dict)
    num_steps: dict[int, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def __call__(self, trainer: Trainer) -> None:
        """Add the gradients of this step."""
        epoch = trainer.progress.step // trainer.steps_per_epoch
        sums = self.zeros.setdefault(epoch, {})
        self.num_steps[epoch] = self.num_steps.get(epoch, 0) + 1
        for name, p in trainer.net.named_parameters():
            assert p.grad is not None
            self.sizes[name] = p.numel()
            sums[name] = sums.get(name, 0.0) + (p.grad == 0).double().mean().item()

    def rows(self) -> list[dict[str, float]]:
        """Return a record for each epoch: overall, and each parameter by its name."""
        total = sum(self.sizes.values())
        records = []
        for epoch, sums in sorted(self.zeros.items()):
            means = {name: value / self.num_steps[epoch] for name, value in sums.items()}
            overall = sum(means[name] * size for name, size in self.sizes.items()) / total
            records.append({"epoch": epoch + 1.0, "overall": overall, **means})
        return records
