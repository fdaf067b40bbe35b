"""Confidence functions: which components of a gradient are sure enough to vote.

A confidence function turns the statistics of one parameter tensor's gradient into one threshold, `alpha`; a component
votes where `abs(g) > alpha`, strictly. The functions here are pure: what they remember between steps is a row of
float64 scalars per parameter tensor (`stats`) that the caller keeps, commits or throws away. All of them work on many
parameter tensors at once, one row each, and on any device without a host synchronisation. What is remembered per
component (carry, mean of squares) belongs to the caller too, `kernels.Memory`.

The idea of confidence is that of signADAM++ (Wang et al., arXiv 1907.09008, Sec. 3.1 and 6.3).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["AdaptiveConfidence", "Confidence", "FixedConfidence", "RMSConfidence", "TargetDensity"]


_LOG_C_BOUND = 20.0


def _require(name: str, value: float, low: float, high: float, meaning: str, *, open_low: bool = False) -> None:
    """Raise a `ValueError` that names the option unless `low <= value < high` (`low < value` if `open_low`)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and (low < value if open_low else low <= value) and value < high):
        raise ValueError(f"{name} must be in {'(' if open_low else '['}{low:g}, {high:g}), got {value!r}: {meaning}")


class Confidence(ABC):
    """Base of the confidence functions.

    Attributes:
        num_stats: float64 scalars remembered per parameter tensor.
        uses_moments: whether `thresholds` reads the gradient's standard deviation, which costs one more pass over it.
        raw_units: whether alpha is given in raw gradient units, so that an unknown loss scale would falsify it.
        requires_carry: whether the function means nothing without a carry at the voter.
        square_decay: decay of the running mean of each component's squared gradient, whose root the gradient is divided
            by before it is added to the carry; None where the gradient is taken as it is.
    """

    num_stats: ClassVar[int]
    uses_moments: ClassVar[bool] = False
    raw_units: ClassVar[bool] = False
    requires_carry: ClassVar[bool] = False

    @property
    def square_decay(self) -> float | None:  # noqa: D102
        return None

    @property
    def fills_budget(self) -> bool:
        """Whether alpha may be steered so that the votes fill a budget; else it is what the user chose."""
        return True

    @property
    def silent_steps(self) -> int:
        """Number of first steps in which hardly anybody votes, so that payloads need no slots."""
        return 0

    def warm_up(self, *, budgeted: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the factors on alpha and on the learning rate, by the clean steps so far; the last ones hold on.

        Args:
            budgeted: whether the number of votes is bounded by a budget.
        """
        del budgeted
        return (1.0,), (1.0,)

    def init_stats(self, num_params: int, device: torch.device | str = "cpu") -> Tensor:
        """Return the stats before the first step, zeros of shape `[num_params, num_stats]`, float64."""
        return torch.zeros(num_params, self.num_stats, dtype=torch.float64, device=device)

    @abstractmethod
    def thresholds(self, stats: Tensor, moments: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return each parameter tensor's alpha for this step, and the stats after it.

        Args:
            stats: float64 `[num_params, num_stats]`, what was kept after the last step. Not changed.
            moments: float64 `[num_params, 2]`, mean and standard deviation (population, not sample) of each parameter
                tensor's gradient in true gradient units; None where `uses_moments` is False.

        Returns:
            `(alpha, stats)`: float64 `[num_params]` in true gradient units, and the new stats.
        """

    def corrections(self, stats: Tensor) -> Tensor | None:
        """Return the bias correction of the root mean square, float64 `[num_params]`; None without `square_decay`.

        Args:
            stats: as `thresholds` returned them.
        """
        del stats
        return None

    def observe(self, stats: Tensor, density: Tensor) -> Tensor:
        """Return the stats after the ballots were counted.

        Args:
            stats: float64 `[num_params, num_stats]` as `thresholds` returned them. Not changed.
            density: float64 `[num_params]`, the share of components that voted, in [0, 1].
        """
        del density
        return stats


@dataclass(frozen=True)
class FixedConfidence(Confidence):
    """Vote where `abs(g) > alpha` for one `alpha` that never changes (arXiv 1907.09008, Algorithm 3).

    Args:
        alpha: threshold in units of the raw gradient, at least 0. `0.0` lets every non-zero component vote.

    Raises:
        ValueError: if `alpha` is negative or not finite.

    Example:
        >>> FixedConfidence(5e-4)
        FixedConfidence(alpha=0.0005)
    """

    alpha: float = 5e-4
    num_stats: ClassVar[int] = 0
    raw_units: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require("alpha", self.alpha, 0.0, math.inf, "components vote where abs(g) > alpha")

    def thresholds(self, stats: Tensor, moments: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: D102
        return stats.new_full((stats.shape[0],), self.alpha), stats


@dataclass(frozen=True)
class AdaptiveConfidence(Confidence):
    r"""Let alpha follow the running standard deviation of each parameter tensor's gradient.

    `s_t = beta1 * s_{t-1} + (1 - beta1) * sqrt(var(g))`, `alpha_t = beta2 * s_t`, with `s_0 = 0`
    (arXiv 1907.09008, Sec. 6.3). The paper does not say over what `var` is taken: here it is the population variance
    over one parameter tensor. Because `s_0 = 0`, the first steps are denser than later ones.

    Args:
        beta1: decay of the running standard deviation, in [0, 1).
        beta2: alpha in units of that standard deviation, at least 0.

    Raises:
        ValueError: if `beta1` or `beta2` is out of range.

    Example:
        >>> AdaptiveConfidence(beta2=2.0)
        AdaptiveConfidence(beta1=0.9, beta2=2.0)
    """

    beta1: float = 0.9
    beta2: float = 1.0
    num_stats: ClassVar[int] = 1
    uses_moments: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require("beta1", self.beta1, 0.0, 1.0, "it is the decay of the running standard deviation")
        _require("beta2", self.beta2, 0.0, math.inf, "alpha is beta2 times the running standard deviation")

    def thresholds(self, stats: Tensor, moments: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: D102
        assert moments is not None, "AdaptiveConfidence needs the gradient's moments"
        s = self.beta1 * stats + (1.0 - self.beta1) * moments[:, 1:]
        return self.beta2 * s[:, 0], s


@dataclass(frozen=True)
class TargetDensity(Confidence):
    """Steer an alpha per parameter tensor until a wanted share of its components votes.

    `alpha_t = c_t * std(g)`, and after the ballots are counted
    `log c_{t+1} = log c_t + gain * clip(log(density_t / target), -2, 2)`. Working in units of the current standard
    deviation lets alpha follow the gradient's scale at once, so the controller only has to learn the shape of its
    distribution. `c_1` is right for a Laplace distribution, `c_1 = -log(target) / sqrt(2)`.

    Args:
        density: wanted share of ballots, in (0, 1).
        gain: how much of the error in log density is corrected per step, in (0, 1). The density falls by 2 to 6 per
            cent for one per cent of alpha, so a gain above 0.3 would oscillate.

    Raises:
        ValueError: if `density` or `gain` is out of range.

    Example:
        >>> TargetDensity(0.05)
        TargetDensity(density=0.05, gain=0.15)
    """

    density: float = 0.1
    gain: float = 0.15
    num_stats: ClassVar[int] = 1
    uses_moments: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require("density", self.density, 0.0, 1.0, "it is the wanted share of components that vote", open_low=True)
        _require("gain", self.gain, 0.0, 1.0, "it is the share of the error corrected per step", open_low=True)

    def init_stats(self, num_params: int, device: torch.device | str = "cpu") -> Tensor:  # noqa: D102
        log_c = math.log(-math.log(self.density) / math.sqrt(2.0))
        return torch.full((num_params, 1), log_c, dtype=torch.float64, device=device)

    def thresholds(self, stats: Tensor, moments: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: D102
        assert moments is not None, "TargetDensity needs the gradient's moments"
        return stats[:, 0].exp() * moments[:, 1], stats

    def observe(self, stats: Tensor, density: Tensor) -> Tensor:  # noqa: D102
        # log(0) is -inf, which the clamp turns into the largest step towards more ballots.
        error = (density.log() - math.log(self.density)).clamp(-2.0, 2.0)
        # A tensor of one element has no spread and always votes: without a bound its c would grow for ever.
        return (stats + self.gain * error[:, None]).clamp(-_LOG_C_BOUND, _LOG_C_BOUND)


@dataclass(frozen=True)
class RMSConfidence(Confidence):
    r"""Vote when the gradients that have gathered, each divided by its root mean square, pass k.

    Per component, at each worker: `v = decay * v + (1 - decay) * g * g` (bias-corrected), `r += g / sqrt(v)`, and where
    `abs(r) > k`: a ballot `sign(r)`, then `r = 0`. `r` is the carry, in units of each component's own root mean square
    as in Adam (Kingma and Ba, arXiv 1412.6980), without which nothing would ever pass: `abs(g) / sqrt(v)` is at most
    about 10. A verdict then stands for about k steps of Adam, so that
    `lr = margin * k * lr_adam / sqrt(world_size)` is a good start.

    Early gradients agree, and all components would vote at once. Without a budget k therefore warms up,
    `k_t = start * (k / start) ** min(1, t / warmup_steps)` after t clean steps, and the learning rate is scaled by
    `k_t / k` alike (`SignVoteState.lr_scale`): early steps are denser and smaller. Under a budget, which bounds the
    density, k stays, and the learning rate grows linearly over `ramp_steps`. What passed k and did not fit is forgotten
    there (`r = 0`): kept, it would queue for hundreds of steps, and stale votes keep a model from learning (measured,
    see README).

    Args:
        k: threshold in root mean squares, above 0. The density of ballots falls as about `1 / k**2`.
        decay: of the running mean of squares, in [0, 1).
        start: k at the first step, above 0; k itself where it is larger.
        warmup_steps: clean steps until k is reached, at least 0.
        ramp_steps: under a budget, clean steps until the learning rate is reached, at least 1.

    Raises:
        ValueError: if an option is out of range.

    Example:
        >>> RMSConfidence(k=16)
        RMSConfidence(k=16, decay=0.99, start=4.0, warmup_steps=200, ramp_steps=50)
    """

    k: float = 24.0
    decay: float = 0.99
    start: float = 4.0
    warmup_steps: int = 200
    ramp_steps: int = 50
    num_stats: ClassVar[int] = 1  # steps of this parameter so far
    requires_carry: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require("k", self.k, 0.0, math.inf, "it is the threshold in root mean squares", open_low=True)
        _require("decay", self.decay, 0.0, 1.0, "it is the decay of the mean of squares")
        _require("start", self.start, 0.0, math.inf, "it is the threshold of the first step", open_low=True)
        _require("warmup_steps", self.warmup_steps, 0, 1e6, "it is a number of steps")
        _require("ramp_steps", self.ramp_steps, 1, 1e6, "it is a number of steps")

    @property
    def square_decay(self) -> float:  # noqa: D102
        return self.decay

    @property
    def fills_budget(self) -> bool:  # noqa: D102
        return False

    @property
    def silent_steps(self) -> int:  # noqa: D102
        # A gradient that stays as it is adds 1 a step, and passes a threshold of 4 in the fifth one; in the fourth,
        # where it grows meanwhile, as many do.
        first = min(self.start, self.k) if self.warmup_steps else self.k
        return max(0, math.ceil(first) - 1)

    def warm_up(self, *, budgeted: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:  # noqa: D102
        if budgeted:
            num = int(self.ramp_steps)
            return (1.0,), tuple((t + 1) / num for t in range(num))
        num, first = int(self.warmup_steps), min(1.0, self.start / self.k)
        factors = (*(first ** (1.0 - t / num) for t in range(num)), 1.0)
        return factors, factors

    def thresholds(self, stats: Tensor, moments: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: D102
        del moments
        return stats.new_full((stats.shape[0],), self.k), stats + 1.0

    def corrections(self, stats: Tensor) -> Tensor:  # noqa: D102
        return (1.0 - self.decay ** stats[:, 0]).sqrt()
