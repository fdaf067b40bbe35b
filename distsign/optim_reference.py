"""The optimizers once more, slowly and in the papers' notation: what the fast ones are held against.

One component at a time, one operation at a time, in Python floats that are rounded to the wanted dtype after each
operation. (A float64 result of +, -, *, / or sqrt on float32 numbers, rounded to float32, is the correctly rounded
float32 result, so this is IEEE arithmetic in either precision.) No parameter groups, no skipped steps, no checkpoints.

theta is the parameter, g the gradient, delta the learning rate, lambda_ the weight decay, as in the papers.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = [
    "SignAdamPPReference",
    "SignAdamReference",
    "SignSGDReference",
    "SignumReference",
    "round_to_float32",
    "sign",
]

Confidence = Callable[[Sequence[float]], float]
Rounding = Callable[[float], float]


def round_to_float32(x: float) -> float:
    """Return the float32 number nearest to `x`.

    Example:
        >>> round_to_float32(0.1)
        0.10000000149011612
    """
    return ctypes.c_float(x).value


def sign(x: float) -> float:
    """Return -1.0, 0.0 or +1.0; 0.0 for both zeros."""
    return float(x > 0) - float(x < 0)


@dataclass(kw_only=True)
class _Reference:
    """What the references share: the confident direction and the decoupled decay.

    Args:
        theta: the parameter, already rounded. Kept, and changed in place by `step`.
        delta: learning rate.
        lambda_: weight decay.
        l2: whether decay is added to the gradient, `g + lambda_ * theta`, or taken off the parameter, AW style.
        alpha: confidence factor: None or a number, or a function of the gradient that returns it.
        fl: rounding after each operation; `float` rounds nothing in float64.
    """

    theta: list[float]
    delta: float
    lambda_: float = 0.0
    l2: bool = False
    alpha: float | Confidence | None = None
    fl: Rounding = float

    def direction(self, g: Sequence[float]) -> list[float]:
        """Return d: sign(g_i) where abs(g_i) > alpha, else 0."""
        fl = self.fl
        if self.l2:
            g = [fl(g_i + fl(fl(self.lambda_) * theta_i)) for g_i, theta_i in zip(g, self.theta, strict=True)]
        if self.alpha is None:
            return [sign(g_i) for g_i in g]
        alpha = self.alpha(g) if callable(self.alpha) else self.alpha
        return [sign(g_i) if abs(g_i) > alpha else 0.0 for g_i in g]

    def average(self, old: float, beta: float, new: float) -> float:
        """Return beta * old + (1 - beta) * new."""
        fl = self.fl
        return fl(fl(fl(beta) * old) + fl(fl(1.0 - beta) * new))

    def descend(self, i: int, step: float) -> None:
        """Take the decoupled decay, and then `delta * step`, off theta_i."""
        fl = self.fl
        if self.lambda_ and not self.l2:
            self.theta[i] = fl(self.theta[i] * fl(1.0 - self.delta * self.lambda_))
        self.theta[i] = fl(self.theta[i] - fl(fl(self.delta) * step))


@dataclass(kw_only=True)
class SignAdamReference(_Reference):
    """signADAM, arXiv 1907.09008, Algorithm 2.

    `m_k = b1 m_{k-1} + (1-b1) d_k`, `v_k = b2 v_{k-1} + (1-b2) d_k^2`,
    `theta_{k+1} = theta_k - delta m_k / (sqrt(v_k) + eps)`.

    Example:
        >>> reference = SignAdamReference(theta=[1.0], delta=0.01)
        >>> reference.step([0.3])
        >>> round(reference.theta[0], 4)
        0.9684
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        self.m = [0.0] * len(self.theta)
        self.v = [0.0] * len(self.theta)

    def step(self, g: Sequence[float]) -> None:
        """Move theta once, in place."""
        fl = self.fl
        for i, d in enumerate(self.direction(g)):
            self.m[i] = self.average(self.m[i], self.b1, d)
            self.v[i] = self.average(self.v[i], self.b2, d * d)
            self.descend(i, fl(self.m[i] / fl(fl(math.sqrt(self.v[i])) + fl(self.eps))))


@dataclass(kw_only=True)
class SignAdamPPReference(_Reference):
    """signADAM++, arXiv 1907.09008, Algorithm 3.

    `m_k = beta m_{k-1} + (1-beta) d_k`, `theta_{k+1} = theta_k - delta m_k`.

    Example:
        >>> reference = SignAdamPPReference(theta=[1.0, 1.0], delta=0.01, alpha=0.5)
        >>> reference.step([0.3, 0.7])
        >>> reference.theta
        [1.0, 0.999]
    """

    beta: float = 0.9

    def __post_init__(self) -> None:
        self.m = [0.0] * len(self.theta)

    def step(self, g: Sequence[float]) -> None:
        """Move theta once, in place."""
        for i, d in enumerate(self.direction(g)):
            self.m[i] = self.average(self.m[i], self.beta, d)
            self.descend(i, self.m[i])


@dataclass(kw_only=True)
class SignSGDReference(_Reference):
    """SIGN-SGD, arXiv 1802.04434, Algorithm 1: `x_{k+1} = x_k - delta sign(g_k)`.

    Example:
        >>> reference = SignSGDReference(theta=[1.0], delta=0.25)
        >>> reference.step([-3.0])
        >>> reference.theta
        [1.25]
    """

    def step(self, g: Sequence[float]) -> None:
        """Move theta once, in place."""
        for i, d in enumerate(self.direction(g)):
            self.descend(i, d)


@dataclass(kw_only=True)
class SignumReference(_Reference):
    """SIGNUM, arXiv 1802.04434, Algorithm 2.

    `m_{k+1} = beta m_k + (1-beta) g_k`, `x_{k+1} = x_k - delta (sign(m_{k+1}) + lambda_ x_k)`. With an alpha it
    averages ballots in place of gradients.

    Example:
        >>> reference = SignumReference(theta=[1.0], delta=0.25)
        >>> reference.step([5.0])
        >>> reference.step([-1.0])
        >>> reference.theta
        [0.5]
    """

    beta: float = 0.9

    def __post_init__(self) -> None:
        self.m = [0.0] * len(self.theta)

    def step(self, g: Sequence[float]) -> None:
        """Move theta once, in place."""
        for i, d in enumerate(g if self.alpha is None else self.direction(g)):
            self.m[i] = self.average(self.m[i], self.beta, d)
            self.descend(i, sign(self.m[i]))
