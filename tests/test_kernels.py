"""All backends against each other bit for bit, and against transcriptions of what `Kernels` documents."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import distsign.kernels
from distsign.kernels import BLOCK, Kernels, Spans, cpu, kernels_for, plane_bytes, reference
from distsign.vote import majority_vote

BACKENDS: list[Kernels] = [reference, cpu]
every_backend = pytest.mark.parametrize("kernels", BACKENDS, ids=["reference", "cpu"])

SIZES = (0, 1, 7, 8, 9, 31, 32, 33, 511, 512, 513, 1023, 1024, 1025, 1537)
FILL = 0xA5
FINITE = np.array(
    # the smallest and the largest denormal, the smallest normal and the largest float among them
    [0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1e-45, -1e-45, 1.1754942e-38, -1.1754942e-38, 1.1754944e-38, 3.4028235e38],
    dtype=np.float32,
)
NON_FINITE = np.array([np.nan, -np.nan, np.inf, -np.inf], dtype=np.float32)
THRESHOLDS = (0.0, 1e-45, 1.1754942e-38, 0.5, 0.7, 1.0, 3.4028235e38, float("inf"))

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """A flat gradient with pieces in it, and a buffer with room for their planes."""

    grad: Floats
    spans: Spans
    thresholds: Floats
    buffer_bytes: int

    def pieces(self) -> list[tuple[slice, int]]:
        return [
            (slice(start, start + length), row)
            for start, length, row in zip(self.spans.start, self.spans.length, self.spans.row, strict=True)
        ]

    def plane_places(self) -> npt.NDArray[np.bool_]:
        """Where in the buffer there are planes."""
        places = np.zeros(self.buffer_bytes, dtype=bool)
        for at, length in zip(
            np.concatenate([self.spans.mask_at, self.spans.sign_at]), np.tile(self.spans.length, 2), strict=True
        ):
            places[at : at + (length + 7) // 8] = True
        return places

    def pack(self, kernels: Kernels) -> tuple[Tensor, Tensor, Tensor]:
        buffer = torch.full((self.buffer_bytes,), FILL, dtype=torch.uint8)
        grad = torch.from_numpy(self.grad.copy())
        counts, finite = kernels.pack(grad, self.spans, torch.from_numpy(self.thresholds.copy()), buffer)
        assert same_bits(grad, torch.from_numpy(self.grad)), "pack must not change the gradient"
        assert counts.dtype == torch.int64 and counts.shape == self.spans.length.shape
        assert finite.dtype == torch.bool and finite.shape == ()
        return buffer, counts, finite

    def ballots(self) -> Floats:
        """The rule in floating point: `sign(g)` where `abs(g) > alpha`, in the pieces; NaN elsewhere."""
        expected = np.full(self.grad.shape, np.nan, dtype=np.float32)
        for piece, row in self.pieces():
            g = self.grad[piece]
            expected[piece] = np.where(np.abs(g) > self.thresholds[row], np.sign(g), np.float32(0.0))
        return expected


@st.composite
def cases(draw: st.DrawFn, *, non_finite: bool = False) -> Case:
    """Pieces of awkward sizes at odd places, several to a row, their planes anywhere in the buffer."""
    lengths = draw(st.lists(st.one_of(st.sampled_from(SIZES), st.integers(0, 1100)), min_size=1, max_size=5))
    gaps = draw(st.lists(st.integers(0, 17), min_size=len(lengths), max_size=len(lengths)))
    thresholds = draw(st.lists(st.sampled_from(THRESHOLDS), min_size=1, max_size=3))
    rows = draw(st.lists(st.integers(0, len(thresholds) - 1), min_size=len(lengths), max_size=len(lengths)))
    planes = draw(st.permutations(range(2 * len(lengths))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    start, end = [], 0
    for gap, length in zip(gaps, lengths, strict=True):
        start.append(end + gap)
        end += gap + length
    grad = rng.standard_normal(end + draw(st.integers(0, 3))).astype(np.float32)
    special = rng.random(grad.size) < draw(st.sampled_from([0.0, 0.1, 0.9]))
    grad[special] = rng.choice(FINITE, int(special.sum()))
    if non_finite and grad.size:
        at = rng.integers(grad.size, size=draw(st.integers(1, 3)))
        grad[at] = rng.choice(NON_FINITE, at.size)
    places, at = [0] * (2 * len(lengths)), 0
    for plane in planes:
        at += draw(st.integers(0, 3))
        places[plane] = at
        at += (lengths[plane % len(lengths)] + 7) // 8
    return Case(
        grad,
        Spans(
            np.array(start, dtype=np.int64),
            np.array(lengths, dtype=np.int64),
            np.array(rows, dtype=np.int64),
            np.array(places[: len(lengths)], dtype=np.int64),
            np.array(places[len(lengths) :], dtype=np.int64),
        ),
        np.array(thresholds, dtype=np.float32),
        at + draw(st.integers(0, 3)),
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit: -0.0 is not 0.0, and a NaN equals itself."""
    as_integers = {4: torch.int32, 8: torch.int64}
    return a.shape == b.shape and torch.equal(a.view(as_integers[a.itemsize]), b.view(as_integers[b.itemsize]))


