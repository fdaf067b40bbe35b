"""What workers keep between steps: both backends against transcriptions of what `Kernels` documents, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distsign.kernels import CarryRule, Kernels, Memory, Spans, cpu, dither_at, plane_bytes, reference

BACKENDS: list[Kernels] = [reference, cpu]
every_backend = pytest.mark.parametrize("kernels", BACKENDS, ids=["reference", "cpu"])

SIZES = (0, 1, 7, 8, 9, 31, 32, 33, 511, 512, 513, 1025)
FILL = 0xA5
LARGEST = np.float32(np.finfo(np.float32).max)

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """Pieces of a gradient and of a memory, and a rule for them."""

    spans: Spans
    rule: CarryRule
    memory: Memory
    grad_size: int
    buffer_bytes: int

    def copy_of_memory(self) -> Memory:
        square = None if self.memory.square is None else self.memory.square.clone()
        return Memory(self.memory.carry.clone(), square, self.memory.live.clone())

    def gradient(self, rng: np.random.Generator) -> Tensor:
        """Ordinary numbers; some rows of the rule's dead, tiny or huge ones among them."""
        grad = rng.standard_normal(self.grad_size).astype(np.float32)
        kind = rng.integers(6, size=self.grad_size)
        grad[kind == 0] = rng.choice(np.array([0.0, -0.0, 1e-45, -1e-45], dtype=np.float32), int((kind == 0).sum()))
        grad[kind == 1] *= np.float32(1e-25)
        grad[kind == 2] *= np.float32(1e25)
        return torch.from_numpy(grad)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = draw(st.lists(st.one_of(st.sampled_from(SIZES), st.integers(0, 1100)), min_size=1, max_size=4))
    num = len(lengths)
    num_rows = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    length = np.array(lengths, dtype=np.int64)
    num_bytes = (length + 7) // 8
    order = rng.permutation(num)

    def places(sizes: npt.NDArray[np.int64], order: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], int]:
        """Lay pieces out in this order, with gaps."""
        at, found = 0, np.zeros(sizes.size, dtype=np.int64)
        for k in order:
            at += int(rng.integers(20))
            found[k] = at
            at += int(sizes[k])
        return found, at + int(rng.integers(20))

    start, grad_size = places(length, np.arange(num))
    home, memory_size = places(length, order)
    planes, buffer_bytes = places(np.concatenate([num_bytes, num_bytes]), rng.permutation(2 * num))
    with_square = draw(st.booleans())
    thresholds = rng.choice(np.array([0.0, -0.0, 0.3, 1.0, 2.0, np.inf], dtype=np.float32), num_rows)
    decay = float(np.float32(draw(st.sampled_from([0.0, 0.9, 0.99]))))
    rule = CarryRule(
        thresholds=torch.from_numpy(thresholds),
        active=torch.from_numpy(rng.random(num_rows) < 0.8),
        unscale=torch.tensor(draw(st.sampled_from([1.0, 2.0**-16, 0.3]))),
        corrections=torch.from_numpy(rng.uniform(0.03, 1.0, num_rows).astype(np.float32)) if with_square else None,
        decay=decay if with_square else 0.0,
        dither=draw(st.sampled_from([0, 1, 0x7FFF, 0xFFFF])),
    )
    carry = rng.standard_normal((2, memory_size)).astype(np.float32)
    carry[rng.random(carry.shape) < 0.2] = 0.0
    square = rng.standard_normal((2, memory_size)).astype(np.float32) ** 2
    square[rng.random(square.shape) < 0.3] = 0.0
    square[rng.random(square.shape) < 0.1] = LARGEST
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    memory = Memory(
        torch.from_numpy(carry).to(dtype),
        torch.from_numpy(square).clamp(max=torch.finfo(dtype).max).to(dtype) if with_square else None,
        torch.tensor(draw(st.integers(0, 1))),
    )
    spans = Spans(start, length, rng.integers(num_rows, size=num), planes[:num], planes[num:], home)
    return Case(spans, rule, memory, grad_size, buffer_bytes)


def as_bits(x: Tensor) -> bytes:
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same_memory(a: Memory, b: Memory) -> bool:
    same_square = (
        a.square is b.square if a.square is None or b.square is None else as_bits(a.square) == as_bits(b.square)
    )
    return as_bits(a.carry) == as_bits(b.carry) and same_square and bool(a.live == b.live)


def element_of_bit(bit: int, length: int) -> int:
    if bit >= length // 512 * 512:
        return bit
    block, place = divmod(bit, 512)
    word, bit_of_word = divmod(place, 32)
    return 512 * block + 16 * bit_of_word + word


