"""Every optimizer through the same contracts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from distsign.confidence import AdaptiveConfidence, FixedConfidence, RMSConfidence
from distsign.hook import SignVoteState
from distsign.optim import SignAdam, SignAdamPP, SignSGD, Signum, base, tiles
from distsign.optim.base import SignOptimizer
from tests.optim_cases import (
    FLOATS,
    LR,
    VARIANTS,
    assert_alike,
    assert_same,
    bits,
    build,
    every_optimizer,
    every_variant,
    make_params,
    set_grads,
    train,
)

# Steps that must not happen ----------------------------------------------------------------------------------------


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


# What does not change a step ---------------------------------------------------------------------------------------


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


# Options -----------------------------------------------------------------------------------------------------------


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


# Votes -------------------------------------------------------------------------------------------------------------


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


# Living with the rest of torch -------------------------------------------------------------------------------------


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
