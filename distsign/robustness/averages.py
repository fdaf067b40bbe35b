"""Rules that combine gradients as numbers: the rivals of a vote, small and slow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distsign.robustness.attacks import Attack, View
from distsign.robustness.electorate import Combined

__all__ = ["RULES", "Averages", "coordinate_median", "mean", "trimmed_mean"]


def mean(gradients: Tensor, num_liars: int) -> Tensor:
    """Return the mean over the workers, which one liar can move anywhere; gradients are float32 `[workers, n]`."""
    del num_liars
    return gradients.mean(0)


def trimmed_mean(gradients: Tensor, num_liars: int) -> Tensor:
    """Return the mean without the `num_liars` smallest and largest of each component (Yin et al., arXiv 1803.01498).

    NaN counts as the largest. At most `(workers - 1) // 2` are cut off on either side.

    Example:
        >>> trimmed_mean(torch.tensor([[1.0], [2.0], [3.0], [900.0], [-5.0]]), 1)
        tensor([2.])
    """
    num_workers = gradients.shape[0]
    cut = min(num_liars, (num_workers - 1) // 2)
    return gradients.sort(0).values[cut : num_workers - cut].mean(0)


def coordinate_median(gradients: Tensor, num_liars: int) -> Tensor:
    """Return the median of each component, of the two in the middle their mean (Yin et al., arXiv 1803.01498)."""
    del num_liars
    num_workers = gradients.shape[0]
    return gradients.sort(0).values[(num_workers - 1) // 2 : num_workers // 2 + 1].mean(0)


RULES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "mean": mean,
    "trimmed-mean": trimmed_mean,
    "median": coordinate_median,
}
"""Rules by name."""


class Averages:
    """Combine gradients by a rule of `RULES`, the last `num_liars` workers' being lies.

    Args:
        rule: of float32 `[workers, n]` and the number of liars, which it is told.
        num_workers: in all.
        num_liars: of them.
        attack: what these do.
        seed: of what is random in it.
    """

    def __init__(
        self, rule: Callable[[Tensor, int], Tensor], num_workers: int, num_liars: int, attack: Attack, *, seed: int = 0
    ) -> None:
        self._rule = rule
        self.num_workers, self.num_liars = num_workers, num_liars
        self._attack = attack
        self._generator = torch.Generator().manual_seed(seed)
        self._step = 0
        self._last: Tensor | None = None

    def combine(self, gradients: Tensor) -> Combined:
        """Return what all workers step along; gradients are float32 `[num_workers, n]`, those of the liars true."""
        h = self.num_workers - self.num_liars
        signs = gradients.sign().to(torch.int8)
        last = torch.zeros_like(signs[0]) if self._last is None else self._last
        view = View(self._step, signs[h:], gradients[h:], signs[:h], gradients[:h], last, self._generator)
        sent = torch.cat([gradients[:h], self._attack.gradients(view)]) if self.num_liars else gradients
        found = self._rule(sent, self.num_liars)
        self._step += 1
        self._last = found.nan_to_num(0.0).sign().to(torch.int8)
        return Combined(found, poisoned=not bool(found.isfinite().all()), lr_scale=1.0)
