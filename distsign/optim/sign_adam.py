"""signADAM and signADAM++ (Wang et al., arXiv 1907.09008)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from distsign.confidence import Confidence
from distsign.optim.arithmetic import blend_
from distsign.optim.base import SignOptimizer
from distsign.optim.options import Group, VoteState, check_flag, check_number

__all__ = ["SignAdam", "SignAdamPP"]


class SignAdam(SignOptimizer):
    r"""Divide an average of signs by the root of the average of their squares, as Adam does with gradients.

    `m = b1 * m + (1 - b1) * d`, `v = b2 * v + (1 - b2) * d * d`, `p -= lr * m / (sqrt(v) + eps)`, where
    `d = sign(grad)` and `m = v = 0` before the first step (arXiv 1907.09008, Algorithm 2).

    There is no bias correction, as published. Where `d` was never 0, `v = 1 - b2**k` after k steps, so that `m` is
    divided by about 1/31 at first and by about 1 later. As `m` starts from 0 as well, steps grow to 6.6 learning rates
    within the first dozen and then shrink to one: warm the learning rate up, or use `SignAdamPP`, which drops `v`.

    Args:
        params: parameters, `model.named_parameters()` or param groups.
        lr: length of a step in units of the parameters, at least 0; a number or a tensor of one.
        betas: `(b1, b2)`, decays of the two averages, each in [0, 1).
        eps: added to the root, at least 1e-30, below which 0/0 could arise in float32.
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
        >>> optimizer = SignAdam([p], lr=0.01)
        >>> p.grad = torch.tensor([0.3, -7.0, 0.0])
        >>> optimizer.step()
        >>> p.data  # the first step is 0.1 / sqrt(0.001) = 3.16 learning rates long
        tensor([0.9684, 1.0316, 1.0000])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled: bool = True,
        confidence: Confidence | None = None,
        maximize: bool = False,
        vote_state: VoteState | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled": decoupled,
            "confidence": confidence,
            "maximize": maximize,
        }
        super().__init__(params, defaults, vote_state)

    def _check_options(self, group: Group) -> None:
        super()._check_options(group)
        check_number(self._label, "eps", group["eps"], "it keeps m / (sqrt(v) + eps) from being 0/0", at_least=1e-30)
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"{self._label}: betas must be two numbers in [0, 1), got {betas!r}: pass (0.9, 0.999)")
        for index, meaning in enumerate(("the decay of the average of d", "the decay of the average of d * d")):
            check_number(self._label, f"betas[{index}]", betas[index], f"it is {meaning}", below=1.0)

    def _average_names(self, group: Group) -> tuple[str, ...]:
        del group
        return ("exp_avg", "exp_avg_sq")

    def _move(self, group: Group, d: list[Tensor], averages: list[list[Tensor]], ok: Tensor | None) -> list[Tensor]:
        m, v = averages
        b1, b2 = group["betas"]
        blend_(m, d, b1, ok)
        blend_(v, list(torch._foreach_abs(d)), b2, ok)  # abs(d) = d * d
        denominator = torch._foreach_sqrt(v)
        torch._foreach_add_(denominator, group["eps"])
        return list(torch._foreach_div(m, denominator))


class SignAdamPP(SignOptimizer):
    r"""Step along an average of confident signs: signADAM++, and signADAM++-AW with adaptive confidence and decay.

    `m = momentum * m + (1 - momentum) * d`, `p -= lr * m`, where `m = 0` before the first step and `d` is `sign(grad)`
    where `abs(grad) > alpha`, else 0 (arXiv 1907.09008, Algorithm 3). Under DDP the hook has applied alpha already, and
    `d` is the verdict. `momentum=0` keeps no average.

    signADAM++-AW (Sec. 6.3) is `confidence=AdaptiveConfidence()` with a `weight_decay`, which is decoupled by default.

    Args:
        params: parameters, `model.named_parameters()` or param groups.
        lr: length of a step in units of the parameters, at least 0; a number or a tensor of one.
        momentum: decay of the average, in [0, 1).
        weight_decay: at least 0. Decoupled, `p -= lr * weight_decay * p`.
        decoupled: False adds `weight_decay * p` to the raw gradient before the confidence instead.
        confidence: None where the gradient is a verdict or plain signs are wanted. On one worker, the map from the raw
            gradient to ballots.
        maximize: move along the gradient, not against it.
        authors_code: step as the authors' public code does, not as their Algorithm 3: along `d` itself, whatever the
            momentum, with weight decay as L2 whatever `decoupled` says. Their code fills a momentum buffer that it
            never reads; none is kept here. Equal bit for bit in float32. Their settings for CIFAR-100:
            `lr=3e-4, weight_decay=5e-4, confidence=FixedConfidence(5e-4)`.
        vote_state: the `SignVoteState` of the hook, which then learns the parameters' names and scales `lr`.

    Raises:
        ValueError: if an option is out of range, `decoupled=False` comes without a confidence, confidence and vote
            state come together, or a parameter is complex or not floating-point.

    Example:
        >>> from distsign.confidence import FixedConfidence
        >>> p = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
        >>> optimizer = SignAdamPP([p], lr=0.01, momentum=0.0, confidence=FixedConfidence(0.5))
        >>> p.grad = torch.tensor([0.3, -7.0, 0.6])
        >>> optimizer.step()
        >>> p.data
        tensor([1.0000, 1.0100, 0.9900])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        decoupled: bool = True,
        confidence: Confidence | None = None,
        maximize: bool = False,
        authors_code: bool = False,
        vote_state: VoteState | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "decoupled": decoupled,
            "confidence": confidence,
            "maximize": maximize,
            "authors_code": authors_code,
        }
        super().__init__(params, defaults, vote_state)

    def _check_options(self, group: Group) -> None:
        super()._check_options(group)
        check_number(self._label, "momentum", group["momentum"], "it is the decay of the average of d", below=1.0)
        check_flag(self._label, "authors_code", group["authors_code"])

    def _adds_l2(self, group: Group) -> bool:
        return super()._adds_l2(group) or bool(group["authors_code"] and group["weight_decay"])

    def _average_names(self, group: Group) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] and not group["authors_code"] else ()

    def _move(self, group: Group, d: list[Tensor], averages: list[list[Tensor]], ok: Tensor | None) -> list[Tensor]:
        if not averages:
            return d
        (m,) = averages
        blend_(m, d, group["momentum"], ok)
        return m
