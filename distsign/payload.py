"""From planes to the payloads of one exchange group and back, for ballots or for verdicts.

Uncapped, a payload is header and planes. Capped, it has room for a fixed number of votes: the
cheaper of planes and sparse, which follows from the caps alone, so that both ends know it. In front of such a body lies
the census, one bit a piece: more wanted to vote here than fits. All ranks see the owners' bits and steer by them.

Components that are averaged instead of voted on travel behind the body, in float32, each owner's share of them. A
checksum, where it is wanted, comes last and covers all before it, the header too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from distsign.digest import write_checksums
from distsign.kernels import Kernels, plane_bytes
from distsign.layout import IntArray, Layout, caps_at
from distsign.sizes import Density
from distsign.wire.bits import pack_bits, read_floats, unpack_bits
from distsign.wire.header import CHECKSUM_BYTES, HEADER_BYTES, POISON_BYTE, POISON_FLAG, Codec, Header
from distsign.wire.sparse import SparseCode

__all__ = ["Form", "Opened", "forms"]

_POISON = POISON_FLAG << 8 * POISON_BYTE  # in the word that a header's bytes are, little-endian


@dataclass(frozen=True)
class Opened:
    """What the payloads of one owner's pieces hold, one row a sender.

    Attributes:
        rows: uint8 `[num_senders, any]`, with the bodies from byte `at` of each row.
        at: see above.
        num_bytes: of one plane.
        code: of the bodies; None for planes.
        crowded: bool `[num_senders, num_pieces]`, the census; None without caps.
        raw: float32 `[num_senders, num_raw]`, components to average.
    """

    rows: Tensor
    at: int
    num_bytes: int
    code: SparseCode | None
    crowded: Tensor | None
    raw: Tensor

    def write_planes(self, sender: int, out: Tensor, kernels: Kernels) -> Tensor:
        """Write one sender's planes into `out`, uint8 `[2 * num_bytes]`; return False if the body is malformed."""
        return _write_planes(self.rows[sender, self.at :], self.code, out, kernels)

    def planes(self, kernels: Kernels) -> tuple[Tensor, int, Tensor]:
        """Return rows of planes, the byte in each where they begin, and bool, False for each malformed body."""
        if self.code is None:
            return self.rows, self.at, self.rows.new_ones(self.rows.shape[0], dtype=torch.bool)
        planes = self.rows.new_empty(self.rows.shape[0], 2 * self.num_bytes)
        return planes, 0, torch.stack([self.write_planes(k, row, kernels) for k, row in enumerate(planes)])

    @property
    def capacity(self) -> int:
        """The most votes that a body can hold."""
        return 8 * self.num_bytes if self.code is None else self.code.num_slots

    def num_votes(self, kernels: Kernels) -> Tensor:
        """Return how many votes each sender's body holds by its own bits, int64 `[num_senders]`; 0 if malformed."""
        if self.code is None:
            return kernels.count_votes(self.rows, self.at, self.num_bytes)
        rows, at, ok = self.planes(kernels)
        return torch.where(ok, kernels.count_votes(rows, at, self.num_bytes), 0)

    def without(self, senders: Tensor) -> Opened:
        """Return the same with abstentions in place of what some senders (bool `[num_senders]`) wrote."""
        if senders.device.type == "cpu" and not senders.any():  # nearly always; elsewhere it would wait for the device
            return self
        # Zeros are the body of no votes in either codec.
        rows = self.rows.masked_fill(senders.unsqueeze(1), 0)
        crowded = None if self.crowded is None else self.crowded & ~senders.unsqueeze(1)
        return replace(self, rows=rows, crowded=crowded)


