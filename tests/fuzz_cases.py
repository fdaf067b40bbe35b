"""Ways to vote, payloads as honest and dishonest ranks write them, and what becomes of those, for `tests.fuzz`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from distsign.kernels import cpu
from distsign.layout import Layout, Shape
from distsign.payload import Form, forms
from distsign.wire import HEADER_BYTES
from tests.fuzz_oracle import Bytes, checksum_of

CHANGES = (
    *("bits flipped", "votes flipped", "random", "random body", "zeros in the body", "ones in the body"),
    *("cut off", "moved", "header byte", "header random", "poison flag", "census", "average", "checksum", "another's"),
    "signs flipped",
)
HARMLESS = ("signs flipped", "census")
"""Changes of sparse payloads that leave payloads."""
HARMLESS_PLANES = ("votes flipped", "random body", "zeros in the body", "ones in the body", *HARMLESS)


@dataclass
class Setting:
    """One way to vote: model, codec, budget, owner, exchange, guards."""

    kind: str
    layout: Layout
    ballots: Form
    verdicts: Form
    rank: int
    num_voters: int
    margin: int
    owner_carry: str | None
    forget: bool
    max_density: float | None
    left_out: tuple[bool, ...]

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Setting:
        num_voters = int(rng.choice([2, 3, rng.integers(1, 7), 12]))
        sizes = [int(rng.choice([1, 1, 7, 33, 500, 512, 1100])) for _ in range(rng.integers(1, 8))]
        shapes = [Shape(index, size) for index, size in enumerate(sizes)]
        cut = int(rng.integers(0, len(shapes)))
        layout = Layout.build(
            [part for part in (shapes[:cut], shapes[cut:]) if part], num_voters, checksum=bool(rng.integers(2))
        )
        owner_carry = [None, "plain", "standing"][rng.integers(3)]
        density = [None, 0.003, 0.05, 0.4][rng.integers(4)]
        ballots, verdicts = forms(
            layout,
            density,
            str(rng.choice(["auto", "planes", "sparse", "sparse"])),
            owner_carry=owner_carry is not None,
            num_raw=int(rng.choice([0, 0, 9])),
        )
        margin = int(rng.choice([1, rng.integers(1, num_voters + 1)]))
        kind, forget = str(rng.choice(["two_phase", "all_gather"])), bool(rng.integers(2))
        rank = int(rng.integers(num_voters))
        max_density = [None, None, 0.01, 0.1, 0.4][rng.integers(5)]
        left_out = tuple((rng.random(num_voters) < rng.choice([0.0, 0.0, 0.3])).tolist())
        return cls(
            kind, layout, ballots, verdicts, rank, num_voters, margin, owner_carry, forget, max_density, left_out
        )

    def __str__(self) -> str:
        codecs = [None if code is None else code.num_slots for code in self.ballots.codes]
        return (
            f"{self.kind}, rank {self.rank} of {self.num_voters}, margin {self.margin}, carry {self.owner_carry}, "
            f"forget {self.forget}, {[s.num_elements for s in self.layout.shapes]} elements, slots {codecs}, "
            f"checksum {self.layout.checksum}, {sum(self.ballots.raw_elements)} averaged, at most {self.max_density}, "
            f"left out {[k for k, out in enumerate(self.left_out) if out]}"
        )


def valid(form: Form, owner: int, honesty: float, rng: np.random.Generator) -> Bytes:
    """Return a payload that an honest rank might send, or one that spends its slots on other pieces than it should."""
    spans, numbers = form.layout.owned(owner)
    num_bytes = form.layout.plane_bytes(owner)
    mask, honest = np.zeros(8 * num_bytes, dtype=bool), rng.random() < honesty
    for k, number in enumerate(numbers.tolist()):
        length = int(spans.length[k])
        most = length if form.caps is None else int(form.caps[number])
        chosen = rng.choice(length, int(rng.integers(0, most + 1)), replace=False)
        mask[8 * int(spans.mask_at[k]) + chosen] = True
    code = form.codes[owner]
    if not honest and code is not None and code.num_bits:
        mask[:] = False
        first = int(rng.integers(0, code.num_bits - code.num_slots + 1))  # in a row, or anywhere
        mask[first : first + code.num_slots] = rng.random() < 0.5
        mask[rng.choice(code.num_bits, code.num_slots - int(mask.sum()), replace=False)] = True
    sign = mask & (rng.random(mask.size) < 0.5)
    planes = np.concatenate([np.packbits(bits, bitorder="little") for bits in (mask, sign)])
    crowded = None if form.caps is None else torch.from_numpy(rng.random(numbers.size) < 0.3)
    raw = torch.tensor(rng.normal(size=form.raw_elements[owner]).tolist(), dtype=torch.float32)
    poisoned = torch.tensor(bool(rng.random() < 0.05))
    return form.seal_one(owner, torch.from_numpy(planes), crowded, raw, poisoned, cpu)[0].numpy()


@dataclass
class Place:
    """Where a payload's parts lie in it."""

    start: int
    end: int
    last: int

    @classmethod
    def of(cls, form: Form, owner: int) -> Place:
        last = form.sizes[owner] - 4 * form.layout.checksum
        return cls(HEADER_BYTES + form.census_bytes[owner], last - 4 * form.raw_elements[owner], last)


