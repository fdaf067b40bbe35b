"""The CUDA kernels against the reference, bit for bit; `test_kernels_cuda` runs this file in processes of its own.

There `TRITON_INTERPRET` decides, before Triton is imported, whether the kernels run in its interpreter, on CPU tensors,
or on a device.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distsign.kernels import CarryRule, Kernels, Memory, Spans, SparseCode, reference

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
SIZES = (513, 0, 1, 7, 8, 9, 31, 33, 511, 512, 1025, 4099)
ROWS = 6
FILL = 0xA5
SPECIAL = np.array([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1.1754942e-38, 3.4028235e38], dtype=np.float32)
THRESHOLDS = torch.tensor([0.0, -0.0, 0.5, 1.0, 1e-45, float("inf")])


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    from distsign.kernels import cuda

    return cuda


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def on_device(value: Any) -> Any:
    """Copy tensors, also those in memories and rules; spans stay, since their tables are cached by identity."""
    if isinstance(value, Tensor):
        return value.clone().to(DEVICE)
    if isinstance(value, Memory):
        return Memory(*(on_device(part) for part in (value.carry, value.square, value.live)))
    if isinstance(value, CarryRule):
        parts = (value.thresholds, value.active, value.unscale, value.corrections)
        return CarryRule(*(on_device(part) for part in parts), decay=value.decay, dither=value.dither)
    return value


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Memory):
        return [part for part in (value.carry, value.square, value.live) if part is not None]
    return [value] if isinstance(value, Tensor) else []


def same_bits(a: Tensor, b: Tensor) -> bool:
    as_integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    a, b = a.cpu().contiguous(), b.cpu().contiguous()
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.view(as_integers[a.itemsize]), b.view(as_integers[b.itemsize]))


def agree(kernels: Kernels, name: str, *args: Any, on_cpu: tuple[int, ...] = (), **options: Any) -> Any:
    """Call both backends and compare what they return and what they changed; return the reference's results.

    Args:
        kernels: the backend that is tested.
        name: of the function.
        args: its arguments, on the CPU; not changed.
        on_cpu: places of arguments that stay there.
        options: by keyword.
    """
    theirs = [on_device(value) if k not in on_cpu else value for k, value in enumerate(args)]
    ours = [Memory(*(None if p is None else p.clone() for p in (a.carry, a.square, a.live))) if isinstance(a, Memory)
            else a.clone() if isinstance(a, Tensor) else a for a in args]  # fmt: skip
    wanted = getattr(reference, name)(*ours, **options)
    if DEVICE.type == "cuda":
        # Once to compile and to upload the tables; then nothing may wait for the device.
        getattr(kernels, name)(*[on_device(v) if k not in on_cpu else v for k, v in enumerate(args)], **options)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        found = getattr(kernels, name)(*theirs, **options)
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    as_tuple: Callable[[Any], tuple[Any, ...]] = lambda x: x if isinstance(x, tuple) else (x,)  # noqa: E731
    for k, (a, b) in enumerate(zip(as_tuple(found), as_tuple(wanted), strict=True)):
        assert (a is None and b is None) or same_bits(a, b), f"{name}: result {k}: {a} instead of {b}"
    for k, (after, expected) in enumerate(zip(theirs, ours, strict=True)):
        for a, b in zip(tensors_of(after), tensors_of(expected), strict=True):
            assert same_bits(a, b), f"{name}: argument {k} differs"
    return (*as_tuple(wanted), *ours)


def spans_of(rng: np.random.Generator, sizes: tuple[int, ...] = SIZES) -> tuple[Spans, int, int, int]:
    """Pieces in any order with gaps, several to a row; return also the elements, plane bytes and kept elements."""
    length = np.array(sizes, dtype=np.int64)[rng.permutation(len(sizes))]

    def places(extent: np.ndarray[Any, np.dtype[np.int64]]) -> tuple[np.ndarray[Any, np.dtype[np.int64]], int]:
        order = rng.permutation(extent.size)
        gap = rng.integers(0, 6, extent.size)
        at = np.zeros_like(extent)
        at[order] = np.cumsum(extent[order] + gap) - extent[order]
        return at, int((extent + gap).sum()) + 3

    start, num_elements = places(length)
    planes, num_bytes = places(np.tile((length + 7) // 8, 2))
    home, num_kept = places(length)
    row = rng.integers(0, ROWS, length.size)
    spans = Spans(start, length, row, planes[: length.size].copy(), planes[length.size :].copy(), home)
    return spans, num_elements, num_bytes, num_kept


def side_by_side(spans: Spans) -> tuple[Spans, int]:
    """Return the pieces with mask planes one behind the other and sign planes after them; and the bytes of either."""
    planes_bytes = (spans.length + 7) // 8
    at, num_bytes = np.cumsum(planes_bytes) - planes_bytes, int(planes_bytes.sum())
    return Spans(spans.start, spans.length, spans.row, at, at + num_bytes, spans.home), num_bytes


def gradient(rng: np.random.Generator, size: int, special: float = 0.2) -> Tensor:
    grad = rng.standard_normal(size).astype(np.float32)
    there = rng.random(size) < special
    grad[there] = rng.choice(SPECIAL, int(there.sum()))
    return torch.from_numpy(grad)


def filled(size: int) -> Tensor:
    return torch.full((size,), FILL, dtype=torch.uint8)


def random_bytes(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))


# --------------------------------------------------------------------------------------------------------------- voter


@pytest.mark.parametrize("seed", range(2))
def test_pack_and_unpack(kernels: Kernels, seed: int) -> None:
    rng = np.random.default_rng(seed)
    spans, num_elements, num_bytes, _ = spans_of(rng)
    grad = gradient(rng, num_elements)
    counts, finite, *_, planes = agree(kernels, "pack", grad, spans, THRESHOLDS, filled(num_bytes))
    assert bool(finite) and int(counts.sum()) > 0
    value = torch.tensor([float("inf"), 1e-45][seed])
    agree(kernels, "unpack", planes, spans, value, torch.full((num_elements,), 9.0))
    # Any bytes: signs without votes, and bits beyond the end.
    agree(kernels, "unpack", random_bytes(rng, num_bytes), spans, value, torch.full((num_elements,), 9.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_pack_of_what_is_not_finite(kernels: Kernels, bad: float) -> None:
    rng = np.random.default_rng(1)
    spans, num_elements, num_bytes, _ = spans_of(rng, (513, 40, 0))
    for piece in np.flatnonzero(spans.length):
        for at in (0, spans.length[piece] - 1):
            grad = gradient(rng, num_elements)
            grad[spans.start[piece] + at] = bad
            _, finite, *_ = agree(kernels, "pack", grad, spans, THRESHOLDS, filled(num_bytes))
            assert not finite


def test_what_lies_between_pieces_is_not_looked_at(kernels: Kernels) -> None:
    zero = np.zeros(1, dtype=np.int64)
    spans = Spans(zero + 3, zero + 520, zero, zero + 1, zero + 70, zero)
    grad = torch.full((527,), float("nan"))
    grad[3:523] = 1.0
    _, finite, *_ = agree(kernels, "pack", grad, spans, torch.zeros(1), filled(140))
    assert finite
    assert agree(kernels, "active", grad, spans)[0].tolist() == [True]
    grad[3:523] = -0.0
    assert agree(kernels, "active", grad, spans)[0].tolist() == [False]


def test_nothing_at_all(kernels: Kernels) -> None:
    none = np.zeros(0, dtype=np.int64)
    spans = Spans(none, none, none, none, none, none)
    agree(kernels, "pack", torch.zeros(0), spans, torch.zeros(0), filled(3))
    agree(kernels, "unpack", filled(3), spans, torch.tensor(1.0), torch.zeros(0))
    agree(kernels, "moments", torch.zeros(0), Spans.whole([]))
    agree(kernels, "active", torch.zeros(0), Spans.whole([]))
    caps = torch.zeros(0, dtype=torch.int64)
    memory = Memory(torch.zeros(2, 0), None, torch.tensor(0))
    agree(kernels, "settle_carry", filled(3), spans, caps, caps, memory, on_cpu=(2, 3))


def test_active(kernels: Kernels) -> None:
    sizes = [0, 1, 1, 40, 513, 9000, 9000, 600, 5, 5]
    spans = Spans.whole(sizes)
    grad = torch.zeros(sum(sizes))
    grad[::3] = -0.0
    ends = np.cumsum(sizes)
    grad[ends[2] - 1], grad[ends[4] - 1] = 1.0, float("nan")
    grad[ends[5] - 1], grad[ends[6] - 9000], grad[ends[8] - 2] = 1e-45, -1e-45, float("-inf")
    found = agree(kernels, "active", grad, spans)[0]
    assert found.tolist() == [False, False, True, False, True, True, True, False, True, False]


def test_moments(kernels: Kernels) -> None:
    rng = np.random.default_rng(5)
    sizes = [int(n) for n in rng.permutation([*SIZES, *[6] * 8])]
    scale = 10.0 ** rng.integers(-30, 30, sum(sizes))
    grad = torch.from_numpy((rng.standard_normal(sum(sizes)) * scale).astype(np.float32))
    agree(kernels, "moments", grad, Spans.whole(sizes))


def test_moments_of_three_levels(kernels: Kernels) -> None:
    sizes = [77, 512 * 512 + 1, 0]
    agree(kernels, "moments", torch.randn(sum(sizes)).exp(), Spans.whole(sizes))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_moments_do_not_hide_a_bad_number(kernels: Kernels, bad: float) -> None:
    grad = torch.randn(1300)
    grad[700] = bad
    found = kernels.moments(grad.to(DEVICE), Spans.whole([600, 600, 100])).cpu()
    assert found.isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize(("clear", "live"), [(False, 0), (True, 1), (True, 0)])
def test_pack_carry(kernels: Kernels, live: int, dtype: torch.dtype, square: bool, clear: bool) -> None:
    rng = np.random.default_rng(live + 2 * clear)
    spans, num_elements, num_bytes, num_kept = spans_of(rng)
    grad = gradient(rng, num_elements)
    # Where nothing is kept yet, v is tiny or 0; elsewhere some overflow.
    kept = torch.from_numpy(rng.choice([0.0, 1e-38, 1e-30, 0.3, 3e38], num_kept).astype(np.float32))
    memory = Memory(
        gradient(rng, 2 * num_kept, 0.1).view(2, -1).to(dtype),
        torch.stack([kept, kept.roll(1)]).to(dtype) if square else None,
        torch.tensor(live),
    )
    rule = CarryRule(
        torch.tensor([0.0, -0.0, 0.7, 1.5, 1e-45, float("inf")]),
        torch.tensor([True, True, False, True, True, True]),
        torch.tensor([0.1, 2.0**-16][live]),
        torch.linspace(0.03, 1.0, ROWS).sqrt() if square and not (clear and live) else None,
        0.9 + 0.05 * live if square else 0.0,
        0xFFFF - 40503 * live,
    )
    results = agree(kernels, "pack_carry", grad, spans, rule, memory, filled(num_bytes), clear=clear)
    assert bool(results[1]) and int(results[0].sum()) > 0
    if not clear:
        planes, memory = results[-1], results[-2]
        agree(kernels, "settle_carry", planes, spans, *turns(rng, spans), None, on_cpu=(2, 3))
        votes = agree(kernels, "settle_carry", planes, spans, *turns(rng, spans), memory, on_cpu=(2, 3))[0]
        assert int(votes.sum()) == int(results[0].sum())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("square", [False, True])
def test_pack_carry_flags_what_is_not_finite(kernels: Kernels, bad: float, square: bool) -> None:
    spans = Spans(*(np.array(column) for column in ([0, 520], [520, 20], [0, 1], [0, 65], [68, 133], [0, 520])))
    for at in (511, 539):  # the last one in a row that does not vote
        grad = torch.randn(540)
        grad[at] = bad
        memory = Memory(torch.zeros(2, 540), torch.ones(2, 540) if square else None, torch.tensor(1))
        rule = CarryRule(torch.zeros(2), torch.tensor([True, False]), torch.tensor(1.0), None, 0.9 * square)
        args = [on_device(value) for value in (grad, spans, rule, memory, filled(140))]
        assert not kernels.pack_carry(*args, clear=True)[1]


def turns(rng: np.random.Generator, spans: Spans) -> tuple[Tensor, Tensor]:
    """Caps of every kind, and starts anywhere in the plane."""
    bits = spans.length
    caps = np.where(rng.random(bits.size) < 0.7, rng.integers(0, bits // 4 + 2), bits)
    starts = rng.integers(0, np.maximum((bits + 7) // 8, 1))
    return torch.from_numpy(caps), torch.from_numpy(starts)


# --------------------------------------------------------------------------------------------------------------- owner


def test_count_votes(kernels: Kernels) -> None:
    rng = np.random.default_rng(1)
    for num_bytes in (0, 1, 8, 513):
        agree(kernels, "count_votes", random_bytes(rng, 3, 5 + num_bytes + 4), 5, num_bytes)


@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_tally(kernels: Kernels, world_size: int) -> None:
    rng = np.random.default_rng(world_size)
    for num_bytes in (0, 1, 513):
        payloads = random_bytes(rng, world_size, 8 + 2 * num_bytes + 3)
        for margin in {1, world_size // 2 + 1, world_size + 1}:
            agree(kernels, "tally", payloads, 8, num_bytes, margin, filled(2 * num_bytes + 1))


def test_tally_counts_more_workers_than_a_byte_holds(kernels: Kernels) -> None:
    payloads = torch.full((260, 8), 255, dtype=torch.uint8)
    payloads[:20, :4] = 0x55
    payloads[:, 4:] = 0x0F
    for margin in (1, 241):
        agree(kernels, "tally", payloads, 0, 4, margin, filled(8))


@pytest.mark.parametrize(("world_size", "live", "margin"), [(1, 0, 1), (3, 0, 2), (3, 1, 1)])
def test_tally_carry_and_settle_votes(kernels: Kernels, world_size: int, live: int, margin: int) -> None:
    rng = np.random.default_rng(live)
    spans, _, num_bytes, num_kept = spans_of(rng)
    payloads = random_bytes(rng, world_size, 5 + num_bytes)
    undecided = torch.from_numpy(rng.integers(-3, 4, (2, num_kept)).astype(np.int16))
    undecided[:, ::7] = 32767
    undecided[:, 3::7] = -32767
    args = (payloads, 5, spans, margin, undecided, torch.tensor(live), filled(num_bytes))
    *_, after, _, planes = agree(kernels, "tally_carry", *args)
    args = (planes, spans, *turns(rng, spans), margin, after, torch.tensor(live))
    for forget in (False, True):
        counts, *_ = agree(kernels, "settle_votes", *args, on_cpu=(2, 3), forget=forget)
    assert int(counts.sum()) > 0


def test_tally_sparse(kernels: Kernels) -> None:
    rng = np.random.default_rng(5)
    spans, _, _, num_kept = spans_of(rng)
    spans, num_bytes = side_by_side(spans)
    mask, sign = (torch.from_numpy(rng.random(8 * num_bytes) < share) for share in (0.1, 0.5))
    planes = torch.from_numpy(np.packbits(torch.stack([mask, mask & sign]).numpy(), axis=1, bitorder="little"))
    code = SparseCode(8 * num_bytes, int(mask.sum()) + 3)
    payloads = filled(2 * (code.num_bytes + 9)).view(2, -1)
    for row in payloads:
        reference.encode_sparse(planes.view(-1), planes.shape[1], code, row[6 : 6 + code.num_bytes])
    payloads[1, 6] ^= 1  # a body that nobody writes, whose votes mean nothing but reach no other place
    undecided = torch.from_numpy(rng.integers(-3, 4, (2, num_kept)).astype(np.int16))
    live, out = torch.tensor(0), filled(planes.numel())
    for rows in (payloads[:1], payloads[:1].repeat(3, 1)):
        agree(kernels, "tally_sparse", rows, 6, code, spans, 2, undecided, live, out)
    args = (payloads, 6, code, spans, 2, undecided, live, out)
    assert kernels.tally_sparse(*map(on_device, args)).tolist() == [True, False]


@pytest.mark.parametrize(("world_size", "live", "margin"), [(1, 0, 1), (3, 0, 2), (3, 1, 1)])
def test_tally_standing_and_settle_standing(kernels: Kernels, world_size: int, live: int, margin: int) -> None:
    rng = np.random.default_rng(live)
    spans, num_bytes = side_by_side(spans_of(rng)[0])
    payloads = random_bytes(rng, world_size, 3 + 2 * num_bytes)
    standing = random_bytes(rng, 2, world_size, 2, num_bytes)
    standing[:, :, 1] &= standing[:, :, 0]
    standing = standing.view(2, world_size, 2 * num_bytes)
    args = (payloads, 3, num_bytes, margin, standing, torch.tensor(live), filled(2 * num_bytes))
    *_, after, _, planes = agree(kernels, "tally_standing", *args)
    args = (planes, spans, *turns(rng, spans), after, torch.tensor(live))
    agree(kernels, "settle_standing", *args, on_cpu=(2, 3))


def test_settle_in_a_turn_of_several_chunks(kernels: Kernels) -> None:
    """Chunks must know the votes of those before them, in pieces that are not the first."""
    rng = np.random.default_rng(3)
    spans, _, num_bytes, num_kept = spans_of(rng, (9000, 40, 13_001))
    planes = random_bytes(rng, num_bytes)
    undecided = torch.from_numpy(rng.integers(-30, 31, (2, num_kept)).astype(np.int16))
    for _ in range(2):
        args = (planes, spans, *turns(rng, spans), 2, undecided, torch.tensor(0))
        agree(kernels, "settle_votes", *args, on_cpu=(2, 3))


# -------------------------------------------------------------------------------------------------------------- sparse


@pytest.mark.parametrize("density", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("num_bytes", [0, 1, 700])
def test_sparse(kernels: Kernels, density: float, num_bytes: int) -> None:
    rng = np.random.default_rng(int(1000 * density))
    mask = rng.random(8 * num_bytes) < density
    sign = mask & (rng.random(mask.size) < 0.5)
    planes = torch.from_numpy(np.concatenate([np.packbits(bits, bitorder="little") for bits in (mask, sign)]))
    votes = int(mask.sum())
    for num_slots in sorted({votes, min(votes + 5, mask.size), mask.size}):
        code = SparseCode(mask.size, num_slots)
        fits, *_, body = agree(kernels, "encode_sparse", planes, num_bytes, code, filled(code.num_bytes))
        assert fits
        fine, *_, back = agree(kernels, "decode_sparse", body, code, num_bytes, filled(2 * num_bytes))
        assert fine and torch.equal(back, planes)
    if votes:
        code = SparseCode(mask.size, votes - 1)
        args = (on_device(planes), num_bytes, code, filled(code.num_bytes).to(DEVICE))
        assert not kernels.encode_sparse(*args)


@pytest.mark.parametrize(("num_bytes", "num_slots"), [(3, 2), (3, 24), (40, 9), (700, 30)])
def test_sparse_bodies_that_nobody_writes(kernels: Kernels, num_bytes: int, num_slots: int) -> None:
    rng = np.random.default_rng(num_slots)
    code = SparseCode(8 * num_bytes, num_slots)
    mask = np.zeros(8 * num_bytes, dtype=bool)
    mask[rng.choice(mask.size, num_slots * 2 // 3, replace=False)] = True
    planes = torch.from_numpy(np.concatenate([np.packbits(mask, bitorder="little")] * 2))
    good = filled(code.num_bytes)
    assert reference.encode_sparse(planes, num_bytes, code, good)
    bodies = [random_bytes(rng, code.num_bytes), filled(code.num_bytes + 1)]
    for at in rng.permutation(8 * code.num_bytes)[:8].tolist():
        body = good.clone()
        body[at // 8] ^= 1 << at % 8
        bodies.append(body)
    refused = 0
    for body in bodies:
        wanted = reference.decode_sparse(body, code, num_bytes, out := filled(2 * num_bytes))
        found_out = filled(2 * num_bytes).to(DEVICE)
        found = kernels.decode_sparse(body.to(DEVICE), code, num_bytes, found_out)
        assert bool(found) == bool(wanted)
        assert not wanted or same_bits(found_out, out)
        refused += not wanted
    assert refused
