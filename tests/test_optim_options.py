"""The optimizers' options: what they do, which are refused, and that each group has its own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from distsign.confidence import AdaptiveConfidence, FixedConfidence
from distsign.optim import SignAdam, SignAdamPP, SignSGD, Signum
from distsign.optim.base import SignOptimizer
from tests.optim_cases import (
    VARIANTS,
    FakeVoteState,
    assert_same,
    bits,
    build,
    every_optimizer,
    every_variant,
    make_params,
    set_grads,
)


@every_optimizer
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -0.1}, r"lr .*\[0, inf\).*-0\.1"),
        ({"lr": math.nan}, "lr .*nan"),
        ({"lr": True}, "lr .*True"),
        ({"lr": "fast"}, "lr .*'fast'"),
        ({"lr": torch.ones(2)}, r"lr .*shape \(2,\)"),
        ({"lr": torch.tensor(-1.0)}, r"lr .*-1"),
        ({"lr": torch.tensor(1)}, r"lr .*int64"),
        ({"weight_decay": -1.0}, r"weight_decay .*-1\.0"),
        ({"weight_decay": None}, r"weight_decay .*None"),
        ({"maximize": 1}, "maximize .*True or False"),
        ({"decoupled": "no"}, "decoupled .*True or False"),
        ({"decoupled": False}, "abstention.*l2=.*FixedConfidence"),
        ({"confidence": 0.5}, r"confidence .*FixedConfidence.*0\.5"),
        ({"confidence": FixedConfidence}, "confidence .*FixedConfidence"),
        ({"vote_state": 3}, "vote_state must be a SignVoteState, got 3"),
        ({"vote_state": FakeVoteState()}, r"named_parameters\(\)"),
        ({"vote_state": FakeVoteState(), "confidence": FixedConfidence(1.0)}, "once"),
    ],
    ids=str,
)
def test_bad_options_are_one_clear_error(cls: type[SignOptimizer], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{cls.__name__}: .*{words}"):
        cls(make_params(), **options)


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        (SignAdam, {"betas": (0.9, 1.0)}, r"betas\[1\] .*\[0, 1\).*1\.0"),
        (SignAdam, {"betas": (-0.1, 0.9)}, r"betas\[0\]"),
        (SignAdam, {"betas": 0.9}, r"betas .*\(0\.9, 0\.999\)"),
        (SignAdam, {"betas": (0.9,)}, r"betas .*two"),
        (SignAdam, {"eps": 0.0}, r"eps .*0/0"),
        (SignAdamPP, {"momentum": 1.0}, r"momentum .*\[0, 1\)"),
        (SignAdamPP, {"momentum": "a"}, r"momentum .*'a'"),
        (SignAdamPP, {"authors_code": 1}, "authors_code .*True or False"),
        (SignAdamPP, {"authors_code": True, "weight_decay": 0.1}, ".*abstention"),
        (Signum, {"momentum": -0.5}, r"momentum .*-0\.5"),
    ],
    ids=str,
)
def test_bad_options_of_one_optimizer(cls: type[SignOptimizer], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{cls.__name__}: {words}"):
        cls(make_params(), **options)


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.int64, torch.float8_e4m3fn], ids=str)
def test_other_dtypes_are_refused(cls: type[SignOptimizer], dtype: torch.dtype) -> None:
    odd = torch.zeros(3, dtype=dtype)
    with pytest.raises(ValueError, match=rf"{dtype} for 'w' of shape \(3,\)"):
        cls([("w", odd)])  # type: ignore[call-arg, arg-type]
    good = nn.Parameter(torch.zeros(2))
    optimizer = cls([good])  # type: ignore[call-arg, arg-type]
    with pytest.raises(ValueError, match=str(dtype)):
        optimizer.add_param_group({"params": [odd]})
    assert [group["params"] for group in optimizer.param_groups] == [[good]]


@every_variant
def test_groups_have_options_of_their_own(name: str) -> None:
    """Two groups in one optimizer step as two optimizers do."""
    together, apart = make_params(), make_params()
    second = {"lr": 0.25, "weight_decay": 0.5}
    optimizer = build(name, together[:3])
    optimizer.add_param_group({"params": together[3:], **second})
    others = [build(name, apart[:3]), build(name, apart[3:], **second)]
    for step in range(5):
        set_grads(together, step)
        set_grads(apart, step)
        for each in (optimizer, *others):
            each.step()
    assert_same(bits(optimizer), [tensor for other in others for tensor in bits(other)])


def test_a_group_may_have_a_confidence_of_its_own() -> None:
    all_vote, none_votes = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    groups = [{"params": [all_vote]}, {"params": [none_votes], "confidence": FixedConfidence(2.0)}]
    optimizer = SignSGD(groups, lr=1.0)
    for p in (all_vote, none_votes):
        p.grad = torch.ones(3)
    optimizer.step()
    assert all_vote.tolist() == [-1.0] * 3
    assert none_votes.tolist() == [0.0] * 3


@every_variant
def test_parameters_without_gradient_or_elements_are_left_alone(name: str) -> None:
    params = make_params()
    optimizer = build(name, params)
    set_grads(params, 0)
    params[0].grad = None
    before = params[0].detach().clone()
    optimizer.step()
    assert torch.equal(params[0], before)
    assert params[0] not in optimizer.state
    assert params[3] not in optimizer.state


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "pp-carry"])
def test_maximize_is_minimizing_the_negative(name: str) -> None:
    results = []
    for sign, maximize in ((1.0, False), (-1.0, True)):
        params = make_params()
        optimizer = build(name, params, maximize=maximize)
        for step in range(5):
            set_grads(params, step)
            for p in params:
                p.grad *= sign  # type: ignore[operator]
            optimizer.step()
        results.append(bits(optimizer))
    assert_same(*results)


def test_maximize_with_a_carry() -> None:
    """The carry is that of the raw gradient, so that it has the other sign."""
    left, right = make_params(), make_params()
    optimizer, other = build("pp-carry", left), build("pp-carry", right, maximize=True)
    for step in range(5):
        for params, sign in ((left, 1.0), (right, -1.0)):
            set_grads(params, step)
            for p in params:
                p.grad *= sign  # type: ignore[operator]
        optimizer.step()
        other.step()
    for p, q in zip(left, right, strict=True):
        assert torch.equal(p, q)
        if p.numel():
            assert torch.equal(optimizer.state[p]["carry"], -other.state[q]["carry"])


@every_optimizer
def test_decay_is_decoupled(cls: type[SignOptimizer]) -> None:
    """Where nothing votes, decay alone moves a parameter, and by its own rate alone."""
    p = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = cls([p], lr=0.5, weight_decay=0.25)  # type: ignore[call-arg, arg-type]
    p.grad = torch.zeros(2)
    optimizer.step()
    assert p.tolist() == [3.0 * 0.875, -2.0 * 0.875]


def test_l2_goes_into_the_gradient_before_the_confidence() -> None:
    p = nn.Parameter(torch.tensor([4.0, 4.0, -4.0, 0.5]))
    optimizer = SignSGD([p], lr=1.0, weight_decay=0.5, decoupled=False, confidence=FixedConfidence(1.0))
    p.grad = torch.tensor([0.0, -1.5, 0.0, 0.5])
    optimizer.step()  # 2.0, 0.5, -2.0 and 0.75 against 1.0
    assert p.tolist() == [3.0, 4.0, -3.0, 0.5]


def test_l2_of_halves_does_not_overflow() -> None:
    p = nn.Parameter(torch.tensor([60000.0, 1.0], dtype=torch.float16))
    optimizer = SignAdamPP([p], lr=1.0, weight_decay=0.5, decoupled=False, confidence=AdaptiveConfidence())
    p.grad = torch.tensor([60000.0, 0.0], dtype=torch.float16)
    optimizer.step()
    assert optimizer.state[p]["confidence"].isfinite().all()
