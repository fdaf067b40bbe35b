"""The optimizers under test, their options, and what their tests train and compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distsign.confidence import AdaptiveConfidence, FixedConfidence, RMSConfidence, TargetDensity
from distsign.optim import SignAdam, SignAdamPP, SignSGD, Signum
from distsign.optim.base import SignOptimizer

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LR = 2.0**-7  # a power of two makes lr * move exact, and so the step the same with and without fused multiply-add

# name: optimizer, options that are not defaults. All of them pass all the contracts.
VARIANTS: dict[str, tuple[type[SignOptimizer], dict[str, Any]]] = {
    "adam": (SignAdam, {}),
    "adam-decay-confidence": (SignAdam, {"weight_decay": 0.125, "confidence": FixedConfidence(0.5)}),
    "pp": (SignAdamPP, {}),
    "pp-no-momentum": (SignAdamPP, {"momentum": 0.0}),
    "pp-decay-maximize": (SignAdamPP, {"weight_decay": 0.1, "maximize": True}),
    "pp-aw": (SignAdamPP, {"weight_decay": 0.1, "confidence": AdaptiveConfidence()}),
    "pp-l2": (SignAdamPP, {"weight_decay": 0.125, "confidence": FixedConfidence(0.5), "decoupled": False}),
    "pp-l2-maximize": (
        SignAdamPP,
        {"weight_decay": 0.125, "confidence": FixedConfidence(0.5), "decoupled": False, "maximize": True},
    ),
    "pp-target-density": (SignAdamPP, {"confidence": TargetDensity(0.2)}),
    "pp-carry": (SignAdamPP, {"momentum": 0.0, "confidence": RMSConfidence(k=3, start=1, warmup_steps=4)}),
    "pp-authors": (SignAdamPP, {"weight_decay": 0.125, "confidence": FixedConfidence(0.5), "authors_code": True}),
    "sgd": (SignSGD, {}),
    "sgd-decay-confidence": (SignSGD, {"weight_decay": 0.1, "confidence": FixedConfidence(0.5)}),
    "signum": (Signum, {"momentum": 0.875}),
    "signum-decay-maximize": (Signum, {"momentum": 0.875, "weight_decay": 0.1, "maximize": True}),
    "signum-confidence": (Signum, {"confidence": FixedConfidence(0.5)}),
    "signum-no-momentum": (Signum, {"momentum": 0.0}),
}
every_variant = pytest.mark.parametrize("name", VARIANTS)
every_optimizer = pytest.mark.parametrize("cls", [SignAdam, SignAdamPP, SignSGD, Signum])


def make_params(dtype: torch.dtype = torch.float32, *, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 7), (), (3,), (0, 4), (17,), (2, 4, 2)]
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_grads(params: Iterable[nn.Parameter], step: int) -> None:
    """Give each parameter a gradient that depends on the step alone; some of its components are zero."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        grad = torch.randn(p.shape, generator=generator)
        p.grad = torch.where(torch.rand(p.shape, generator=generator) < 0.2, 0.0, grad).to(p.dtype)


def build(name: str, params: Any, **more: Any) -> SignOptimizer:
    cls, options = VARIANTS[name]
    return cls(params, **{"lr": LR, **options, **more})  # type: ignore[arg-type]


def train(optimizer: SignOptimizer, params: list[nn.Parameter], steps: Iterable[int]) -> None:
    for step in steps:
        set_grads(params, step)
        optimizer.step()


def bits(optimizer: SignOptimizer) -> list[Tensor]:
    """Everything a step may change, copied."""
    tensors = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            tensors += [
                p.detach().clone(),
                *(optimizer.state[p][k].clone() for k in sorted(optimizer.state.get(p, {}))),
            ]
    return tensors


def assert_same(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def assert_alike(name: str, left: list[Tensor], right: list[Tensor]) -> None:
    """As `assert_same`, but for SignAdam.

    torch.sqrt is correctly rounded in the tail of a tensor and not always in its body, so it depends on the position.
    """
    if not name.startswith("adam"):
        assert_same(left, right)
        return
    for a, b in zip(left, right, strict=True):
        wide = a.dtype in (torch.float32, torch.float64)
        torch.testing.assert_close(a, b, rtol=0, atol=(200 if wide else 8) * torch.finfo(a.dtype).eps)


class FakeVoteState:
    """Stands in for `SignVoteState`: remembers the names, and scales the learning rate by what it is told."""

    def __init__(self, scale: float | Tensor | Callable[[Tensor], float] = 1.0) -> None:
        self.scale = scale
        self.names: dict[str, Tensor] = {}

    def track(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        self.names.update(named_parameters)

    def lr_scale(self, param: Tensor) -> float | Tensor:
        return self.scale(param) if callable(self.scale) else self.scale


def named(params: list[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return [(f"p{i}", p) for i, p in enumerate(params)]


def least_squares(make: Callable[[list[nn.Parameter]], SignOptimizer], num_steps: int) -> list[float]:
    """Fit a linear layer with a cosine schedule, as a user writes it; return the losses."""
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    y = x @ torch.randn(8, 1)
    model = nn.Linear(8, 1)
    optimizer = make(list(model.parameters()))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses
