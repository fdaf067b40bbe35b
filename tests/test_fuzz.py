"""Bytes that nobody wrote: a header or a sparse body is refused, or is exactly what its reader would write itself."""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distsign import inspection
from distsign.exchange import VoteExchange
from distsign.kernels import Kernels, SparseCode, cpu, jit_sparse, reference
from distsign.layout import Layout, Shape
from distsign.owner import make_owner
from distsign.payload import forms
from distsign.wire import HEADER_BYTES, Codec, Header, PayloadError
from tests import fuzz
from tests.fuzz_cases import CHANGES

FILL = 0xA5
NUM_CODES = 150
NUM_BODIES = 150_000
NUM_HEADERS = 100_000
NUM_PAYLOADS = 10_000

Bytes = npt.NDArray[np.uint8]


@numba.njit
def read_all(bodies, num_slots, low_bits, num_high_bits, num_bytes, planes, again, sound):  # type: ignore[no-untyped-def]
    """Decode each row, and where that says yes encode again; return the first row that does not come out, or -1."""
    for i in range(bodies.shape[0]):
        sound[i] = jit_sparse.decode_votes(bodies[i], num_slots, low_bits, num_high_bits, num_bytes, planes)
        if sound[i]:
            again[:] = FILL
            fits = jit_sparse.encode_votes(planes, num_bytes, num_slots, low_bits, num_high_bits, again)
            if not fits or not np.array_equal(again, bodies[i]):
                return i
    return -1


class Reader:
    """Reads bodies of one size into planes with guards around them."""

    def __init__(self, kernels: Kernels, code: SparseCode) -> None:
        self.kernels, self.code, self.num_bytes = kernels, code, code.num_bits // 8
        self.memory = torch.full((2 * self.num_bytes + 16,), FILL, dtype=torch.uint8)
        self.planes = self.memory[8:-8]
        self.again = torch.zeros(code.num_bytes, dtype=torch.uint8)

    def is_sound(self, body: Tensor) -> bool:
        """Decode; if that says yes, encode again and compare. Nothing may be raised."""
        ok = bool(self.kernels.decode_sparse(body, self.code, self.num_bytes, self.planes))
        if ok:
            assert self.kernels.encode_sparse(self.planes, self.num_bytes, self.code, self.again)
            assert torch.equal(self.again, body)
        return ok

    def are_sound(self, bodies: Bytes) -> npt.NDArray[np.bool_]:
        """Do the same with all rows at once, on the CPU."""
        sound = np.zeros(len(bodies), dtype=np.bool_)
        sizes = (self.code.num_slots, self.code.low_bits, self.code.num_high_bits, self.num_bytes)
        misread = read_all(bodies, *sizes, self.planes.numpy(), self.again.numpy(), sound)
        assert misread < 0, f"{bodies[misread].tobytes().hex()} as {self.code}"
        return sound

    def check_guards(self) -> None:
        guards = self.memory.numpy()
        assert (guards[:8] == FILL).all() and (guards[-8:] == FILL).all(), "written outside of the planes"


def is_sound(kernels: Kernels, body: Bytes, code: SparseCode) -> bool:
    reader = Reader(kernels, code)
    ok = reader.is_sound(torch.from_numpy(body))
    reader.check_guards()
    mask, sign = reader.planes.view(2, -1)
    assert not (ok and (sign & ~mask).any())
    return ok


