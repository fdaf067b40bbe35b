"""Payloads of all owners at once: the same bytes as one by one, and what was put in comes out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distsign.kernels import reference
from distsign.layout import Layout, Shape
from distsign.payload import Form, forms
from distsign.wire.header import HEADER_BYTES, POISON_BYTE, POISON_FLAG


def drawn_planes(form: Form, rng: np.random.Generator, beyond: int = 0) -> Tensor:
    """Return planes of all owners where the layout puts them, with at most as many votes as fit, or `beyond` more."""
    layout = form.layout
    out = np.full(layout.buffer_bytes, 0xAA, dtype=np.uint8)
    for owner, at in enumerate(layout.offsets):
        spans, numbers = layout.owned(owner)
        mask = np.zeros(8 * layout.plane_bytes(owner), dtype=bool)
        for first, length, number in zip(8 * spans.mask_at, spans.length, numbers, strict=True):
            most = length if form.caps is None else min(length, form.caps[number] + beyond)
            mask[first + rng.choice(length, most if beyond else rng.integers(0, most + 1), replace=False)] = True
        sign = mask & (rng.random(mask.size) < 0.5)
        both = np.concatenate([np.packbits(bits, bitorder="little") for bits in (mask, sign)])
        out[at + HEADER_BYTES : at + HEADER_BYTES + both.size] = both
    return torch.from_numpy(out)


@st.composite
def drawn_forms(draw: st.DrawFn) -> Form:
    shapes = [Shape(k, n) for k, n in enumerate(draw(st.lists(st.integers(1, 3000), max_size=12)))]
    layout = Layout.build([shapes], draw(st.integers(1, 6)), checksum=draw(st.booleans()))
    density = draw(st.sampled_from([None, 0.02, 0.3]))
    wire, num_raw = draw(st.sampled_from(["auto", "planes", "sparse"])), draw(st.sampled_from([0, 2, 100]))
    return forms(layout, density, wire, owner_carry=draw(st.booleans()), num_raw=num_raw)[draw(st.integers(0, 1))]


@settings(max_examples=200, deadline=None)
@given(drawn_forms(), st.integers(0, 2**32 - 1), st.booleans())
def test_all_owners_at_once_are_as_one_by_one(form: Form, seed: int, poison: bool) -> None:
    rng, layout = np.random.default_rng(seed), form.layout
    planes, poisoned = drawn_planes(form, rng), torch.tensor(poison)
    raw = torch.tensor(rng.normal(size=sum(form.raw_elements)).tolist(), dtype=torch.float32)
    crowded = None if form.caps is None else torch.from_numpy(rng.random(form.caps.size) < 0.5)
    sealed = form.seal(planes.clone(), crowded, raw, poisoned, reference)
    bodies, shares = torch.split(planes, list(layout.sizes)), torch.split(raw, list(form.raw_elements))
    for owner, payload in enumerate(torch.split(sealed, list(form.sizes))):
        body = bodies[owner][HEADER_BYTES:][: 2 * layout.plane_bytes(owner)]
        mine = None if crowded is None else crowded[torch.from_numpy(layout.owned(owner)[1])]
        one, fits = form.seal_one(owner, body, mine, shares[owner], poisoned, reference)
        assert fits
        assert torch.equal(payload, one)
        assert bool(payload[POISON_BYTE] & POISON_FLAG) == poison
    opened, census, mean, ok = form.open_all(sealed, reference)
    assert ok.all()
    assert torch.equal(mean, raw)
    assert (census is None) == (crowded is None)
    if census is not None and crowded is not None:
        assert torch.equal(census, crowded & ~poisoned)
    for owner, (before, after) in enumerate(zip(bodies, torch.split(opened, list(layout.sizes)), strict=True)):
        end = HEADER_BYTES + 2 * layout.plane_bytes(owner)
        assert torch.equal(before[HEADER_BYTES:end], after[HEADER_BYTES:end])


@pytest.mark.parametrize("checksum", [False, True])
def test_what_does_not_fit_is_poison_and_zeros(checksum: bool) -> None:
    layout = Layout.build([[Shape(0, 5000), Shape(1, 40)]], 3, checksum=checksum)
    form, _ = forms(layout, 0.01, "sparse", owner_carry=True)
    planes = drawn_planes(form, np.random.default_rng(0), beyond=1)
    nobody = torch.zeros(layout.all_pieces.length.size, dtype=torch.bool)
    sealed = form.seal(planes, nobody, torch.zeros(0), torch.tensor(False), reference)
    for owner, payload in enumerate(torch.split(sealed, list(form.sizes))):
        start = HEADER_BYTES + form.census_bytes[owner]
        code = form.codes[owner]
        assert code is not None
        assert payload[POISON_BYTE] & POISON_FLAG
        assert not payload[start : start + code.num_bytes].any()


@pytest.mark.parametrize("owners", [(0,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("checksum", [False, True])
def test_usual_headers_are_those_that_nothing_is_wrong_with(owners: tuple[int, ...], checksum: bool) -> None:
    """Every bit of every header, in each of two rows: the quick look and the careful one say the same."""
    layout = Layout.build([[Shape(0, 5000), Shape(1, 7)]], 3, checksum=checksum)
    form = forms(layout, 0.02, "sparse", owner_carry=True)[0]
    planes, clean = torch.zeros(layout.buffer_bytes, dtype=torch.uint8), torch.tensor(False)
    crowded, nothing = torch.zeros(layout.all_pieces.length.size, dtype=torch.bool), torch.zeros(0)
    sealed = torch.split(form.seal(planes, crowded, nothing, clean, reference), list(form.sizes))
    rows = torch.cat([sealed[owner] for owner in owners]).repeat(2, 1)
    assert form.has_usual_headers(rows, owners)
    _, poisoned, foreign = form.read_headers(rows, owners)
    assert not (poisoned | foreign).any()
    starts = np.cumsum([0, *(form.sizes[owner] for owner in owners)])[:-1]
    bits = itertools.product(range(HEADER_BYTES), range(8))
    for row, (number, start), (place, bit) in itertools.product(range(2), enumerate(starts), bits):
        rows[row, start + place] ^= 1 << bit
        assert not form.has_usual_headers(rows, owners)
        headers, poisoned, foreign = form.read_headers(rows, owners)
        expected = torch.zeros(2, len(owners), dtype=torch.bool)
        expected[row, number] = True
        is_poison = place == POISON_BYTE and 1 << bit == POISON_FLAG
        assert torch.equal(poisoned, expected & is_poison)
        assert torch.equal(foreign, expected & (not is_poison))
        assert torch.equal(headers[row, number], rows[row, start : start + HEADER_BYTES])
        rows[row, start + place] ^= 1 << bit
