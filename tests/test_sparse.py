"""The sparse codec: its sizes, its bytes, and that it gives back what went in; `test_fuzz` has what did not."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distsign.kernels import Kernels, SparseCode, cpu, reference
from distsign.wire import HEADER_BYTES

BACKENDS: list[Kernels] = [reference, cpu]
every_backend = pytest.mark.parametrize("kernels", BACKENDS, ids=["reference", "cpu"])

FILL = 0xA5
Bits = npt.NDArray[np.bool_]


def planes_of(mask: Bits, sign: Bits) -> Tensor:
    return torch.from_numpy(np.concatenate([np.packbits(bits, bitorder="little") for bits in (mask, sign)]))


def drawn(num_bits: int, num_votes: int, rng: np.random.Generator) -> tuple[Bits, Bits]:
    mask = np.zeros(num_bits, dtype=bool)
    mask[rng.choice(num_bits, num_votes, replace=False)] = True
    return mask, mask & (rng.random(num_bits) < 0.5)


def body_of(mask: Bits, sign: Bits, code: SparseCode) -> bytes:
    """The module's docstring, bit after bit."""
    low_bits = code.low_bits
    high = [0] * (code.num_slots + ((code.num_bits - code.num_slots) >> low_bits))
    fields: list[int] = []
    for i, p in enumerate(np.flatnonzero(mask).tolist()):
        y = p - i
        high[(y >> low_bits) + i] = 1
        fields += [(y >> place) & 1 for place in range(low_bits)] + [int(sign[p])]
    fields += [0] * (code.num_slots * (low_bits + 1) - len(fields))
    stream = high + fields
    stream += [0] * (-len(stream) % 8)
    return bytes(sum(bit << i for i, bit in enumerate(stream[at : at + 8])) for at in range(0, len(stream), 8))


def encode(kernels: Kernels, planes: Tensor, code: SparseCode) -> bytes | None:
    out = torch.full((code.num_bytes,), FILL, dtype=torch.uint8)
    before = planes.clone()
    fits = kernels.encode_sparse(planes, planes.numel() // 2, code, out)
    assert fits.dtype == torch.bool and fits.shape == ()
    assert torch.equal(planes, before)
    return bytes(out.tolist()) if fits else None


def decode(kernels: Kernels, body: bytes, code: SparseCode) -> Tensor | None:
    out = torch.full((code.num_bits // 4 + 2,), FILL, dtype=torch.uint8)
    data = torch.tensor(list(body), dtype=torch.uint8)
    ok = kernels.decode_sparse(data, code, code.num_bits // 8, out[1:-1])
    assert ok.dtype == torch.bool and ok.shape == ()
    assert out[0] == out[-1] == FILL, "written outside"
    assert bytes(data.tolist()) == body
    return out[1:-1] if ok else None


# -------------------------------------------------------------------------------------------------------------- sizes


def entropy(p: float) -> float:
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p) if 0 < p < 1 else 0.0


@pytest.mark.parametrize("num_bits", [100_000, 100_008, 262_144, 1_000_000, 3_000_000, 25_000_000])
@pytest.mark.parametrize("density", [0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01, 0.003, 0.001])
def test_a_payload_is_within_ten_percent_of_the_entropy(num_bits: int, density: float) -> None:
    code = SparseCode(num_bits, int(density * num_bits))
    bound = num_bits * (entropy(density) + density) / 8
    # With fewer votes than the bound's density has there would be nothing to it.
    assert code.num_slots >= density * num_bits - 1
    assert code.num_bytes + HEADER_BYTES <= 1.1 * bound


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 3000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))))
def test_sizes_follow_from_the_format(sizes: tuple[int, int]) -> None:
    num_bits, num_slots = sizes
    code = SparseCode(num_bits, num_slots)
    by_low_bits = [num_slots * (k + 1) + num_slots + ((num_bits - num_slots) >> k) for k in range(20)]
    smallest = min((bits + 7) // 8 for bits in by_low_bits)
    assert code.num_bytes == smallest
    assert code.low_bits == next(k for k, bits in enumerate(by_low_bits) if (bits + 7) // 8 == smallest)
    assert code.num_high_bits == by_low_bits[code.low_bits] - num_slots * (code.low_bits + 1)
    assert code == SparseCode(num_bits, num_slots) and hash(code) == hash(SparseCode(num_bits, num_slots))


def test_a_body_without_slots_is_empty() -> None:
    assert [SparseCode(n, 0).num_bytes for n in (0, 1, 8, 1000, 10**9, 2**40)] == [0] * 6


def test_sizes_are_exact_where_floats_are_not() -> None:
    assert SparseCode(2**53 + 8, 2**50).num_bytes == min(
        (2**50 * (k + 2) + ((2**53 + 8 - 2**50) >> k) + 7) // 8 for k in range(10)
    )


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 500), st.integers(0, 200))
def test_slots_for_is_the_largest_that_fits(num_bits: int, num_bytes: int) -> None:
    sizes = [SparseCode(num_bits, m).num_bytes for m in range(num_bits + 1)]
    assert sizes == sorted(sizes), "the search needs it"
    assert SparseCode.slots_for(num_bits, num_bytes) == max(m for m, size in enumerate(sizes) if size <= num_bytes)