def plane(bits: npt.NDArray[np.bool_]) -> bytes:
    """Write one plane as the package's docstring describes it, one bit after the other."""
    written = bytearray((len(bits) + 7) // 8)
    in_blocks = len(bits) // 512 * 512
    for element in np.flatnonzero(bits).tolist():
        if element < in_blocks:
            block, place = divmod(element, 512)
            bit, word = divmod(place, 16)  # element 16 * bit + word
            byte = 64 * block + 4 * word + bit // 8  # little-endian words of four bytes
        else:
            byte, bit = element // 8, element % 8
        written[byte] |= 1 << bit % 8
    return bytes(written)


def one_span(length: int) -> Spans:
    zero = np.zeros(1, dtype=np.int64)
    return Spans(zero, np.array([length]), zero, zero, np.array([plane_bytes(length)]))


def packed(kernels: Kernels, grad: Tensor, alpha: float) -> Tensor:
    out = torch.full((2 * plane_bytes(grad.numel()),), FILL, dtype=torch.uint8)
    kernels.pack(grad, one_span(grad.numel()), torch.tensor([alpha]), out)
    return out


# ---------------------------------------------------------------------------------------------------------------- pack


@settings(max_examples=150, deadline=None)
@given(cases())
def test_pack_writes_the_ballots_of_finite_gradients(case: Case) -> None:
    expected = np.full(case.buffer_bytes, FILL, dtype=np.uint8)
    counts = []
    ballots = case.ballots()
    for (piece, _), mask_at, sign_at in zip(case.pieces(), case.spans.mask_at, case.spans.sign_at, strict=True):
        for at, bits in ((mask_at, ballots[piece] != 0), (sign_at, ballots[piece] < 0)):
            written = np.frombuffer(plane(bits), dtype=np.uint8)
            expected[at : at + written.size] = written
        counts.append(np.count_nonzero(ballots[piece]))
    for kernels in BACKENDS:
        buffer, found, finite = case.pack(kernels)
        assert buffer.numpy().tobytes() == expected.tobytes()
        assert found.tolist() == counts
        assert bool(finite)


@settings(max_examples=100, deadline=None)
@given(cases(non_finite=True))
def test_pack_flags_what_is_not_finite_alike_on_every_backend(case: Case) -> None:
    in_pieces = all(np.isfinite(case.grad[piece]).all() for piece, _ in case.pieces())
    wanted = case.pack(reference)
    found = case.pack(cpu)
    assert bool(wanted[2]) == in_pieces
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    assert torch.equal(found[2], wanted[2])
    untouched = ~case.plane_places()
    assert (found[0].numpy()[untouched] == FILL).all()


@every_backend
@pytest.mark.parametrize("bad", NON_FINITE.tolist())
@pytest.mark.parametrize("length", [1, 7, 33, 512, 513, 1100])
def test_pack_finds_one_bad_number_wherever_it_is(kernels: Kernels, bad: float, length: int) -> None:
    out = torch.zeros(2 * plane_bytes(length), dtype=torch.uint8)
    for at in {0, length // 2, length - 1}:
        grad = torch.zeros(length)
        grad[at] = bad
        _, finite = kernels.pack(grad, one_span(length), torch.tensor([float("inf")]), out)
        assert not finite, at


@every_backend
def test_pack_takes_the_largest_numbers_for_finite(kernels: Kernels) -> None:
    largest = torch.tensor([torch.finfo(torch.float32).max])
    grad = torch.cat([largest, -largest]).repeat(513)[:1025]
    out = torch.zeros(2 * plane_bytes(1025), dtype=torch.uint8)
    counts, finite = kernels.pack(grad, one_span(1025), torch.nextafter(largest, torch.zeros(1)), out)
    assert counts.tolist() == [1025]
    assert finite


@every_backend
def test_the_threshold_itself_does_not_vote(kernels: Kernels) -> None:
    alpha = 0.1  # not exact in binary: the comparison is with the float32 next to it
    at = torch.tensor([alpha])
    grad = torch.cat([at, -at, torch.nextafter(at, at + 1), -torch.nextafter(at, at + 1), torch.nextafter(at, at - 1)])
    assert packed(kernels, grad, alpha).tolist() == [0b01100, 0b01000]
    assert packed(kernels, grad.repeat(205), alpha).tolist() == packed(reference, grad.repeat(205), alpha).tolist()


@every_backend
def test_zero_of_either_sign_never_votes(kernels: Kernels) -> None:
    grad = torch.zeros(513)
    grad[::2] = -0.0
    assert packed(kernels, grad, 0.0).eq(0).all()


def test_a_threshold_of_minus_zero_is_a_threshold_of_zero() -> None:
    """`-0.0` is at least 0, but as an integer it is the largest or the smallest there is."""
    grad = torch.tensor([1.0, -2.0, 0.0, -0.0, 3.0]).repeat(205)
    expected = packed(reference, grad, 0.0).tolist()
    assert packed(cpu, grad, -0.0).tolist() == expected
    assert packed(reference, grad, -0.0).tolist() == expected


@every_backend
def test_pack_of_a_short_span_has_these_bytes(kernels: Kernels) -> None:
    grad = torch.tensor([1.0, -2.0, 0.0, 3.0, -4.0, 0.5, -0.5, 0.0, -9.0, 7.0])
    # element:      7 6 5 4 3 2 1 0            9 8
    # mask:      0b 0 0 0 1 1 0 1 1  = 1b   0b 1 1 = 03
    # sign:      0b 0 0 0 1 0 0 1 0  = 12   0b 0 1 = 01
    assert bytes(packed(kernels, grad, 0.5).tolist()) == bytes.fromhex("1b 03  12 01")


@every_backend
def test_pack_of_a_full_block_has_these_bytes(kernels: Kernels) -> None:
    grad = torch.full((514,), 0.25)
    votes = [(0, 1.0), (15, 1.0), (16, 1.0), (17, -1.0), (130, 1.0), (511, -1.0), (513, -1.0)]
    for element, value in votes:
        grad[element] = value
    mask, sign = bytearray(65), bytearray(65)
    mask[0] = 0b11  # element 0: word 0, bit 0; element 16: word 0, bit 1
    mask[4] = 0b10  # element 17 = 16 * 1 + 1: word 1, bit 1
    mask[9] = 0b01  # element 130 = 16 * 8 + 2: word 2, bit 8, so the second byte of that word
    mask[60] = 0b01  # element 15: word 15, bit 0
    mask[63] = 0x80  # element 511 = 16 * 31 + 15: word 15, bit 31
    mask[64] = 0b10  # element 513, in the tail
    sign[4], sign[63], sign[64] = 0b10, 0x80, 0b10
    assert bytes(packed(kernels, grad, 0.5).tolist()) == bytes(mask + sign)


@every_backend
def test_pack_counts_each_piece_of_a_row_by_itself(kernels: Kernels) -> None:
    lengths = np.array([600, 40, 513, 0])
    start = np.cumsum(lengths) - lengths
    at = np.arange(4) * 200
    spans = Spans(start, lengths, np.array([2, 0, 2, 1]), at, at + 100)
    grad = torch.ones(int(lengths.sum()))
    grad[5] = 0.0
    counts, _ = kernels.pack(grad, spans, torch.zeros(4), torch.zeros(800, dtype=torch.uint8))
    assert counts.tolist() == [600 - 1, 40, 513, 0]


@every_backend
def test_nothing_to_pack_is_fine(kernels: Kernels) -> None:
    none = np.zeros(0, dtype=np.int64)
    out = torch.full((3,), FILL, dtype=torch.uint8)
    counts, finite = kernels.pack(torch.zeros(0), Spans(none, none, none, none, none), torch.zeros(0), out)
    assert counts.numel() == 0 and bool(finite) and out.eq(FILL).all()
    assert kernels.moments(torch.zeros(0), Spans.whole([])).shape == (0, 2)


# -------------------------------------------------------------------------------------------------------------- unpack


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from([1.0, 2.0**16, 0.75, 1e-45, float("inf")]))
def test_unpack_undoes_pack(case: Case, value: float) -> None:
    ballots = case.ballots()
    in_pieces = ~np.isnan(ballots)
    expected = np.full(ballots.shape, np.float32(123.0))
    expected[in_pieces] = 0.0
    voted = in_pieces & (ballots != 0)
    expected[voted] = ballots[voted] * np.float32(value)
    payload, counts, _ = case.pack(cpu)
    for kernels in BACKENDS:
        out = torch.full(case.grad.shape, 123.0)
        number = kernels.unpack(payload.clone(), case.spans, torch.tensor(value), out)
        # Bit for bit: an abstention is +0.0, and what lies between the pieces stays.
        assert same_bits(out, torch.from_numpy(expected))
        assert number.dtype == torch.int64 and number.shape == (case.spans.num_rows,)
        rows = torch.from_numpy(case.spans.row)
        assert torch.equal(number, torch.zeros_like(number).index_add_(0, rows, counts))


@every_backend
def test_unpack_reads_these_bytes(kernels: Kernels) -> None:
    mask, sign = bytearray(65), bytearray(65)
    mask[0], mask[4], mask[9], mask[63], mask[64] = 0b11, 0b10, 0b01, 0x80, 0b10
    sign[4], sign[63], sign[64] = 0b10, 0x80, 0b10
    out = torch.full((514,), 9.0)
    payload = torch.tensor(list(mask + sign), dtype=torch.uint8)
    number = kernels.unpack(payload, one_span(514), torch.tensor(0.5), out)
    expected = torch.zeros(514)
    for element, value in [(0, 0.5), (16, 0.5), (17, -0.5), (130, 0.5), (511, -0.5), (513, -0.5)]:
        expected[element] = value
    assert same_bits(out, expected)
    assert number.tolist() == [6]


@every_backend
def test_unpack_reads_a_sign_only_where_there_is_a_vote(kernels: Kernels) -> None:
    out = torch.full((514,), 9.0)
    payload = torch.cat([torch.zeros(65, dtype=torch.uint8), torch.full((65,), 255, dtype=torch.uint8)])
    assert kernels.unpack(payload, one_span(514), torch.tensor(1.0), out).tolist() == [0]
    assert same_bits(out, torch.zeros(514))


# --------------------------------------------------------------------------------------------------------------- tally


def payloads_of(ballots: npt.NDArray[np.int8], body_at: int, behind: int) -> Tensor:
    """One row a worker: something, mask plane, sign plane, something. Only whole bytes of components."""
    mask = np.packbits(ballots != 0, axis=1, bitorder="little")
    sign = np.packbits(ballots < 0, axis=1, bitorder="little")
    front = np.full((ballots.shape[0], body_at), FILL, dtype=np.uint8)
    back = np.full((ballots.shape[0], behind), FILL, dtype=np.uint8)
    return torch.from_numpy(np.ascontiguousarray(np.concatenate([front, mask, sign, back], axis=1)))


def every_outcome(world_size: int, rng: np.random.Generator) -> npt.NDArray[np.int8]:
    """Each count of yes, no and abstention that these workers can come to, cast by workers drawn anew."""
    columns = [
        rng.permutation(np.array([1] * yes + [-1] * no + [0] * (world_size - yes - no), dtype=np.int8))
        for yes in range(world_size + 1)
        for no in range(world_size + 1 - yes)
    ]
    return np.stack(columns, axis=1)


@every_backend
@pytest.mark.parametrize("world_size", [*range(1, 10), 17, 33])
def test_tally_is_the_majority_vote(kernels: Kernels, world_size: int) -> None:
    rng = np.random.default_rng(world_size)
    outcomes = every_outcome(world_size, rng)
    # 1061 bytes are two full chunks of the bit-sliced counter and a piece.
    ballots = rng.choice(np.array([-1, 0, 1], dtype=np.int8), (world_size, 8 * 1061), p=[0.35, 0.3, 0.35])
    ballots[:, -outcomes.shape[1] :] = outcomes
    payloads = payloads_of(ballots, body_at=8, behind=3)
    for margin in range(1, world_size + 2):
        out = torch.full((2 * 1061,), FILL, dtype=torch.uint8)
        kernels.tally(payloads, 8, 1061, margin, out)
        verdicts = majority_vote(torch.from_numpy(ballots), margin).numpy()
        assert out.numpy().tobytes() == payloads_of(verdicts[None], 0, 0).numpy().tobytes(), margin


@every_backend
@pytest.mark.parametrize("num_bytes", [0, 1, 2, 63, 64, 65, 511, 512, 513, 1024, 1025])
def test_tally_of_any_size(kernels: Kernels, num_bytes: int) -> None:
    rng = np.random.default_rng(num_bytes)
    for world_size, margin in [(1, 1), (2, 1), (5, 2)]:
        ballots = rng.integers(-1, 2, (world_size, 8 * num_bytes)).astype(np.int8)
        out = torch.full((2 * num_bytes,), FILL, dtype=torch.uint8)
        kernels.tally(payloads_of(ballots, body_at=8, behind=0), 8, num_bytes, margin, out)
        verdicts = majority_vote(torch.from_numpy(ballots), margin).numpy()
        assert out.numpy().tobytes() == payloads_of(verdicts[None], 0, 0).numpy().tobytes()


@every_backend
def test_tally_counts_more_workers_than_a_byte_holds(kernels: Kernels) -> None:
    ballots = np.zeros((300, 16), dtype=np.int8)
    for component in range(16):
        ballots[: 20 * component, component] = 1 if component % 2 else -1
    for margin in (1, 100, 129, 260, 280, 300):
        out = torch.zeros(4, dtype=torch.uint8)
        kernels.tally(payloads_of(ballots, 0, 0), 0, 2, margin, out)
        verdicts = np.array([(1 if c % 2 else -1) * (c > 0 and 20 * c >= margin) for c in range(16)], dtype=np.int8)
        assert out.numpy().tobytes() == payloads_of(verdicts[None], 0, 0).numpy().tobytes()


@every_backend
def test_tally_takes_a_sign_without_a_vote_for_an_abstention(kernels: Kernels) -> None:
    """No honest worker sends one; a lying one must not gain from it."""
    payloads = torch.zeros(3, 2 * 600, dtype=torch.uint8)
    payloads[:2, 600:] = 255
    payloads[2, :300] = 255
    out = torch.full((1200,), FILL, dtype=torch.uint8)
    kernels.tally(payloads, 0, 600, 1, out)
    expected = torch.zeros(1200, dtype=torch.uint8)
    expected[:300] = 255
    assert torch.equal(out, expected)


# ------------------------------------------------------------------------------------------------------------- moments


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.one_of(st.sampled_from(SIZES), st.integers(0, 1100)), max_size=6),
    st.floats(-30, 30),
    st.integers(0, 2**32 - 1),
)
def test_moments_agree_and_are_right(lengths: list[int], log_scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    grad = torch.from_numpy((rng.standard_normal(sum(lengths)) * 10**log_scale).astype(np.float32))
    before = grad.clone()
    spans = Spans.whole(lengths)
    wanted = reference.moments(grad, spans)
    assert same_bits(cpu.moments(grad, spans), wanted)
    assert same_bits(grad, before)
    assert wanted.shape == (len(lengths), 2) and wanted.dtype == torch.float64
    for piece, (mean, std) in zip(grad.double().split(lengths), wanted, strict=True):
        if piece.numel():
            std_right = piece.std(correction=0)
            torch.testing.assert_close(std, std_right, rtol=1e-12, atol=1e-12 * float(piece.abs().max()))
            torch.testing.assert_close(mean, piece.mean(), rtol=1e-12, atol=1e-14 * float(piece.abs().max()))
        else:
            assert mean == std == 0.0


@every_backend
@pytest.mark.parametrize("num_elements", [1, 2, 512, 513, BLOCK * BLOCK, BLOCK * BLOCK + 1, 700_001])
@pytest.mark.parametrize("offset", [0.0, 3.0, -1000.0])
def test_moments_of_large_tensors(kernels: Kernels, num_elements: int, offset: float) -> None:
    """Beyond 512 blocks the blocks' sums are themselves summed in blocks."""
    grad = torch.randn(num_elements, generator=torch.Generator().manual_seed(1)) * 1e-2 + offset
    mean, std = kernels.moments(grad, Spans.whole([num_elements]))[0]
    torch.testing.assert_close(mean, grad.double().mean(), rtol=1e-13, atol=1e-14)
    # One pass: the squares cancel, so the relative error grows with (mean / std)^2.
    torch.testing.assert_close(
        std, grad.double().std(correction=0), rtol=1e-13 + 1e-15 * (offset / 1e-2) ** 2, atol=1e-15
    )


def test_backends_agree_on_the_moments_of_large_tensors() -> None:
    lengths = [BLOCK * BLOCK, 1, 0, BLOCK * BLOCK + 513, 77, 300_000]
    grad = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(2)).exp()
    spans = Spans.whole(lengths)
    assert same_bits(cpu.moments(grad, spans), reference.moments(grad, spans))


