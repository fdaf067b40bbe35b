"""Every optimizer beside `distsign.optim_reference`, which says what the right numbers are, slowly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distsign.confidence import AdaptiveConfidence, FixedConfidence, RMSConfidence
from distsign.optim import SignAdam, SignAdamPP, SignSGD, Signum
from distsign.optim.base import SignOptimizer
from distsign.optim_reference import (
    SignAdamPPReference,
    SignAdamReference,
    SignSGDReference,
    SignumReference,
    round_to_float32,
)
from tests.optim_cases import (
    FLOATS,
    VARIANTS,
    assert_alike,
    assert_same,
    build,
    make_params,
    set_grads,
)


def reference_for(optimizer: SignOptimizer, p: nn.Parameter, fl: Callable[[float], float]) -> Any:
    (group,) = optimizer.param_groups
    confidence = group["confidence"]
    common: dict[str, Any] = {
        "theta": p.detach().double().flatten().tolist(),
        "delta": group["lr"],
        "lambda_": group["weight_decay"],
        "l2": not group["decoupled"] or group.get("authors_code", False),
        "fl": fl,
    }
    if isinstance(confidence, FixedConfidence):
        common["alpha"] = confidence.alpha
    elif isinstance(confidence, AdaptiveConfidence):
        common["alpha"] = adaptive_alpha(confidence)
    if isinstance(optimizer, SignAdam):
        return SignAdamReference(b1=group["betas"][0], b2=group["betas"][1], eps=group["eps"], **common)
    if isinstance(optimizer, SignSGD):
        return SignSGDReference(**common)
    momentum = 0.0 if group.get("authors_code") else group["momentum"]
    return (SignumReference if isinstance(optimizer, Signum) else SignAdamPPReference)(beta=momentum, **common)


def adaptive_alpha(confidence: AdaptiveConfidence) -> Callable[[Iterable[float]], float]:
    s = 0.0

    def alpha(g: Iterable[float]) -> float:
        nonlocal s
        values = torch.tensor(list(g), dtype=torch.float64)
        if values.any():
            s = confidence.beta1 * s + (1 - confidence.beta1) * float(values.std(correction=0))
        return confidence.beta2 * s

    return alpha


@pytest.mark.usefixtures("small_tiles", "decided_on")
@pytest.mark.parametrize(
    ("dtype", "decided_on"),
    [*((d, "host") for d in FLOATS), (torch.float32, "device")],
    ids=str,
    indirect=["decided_on"],
)
@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in {"pp-target-density", "pp-carry"}])
def test_a_hundred_steps_equal_the_reference(name: str, dtype: torch.dtype) -> None:
    """Bit for bit, but for SignAdam, whose vectorised square root may be off by one in the last place.

    Averages and the step are float32, or float64, and a half-precision parameter is rounded once a step.
    """
    params = make_params(dtype)[1:5]
    optimizer = build(name, params)
    fl = float if dtype == torch.float64 else round_to_float32
    references = [reference_for(optimizer, p, fl) for p in params]
    sign = -1.0 if optimizer.param_groups[0]["maximize"] else 1.0
    for step in range(100):
        set_grads(params, step)
        for p, reference in zip(params, references, strict=True):
            reference.step((sign * p.grad.double()).flatten().tolist())
            if dtype in (torch.float16, torch.bfloat16):
                reference.theta = torch.tensor(reference.theta).to(dtype).tolist()
        optimizer.step()
    for p, reference in zip(params, references, strict=True):
        assert_alike(name, [p.detach().flatten()], [torch.tensor(reference.theta, dtype=dtype)])


class CarryReference:
    """`RMSConfidence` and the step, one component at a time: `optim_reference` has the rest."""

    def __init__(self, theta: list[float], lr: float, confidence: RMSConfidence) -> None:
        self.theta, self.lr, self.confidence = theta, lr, confidence
        self.v, self.r = [0.0] * len(theta), [0.0] * len(theta)
        self.num_steps = self.num_clean_steps = 0

    def step(self, g: list[float]) -> None:
        fl, c = round_to_float32, self.confidence
        share = (c.start / c.k) ** (1 - min(1.0, self.num_clean_steps / c.warmup_steps))
        self.num_clean_steps += 1
        if not any(g):
            return
        self.num_steps += 1
        correction = fl(math.sqrt(1 - c.decay**self.num_steps))
        for i, g_i in enumerate(g):
            self.v[i] = fl(fl(fl(c.decay) * self.v[i]) + fl(fl(1 - c.decay) * fl(g_i * g_i)))
            if self.v[i] > 1e-30:
                self.r[i] = fl(self.r[i] + fl(fl(g_i * correction) / fl(math.sqrt(self.v[i]))))
            if abs(self.r[i]) > fl(c.k * share):
                self.theta[i] = fl(self.theta[i] - fl(self.lr * share) * math.copysign(1.0, self.r[i]))
                self.r[i] = 0.0


@pytest.mark.usefixtures("small_tiles", "decided_on")
def test_fifty_steps_with_a_carry_equal_the_reference() -> None:
    """With dead components, parameters that are idle now and then, and steps that are skipped."""
    confidence = RMSConfidence(k=5, decay=0.9, start=1.5, warmup_steps=20)
    params = make_params()
    optimizer = SignAdamPP(params, lr=1e-3, momentum=0.0, confidence=confidence)
    references = [CarryReference(p.detach().flatten().tolist(), 1e-3, confidence) for p in params]
    started = [p.detach().clone() for p in params]
    for step in range(50):
        set_grads(params, step)
        params[0].grad[0].zero_()  # type: ignore[index]
        params[5].grad *= 1e-20  # type: ignore[operator]
        if step % 7 == 3:
            params[4].grad.zero_()  # type: ignore[union-attr]
        if step % 10 == 5:
            params[2].grad[1] = math.nan  # type: ignore[index]
        else:
            for p, reference in zip(params, references, strict=True):
                reference.step(p.grad.flatten().tolist())  # type: ignore[union-attr]
        optimizer.step()
    for p, reference, start in zip(params, references, started, strict=True):
        assert p.detach().flatten().tolist() == reference.theta
        if p.numel():
            state = optimizer.state[p]
            assert state["carry"].flatten().tolist() == reference.r
            assert state["square"].flatten().tolist() == reference.v
            assert state["confidence"].tolist() == [reference.num_steps]
            # Squares of 1e-20 are dead.
            assert torch.equal(p.detach(), start) == (p is params[5])
    assert torch.equal(params[0][0], started[0][0])


@pytest.mark.parametrize("cls", [SignAdam, SignAdamPP, SignSGD, Signum])
def test_published_settings_equal_the_reference(cls: type[SignOptimizer]) -> None:
    """With lr = 1e-3 the product lr * move is inexact and may be fused with the sum: one rounding a step apart."""
    params = make_params()
    optimizer = cls(params, lr=1e-3, weight_decay=0.01)  # type: ignore[arg-type, call-arg]
    references = [reference_for(optimizer, p, round_to_float32) for p in params]
    for step in range(100):
        set_grads(params, step)
        for p, reference in zip(params, references, strict=True):
            reference.step(p.grad.double().flatten().tolist())
        optimizer.step()
    for p, reference in zip(params, references, strict=True):
        expected = torch.tensor(reference.theta)
        torch.testing.assert_close(p.detach().flatten(), expected, rtol=0, atol=100 * 2.0**-23)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 5e-4])
def test_authors_code_step_for_step(dtype: torch.dtype, momentum: float, weight_decay: float) -> None:
    """Their step: L2 into the gradient, a threshold, a momentum buffer that is filled and not used."""
    lr, threshold = 3e-4, 0.3
    params, theirs = make_params(dtype), [p.detach().clone() for p in make_params(dtype)]
    buffers: list[Tensor | None] = [None] * len(theirs)
    optimizer = SignAdamPP(params, lr, momentum, weight_decay, confidence=FixedConfidence(threshold), authors_code=True)
    for step in range(100):
        set_grads(params, step)
        for i, (p, x) in enumerate(zip(params, theirs, strict=True)):
            d = p.grad.clone()  # type: ignore[union-attr]
            if weight_decay != 0:
                d.add_(x, alpha=weight_decay)
            d = (d.abs() > threshold).to(dtype) * d.sign()
            if momentum != 0:
                buffer = buffers[i]
                buffers[i] = d.clone() if buffer is None else buffer.mul_(momentum).add_(d, alpha=1 - momentum)
            x.add_(d, alpha=-lr)
        optimizer.step()
    assert_same([p.detach() for p in params], theirs)


def test_first_steps_of_sign_adam_are_long() -> None:
    """v starts at zero and is not corrected: the step is `m / sqrt(1 - b2**k)`."""
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    for b1, first in ((0.0, 31.62), (0.9, 3.162)):
        optimizer = SignAdam([p], lr=1.0, betas=(b1, 0.999))
        lengths = []
        for k in range(1, 3001):
            before = p.item()
            p.grad = torch.ones_like(p)
            optimizer.step()
            lengths.append(before - p.item())
            if k < 50:
                assert lengths[-1] == pytest.approx((1 - b1**k) / math.sqrt(1 - 0.999**k), rel=1e-6)
        assert lengths[0] == pytest.approx(first, rel=1e-3)
        assert lengths[-1] == pytest.approx(1.0, rel=3e-2)
    assert max(lengths) == pytest.approx(6.57, rel=1e-2)
