"""Steps that must not happen: bad numbers, and gradients that no optimizer here can take."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distsign.optim import tiles
from distsign.optim.base import SignOptimizer
from tests.optim_cases import (
    FLOATS,
    LR,
    assert_same,
    bits,
    build,
    every_optimizer,
    every_variant,
    make_params,
    set_grads,
    train,
)


@every_variant
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_number_skips_the_whole_step(name: str, bad: float, decided_on: str) -> None:
    params = make_params()
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 2 * LR}]
    optimizer = build(name, groups)
    train(optimizer, params, range(3))
    before = bits(optimizer)
    for at in (0, -1):
        set_grads(params, 3)
        params[at].grad.view(-1)[-1] = bad  # type: ignore[union-attr]
        optimizer.step()
        assert_same(bits(optimizer), before)
    train(optimizer, params, range(3, 6))
    untroubled = make_params()
    other = build(name, [{"params": untroubled[:2]}, {"params": untroubled[2:], "lr": 2 * LR}])
    train(other, untroubled, range(6))
    assert_same(bits(optimizer), bits(other))


@every_variant
def test_a_first_step_may_be_bad(name: str, decided_on: str) -> None:
    params = make_params()
    optimizer = build(name, params)
    set_grads(params, 0)
    params[0].grad.view(-1)[3] = math.nan  # type: ignore[union-attr]
    optimizer.step()
    train(optimizer, params, range(3))
    untroubled = make_params()
    other = build(name, untroubled)
    train(other, untroubled, range(3))
    assert_same(bits(optimizer), bits(other))


@given(
    st.lists(st.floats(width=16, allow_nan=True, allow_infinity=True), min_size=1, max_size=40),
    st.sampled_from(FLOATS),
    st.integers(1, 3),
)
def test_finite_is_what_isfinite_says(values: list[float], dtype: torch.dtype, num_tensors: int) -> None:
    whole = torch.tensor(values, dtype=torch.float64).to(dtype)
    grads = [chunk for chunk in whole.chunk(num_tensors) if chunk.numel()]
    expected = bool(torch.isfinite(whole).all())
    assert tiles.finite_on_host(grads) == expected
    assert {k: bool(v) for k, v in tiles.finite_on_devices(grads).items()} == {torch.device("cpu"): expected}


def test_finite_looks_at_every_dtype_in_its_own_range() -> None:
    """1e300 is finite in float64, although not in the float32 beside it."""
    grads = [torch.tensor([1e300], dtype=torch.float64), torch.ones(2), torch.tensor([65504.0], dtype=torch.float16)]
    assert tiles.finite_on_host(grads)
    assert all(tiles.finite_on_devices(grads).values())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_number_is_found_wherever_it_is(bad: float) -> None:
    """Vectorised reductions treat the tail apart from the body, and either may lose a NaN."""
    for n, at in itertools.product((7, 8, 9, 63, 64, 65, 100_003), (0.0, 0.5, 1.0)):
        grad = torch.randn(n)
        grad[int(at * (n - 1))] = bad
        assert not tiles.finite_on_host([grad])
        assert not any(tiles.finite_on_devices([grad]).values())


@every_optimizer
def test_sparse_gradients_are_refused_before_anything_moves(cls: type[SignOptimizer]) -> None:
    table = nn.Embedding(4, 2, sparse=True)
    p = nn.Parameter(torch.ones(3))
    optimizer = cls([("p", p), ("table", table.weight)], lr=0.1)  # type: ignore[arg-type, call-arg]
    p.grad = torch.ones(3)
    table(torch.tensor([1])).sum().backward()
    before = bits(optimizer)
    with pytest.raises(ValueError, match=r"sparse.*'table' of shape \(4, 2\).*sparse=False"):
        optimizer.step()
    assert_same(bits(optimizer), before)