@dataclass(frozen=True, eq=False)
class Form:
    """What the payloads of one direction are made of.

    Attributes:
        layout: where the planes lie.
        verdict: whether they hold verdicts, else ballots.
        caps: int64 `[num_pieces]`, most votes of each piece of the group; None without a cap.
        codes: per owner, the sparse code of its body; None for planes.
        census_bytes: per owner.
        raw_elements: per owner, components that are averaged.
        sizes: per owner, bytes of its payload.
    """

    layout: Layout
    verdict: bool
    caps: IntArray | None
    codes: tuple[SparseCode | None, ...]
    census_bytes: tuple[int, ...]
    raw_elements: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def build(
        cls,
        layout: Layout,
        *,
        verdict: bool,
        caps: IntArray | None = None,
        wire: str = "auto",
        num_raw: int = 0,
    ) -> Form:
        """Decide how each owner's payload is coded.

        Args:
            layout: the group's.
            verdict: whether the payloads hold verdicts.
            caps: int64 `[num_pieces]`, see `caps_at`; None without a cap.
            wire: `"planes"`, `"sparse"` or `"auto"`, the shorter of both. Without caps all are planes.
            num_raw: components of the group that are averaged, over all owners.
        """
        num_owners = len(layout.sizes)
        raw = tuple((k + 1) * num_raw // num_owners - k * num_raw // num_owners for k in range(num_owners))
        if caps is None:
            whole = tuple(size + 4 * n for size, n in zip(layout.sizes, raw, strict=True))
            return cls(layout, verdict, None, (None,) * num_owners, (0,) * num_owners, raw, whole)
        codes: list[SparseCode | None] = []
        sizes, census = [], layout.census_bytes
        slots = np.bincount(np.concatenate(layout.owners), weights=caps, minlength=num_owners).astype(np.int64)
        for owner, num_slots in enumerate(slots.tolist()):
            num_bytes = layout.plane_bytes(owner)
            code: SparseCode | None = SparseCode(8 * num_bytes, num_slots)
            assert code is not None
            if wire == "planes" or (wire == "auto" and code.num_bytes >= 2 * num_bytes):
                code = None
            codes.append(code)
            body_bytes = 2 * num_bytes if code is None else code.num_bytes
            sizes.append(HEADER_BYTES + census[owner] + body_bytes + 4 * raw[owner] + CHECKSUM_BYTES * layout.checksum)
        return cls(layout, verdict, caps, tuple(codes), census, raw, tuple(sizes))

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the payloads of all owners together."""
        return sum(self.sizes)

    @cached_property
    def headers(self) -> tuple[Header, ...]:
        """Per owner, its payload's header, without poison."""
        codecs = [Codec.PLANES if code is None else Codec.SPARSE for code in self.codes]
        return tuple(
            Header(codec, n, verdict=self.verdict, checksum=self.layout.checksum)
            for codec, n in zip(codecs, self.layout.owned_elements, strict=True)
        )

    def seal(self, planes: Tensor, crowded: Tensor | None, raw: Tensor, poisoned: Tensor, kernels: Kernels) -> Tensor:
        """Return the payloads for all owners in one buffer, uint8 `[buffer_bytes]`.

        Args:
            planes: uint8 `[layout.buffer_bytes]`, planes of all owners where the layout puts them; where nothing
                comes between them and the headers, payloads are made in this buffer.
            crowded: bool `[num_pieces]`, the census; None without caps.
            raw: float32 `[num_raw]`, the components to average.
            poisoned: bool scalar tensor; the body of a poisoned payload is void.
            kernels: backend of the device.
        """
        clean, poison = self._headers(planes.device)
        headers = torch.where(poisoned, poison, clean)
        if self._is_layout:
            planes[self.layout.header_places(planes.device)] = headers.flatten()
            if self.layout.checksum:
                write_checksums(planes, self.sizes)
            return planes
        buffer = torch.empty(self.buffer_bytes, dtype=torch.uint8, device=planes.device)
        parts = torch.split(buffer, list(self.sizes))
        shares = torch.split(raw, list(self.raw_elements))
        # What is small is made for all owners at once: of hundreds of owners each operation would be as many.
        census: Sequence[Tensor | None] = [None] * len(parts)
        if crowded is not None:
            bits = crowded.new_zeros(8 * sum(self.census_bytes))
            bits[self.layout.census_places(planes.device)] = crowded & ~poisoned
            census = torch.split(pack_bits(bits), list(self.census_bytes))
        for owner, at in enumerate(self.layout.offsets):
            body = planes[at + HEADER_BYTES :][: 2 * self.layout.plane_bytes(owner)]
            self._seal_into(parts[owner], owner, headers[owner], census[owner], body, shares[owner], kernels)
        return buffer

    def seal_one(
        self, owner: int, planes: Tensor, crowded: Tensor | None, raw: Tensor, poisoned: Tensor, kernels: Kernels
    ) -> tuple[Tensor, Tensor]:
        """Return one owner's payload and whether it has slots for all votes, else it carries poison.

        Args:
            owner: whose pieces it speaks of.
            planes: uint8 `[2 * plane_bytes]`, of its share, as are `crowded` and `raw`; see `seal`.
            crowded: see `seal`.
            raw: see `seal`.
            poisoned: see `seal`.
            kernels: see `seal`.

        Returns:
            `(payload, fits)`: uint8 `[sizes[owner]]`, and a bool scalar tensor.
        """
        payload = torch.empty(self.sizes[owner], dtype=torch.uint8, device=planes.device)
        census = None if crowded is None else pack_bits(crowded & ~poisoned)
        clean, poison = self._headers(planes.device)[:, owner]
        header = torch.where(poisoned, poison, clean)
        return payload, self._seal_into(payload, owner, header, census, planes, raw, kernels)

    def _seal_into(
        self,
        payload: Tensor,
        owner: int,
        header: Tensor,
        census: Tensor | None,
        planes: Tensor,
        raw: Tensor,
        kernels: Kernels,
    ) -> Tensor:
        payload[:HEADER_BYTES] = header
        start, end, last = self._cuts(owner)
        code, body = self.codes[owner], payload[start:end]
        if census is not None:
            payload[HEADER_BYTES:start] = census
        if code is None:
            body.copy_(planes)
            fits = payload.new_ones((), dtype=torch.bool)
        else:
            fits = kernels.encode_sparse(planes, self.layout.plane_bytes(owner), code, body)
            if fits.device.type != "cpu" or not fits:
                # What lay in this memory before must not travel, and would be other bytes on other ranks.
                body.masked_fill_(~fits, 0)
                payload[POISON_BYTE] |= (~fits).to(torch.uint8) * POISON_FLAG
        if raw.numel():
            payload[end:last] = raw.view(torch.uint8)
        if self.layout.checksum:
            write_checksums(payload, [payload.numel()])
        return fits

    def _cuts(self, owner: int) -> tuple[int, int, int]:
        """Return where in an owner's payload its body begins and ends, and where the checksum would begin."""
        last = self.sizes[owner] - CHECKSUM_BYTES * self.layout.checksum
        return HEADER_BYTES + self.census_bytes[owner], last - 4 * self.raw_elements[owner], last

    def has_usual_headers(self, rows: Tensor, owners: Sequence[int]) -> bool:
        """Return whether all headers are the expected ones, without poison; on the CPU, where it spares `read_headers`.

        Args:
            rows: see `read_headers`.
            owners: see `read_headers`.
        """
        data, at = rows.numpy(), 0
        for owner, word in zip(owners, self._usual_words(owners, rows.device).numpy(), strict=True):
            if data[:, at : at + HEADER_BYTES].tobytes() != word.tobytes() * rows.shape[0]:
                return False
            at += self.sizes[owner]
        return True

    def read_headers(self, rows: Tensor, owners: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Hold the headers of payloads against the expected ones.

        Args:
            rows: uint8 `[num_rows, any]`, in each the payloads on the pieces of these owners, one after the other.
            owners: see above.

        Returns:
            `(headers, poisoned, foreign)`: uint8 `[num_rows, num_owners, HEADER_BYTES]`, and of each whether it says
            poison, and whether it is another than it must be, poison aside; bool `[num_rows, num_owners]`.
        """
        starts = accumulate((self.sizes[owner] for owner in owners[:-1]), initial=0)
        # A header is one word: so it takes a few operations to look at all bytes of all of them.
        headers = torch.cat([rows[:, start : start + HEADER_BYTES] for start in starts], dim=1)
        words = headers.view(torch.int64)
        poisoned, usual = (words & _POISON) != 0, self._usual_words(owners, rows.device)
        return headers.view(*words.shape, HEADER_BYTES), poisoned, ((words ^ usual) & ~_POISON) != 0

    def open(self, owner: int, payloads: Tensor) -> Opened:
        """Take apart one owner's payloads from several senders; nothing is checked yet.

        Args:
            owner: whose pieces they speak of.
            payloads: uint8 `[num_senders, sizes[owner]]`, contiguous.
        """
        start, end, last = self._cuts(owner)
        raw = torch.empty(payloads.shape[0], self.raw_elements[owner], device=payloads.device)
        if raw.numel():  # copied as bytes, since they need not lie where a float may
            raw.view(torch.uint8).copy_(payloads[:, end:last])
        num_pieces = self.layout.owned(owner)[1].size
        crowded = None if self.caps is None else unpack_bits(payloads[:, HEADER_BYTES:start], num_pieces)
        return Opened(payloads, start, self.layout.plane_bytes(owner), self.codes[owner], crowded, raw)

    def overfull(self, owner: int, ballots: Opened, kernels: Kernels) -> list[int]:
        """Return the senders with more ballots on a piece than its cap, or beyond its end: no honest one has any.

        Args:
            owner: whose pieces they speak of.
            ballots: as `open` returned them, on the CPU.
            kernels: backend of the CPU.
        """
        assert self.caps is not None
        spans, numbers = self.layout.owned(owner)
        rows, at, _ = ballots.planes(kernels)
        mask = np.unpackbits(rows[:, at : at + ballots.num_bytes].numpy(), axis=1, bitorder="little")
        found = np.zeros(rows.shape[0], dtype=bool)
        for first, length, cap in zip(8 * spans.mask_at, spans.length, self.caps[numbers], strict=True):
            found |= mask[:, first : first + length].sum(1, dtype=np.int64) > cap
            found |= mask[:, first + length : first + 8 * plane_bytes(int(length))].any(1)
        return np.flatnonzero(found).tolist()

    def open_all(self, buffer: Tensor, kernels: Kernels) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Read the payloads of all owners.

        Returns:
            `(planes, crowded, raw, ok)`: uint8 `[layout.buffer_bytes]`, the planes where the layout puts them, whose
            headers mean nothing; the census, bool `[num_pieces]`, None without caps; float32 `[num_raw]`; and bool
            `[num_owners]`, False for each body that is malformed.
        """
        if self._is_layout:
            fine = buffer.new_ones(len(self.sizes), dtype=torch.bool)
            return buffer, None, buffer.new_zeros(0, dtype=torch.float32), fine
        planes = torch.empty(self.layout.buffer_bytes, dtype=torch.uint8, device=buffer.device)
        parts, cuts = torch.split(buffer, list(self.sizes)), [self._cuts(owner) for owner in range(len(self.sizes))]
        crowded = None
        if self.caps is not None:
            census = torch.cat([part[HEADER_BYTES:start] for part, (start, _, _) in zip(parts, cuts, strict=True)])
            crowded = unpack_bits(census, 8 * census.numel())[self.layout.census_places(buffer.device)]
        raw = buffer.new_zeros(0, dtype=torch.float32)
        if sum(self.raw_elements):
            raw = read_floats(torch.cat([part[end:last] for part, (_, end, last) in zip(parts, cuts, strict=True)]))
        ok = []
        for owner, (part, (start, end, _)) in enumerate(zip(parts, cuts, strict=True)):
            out = planes[self.layout.offsets[owner] + HEADER_BYTES :][: 2 * self.layout.plane_bytes(owner)]
            ok.append(_write_planes(part[start:end], self.codes[owner], out, kernels))
        return planes, crowded, raw, torch.stack(ok)

    @property
    def _is_layout(self) -> bool:
        """Whether payloads are just what the layout describes: headers, planes, checksums."""
        return self.caps is None and self.sizes == self.layout.sizes

    @cached_property
    def _kind(self) -> tuple[object, ...]:
        """What headers depend on, besides the layout."""
        return self.verdict, tuple(code is None for code in self.codes)

    def _usual_words(self, owners: Sequence[int], device: torch.device) -> Tensor:
        """Return the headers, without poison, of payloads on these owners' pieces as words, int64 `[num_owners]`."""
        tables, key = self.layout.tables, ("expected", self._kind, *owners, device)
        if key not in tables:
            tables[key] = self._headers(device)[0, list(owners)].view(torch.int64).squeeze(1)
        return tables[key]

    def _headers(self, device: torch.device) -> Tensor:
        """Return each owner's header without and with poison, uint8 `[2, num_owners, HEADER_BYTES]`."""
        tables, key = self.layout.tables, ("headers", self._kind, device)
        if key not in tables:
            both = [replace(header, poison=poison).encode() for poison in (False, True) for header in self.headers]
            data = torch.frombuffer(bytearray(b"".join(both)), dtype=torch.uint8)
            tables[key] = data.view(2, -1, HEADER_BYTES).to(device)
        return tables[key]


def _write_planes(body: Tensor, code: SparseCode | None, out: Tensor, kernels: Kernels) -> Tensor:
    """Write a body's planes into all of `out`; return whether it is one, bool scalar tensor.

    What may follow the body is not looked at.
    """
    if code is not None:
        return kernels.decode_sparse(body[: code.num_bytes], code, out.numel() // 2, out)
    out.copy_(body[: out.numel()])
    return body.new_ones((), dtype=torch.bool)


def forms(layout: Layout, density: Density, wire: str, *, owner_carry: bool, num_raw: int = 0) -> tuple[Form, Form]:
    """Return the forms of a group's ballots and verdicts.

    Args:
        layout: the group's.
        density: share of the components that payloads have slots for, of all or of each piece; None without a cap,
            planes.
        wire: `"planes"`, `"sparse"` or `"auto"`, with a density.
        owner_carry: whether owners keep what does not fit; else verdicts have slots for the ballots of all.
        num_raw: components that are averaged.
    """
    build = partial(Form.build, layout, wire=wire, num_raw=num_raw)
    if density is None:
        return build(verdict=False), build(verdict=True)
    length, num_owners = layout.all_pieces.length, len(layout.sizes)
    ballots = build(verdict=False, caps=caps_at(density, length))
    # Without a carry at the owner nothing may be left behind there, and there are at most so many verdicts.
    back = caps_at(density, length, 1 if owner_carry else num_owners)
    return ballots, build(verdict=True, caps=back)
