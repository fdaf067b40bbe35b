"""The step along sparse verdicts: bit for bit the ordinary step, and taken only where it may be."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distsign import SignAdamPP, SignSGD, Signum
from distsign.optim import base, sparse

SIZES = (1, 15, 16, 63, 64, 65, 127, 128, 1000, 70_001)


class VoteState:
    def track(self, named: object) -> None:
        pass

    def lr_scale(self, p: Tensor) -> float:
        return 0.75


def verdicts(rng: np.random.Generator, size: int, density: float, scale: float) -> Tensor:
    found = rng.choice(np.array([-scale, 0.0, -0.0, scale]), size, p=[density / 2, 0.5, 0.5 - density, density / 2])
    return torch.from_numpy(found.astype(np.float32))


def step_all(make: Callable[..., torch.optim.Optimizer], sources: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    params = [torch.nn.Parameter(p.clone()) for p in sources]
    optimizer = make([(str(k), p) for k, p in enumerate(params)], vote_state=VoteState())
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad.clone()
    optimizer.step()
    return [p.detach() for p in params]


MAKERS: list[Callable[..., torch.optim.Optimizer]] = [
    lambda params, **kw: SignAdamPP(params, lr=0.013, momentum=0.0, **kw),
    lambda params, **kw: SignAdamPP(params, lr=torch.tensor(0.013), momentum=0.0, maximize=True, **kw),
    lambda params, **kw: SignSGD(params, lr=0.013, **kw),
    lambda params, **kw: Signum(params, lr=0.013, momentum=0.0, **kw),
]


@pytest.mark.parametrize("make", MAKERS)
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    density=st.sampled_from([0.0, 0.01, 0.06, 0.4]),
    scale=st.sampled_from([1.0, 65536.0, 1e-40]),
    bad=st.sampled_from([None, None, math.nan, math.inf, -math.inf]),
)
def test_it_is_the_ordinary_step(
    make: Callable[..., torch.optim.Optimizer], seed: int, density: float, scale: float, bad: float | None
) -> None:
    rng = np.random.default_rng(seed)
    sources = [torch.from_numpy(rng.standard_normal(n).astype(np.float32)) for n in SIZES]
    grads = [verdicts(rng, n, density, scale) for n in SIZES]
    if bad is not None:
        chosen = grads[rng.integers(len(grads))]
        chosen[rng.integers(chosen.numel())] = bad
    found = step_all(make, sources, grads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "signs_of", lambda p, grad: None)
        expected = step_all(make, sources, grads)
    for a, b, before in zip(found, expected, sources, strict=True):
        assert torch.equal(a, b)
        if bad is not None:
            assert torch.equal(a, before), "one bad number anywhere and nothing moves"


def test_it_is_taken_where_it_may_be() -> None:
    p, few, many = torch.zeros(4096), torch.zeros(4096), torch.ones(4096)
    few[::100] = -1.0
    signs = sparse.signs_of(p, few)
    assert signs is not None and signs.finite
    signs.step(p, 0.5)
    assert torch.equal(p, -0.5 * few)
    assert sparse.signs_of(p, many) is None
    assert sparse.signs_of(p.bfloat16(), few.bfloat16()) is None
    assert sparse.signs_of(p.view(64, 64).t(), few.view(64, 64)) is None


@pytest.mark.parametrize("option", [{"momentum": 0.5}, {"weight_decay": 0.1}])
def test_averages_and_decay_take_the_ordinary_step(option: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(base, "signs_of", lambda p, grad: asked.append(p.numel()))
    options = {"lr": 0.1, "momentum": 0.0, **option}
    step_all(lambda params, **kw: SignAdamPP(params, **options, **kw), [torch.ones(9)], [torch.ones(9)])
    assert not asked
    step_all(lambda params, **kw: SignAdamPP(params, lr=0.1, momentum=0.0, **kw), [torch.ones(9)], [torch.ones(9)])
    assert asked == [9]