def changed(
    row: Bytes, form: Form, owner: int, others: list[Bytes], rng: np.random.Generator, ways: tuple[str, ...]
) -> tuple[Bytes, str]:
    """Return a payload of the same size that is changed in one of some ways, and the way; unchanged if none is left."""
    row, place = row.copy(), Place.of(form, owner)
    noise = np.frombuffer(rng.bytes(row.size), dtype=np.uint8)
    for how in (ways[k] for k in rng.permutation(len(ways)).tolist()):
        if how == "another's":
            other = others[rng.integers(len(others))]
            row[: min(row.size, other.size)] = other[: row.size]
        elif how == "signs flipped":
            if not flip_signs(row, form, owner, place, rng):
                continue
        elif not (change_body(row, how, place, noise, rng) or change_rest(row, how, place, noise, rng)):
            continue
        break
    else:
        return row, ""
    if form.layout.checksum and how != "checksum" and rng.random() < 0.7:  # a liar's, else a link's damage
        row[place.last :] = np.frombuffer(checksum_of(row[: place.last].tobytes()), dtype=np.uint8)
    return row, how


def change_body(row: Bytes, how: str, place: Place, noise: Bytes, rng: np.random.Generator) -> bool:
    """Change a payload's body, or all of it, in place; return False if there is no such way."""
    start, end = place.start, place.end
    at = int(rng.integers(row.size))
    match how:
        case "bits flipped":
            flip(row, rng.integers(0, 8 * row.size, rng.integers(1, 4)))
        case "votes flipped" if end > start:
            flip(row, rng.integers(8 * start, 8 * end, rng.integers(1, 4)))
        case "random":
            row[:] = noise
        case "random body":
            row[start:end] = noise[start:end]
        case "zeros in the body":
            row[min(max(at, start), end) : end] = 0
        case "ones in the body":
            row[min(max(at, start), end) : end] = 255
        case "cut off":  # the rest of the place where it arrives keeps what lay there
            row[at:] = noise[at:] if rng.integers(2) else 0
        case "moved":
            row[:] = np.roll(row, at + 1)
        case _:
            return False
    return True


def change_rest(row: Bytes, how: str, place: Place, noise: Bytes, rng: np.random.Generator) -> bool:
    """Change what is around a payload's body in place; return False if there is no such way."""
    match how:
        case "header byte":
            row[rng.integers(HEADER_BYTES)] = noise[0]
        case "header random":
            row[1:HEADER_BYTES] = noise[1:HEADER_BYTES]
        case "poison flag":
            row[2] ^= 2
        case "census" if place.start > HEADER_BYTES:
            row[HEADER_BYTES : place.start] = noise[HEADER_BYTES : place.start]
        case "average" if place.last > place.end:
            bad = np.array([np.nan, np.inf, -np.inf, 3e38, 0.0], dtype=np.float32)
            row[place.end : place.end + 4] = rng.choice(bad, 1).view(np.uint8)
        case "checksum" if row.size > place.last:
            row[place.last :] = noise[place.last :]
        case _:
            return False
    return True


def flip_signs(row: Bytes, form: Form, owner: int, place: Place, rng: np.random.Generator) -> bool:
    """Turn round one to three votes of a sparse body; return False if there are none."""
    code = form.codes[owner]
    if code is None or not code.num_bytes:
        return False
    num_votes = int(np.unpackbits(row[place.start : place.end], bitorder="little")[: code.num_high_bits].sum())
    if not num_votes:
        return False
    slots = rng.integers(0, num_votes, rng.integers(1, 4))
    flip(row, 8 * place.start + code.num_high_bits + slots * (code.low_bits + 1) + code.low_bits)
    return True


def flip(row: Bytes, bits: Any) -> None:
    for bit in bits.tolist():
        row[bit // 8] ^= 1 << bit % 8