def test_backends_round_the_standard_deviation_alike() -> None:
    """torch's own square root is one unit in the last place off for one float64 in seventy, on some processors."""
    grad = torch.randn(12_000, generator=torch.Generator().manual_seed(4))
    spans = Spans.whole([6] * 2000)
    found = [kernels.moments(grad, spans) for kernels in BACKENDS]
    assert same_bits(found[0], found[1])


@every_backend
def test_moments_of_a_constant_are_exact(kernels: Kernels) -> None:
    grad = torch.tensor([0.1, 0.25, 0.25, 0.25, -0.0, 0.0])
    found = kernels.moments(grad, Spans.whole([1, 3, 2]))
    assert found.tolist() == [[float(grad[0]), 0.0], [0.25, 0.0], [0.0, 0.0]]


@every_backend
@pytest.mark.parametrize("bad", NON_FINITE.tolist())
def test_moments_do_not_hide_a_bad_number(kernels: Kernels, bad: float) -> None:
    grad = torch.randn(1300, generator=torch.Generator().manual_seed(3))
    clean = kernels.moments(grad, Spans.whole([600, 600, 100]))
    for at in (600, 1100, 1199):  # in a block, in the tail, at its end
        spoilt = grad.clone()
        spoilt[at] = bad
        found = kernels.moments(spoilt, Spans.whole([600, 600, 100]))
        assert not found[1].isfinite().any()
        assert same_bits(found[::2].clone(), clean[::2].clone()), "other parameters are not touched"


@every_backend
def test_moments_of_the_largest_and_smallest_floats(kernels: Kernels) -> None:
    grad = torch.tensor([3e38, -3e38, 1e-45, -1e-45])
    found = kernels.moments(grad, Spans.whole([2, 2]))
    exact = grad.double()
    torch.testing.assert_close(found[:, 1], torch.stack([exact[0], exact[2]]), rtol=1e-15, atol=0.0)
    assert found[:, 0].tolist() == [0.0, 0.0]


# ------------------------------------------------------------------------------------------------------------- choosing


def test_the_fast_backend_is_chosen_on_the_cpu() -> None:
    assert kernels_for("cpu") is cpu
    assert kernels_for(torch.device("cpu", 0)) is cpu


def test_a_device_without_kernels_is_said_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    distsign.kernels._load.cache_clear()
    with caplog.at_level(logging.WARNING, logger="distsign"):
        assert kernels_for("meta") is reference
        assert kernels_for("meta") is reference
    assert len(caplog.records) == 1, "once"
    assert "'meta'" in caplog.text


def test_plane_bytes_do_not_pad() -> None:
    assert [plane_bytes(n) for n in (0, 1, 7, 8, 9, 511, 512, 513)] == [0, 1, 1, 1, 2, 64, 64, 65]