def plane(bits: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    in_order = np.array([bits[element_of_bit(bit, bits.size)] for bit in range(bits.size)], dtype=bool)
    return np.packbits(in_order, bitorder="little")


def to_bfloat16(x: Floats) -> Floats:
    """Round to the nearest of the two neighbours that bfloat16 has, from the middle to the even one; in float64."""
    cut = (x.view(np.uint32) & np.uint32(0xFFFF0000)).astype(np.uint32)
    low = cut.view(np.float32).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        high = np.where(
            (cut + np.uint32(0x10000)) & 0x7FFFFFFF == 0x7F800000,
            np.copysign(2.0**128, low),
            (cut + np.uint32(0x10000)).view(np.float32).astype(np.float64),
        )
        up = np.abs(high - x.astype(np.float64)), np.abs(x.astype(np.float64) - low)
        odd = (cut >> np.uint32(16)) & 1 == 1
        nearest = np.where((up[0] < up[1]) | ((up[0] == up[1]) & odd), high, low)
        return nearest.astype(np.float32)


def dithered(v: Floats, dither: int) -> Floats:
    """Round to the upper of the two neighbours in bfloat16 where the way up and the dither make a whole; v >= 0."""
    low = (v.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    high = (low.view(np.uint32) + np.uint32(0x10000)).view(np.float32)
    way = (v.astype(np.float64) - low) / (high.astype(np.float64) - low)
    return np.where(way + dither / 2**16 >= 1.0, high, low)


def expected_step(case: Case, grad: Tensor, clear: bool) -> tuple[Memory, npt.NDArray[np.uint8], list[int]]:
    """The documented rule, a piece at a time, in numpy's float32."""
    memory, rule, spans = case.copy_of_memory(), case.rule, case.spans
    buffer = np.full(case.buffer_bytes, FILL, dtype=np.uint8)
    counts = []
    live = int(memory.live)
    for k, row in enumerate(spans.row.tolist()):
        n = int(spans.length[k])
        here = slice(int(spans.home[k]), int(spans.home[k]) + n)
        if rule.active[row]:
            carry = memory.carry[live, here].float().numpy()
            with np.errstate(all="ignore"):
                g = grad.numpy()[spans.start[k] : spans.start[k] + n] * np.float32(rule.unscale)
                if memory.square is None:
                    u = carry + g
                else:
                    assert rule.corrections is not None
                    decay, rest = np.float32(rule.decay), np.float32(1.0 - rule.decay)
                    largest = np.float32(torch.finfo(memory.square.dtype).max)
                    v = np.minimum(decay * memory.square[live, here].float().numpy() + rest * (g * g), largest)
                    u = carry.copy()
                    lives = v > np.float32(1e-30)
                    u[lives] = carry[lives] + (g[lives] * rule.corrections[row].numpy()) / np.sqrt(v[lives])
                    if memory.square.dtype == torch.bfloat16:
                        v = dithered(v, rule.dither)
                    memory.square[1 - live, here] = torch.from_numpy(v).to(memory.square.dtype)
            assert u.dtype == np.float32
            votes = np.abs(u) > rule.thresholds[row].numpy()
            new = np.where(votes, np.float32(0.0), u) if clear else u
            if memory.carry.dtype == torch.bfloat16:
                new = to_bfloat16(new)
            memory.carry[1 - live, here] = torch.from_numpy(new).to(memory.carry.dtype)
        else:
            u, votes = np.zeros(n, dtype=np.float32), np.zeros(n, dtype=bool)
            memory.carry[1 - live, here] = memory.carry[live, here]
            if memory.square is not None:
                memory.square[1 - live, here] = memory.square[live, here]
        counts.append(int(votes.sum()))
        buffer[spans.mask_at[k] : spans.mask_at[k] + plane_bytes(n)] = plane(votes)
        buffer[spans.sign_at[k] : spans.sign_at[k] + plane_bytes(n)] = plane(votes & (u < 0))
    return memory, buffer, counts


def run_step(kernels: Kernels, case: Case, grad: Tensor, clear: bool) -> tuple[Memory, Tensor, Tensor, Tensor]:
    memory = case.copy_of_memory()
    buffer = torch.full((case.buffer_bytes,), FILL, dtype=torch.uint8)
    before = as_bits(grad)
    counts, finite = kernels.pack_carry(grad, case.spans, case.rule, memory, buffer, clear=clear)
    assert as_bits(grad) == before, "the gradient must not change"
    assert counts.dtype == torch.int64 and counts.shape == case.spans.length.shape
    assert finite.dtype == torch.bool and finite.shape == ()
    return memory, buffer, counts, finite


# ---------------------------------------------------------------------------------------------------------- pack_carry


@settings(max_examples=40, deadline=None)
@given(cases(), st.booleans(), st.integers(0, 2**32 - 1))
def test_pack_carry_follows_the_rule_over_several_steps(case: Case, clear: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(3):
        grad = case.gradient(rng)
        wanted, planes, counts = expected_step(case, grad, clear)
        for kernels in BACKENDS:
            memory, buffer, found, finite = run_step(kernels, case, grad, clear)
            # The live half, and what lies outside of the pieces, are in the comparison too.
            assert same_memory(memory, wanted)
            assert buffer.numpy().tobytes() == planes.tobytes()
            assert found.tolist() == counts
            assert bool(finite)
        case = replace(case, memory=replace(wanted, live=1 - wanted.live))


def one_piece(length: int, dtype: torch.dtype = torch.float32, *, square: bool = False) -> Case:
    zero, at = np.zeros(1, dtype=np.int64), np.array([plane_bytes(length)])
    return Case(
        Spans(zero, np.array([length]), zero, zero, at, zero),
        CarryRule(torch.tensor([1.0]), torch.tensor([True]), torch.tensor(1.0), torch.ones(1), 0.5),
        Memory(
            torch.zeros(2, length, dtype=dtype),
            torch.zeros(2, length, dtype=dtype) if square else None,
            torch.tensor(0),
        ),
        length,
        2 * plane_bytes(length),
    )


@every_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("square", [False, True])
def test_pack_carry_finds_one_bad_number_wherever_it_is(kernels: Kernels, bad: float, square: bool) -> None:
    for length in (1, 33, 512, 1100):
        case = one_piece(length, square=square)
        for at in {0, length // 2, length - 1}:
            grad = torch.zeros(length)
            grad[at] = bad
            for active in (True, False):
                rule = replace(case.rule, active=torch.tensor([active]))
                memory, _, _, finite = run_step(kernels, replace(case, rule=rule), grad, clear=True)
                assert not finite
                assert as_bits(memory.carry[0]) == as_bits(case.memory.carry[0]), "the live half is as it was"


def test_squares_in_bfloat16_follow_what_moves_them_by_less_than_their_last_bit() -> None:
    """v is 1, the gradient 0.95: a step moves v by less than half of its last bit; rounded to the nearest it stays."""

    def settled(dithers: Iterable[int]) -> Tensor:
        case = one_piece(600, torch.bfloat16, square=True)
        memory = replace(case.memory, square=torch.ones(2, 600, dtype=torch.bfloat16))
        out = torch.zeros(case.buffer_bytes, dtype=torch.uint8)
        seen = []
        for dither in dithers:
            rule = replace(case.rule, decay=0.99, dither=dither)
            cpu.pack_carry(torch.full((600,), 0.95), case.spans, rule, memory, out, clear=True)
            memory = replace(memory, live=1 - memory.live)
            assert memory.square is not None
            seen.append(memory.square[int(memory.live)].float())
        return torch.stack(seen[-200:]).mean(0)

    assert (settled(map(dither_at, range(800))) - 0.95**2).abs().max() < 2e-3
    assert (settled([0x8000] * 800) == 1).all()


@every_backend
def test_finite_is_about_the_gradient_and_not_about_the_sum(kernels: Kernels) -> None:
    largest = torch.finfo(torch.float32).max
    case = one_piece(600)
    case.memory.carry.fill_(largest)
    memory, _, counts, finite = run_step(kernels, case, torch.full((600,), largest), clear=False)
    assert finite and counts.tolist() == [600]
    assert memory.carry[1].isinf().all()


@every_backend
def test_a_dead_component_keeps_its_carry(kernels: Kernels) -> None:
    case = one_piece(513, square=True)
    case.memory.carry[0] = torch.linspace(-0.9, 0.9, 513)
    case.memory.carry[0, ::7] = -0.0
    grad = torch.zeros(513)
    grad[1::2] = 1e-25  # its square is not a normal float
    memory, _, counts, _ = run_step(kernels, case, grad, clear=True)
    assert counts.tolist() == [0]
    assert as_bits(memory.carry[1]) == as_bits(case.memory.carry[0])


@every_backend
def test_a_component_is_dead_up_to_its_limit(kernels: Kernels) -> None:
    case = one_piece(520, square=True)
    assert case.memory.square is not None
    limit = torch.tensor(1e-30)
    case.memory.square[0] = 2 * limit  # halved by the decay; the gradient's own square is 0
    case.memory.square[0, 1::2] = 2 * torch.nextafter(limit, torch.tensor(1.0))
    case.memory.square[0, 2::4] = 1e-36
    memory, _, _, _ = run_step(kernels, case, torch.full((520,), 1e-25), clear=False)
    assert memory.carry[1, ::2].eq(0).all()
    assert (memory.carry[1, 1::2] > 0.9e-10).all()


@every_backend
def test_a_huge_component_stays_finite(kernels: Kernels) -> None:
    case = one_piece(513, square=True)
    memory, _, _, finite = run_step(kernels, case, torch.full((513,), 1e25), clear=False)
    assert finite
    assert memory.square is not None and memory.square[1].eq(torch.finfo(torch.float32).max).all()
    assert memory.carry[1].isfinite().all() and (memory.carry[1] > 0).all()


@every_backend
def test_without_a_threshold_every_sum_but_zero_votes(kernels: Kernels) -> None:
    case = one_piece(1025)
    for zero in (0.0, -0.0):
        case = replace(case, rule=replace(case.rule, thresholds=torch.tensor([zero])))
        case.memory.carry[0, 3::5] = -2.0
        grad = torch.full((1025,), 2.0)
        memory, _, counts, _ = run_step(kernels, case, grad, clear=True)
        assert counts.tolist() == [1025 - len(range(3, 1025, 5))]
        assert memory.carry[1].eq(0).all()


@every_backend
def test_the_vote_is_decided_before_bfloat16_rounds(kernels: Kernels) -> None:
    """The float32 after 1 is above the threshold of 1, and rounds to it."""
    case = one_piece(520, torch.bfloat16)
    above = float(torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)))
    memory, _, counts, _ = run_step(kernels, case, torch.full((520,), above), clear=False)
    assert counts.tolist() == [520]
    assert memory.carry[1].eq(1.0).all()


@every_backend
def test_roots_and_quotients_are_rounded_correctly(kernels: Kernels) -> None:
    """Exact results in float64, rounded once more, are what IEEE float32 gives for a root or a quotient."""
    case = one_piece(40_000, square=True)
    assert case.memory.square is not None
    rng = np.random.default_rng(5)
    case.memory.square[0] = torch.from_numpy(rng.uniform(1e-6, 4.0, 40_000).astype(np.float32))
    grad = torch.from_numpy(rng.standard_normal(40_000).astype(np.float32))
    memory, _, _, _ = run_step(kernels, case, grad, clear=False)
    assert memory.square is not None
    root = memory.square[1].double().sqrt().float()
    assert as_bits(memory.carry[1]) == as_bits((grad.double() / root.double()).float())


@every_backend
def test_no_pieces_are_fine(kernels: Kernels) -> None:
    none = np.zeros(0, dtype=np.int64)
    spans = Spans(none, none, none, none, none, none)
    rule = CarryRule(torch.zeros(0), torch.zeros(0, dtype=torch.bool), torch.tensor(1.0))
    memory, nothing = Memory(torch.zeros(2, 0), None, torch.tensor(0)), torch.zeros(0, dtype=torch.uint8)
    counts, finite = kernels.pack_carry(torch.zeros(0), spans, rule, memory, nothing, clear=True)
    assert counts.numel() == 0 and finite
    assert kernels.active(torch.zeros(0), spans).shape == (0,)
    where = torch.zeros(0, dtype=torch.int64)
    assert kernels.settle_carry(nothing, spans, where, where, memory).shape == (0,)


# -------------------------------------------------------------------------------------------------------------- active


@every_backend
def test_active_finds_one_number_wherever_it_is(kernels: Kernels) -> None:
    lengths = list(SIZES)
    spans = Spans.whole(lengths)
    for value in (1e-45, -3.0, float("nan"), float("inf")):
        for k, (start, length) in enumerate(zip(spans.start.tolist(), lengths, strict=True)):
            for at in {0, length // 2, length - 1} if length else ():
                grad = torch.zeros(sum(lengths))
                grad[::2] = -0.0
                grad[start + at] = value
                found = kernels.active(grad, spans)
                assert found.dtype == torch.bool
                assert found.nonzero().flatten().tolist() == [k]


@every_backend
def test_active_looks_into_the_spans_alone(kernels: Kernels) -> None:
    spans = Spans(np.array([5, 1000]), np.array([600, 30]), np.array([1, 0]))
    grad = torch.ones(1030)
    grad[5:605] = 0.0
    assert kernels.active(grad, spans).tolist() == [True, False]


# -------------------------------------------------------------------------------------------------------- settle_carry


def settled(case: Case, planes: Tensor, caps: Tensor, starts: Tensor) -> tuple[bytes, Memory, list[int]]:
    """The documented rule, a vote at a time."""
    memory, spans = case.copy_of_memory(), case.spans
    left, counts = bytearray(planes.numpy().tobytes()), []
    spare = 1 - int(memory.live)
    for k, length in enumerate(spans.length.tolist()):
        num_bytes, kept, count = plane_bytes(length), 0, 0
        for turn in range(8 * num_bytes):
            bit = (8 * int(starts[k]) + turn) % (8 * num_bytes)
            at, here = int(spans.mask_at[k]) + bit // 8, 1 << bit % 8
            if left[at] & here:
                count += 1
                if kept < int(caps[k]):
                    kept += 1
                    memory.carry[spare, int(spans.home[k]) + element_of_bit(bit, length)] = 0.0
                else:
                    left[at] &= ~here
                    left[int(spans.sign_at[k]) + bit // 8] &= ~here
        counts.append(count)
    return bytes(left), memory, counts


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(0, 2**32 - 1))
def test_settle_carry_follows_the_rule(case: Case, seed: int) -> None:
    rng = np.random.default_rng(seed)
    case.memory.carry[case.memory.carry == 0] = 0.5  # so that one that is zeroed can be told
    planes = torch.full((case.buffer_bytes,), FILL, dtype=torch.uint8)
    caps, starts = [], []
    for k, length in enumerate(case.spans.length.tolist()):
        votes = rng.random(length) < rng.choice([0.0, 0.01, 0.2, 1.0])
        mask, sign = plane(votes), plane(votes & (rng.random(length) < 0.5))
        planes[case.spans.mask_at[k] : case.spans.mask_at[k] + mask.size] = torch.from_numpy(mask)
        planes[case.spans.sign_at[k] : case.spans.sign_at[k] + sign.size] = torch.from_numpy(sign)
        num = int(votes.sum())
        caps.append(int(rng.choice([0, 1, num // 2, num, num + 5])))
        starts.append(int(rng.integers(mask.size)) if mask.size else 0)
    wanted_planes, wanted, counts = settled(case, planes, torch.tensor(caps), torch.tensor(starts))
    for kernels in BACKENDS:
        found, memory = planes.clone(), case.copy_of_memory()
        before = kernels.settle_carry(found, case.spans, torch.tensor(caps), torch.tensor(starts), memory)
        assert before.dtype == torch.int64 and before.tolist() == counts
        assert found.numpy().tobytes() == wanted_planes
        assert same_memory(memory, wanted)
        found = planes.clone()
        assert (
            kernels.settle_carry(found, case.spans, torch.tensor(caps), torch.tensor(starts), None).tolist() == counts
        )
        assert found.numpy().tobytes() == wanted_planes


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_sent_stays_in_the_carry(kernels: Kernels, dtype: torch.dtype) -> None:
    """After both kernels, votes that were sent left the carry, and all other sums are in it, capped ones included."""
    case = one_piece(1100, dtype)
    grad = torch.from_numpy(np.random.default_rng(6).standard_normal(1100).astype(np.float32) * 2)
    memory, planes, counts, _ = run_step(kernels, case, grad, clear=False)
    total, cap = int(counts[0]), 100
    assert total > 2 * cap
    before = kernels.settle_carry(planes, case.spans, torch.tensor([cap]), torch.tensor([137]), memory)
    assert before.tolist() == [total]
    value, sent = torch.tensor(1.0), torch.zeros(1100)
    kernels.unpack(planes, case.spans, value, sent)
    assert int(sent.ne(0).sum()) == cap
    assert torch.equal(sent.ne(0), memory.carry[1].eq(0))
    assert torch.equal(sent[sent != 0], grad[sent != 0].sign())
    assert torch.equal(memory.carry[1][sent == 0], grad[sent == 0].to(dtype))


@every_backend
def test_settling_begins_where_it_is_told_and_goes_round(kernels: Kernels) -> None:
    case = one_piece(24)
    case.memory.carry[1] = 1.0
    planes = torch.tensor([0b1000_0001, 0b0000_0010, 0b0100_0000, 0b0000_0001, 0, 0b0100_0000], dtype=torch.uint8)
    before = kernels.settle_carry(planes, case.spans, torch.tensor([3]), torch.tensor([1]), case.memory)
    assert before.tolist() == [4]
    assert planes.tolist() == [0b0000_0001, 0b0000_0010, 0b0100_0000, 0b0000_0001, 0, 0b0100_0000]
    assert case.memory.carry[1].eq(0).nonzero().flatten().tolist() == [0, 9, 22]
