"""Optimizers and the vote: names, rates, carries, warm-up."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from distsign.confidence import AdaptiveConfidence, FixedConfidence, RMSConfidence
from distsign.hook import SignVoteState
from distsign.optim import SignAdamPP, SignSGD
from distsign.optim.base import SignOptimizer
from tests.optim_cases import (
    LR,
    FakeVoteState,
    assert_same,
    bits,
    every_optimizer,
    least_squares,
    make_params,
    named,
    train,
)


@every_optimizer
def test_the_vote_learns_the_names(cls: type[SignOptimizer]) -> None:
    state = FakeVoteState()
    params = make_params()
    optimizer = cls(named(params[:2]), vote_state=state)  # type: ignore[call-arg, arg-type]
    optimizer.add_param_group({"params": [("late", params[2])]})
    assert list(state.names) == ["p0", "p1", "late"]
    assert all(a is b for a, b in zip(state.names.values(), params, strict=False))
    with pytest.raises(ValueError, match="without names"):
        optimizer.add_param_group({"params": params[3:]})
    assert len(optimizer.param_groups) == 2


@every_optimizer
@pytest.mark.parametrize("scale", [0.25, torch.tensor(0.25), lambda p: 0.25], ids=["float", "tensor", "function"])
def test_the_vote_scales_the_step_and_not_the_decay(cls: type[SignOptimizer], scale: Any, decided_on: str) -> None:
    scaled, plain = make_params(), make_params()
    optimizers = [
        cls(named(scaled), lr=LR, weight_decay=0.25, vote_state=FakeVoteState(scale)),  # type: ignore[call-arg, arg-type]
        cls(named(plain), lr=LR / 4, weight_decay=1.0, vote_state=FakeVoteState()),  # type: ignore[call-arg, arg-type]
    ]
    for step in range(5):
        for params, optimizer in zip((scaled, plain), optimizers, strict=True):
            train(optimizer, params, [step])
    assert_same(bits(optimizers[0]), bits(optimizers[1]))


def test_each_parameter_has_its_own_scale() -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = SignSGD([("a", a), ("b", b)], lr=1.0, vote_state=FakeVoteState(lambda p: 0.5 if p is a else 0.25))
    a.grad, b.grad = torch.ones(2), torch.ones(2)
    optimizer.step()
    assert a.tolist() == [-0.5] * 2
    assert b.tolist() == [-0.25] * 2


def test_a_vote_state_that_refuses_leaves_nothing_half_done() -> None:
    """The state raises for a parameter that it does not know, here one of the second group."""
    params = make_params()

    def scale(p: Tensor) -> float:
        if p is params[-1]:
            raise RuntimeError("never seen")
        return 1.0

    groups = [{"params": named(params)[:2]}, {"params": named(params)[2:]}]
    optimizer = SignAdamPP(groups, vote_state=FakeVoteState(scale))
    before = bits(optimizer)
    with pytest.raises(RuntimeError, match="never seen"):
        train(optimizer, params, [0])
    assert_same(bits(optimizer), before)


def test_a_sign_vote_state_is_a_vote_state() -> None:
    """One process, no group: the state's scale is 1, and it learns the names."""
    state = SignVoteState(confidence=FixedConfidence(0.0))
    params, expected = make_params(), make_params()
    optimizer, other = SignAdamPP(named(params), lr=LR, vote_state=state), SignAdamPP(expected, lr=LR)
    train(optimizer, params, range(3))
    train(other, expected, range(3))
    assert_same(bits(optimizer), bits(other))


class CarryingConfidence(FixedConfidence):
    requires_carry: ClassVar[bool] = True


def test_a_carry_without_squares_is_in_units_of_the_gradient() -> None:
    p = nn.Parameter(torch.zeros(3))
    optimizer = SignSGD([p], lr=1.0, confidence=CarryingConfidence(1.0))
    for expected in ([0.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]):
        p.grad = torch.tensor([0.75, -0.25, 0.0])
        optimizer.step()
        assert p.tolist() == expected
    assert optimizer.state[p].keys() == {"carry"}
    assert optimizer.state[p]["carry"].tolist() == [0.75, -0.75, 0.0]


def test_a_carry_that_nobody_wants_is_forgotten() -> None:
    p = nn.Parameter(torch.zeros(3))
    optimizer = SignAdamPP([p], confidence=RMSConfidence(k=3))
    train(optimizer, [p], range(2))
    assert optimizer.state[p].keys() == {"momentum_buffer", "confidence", "carry", "square"}
    optimizer.param_groups[0]["confidence"] = FixedConfidence(0.5)
    train(optimizer, [p], [2])
    assert optimizer.state[p].keys() == {"momentum_buffer", "confidence"}


def test_each_group_warms_up_by_itself(decided_on: str) -> None:
    """The first step of RMSConfidence votes where the threshold is below 1, and is as much shorter."""
    early, late = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = SignSGD([early], lr=1.0, confidence=RMSConfidence(k=2, start=0.5, warmup_steps=2))
    lengths = []
    for step in range(4):
        if step == 2:
            optimizer.add_param_group({"params": [late]})
        for p in (early, late):
            p.grad = torch.ones(2)
        before = early.detach().clone(), late.detach().clone()
        optimizer.step()
        lengths.append([(b - p)[0].item() for b, p in zip(before, (early, late), strict=True)])
    # early: k_t = 0.5, 1, 2, 2 and ones add up; the 1 of the second step does not pass 1, and 1 + 1 does not pass 2.
    assert lengths == [[0.25, 0.0], [0.0, 0.0], [0.0, 0.25], [1.0, 0.0]]


def test_with_a_carry_it_learns() -> None:
    """Least squares on one worker, as a user writes it."""
    confidence = RMSConfidence(k=4, start=1)
    losses = least_squares(lambda params: SignAdamPP(params, lr=0.2, momentum=0.0, confidence=confidence), 300)
    assert losses[-1] < 0.01 * losses[0]


def test_an_idle_parameter_keeps_its_statistics() -> None:
    p = nn.Parameter(torch.zeros(50))
    optimizer = SignAdamPP([p], confidence=AdaptiveConfidence())
    train(optimizer, [p], range(3))
    before = optimizer.state[p]["confidence"].clone()
    assert before.dtype == torch.float64
    assert before.item() > 0
    p.grad = torch.zeros(50)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["confidence"], before)
