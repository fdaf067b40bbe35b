"""What one worker does alone, held to the kernels' oracle bit for bit."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from distsign.ballots import Kept, cast_with_carry
from distsign.confidence import Confidence, FixedConfidence, RMSConfidence, TargetDensity
from distsign.kernels import CarryRule, Memory, Spans, plane_bytes, reference

EXTREMES = [0.0, -0.0, 1e-45, -1e-38, 1e-16, -1e-15, 3e19, -3.4e38, 1.0, -1.0]


class CarryingConfidence(FixedConfidence):
    requires_carry: ClassVar[bool] = True


def gradient(step: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    grad = torch.randn(size, generator=generator) * torch.randn(size, generator=generator).mul(4).exp()
    extremes = torch.tensor(EXTREMES)
    chosen = torch.randint(len(EXTREMES), (size,), generator=generator)
    return torch.where(torch.rand(size, generator=generator) < 0.1, extremes[chosen], grad)


class Oracle:
    """A voter of one parameter, by the kernels' oracle."""

    def __init__(self, confidence: Confidence, size: int) -> None:
        self.confidence, self.size = confidence, size
        self.stats = confidence.init_stats(1)
        square = None if confidence.square_decay is None else torch.zeros(2, size)
        self.memory = Memory(torch.zeros(2, size), square, torch.zeros((), dtype=torch.int64))

    def cast(self, grad: Tensor, factor: float) -> Tensor:
        places = [np.asarray([at]) for at in (0, self.size, 0, 0, plane_bytes(self.size), 0)]
        spans = Spans(*places)
        planes = torch.zeros(2 * plane_bytes(self.size), dtype=torch.uint8)
        active = reference.active(grad, spans)
        alpha, stats = self.confidence.thresholds(self.stats, None)
        corrections = self.confidence.corrections(stats)
        rule = CarryRule(
            (alpha * factor).float(),
            active,
            torch.tensor(1.0),
            None if corrections is None else corrections.float(),
            self.confidence.square_decay or 0.0,
        )
        reference.pack_carry(grad, spans, rule, self.memory, planes, clear=True)
        self.memory = Memory(self.memory.carry, self.memory.square, 1 - self.memory.live)
        if active:
            self.stats = stats
        out = torch.empty(self.size)
        reference.unpack(planes, spans, torch.tensor(1.0), out)
        return out

    def kept(self) -> Kept:
        live = int(self.memory.live)
        square = None if self.memory.square is None else self.memory.square[live]
        return Kept(self.stats[0], self.memory.carry[live], square)


def start(confidence: Confidence, shape: tuple[int, ...]) -> Kept:
    square = None if confidence.square_decay is None else torch.zeros(shape)
    return Kept(confidence.init_stats(1)[0], torch.zeros(shape), square)


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (700,), (2, 600)], ids=str)
@pytest.mark.parametrize(
    "confidence",
    [RMSConfidence(k=3), RMSConfidence(k=0.5, decay=0.0), RMSConfidence(k=2, decay=0.999), CarryingConfidence(1.5)],
    ids=repr,
)
def test_a_carry_equals_the_oracle(confidence: Confidence, shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    oracle, kept = Oracle(confidence, size), start(confidence, shape)
    total = 0
    for step in range(30):
        grad = torch.zeros(size) if step % 9 == 4 else gradient(step, size)
        factor = min(1.0, 0.3 + 0.1 * step)
        expected = oracle.cast(grad, factor)
        ballots, kept = cast_with_carry(confidence, grad.reshape(shape), kept, factor)
        assert torch.equal(ballots.reshape(-1), expected)
        for mine, theirs in zip(vars(kept).values(), vars(oracle.kept()).values(), strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                assert torch.equal(mine.reshape(-1).nan_to_num(7e7), theirs.reshape(-1).nan_to_num(7e7))
        total += int(expected.abs().sum())
    assert total > 0 or size == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_ballots_have_the_dtype_of_the_gradient_and_what_is_kept_float32(dtype: torch.dtype) -> None:
    ballots, kept = cast_with_carry(RMSConfidence(k=0.5), torch.ones(3, dtype=dtype), start(RMSConfidence(), (3,)))
    assert ballots.dtype == dtype
    assert ballots.tolist() == [1.0, 1.0, 1.0]
    assert kept.square is not None
    assert kept.carry.dtype == kept.square.dtype == torch.float32
    assert kept.stats.dtype == torch.float64


def test_what_was_kept_is_not_changed() -> None:
    confidence = RMSConfidence(k=3)
    _, kept = cast_with_carry(confidence, gradient(0, 50), start(confidence, (50,)))
    before = [value.clone() for value in vars(kept).values()]
    cast_with_carry(confidence, gradient(1, 50), kept)
    assert all(torch.equal(a, b) for a, b in zip(before, vars(kept).values(), strict=True))


def test_an_empty_gradient() -> None:
    kept = start(RMSConfidence(), (0, 4))
    ballots, after = cast_with_carry(RMSConfidence(), torch.zeros(0, 4), kept)
    assert ballots.shape == (0, 4)
    assert after is kept


def test_a_carry_under_a_function_that_looks_at_moments_and_density() -> None:
    """Its statistics move by what has voted, and not at all where the gradient is zero."""
    confidence = TargetDensity(0.1)
    first = start(confidence, (400,))
    _, idle = cast_with_carry(confidence, torch.zeros(400), first)
    assert torch.equal(idle.stats, first.stats)
    ballots, kept = cast_with_carry(confidence, torch.randn(400, generator=torch.Generator().manual_seed(0)), first)
    assert 0 < ballots.abs().sum() < 200
    assert not torch.equal(kept.stats, first.stats)
