"""What bytes that arrive must come to, read off the formats in plain NumPy and slow: the oracle of `tests.fuzz`.

It shares no code with the readers, kernels and owners of the library; of a payload's `Form` it takes the sizes alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from distsign.payload import Form

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]


@dataclass
class Read:
    """One payload.

    Attributes:
        refused: its header is none, or not the expected one.
        damaged: its checksum does not match.
        poison: its poison flag.
        votes: -1, 0, +1 for each bit of the planes, in order; None where the body is none.
        claims: the census; None without caps.
        raw: float32, components to average.
    """

    refused: bool
    damaged: bool
    poison: bool
    votes: Ints | None
    claims: npt.NDArray[np.bool_] | None
    raw: npt.NDArray[np.float32]


def bits_of(data: Bytes) -> Ints:
    return np.unpackbits(data, bitorder="little").astype(np.int64)


def checksum_of(data: bytes) -> bytes:
    """Return the upper half of XXH3, shifted into the range of an int64, little-endian."""
    return ((xxhash.xxh3_64_intdigest(data) - 2**63) % 2**64).to_bytes(8, "little")[4:]


def header_of(form: Form, owner: int, poison: bool) -> bytes:
    codec = 1 if form.codes[owner] is None else 2
    flags = form.verdict | poison << 1 | form.layout.checksum << 2
    return bytes([1, codec, flags]) + form.layout.owned_elements[owner].to_bytes(5, "little")


def read(form: Form, owner: int, row: Bytes) -> Read:
    """Read one payload of `sizes[owner]` bytes."""
    data = row.tobytes()
    last = len(data) - 4 * form.layout.checksum
    poison = bool(data[2] & 2)
    start = 8 + form.census_bytes[owner]
    end = last - 4 * form.raw_elements[owner]
    claims = None
    if form.caps is not None:
        claims = bits_of(row[8:start])[: form.layout.owned(owner)[1].size] != 0
    return Read(
        refused=data[:8] != header_of(form, owner, poison),
        damaged=form.layout.checksum and checksum_of(data[:last]) != data[last:],
        poison=poison,
        votes=votes_of(form, owner, row[start:end]),
        claims=claims,
        raw=np.frombuffer(data[end:last], dtype=np.float32),
    )


def votes_of(form: Form, owner: int, body: Bytes) -> Ints | None:
    code = form.codes[owner]
    bits = bits_of(body)
    if code is None:
        mask, sign = bits.reshape(2, -1)
        return mask * (1 - 2 * sign)
    width = code.low_bits + 1
    ones = np.flatnonzero(bits[: code.num_high_bits])
    if ones.size > code.num_slots:
        return None
    used = code.num_high_bits + ones.size * width
    fields = bits[code.num_high_bits : used].reshape(-1, width)
    vote = np.arange(ones.size)
    position = ((ones - vote) << code.low_bits) + fields[:, :-1] @ (1 << np.arange(code.low_bits)) + vote
    if (position >= code.num_bits).any() or (np.diff(position) <= 0).any() or bits[used:].any():
        return None
    votes = np.zeros(code.num_bits, dtype=np.int64)
    votes[position] = 1 - 2 * fields[:, -1]
    return votes


def most_votes(form: Form, owner: int, max_density: float | None) -> float:
    """Return how many votes a worker may have on one owner's pieces: of each a share, at least one."""
    if max_density is None:
        return float("inf")
    return sum(max(1, int(max_density * length)) for length in form.layout.owned(owner)[0].length.tolist())


def admitted(payload: Read, left_out: bool, most: float, num_bits: int) -> Read:
    """Return what counts of a payload: of those of a worker that is left out nothing, and of too many votes none."""
    too_many = payload.votes is not None and np.count_nonzero(payload.votes) > most
    if not (left_out or too_many):
        return payload
    claims = None if payload.claims is None else np.zeros_like(payload.claims)
    raw = np.zeros_like(payload.raw) if left_out else payload.raw
    return replace(payload, votes=np.zeros(num_bits, dtype=np.int64), claims=claims, raw=raw)


@dataclass
class Counted:
    """One owner's verdicts on its pieces, in the order of the planes' bits."""

    verdicts: Ints
    crowded: npt.NDArray[np.bool_]


@dataclass
class SlowOwner:
    """An owner in plain integers: what it keeps is `kept`, and `later` if the step is not poisoned."""

    kind: str | None
    margin: int
    num_voters: int
    forget: bool
    kept: dict[int, Ints] = field(default_factory=dict)
    later: dict[int, Ints] = field(default_factory=dict)

    def count(self, form: Form, verdicts: Form, shard: int, votes: Ints, starts: Ints) -> Counted:
        """Count `votes`, `[num_voters, num_bits]`, on one owner's pieces."""
        spans, numbers = form.layout.owned(shard)
        tally = votes.sum(0)
        if self.kind is None:
            found = np.where(abs(tally) >= self.margin, np.sign(tally), 0)
            return Counted(found, np.zeros(numbers.size, dtype=bool))
        shape = votes.shape if self.kind == "standing" else tally.shape
        before = self.kept.get(shard, np.zeros(shape, dtype=np.int64))
        if self.kind == "standing":
            now = np.clip(before + votes, -1, 1)
            lead = now.sum(0)
        else:
            now = lead = np.clip(before + tally, -32767, 32767)
        found = np.zeros_like(tally)
        crowded = np.zeros(numbers.size, dtype=bool)
        for k, number in enumerate(numbers.tolist()):
            first, length = 8 * int(spans.mask_at[k]), int(spans.length[k])
            here = slice(first, first + length)
            wanted = np.flatnonzero(abs(lead[here]) >= self.margin)
            cap = length if verdicts.caps is None else int(verdicts.caps[number])
            chosen = sorted(wanted.tolist(), key=lambda place, k=k: (place < 8 * starts[numbers[k]], place))[:cap]
            found[here][chosen] = np.sign(lead[here][chosen])
            crowded[k] = wanted.size > cap
            if self.kind == "plain":
                votes_left = lead[here]
                votes_left -= self.margin * found[here]
                if self.forget and wanted.size > cap:
                    votes_left[abs(votes_left) >= self.margin] = 0
            else:
                now[:, here][:, found[here] != 0] = 0
        self.later[shard] = now
        return Counted(found, crowded)

    def commit(self, poisoned: bool) -> None:
        if not poisoned:
            self.kept.update(self.later)
        self.later.clear()


def in_plane_order(values: Any, length: int) -> Any:
    """Return a piece's elements in the order of its plane's bits."""
    full = length // 512 * 512
    blocks = values[:full].reshape(-1, 32, 16).transpose(0, 2, 1).reshape(-1)
    return np.concatenate([blocks, values[full:]])
