"""Every optimizer through the same contracts: what does not change a step, and life with the rest of torch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distsign.confidence import FixedConfidence
from distsign.optim import SignAdam, SignAdamPP, SignSGD, Signum, base, tiles
from distsign.optim.base import SignOptimizer
from tests.optim_cases import (
    FLOATS,
    LR,
    VARIANTS,
    FakeVoteState,
    assert_alike,
    assert_same,
    bits,
    build,
    every_optimizer,
    every_variant,
    least_squares,
    make_params,
    named,
    set_grads,
    train,
)


@pytest.mark.parametrize("cls", [SignAdam, SignAdamPP, SignSGD, Signum])
@pytest.mark.parametrize("change", ["clip", "scale"])
def test_clipping_and_scaling_do_not_change_the_step(cls: type[SignOptimizer], change: str) -> None:
    results = []
    for changed in (False, True):
        params = make_params()
        optimizer = cls(named(params), lr=LR, vote_state=FakeVoteState())  # type: ignore[call-arg, arg-type]
        for step in range(10):
            set_grads(params, step)
            if changed and change == "clip":
                torch.nn.utils.clip_grad_norm_(params, 0.01 * (1 + step))
            elif changed:
                for p in params:
                    p.grad *= 2.0 ** (step - 5)  # type: ignore[operator]
            optimizer.step()
        results.append(bits(optimizer))
    assert_same(*results)


def test_signum_averages_gradients_and_not_signs() -> None:
    """As published: one large gradient outweighs a small one after it. A known verdict has only signs to average."""
    grads = [torch.tensor([5.0]), torch.tensor([-1.0])]
    for vote_state, expected in ((None, 0.8), (FakeVoteState(), 1.0)):
        p = nn.Parameter(torch.ones(1))
        optimizer = Signum([("p", p)], lr=0.1, momentum=0.5, vote_state=vote_state)
        for grad in grads:
            p.grad = grad.clone()
            optimizer.step()
        # Of signs m is 0.5 and then -0.25, so the second step takes the first one back.
        assert p.item() == pytest.approx(expected)


@every_variant
def test_gradients_are_not_changed(name: str, decided_on: str) -> None:
    params = make_params()
    optimizer = build(name, params)
    set_grads(params, 0)
    before = [p.grad.clone() for p in params]  # type: ignore[union-attr]
    optimizer.step()
    assert_same([p.grad for p in params], before)  # type: ignore[misc]


@every_variant
def test_memory_layout_does_not_change_the_step(name: str) -> None:
    results = []
    for fmt in (torch.contiguous_format, torch.channels_last):
        generator = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=fmt))
        optimizer = build(name, [p])
        for step in range(5):
            set_grads([p], step)
            # Every other gradient has another layout than its parameter.
            p.grad = p.grad.to(memory_format=fmt if step % 2 else torch.contiguous_format)  # type: ignore[union-attr]
            optimizer.step()
        assert p.is_contiguous(memory_format=fmt)
        results.append(bits(optimizer))
    assert_alike(name, *results)


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 30))
def test_tiles_cover_every_element_once(sizes: list[int], limit: int) -> None:
    rows = [(torch.zeros(n), torch.full((n,), float(i))) for i, n in enumerate(sizes)]
    seen = []
    for counts, owners in tiles.tiles(rows, limit):
        assert sum(t.numel() for t in counts) <= 2 * limit
        for count, owner in zip(counts, owners, strict=True):
            count.add_(1)
            seen += owner.tolist()
    assert all((row[0] == 1).all() for row in rows)
    assert sorted(seen) == sorted(value for row in rows for value in row[1].tolist())


# Living with the rest of torch ---------------------------------------------------------------------------------------


@every_optimizer
def test_closure(cls: type[SignOptimizer]) -> None:
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = cls([p], lr=0.5)  # type: ignore[call-arg, arg-type]

    def closure() -> float:
        optimizer.zero_grad()
        loss = (p * p).sum()
        assert loss.requires_grad
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 5.0
    assert abs(p[0].item()) < 1.0
    assert optimizer.step() is None


@every_variant
def test_lr_as_a_tensor(name: str, decided_on: str) -> None:
    results = []
    for lr in (LR, torch.tensor(LR), torch.tensor([LR])):
        params = make_params()
        optimizer = build(name, params, lr=lr)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        for step in range(6):
            train(optimizer, params, [step])
            scheduler.step()
        assert float(optimizer.param_groups[0]["lr"]) == LR / 8
        results.append(bits(optimizer))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@pytest.mark.parametrize("cls", [SignAdam, SignAdamPP, Signum])
def test_schedulers_that_cycle_momentum(cls: type[SignOptimizer]) -> None:
    params = make_params()
    optimizer = cls(params, lr=0.1)  # type: ignore[call-arg, arg-type]
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    seen = set()
    for step in range(9):
        train(optimizer, params, [step])
        group = optimizer.param_groups[0]
        seen.add(group["betas"][0] if cls is SignAdam else group["momentum"])
        scheduler.step()
    assert len(seen) > 3
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("cls", [SignAdamPP, Signum])
def test_momentum_set_to_zero_forgets_the_average(cls: type[SignOptimizer]) -> None:
    params = make_params()
    optimizer = cls(params)  # type: ignore[call-arg, arg-type]
    train(optimizer, params, [0])
    assert optimizer.state[params[0]].keys() == {"momentum_buffer"}
    optimizer.param_groups[0]["momentum"] = 0.0
    train(optimizer, params, [1])
    assert not optimizer.state[params[0]]


def test_momentum_zero_keeps_no_state() -> None:
    params = make_params()
    optimizer = SignAdamPP(params, momentum=0.0, confidence=FixedConfidence(0.5), weight_decay=0.1)
    train(optimizer, params, range(2))
    assert not any(optimizer.state.values())


@every_variant
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_averages_are_wide(name: str, dtype: torch.dtype) -> None:
    params = make_params(dtype)
    optimizer = build(name, params)
    train(optimizer, params, range(2))
    for p, state in optimizer.state.items():
        for key, value in state.items():
            if key != "confidence":
                wide = dtype == torch.float64 and key not in {"carry", "square"}
                assert value.dtype == (torch.float64 if wide else torch.float32)
                assert value.shape == p.shape


def test_why_averages_are_wide() -> None:
    """In bfloat16 the average of squares would stop at a half: the step would stay 1.4 times too long for ever."""
    v = torch.zeros(1, dtype=torch.bfloat16)
    p = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = SignAdam([p])
    for _ in range(3000):
        v.mul_(0.999).add_(torch.ones(1, dtype=torch.bfloat16), alpha=0.001)
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert v.item() == 0.5
    assert optimizer.state[p]["exp_avg_sq"].item() == pytest.approx(1 - 0.999**3000, rel=1e-4)


@pytest.mark.parametrize("cls", [SignAdam, SignAdamPP, SignSGD, Signum])
def test_grad_scaler(cls: type[SignOptimizer]) -> None:
    """GradScaler unscales, skips a step that overflowed, and otherwise ours is the step it would be without."""
    scaled, plain = make_params(), make_params()
    optimizer, other = cls(scaled, lr=LR), cls(plain, lr=LR)  # type: ignore[call-arg, arg-type]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(6):
        before = bits(optimizer)
        set_grads(scaled, step)
        scale = scaler.scale(torch.ones(()))
        for p in scaled:
            p.grad *= scale  # type: ignore[operator]
        if step == 3:
            scaled[0].grad.view(-1)[0] = math.inf  # type: ignore[union-attr]
        if step % 2:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if step == 3:
            assert_same(bits(optimizer), before)
        else:
            train(other, plain, [step])
    assert scaler.get_scale() == 512.0
    assert_same(bits(optimizer), bits(other))


@every_optimizer
def test_it_learns(cls: type[SignOptimizer]) -> None:
    """Least squares by a linear layer, with a cosine schedule: the loss falls to a small part of what it was."""
    losses = least_squares(lambda params: cls(params, lr=0.05), 200)  # type: ignore[call-arg, arg-type]
    assert losses[-1] < 0.01 * losses[0]


@settings(max_examples=30)
@given(st.sampled_from(sorted(VARIANTS)), st.integers(0, 2**31), st.integers(1, 60))
def test_tile_size_does_not_change_the_step(name: str, seed: int, limit: int) -> None:
    results = []
    for tile in (limit, 10**6):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(base, "tile_limit", lambda device, tile=tile: tile)
            params = make_params(seed=seed)
            optimizer = build(name, params)
            train(optimizer, params, range(3))
            results.append(bits(optimizer))
    assert_alike(name, *results)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "name", [name for name, (_, options) in VARIANTS.items() if "confidence" not in options or name == "pp-carry"]
)
def test_cuda_decides_without_waiting(name: str) -> None:
    params, expected = [nn.Parameter(p.detach().cuda()) for p in make_params()], make_params()
    optimizer, other = build(name, params), build(name, expected)
    for step in range(5):
        train(other, expected, [step])
        set_grads(expected, step)
        for p, q in zip(params, expected, strict=True):
            p.grad = q.grad.cuda()  # type: ignore[union-attr]
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
            params[0].grad.view(-1)[0] = math.nan  # type: ignore[union-attr]
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach(), rtol=0, atol=1e-6)