def valid_body(code: SparseCode, rng: np.random.Generator) -> Bytes:
    mask = np.zeros(code.num_bits, dtype=bool)
    mask[rng.choice(code.num_bits, rng.integers(0, code.num_slots + 1), replace=False)] = True
    sign = mask & (rng.random(code.num_bits) < 0.5)
    planes = np.concatenate([np.packbits(bits, bitorder="little") for bits in (mask, sign)])
    out = torch.zeros(code.num_bytes, dtype=torch.uint8)
    assert cpu.encode_sparse(torch.from_numpy(planes), code.num_bits // 8, code, out)
    return out.numpy()


def mutants(body: Bytes, number: int, rng: np.random.Generator) -> Bytes:
    """Return bodies of the same size: one to three bits flipped, ones moved, parts shifted or overwritten, or noise."""
    bodies = np.repeat(body[None], number, axis=0)
    if body.size == 0:
        return bodies
    rows = np.arange(number)
    flips = rng.integers(0, 8 * body.size, (3, number))
    for k, flip in enumerate(flips):
        chosen = rows % 8 >= 2 * k  # all once, some twice, some three times
        np.bitwise_xor.at(bodies, (rows[chosen], flip[chosen] // 8), (1 << flip[chosen] % 8).astype(np.uint8))
    noise = rng.integers(0, 256, bodies.shape).astype(np.uint8)
    bodies[7::16] = noise[7::16]
    bodies[15::32] = noise[15::32] & noise[14::32][: len(noise[15::32])]
    bits = np.unpackbits(np.repeat(body[None], len(bodies[5::8]), axis=0), axis=1, bitorder="little")
    for row, (one, other) in zip(bits, rng.integers(0, bits.shape[1], (len(bits), 2)).tolist(), strict=True):
        row[[one, other]] = row[[other, one]]  # as many votes as before
    bodies[5::8] = np.packbits(bits, axis=1, bitorder="little")
    for k in range(3, number, 16):
        bodies[k] = np.roll(body, k)
        bodies[k - 1] = body
        bodies[k - 1, rng.integers(body.size) :] = 255 * (k % 2)
    return bodies


def test_no_sparse_body_is_misread() -> None:
    rng = np.random.default_rng(1)
    num_accepted = num_changed = 0
    for k in range(NUM_CODES):
        num_bits = 8 * int(rng.integers(1, 20) if k % 4 else rng.integers(20, 400))
        num_slots = int(rng.integers(0, num_bits + 1) * rng.choice([0.02, 0.1, 0.3, 1.0]))
        code = SparseCode(num_bits, max(num_slots, k % 20 > 0))
        reader = Reader(cpu, code)
        for _ in range(10):
            start = valid_body(code, rng)
            assert reader.is_sound(torch.from_numpy(start))
            bodies = mutants(start, NUM_BODIES // NUM_CODES // 10, rng)
            sound = reader.are_sound(bodies)
            num_accepted += int(sound.sum())
            num_changed += int((sound & (bodies != start).any(1)).sum())
            assert reader.is_sound(torch.from_numpy(bodies[0])) == sound[0]
            assert is_sound(reference, bodies[0], code) == sound[0]
            for size in {0, start.size // 2, start.size - 1} - {-1, start.size}:
                assert not reader.is_sound(torch.from_numpy(start[:size].copy()))
            assert not reader.is_sound(torch.from_numpy(np.append(start, rng.choice([0, 255])).astype(np.uint8)))
        reader.check_guards()
    # Else the mutations would show nothing: some of them are bodies still (a flipped sign is one), most are not.
    assert num_changed > 1000 and num_accepted < NUM_BODIES // 2


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_small_sparse_body_is_misread(data: st.DataObject) -> None:
    """Hypothesis finds short counterexamples where there are any, and holds the backends together."""
    num_bits = 8 * data.draw(st.integers(0, 12))
    code = SparseCode(num_bits, data.draw(st.integers(0, num_bits)))
    size = data.draw(st.one_of(st.just(code.num_bytes), st.integers(0, code.num_bytes + 2)))
    body = np.array(data.draw(st.lists(st.integers(0, 255), min_size=size, max_size=size)), dtype=np.uint8)
    assert is_sound(cpu, body, code) == is_sound(reference, body, code)


@pytest.mark.parametrize("content", [0, 1, 0x55, 0x80, 255])
def test_large_sparse_bodies_of_one_byte_are_read_to_the_end_or_refused(content: int) -> None:
    for num_bits, num_slots in [(80_000, 80), (80_000, 8000), (80_000, 80_000), (8_000_000, 1), (8_000_000, 8000)]:
        code = SparseCode(num_bits, num_slots)
        body = np.full(code.num_bytes, content, dtype=np.uint8)
        assert is_sound(cpu, body, code) == is_sound(reference, body, code)
        assert content or is_sound(cpu, body, code), "nobody votes"


def test_no_header_is_misread() -> None:
    rng = np.random.default_rng(2)
    start = np.stack(
        [
            np.frombuffer(Header(codec, n, verdict=verdict, poison=poison).encode(), dtype=np.uint8)
            for codec in Codec
            for n in (0, 1, 2**20 + 3, 2**40 - 1)
            for verdict in (False, True)
            for poison in (False, True)
        ]
    )
    headers = start[rng.integers(0, len(start), NUM_HEADERS)]
    flips = 1 << rng.integers(0, 8, NUM_HEADERS)
    headers[np.arange(NUM_HEADERS), rng.integers(0, HEADER_BYTES, NUM_HEADERS)] ^= flips.astype(np.uint8)
    headers[::4] = rng.integers(0, 256, headers[::4].shape)
    headers[::8, 0] = 1
    headers[::16, 1] = rng.integers(0, 4, headers[::16, 1].shape)
    sizes = np.where(rng.random(NUM_HEADERS) < 0.1, rng.integers(0, HEADER_BYTES, NUM_HEADERS), HEADER_BYTES)
    accepted = 0
    for row, size in zip(headers, sizes.tolist(), strict=True):
        data = row.tobytes()[:size]
        try:
            header = Header.decode(data)
        except PayloadError:
            continue
        assert header.encode() == data
        accepted += 1
    assert NUM_HEADERS // 4 < accepted < NUM_HEADERS * 3 // 4


def test_no_payload_comes_to_anything_but_what_the_oracle_says() -> None:
    tried = fuzz.fuzz(NUM_PAYLOADS, seed=1)
    assert tried.total() >= NUM_PAYLOADS
    assert {how for how, _ in tried} == {*CHANGES, "shorter", "longer"}
    for outcome, least in (("refused", 0.1), ("poison", 0.05), ("verdict", 0.1)):
        assert sum(count for (_, found), count in tried.items() if found == outcome) > least * NUM_PAYLOADS


def take_any_header(data: bytes, expected: Header, *, sender: int, receiver: int) -> Header:
    return expected


def see_no_damage(rows: Tensor, sizes: Sequence[int], own: range) -> Tensor:
    return torch.zeros(rows.shape[0], len(sizes), dtype=torch.bool)


def take_any_body(body: Tensor, code: SparseCode, num_bytes: int, out: Tensor) -> Tensor:
    out.zero_()
    reference.decode_sparse(body, code, num_bytes, out)
    return torch.tensor(True)


def count_with_another_margin(payloads: Tensor, body_at: int, num_bytes: int, margin: int, out: Tensor) -> None:
    reference.tally(payloads, body_at, num_bytes, max(1, margin - 1), out)


@pytest.mark.parametrize(
    ("place", "name", "defect"),
    [
        (Header, "expect", take_any_header),
        (inspection, "find_damaged", see_no_damage),
        (cpu, "decode_sparse", take_any_body),
        (cpu, "tally", count_with_another_margin),
    ],
)
def test_fuzzing_finds_defects(monkeypatch: pytest.MonkeyPatch, place: object, name: str, defect: object) -> None:
    monkeypatch.setattr(place, name, defect)
    with pytest.raises(AssertionError, match=r"again by: python -m tests.fuzz --seed 2 --first \d+ --payloads 1$"):
        fuzz.fuzz(2 * NUM_PAYLOADS, seed=2)


@pytest.mark.parametrize("kind", ["two_phase", "all_gather"])
def test_a_rank_that_votes_beyond_a_cap_is_named(kind: str) -> None:
    """Its payload is well-formed, but then there are more verdicts than slots."""
    layout = Layout.build([[Shape(0, 1), Shape(4, 500)]], 4)  # both are rank 0's
    ballots, verdicts = forms(layout, 0.02, "sparse", owner_carry=False)
    assert (ballots.codes[0].num_slots, verdicts.codes[0].num_slots) == (1 + 10, 1 + 4 * 10)  # type: ignore[union-attr]
    num_bytes = layout.plane_bytes(0)
    nothing, clean = torch.zeros(0), torch.tensor(False)

    def payloads(votes: list[int]) -> Tensor:
        mask = np.zeros(8 * num_bytes, dtype=bool)
        mask[votes] = True
        planes = torch.from_numpy(np.packbits(np.stack([mask, mask & False]), bitorder="little"))
        rest = [ballots.seal_one(k, nothing.byte(), nothing.bool(), nothing, clean, cpu)[0] for k in (1, 2, 3)]
        sealed, fits = ballots.seal_one(0, planes, torch.zeros(2, dtype=torch.bool), nothing, clean, cpu)
        assert fits
        return torch.cat([sealed, *rest])

    second = 8 * int(layout.owned(0)[0].mask_at[1])
    several = [[0, *range(second + 10 * k, second + 10 * k + 10)] for k in range(4)]
    exchange = VoteExchange(link := fuzz.FakeLink(0, 4), kind)

    def vote(rows: list[list[int]]) -> Tensor:
        arrived = torch.stack([payloads(row) for row in rows])
        link.arriving = [arrived[:, : ballots.sizes[0]].flatten() if kind == "two_phase" else arrived]
        starts = np.zeros(2, dtype=np.int64)
        return exchange.vote(ballots, verdicts, arrived[0], make_owner(None, 1, 4), starts, cpu)

    vote(several)
    several[2] = [*range(second + 20, second + 30), second + 499]
    with pytest.raises(PayloadError, match="counts more verdicts than a payload has slots for: rank 2 cast more"):
        vote(several)
