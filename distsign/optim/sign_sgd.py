"""SIGN-SGD and SIGNUM (Bernstein et al., arXiv 1802.04434)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from distsign.confidence import Confidence
from distsign.optim.arithmetic import blend_
from distsign.optim.base import SignOptimizer
from distsign.optim.options import Group, VoteState, check_number

__all__ = ["SignSGD", "Signum"]


class SignSGD(SignOptimizer):
    r"""Step by `lr` against the sign of the gradient.

    `p -= lr * (d + weight_decay * p)`, where `d = sign(grad)` (arXiv 1802.04434, Algorithm 1). It keeps no state of its
    own.

    Args:
        params: parameters, `model.named_parameters()` or param groups.
        lr: length of a step in units of the parameters, at least 0; a number or a tensor of one.
        weight_decay: at least 0. Decoupled, `p -= lr * weight_decay * p`.
        decoupled: False adds `weight_decay * p` to the raw gradient before the confidence instead.
        confidence: None where the gradient is a verdict or plain signs are wanted. On one worker, the map from the raw
            gradient to ballots.
        maximize: move along the gradient, not against it.
        vote_state: the `SignVoteState` of the hook, which then learns the parameters' names and scales `lr`.

    Raises:
        ValueError: if an option is out of range, `decoupled=False` comes without a confidence, confidence and vote
            state come together, or a parameter is complex or not floating-point.

    Example:
        >>> p = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
        >>> optimizer = SignSGD([p], lr=0.01)
        >>> p.grad = torch.tensor([0.3, -7.0, 0.0])
        >>> optimizer.step()
        >>> p.data
        tensor([0.9900, 1.0100, 1.0000])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        weight_decay: float = 0.0,
        *,
        decoupled: bool = True,
        confidence: Confidence | None = None,
        maximize: bool = False,
        vote_state: VoteState | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "decoupled": decoupled,
            "confidence": confidence,
            "maximize": maximize,
        }
        super().__init__(params, defaults, vote_state)

    def _average_names(self, group: Group) -> tuple[str, ...]:
        del group
        return ()

    def _move(self, group: Group, d: list[Tensor], averages: list[list[Tensor]], ok: Tensor | None) -> list[Tensor]:
        del group, averages, ok
        return d


class Signum(SignOptimizer):
    r"""Step by `lr` against the sign of the average gradient.

    `m = momentum * m + (1 - momentum) * grad`, `p -= lr * (sign(m) + weight_decay * p)`, where `m = 0` before the first
    step (arXiv 1802.04434, Algorithm 2). `momentum=0` is `SignSGD` and keeps no average.

    Unlike the other optimizers it averages gradients before it takes a sign, as published, so that clipping changes how
    much each of them counts. Where the gradient is a verdict, which the optimizer knows from `vote_state`, or becomes
    ballots by a `confidence`, it averages their signs, and clipping changes nothing.

    Args:
        params: parameters, `model.named_parameters()` or param groups.
        lr: length of a step in units of the parameters, at least 0; a number or a tensor of one.
        momentum: decay of the average, in [0, 1).
        weight_decay: at least 0. Decoupled, `p -= lr * weight_decay * p`.
        decoupled: False adds `weight_decay * p` to the raw gradient before the confidence instead.
        confidence: None where the gradient is a verdict or its plain average is wanted. On one worker, the map from the
            raw gradient to ballots.
        maximize: move along the gradient, not against it.
        vote_state: the `SignVoteState` of the hook, which then learns the parameters' names and scales `lr`.

    Raises:
        ValueError: if an option is out of range, `decoupled=False` comes without a confidence, confidence and vote
            state come together, or a parameter is complex or not floating-point.

    Example:
        >>> p = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = Signum([p], lr=0.01)
        >>> for grad in ([5.0, 1.0], [-1.0, -2.0]):
        ...     p.grad = torch.tensor(grad)
        ...     optimizer.step()
        >>> p.data  # in the first component the large gradient outweighs the small one after it
        tensor([0.9800, 1.0000])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        decoupled: bool = True,
        confidence: Confidence | None = None,
        maximize: bool = False,
        vote_state: VoteState | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "decoupled": decoupled,
            "confidence": confidence,
            "maximize": maximize,
        }
        super().__init__(params, defaults, vote_state)

    def _check_options(self, group: Group) -> None:
        super()._check_options(group)
        check_number(self._label, "momentum", group["momentum"], "it is the decay of the average gradient", below=1.0)

    def _averages_gradients(self, group: Group) -> bool:
        return bool(group["momentum"]) and group["confidence"] is None and self._vote_state is None

    def _average_names(self, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _move(self, group: Group, d: list[Tensor], averages: list[list[Tensor]], ok: Tensor | None) -> list[Tensor]:
        if not averages:
            return d
        (m,) = averages
        blend_(m, d, group["momentum"], ok)
        return list(torch._foreach_sign(m))