@pytest.mark.parametrize(("num_bits", "num_slots"), [(8, 9), (8, -1), (0, 1), (-8, -8)])
def test_impossible_sizes_are_refused(num_bits: int, num_slots: int) -> None:
    with pytest.raises(ValueError, match=f"num_slots={num_slots} and num_bits={num_bits}"):
        SparseCode(num_bits, num_slots)


@pytest.mark.parametrize(("num_bits", "num_bytes"), [(-1, 10), (10, -1)])
def test_impossible_room_is_refused(num_bits: int, num_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"got {num_bits} and {num_bytes}"):
        SparseCode.slots_for(num_bits, num_bytes)


# --------------------------------------------------------------------------------------------------------- round trips


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_what_goes_in_comes_out_and_has_the_bytes_of_the_format(data: st.DataObject) -> None:
    num_bytes = data.draw(st.one_of(st.integers(0, 40), st.sampled_from([63, 64, 65, 127, 511, 512, 513, 1100])))
    num_bits = 8 * num_bytes
    share = data.draw(st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.9, 1.0]))
    num_votes = min(num_bits, math.ceil(share * num_bits))
    num_slots = data.draw(st.one_of(st.just(num_votes), st.integers(num_votes, num_bits)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    mask, sign = drawn(num_bits, num_votes, rng)
    if data.draw(st.booleans()):  # crowded at one end, where the high parts are largest or all alike
        mask = np.sort(mask) if data.draw(st.booleans()) else np.sort(mask)[::-1].copy()
        sign = mask & (rng.random(num_bits) < 0.5)
    code = SparseCode(num_bits, num_slots)
    planes = planes_of(mask, sign)
    expected = body_of(mask, sign, code)
    assert len(expected) == code.num_bytes
    for kernels in BACKENDS:
        assert encode(kernels, planes, code) == expected
        found = decode(kernels, expected, code)
        assert found is not None and torch.equal(found, planes)


@every_backend
def test_large_planes_come_back(kernels: Kernels) -> None:
    rng = np.random.default_rng(5)
    for share in (0.001, 0.03, 0.4):
        mask, sign = drawn(8 * 25_003, int(share * 200_000), rng)
        code = SparseCode(mask.size, int(mask.sum()) + 3)
        body = encode(kernels, planes_of(mask, sign), code)
        assert body is not None and body == encode(reference, planes_of(mask, sign), code)
        found = decode(kernels, body, code)
        assert found is not None and torch.equal(found, planes_of(mask, sign))


@every_backend
def test_one_vote_too_many_is_said(kernels: Kernels) -> None:
    rng = np.random.default_rng(6)
    for num_bits, num_votes in [(8, 1), (8, 8), (800, 100), (9000, 1), (9000, 9000)]:
        planes = planes_of(*drawn(num_bits, num_votes, rng))
        assert encode(kernels, planes, SparseCode(num_bits, num_votes)) is not None
        assert encode(kernels, planes, SparseCode(num_bits, num_votes - 1)) is None


@every_backend
def test_a_sign_without_a_vote_is_not_sent(kernels: Kernels) -> None:
    mask, sign = drawn(400, 30, np.random.default_rng(7))
    code = SparseCode(400, 40)
    assert encode(kernels, planes_of(mask, sign | ~mask), code) == encode(kernels, planes_of(mask, sign), code)


@every_backend
@pytest.mark.parametrize("num_slots", range(7))
def test_every_small_set_has_a_body_and_every_other_body_is_refused(kernels: Kernels, num_slots: int) -> None:
    """All votes and signs on eight positions; and of two bytes all contents."""
    code = SparseCode(8, num_slots)
    bodies = {}
    for votes in itertools.product((0, 1, -1), repeat=8):
        mask, sign = np.array(votes) != 0, np.array(votes) < 0
        if mask.sum() <= num_slots and (num_slots < 5 or votes[:4] == (0, 1, -1, 0)):
            body = encode(kernels, planes_of(mask, sign), code)
            assert body is not None and body not in bodies
            bodies[body] = planes_of(mask, sign).tolist()
    if code.num_bytes > 1:
        bodies = dict(list(bodies.items())[:300])
    for body, planes in bodies.items():
        found = decode(kernels, body, code)
        assert found is not None and found.tolist() == planes
    if code.num_bytes == 1:
        accepted = {bytes([k]) for k in range(256) if decode(kernels, bytes([k]), code) is not None}
        assert accepted == bodies.keys()


@every_backend
def test_nothing_on_nothing(kernels: Kernels) -> None:
    for num_bits in (0, 8, 80_000):
        code = SparseCode(num_bits, 0)
        planes = torch.zeros(num_bits // 4, dtype=torch.uint8)
        assert encode(kernels, planes, code) == b""
        found = decode(kernels, b"", code)
        assert found is not None and torch.equal(found, planes)
        assert decode(kernels, b"\0", code) is None


# -------------------------------------------------------------------------------------------------------- golden bytes


@every_backend
def test_bodies_have_these_bytes(kernels: Kernels) -> None:
    """Votes +3, -4, -17, +63 of 64 positions in five slots.

    y = 3, 3, 15, 60; five slots of 64: (64 - 5) >> k = 59, 29, 14, 7, 3 and so 69, 44, 34, 32, 33 bits; the bytes are
    9, 6, 5, 4, 5, so that low_bits is 3, and the high section has 5 + 7 = 12 bits.
    High parts 0, 0, 1, 7, at 0, 1, 3, 10: 1101 0000 | 0010.
    Fields, lowest bit first: 3+ 1100, 3- 1101, 7- 1111, 4+ 0010, and an empty one 0000.
    """
    code = SparseCode(64, 5)
    assert (code.low_bits, code.num_high_bits, code.num_bytes) == (3, 12, 4)
    mask, sign = np.zeros(64, dtype=bool), np.zeros(64, dtype=bool)
    mask[[3, 4, 17, 63]] = True
    sign[[4, 17]] = True
    #        11010000  00101100  11011111  00100000, lowest bit first
    golden = bytes([0b00001011, 0b00110100, 0b11111011, 0b00000100])
    assert encode(kernels, planes_of(mask, sign), code) == golden
    found = decode(kernels, golden, code)
    assert found is not None and torch.equal(found, planes_of(mask, sign))


@every_backend
def test_a_dense_body_is_the_mask_and_the_signs(kernels: Kernels) -> None:
    """With no low bits the high section is the mask itself: bit p_i - i + i."""
    code = SparseCode(16, 10)
    assert (code.low_bits, code.num_high_bits, code.num_bytes) == (0, 16, 4)
    mask, sign = np.zeros(16, dtype=bool), np.zeros(16, dtype=bool)
    mask[[0, 1, 2, 8, 15]] = True
    sign[[1, 15]] = True
    assert encode(kernels, planes_of(mask, sign), code) == bytes([0b00000111, 0b10000001, 0b00010010, 0])


@every_backend
@pytest.mark.parametrize(
    ("why", "body"),
    [
        ("a bit in an unused slot", [0b00001011, 0b00110100, 0b11111011, 0b00010100]),
        ("a sign in an unused slot", [0b00001011, 0b00110100, 0b11111011, 0b10000100]),
        ("a number below the one before", [0b00001011, 0b00110100, 0b11111010, 0b00000100]),
        ("a position just beyond the end", [0b00001011, 0b00110100, 0b11111011, 0b00000101]),
        ("a position far beyond the end", [0b00001011, 0b00111000, 0b11111011, 0b00000111]),
        ("more votes than slots", [0b11111111, 0b00110101, 0b11111011, 0b00000100]),
        ("too short", [0b00001011, 0b00110100, 0b11111011]),
        ("too long", [0b00001011, 0b00110100, 0b11111011, 0b00000100, 0]),
        ("empty", []),
    ],
)
def test_bodies_that_are_no_encoding_are_refused(kernels: Kernels, why: str, body: list[int]) -> None:
    assert decode(kernels, bytes(body), SparseCode(64, 5)) is None, why


@every_backend
def test_a_bit_in_the_padding_is_refused(kernels: Kernels) -> None:
    code = SparseCode(16, 3)
    used = code.num_high_bits + 3 * (code.low_bits + 1)
    body = bytearray(body_of(*drawn(16, 3, np.random.default_rng(8)), code))
    assert used % 8 and decode(kernels, bytes(body), code) is not None
    for bit in range(used % 8, 8):
        spoilt = bytearray(body)
        spoilt[-1] |= 1 << bit
        assert decode(kernels, bytes(spoilt), code) is None
