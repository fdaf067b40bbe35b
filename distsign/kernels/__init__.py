"""The hot loops, behind one interface; all backends agree bit for bit.

A backend is a module with the functions of `Kernels`: `reference` is plain torch, slow, and runs on any device; `cpu`
is Numba, `cuda` Triton. `kernels_for` picks the fast one for a device.

A bucket is one flat gradient that holds several parameter tensors, and each parameter is cut into shards with different
owners; `Spans` lists such pieces of a flat tensor.

**Vertical planes.** A plane holds one bit per element. Full blocks of `BLOCK` = 512 elements become 16 little-endian
32-bit words: bit `i` of word `j` is element `16 * i + j`, so that sixteen neighbouring elements go to sixteen words at
the same bit, element-wise code that every compiler vectorises. The rest of a span, fewer than 512 elements, is in
plain order (bit `e % 8` of byte `e // 8`) and is cut after its last byte: the tail is never padded on the wire.
The mask plane is 1 where there is a vote; the sign plane is 1 where that vote is negative, else 0.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Protocol, cast

import torch
from torch import Tensor

from distsign.kernels import reference
from distsign.kernels.memory import CarryRule, Memory, dither_at
from distsign.kernels.spans import BLOCK, Spans, plane_bytes
from distsign.wire.sparse import SparseCode

__all__ = [
    "BLOCK",
    "CarryRule",
    "Kernels",
    "Memory",
    "SparseCode",
    "Spans",
    "dither_at",
    "kernels_for",
    "plane_bytes",
]

_log = logging.getLogger(__name__)


class Kernels(Protocol):
    """What every backend offers. Tensors are one-dimensional and contiguous and lie on the backend's device."""

    def moments(self, grad: Tensor, spans: Spans) -> Tensor:
        """Return mean and population standard deviation of each span of `grad` (float32), float64 `[num_rows, 2]`.

        Sums are float64 in one fixed order, so that backends agree bit for bit. An empty span has zeros; a span that
        holds a NaN or an infinity has a NaN or an infinity. One span a row.
        """
        ...

    def pack(self, grad: Tensor, spans: Spans, thresholds: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        """Write the ballots of each span, `sign(g)` where `abs(g) > thresholds[row]`, as planes into `out` (uint8).

        Args:
            grad: float32, not changed.
            spans: the pieces, with the places of their planes in `out`.
            thresholds: float32 `[num_rows]`, at least 0.
            out: uint8, changed in place where the planes lie.

        Returns:
            `(counts, finite)`: int64 `[num_pieces]` ballots cast, and a bool, False if any element was NaN or infinite
            (what the planes then hold must not be used).
        """
        ...

    def active(self, grad: Tensor, spans: Spans) -> Tensor:
        """Return whether each span of `grad` (float32) holds anything but zeros, bool `[num_rows]`. One span a row.

        A NaN is not zero. Looks no further than the first element that is not, where the device allows.
        """
        ...

    def pack_carry(
        self, grad: Tensor, spans: Spans, rule: CarryRule, memory: Memory, out: Tensor, *, clear: bool
    ) -> tuple[Tensor, Tensor]:
        """Add gradient and carry, vote on the sum, and keep the rest: one pass.

        Per component of an active row, all in float32, each operation rounded by itself (no fused multiply-add):

        1. `g = grad * unscale`
        2. without `square`: `u = carry + g`. With it: `v = min(decay * square + (1 - decay) * (g * g), MAX)`, where
           `1 - decay` is `float32(1.0 - decay)` and MAX the largest number of the memory's dtype;
           `u = carry + (g * correction) / sqrt(v)` where `v > 1e-30`, else `u = carry` (a dead component has v = 0, and
           tiny ones would overflow).
        3. ballot `sign(u)` where `abs(u) > threshold`, else 0, written as planes as `pack` does;
        4. the new carry is 0 where there is a ballot and `clear` is set, else u, in bfloat16 rounded to the nearest;
           the new square is v, in bfloat16 the upper half of `bits(v) + dither`.

        Reads half `live` of the memory and writes the other; an inactive row is copied, and its planes are 0.

        Args:
            grad: float32, not changed.
            spans: the pieces, with the places of their planes in `out` and their `home` in the memory.
            rule: thresholds and units.
            memory: changed in place, in the spare half.
            out: uint8, changed in place where the planes lie.
            clear: False where `settle_carry` follows, which decides which ballots are sent.

        Returns:
            `(counts, finite)` as `pack` does; finite is about `grad` as it came.
        """
        ...

    def settle_carry(self, planes: Tensor, spans: Spans, caps: Tensor, starts: Tensor, memory: Memory | None) -> Tensor:
        """Keep at most `caps` votes of each piece and abstain on the others; zero the carry where a vote is kept.

        Votes are taken in the order of the plane's bits (byte, then lowest bit first), beginning at bit `8 * start` and
        going on from the plane's first bit after its last: a rotating start, so that no end of a tensor starves.

        Args:
            planes: uint8, changed in place where more than `caps` votes were.
            spans: the pieces with their planes' places in `planes` and their `home` in the memory.
            caps: int64 `[num_pieces]`, at least 0, on the CPU.
            starts: int64 `[num_pieces]`, a byte of the piece's plane each, on the CPU.
            memory: the spare half of `carry` is changed in place; None where the carry needs no change, since
                `pack_carry` cleared it.

        Returns:
            int64 `[num_pieces]`: votes that each piece had before.
        """
        ...

    def tally(self, payloads: Tensor, body_at: int, num_bytes: int, margin: int, out: Tensor) -> None:
        """Count the ballots of all workers and write the verdicts into `out`.

        Args:
            payloads: uint8 `[world_size, payload_bytes]`, contiguous; the mask plane of each row lies at `body_at` and
                its sign plane follows at once.
            body_at: byte in a row where the mask plane begins.
            num_bytes: bytes of one plane.
            margin: least lead, at least 1.
            out: uint8 `[2 * num_bytes]`, changed in place: mask plane, then sign plane of the verdicts.
        """
        ...

    def tally_carry(
        self, payloads: Tensor, body_at: int, spans: Spans, margin: int, undecided: Tensor, live: Tensor, out: Tensor
    ) -> None:
        """Count the ballots of all workers on top of the undecided votes, and find where the margin is reached.

        `R' = clip(R + tally, -32767, 32767)`, verdict `sign(R')` where `abs(R') >= margin`, else 0. Nothing is
        subtracted yet: `settle_votes` follows and decides which verdicts are sent.

        Args:
            payloads: uint8 `[world_size, payload_bytes]`, contiguous; the planes of the pieces lie at
                `body_at + mask_at` and `body_at + sign_at` of each row.
            body_at: byte in a row that the spans' places count from.
            spans: this owner's pieces; `mask_at` and `sign_at` count from `body_at` in a payload and from 0 in `out`,
                `home` from the first element of `undecided`. `start` is not used.
            margin: least lead, at least 1.
            undecided: int16 `[2, num_owned_elements]`; half `live` is read and the other written.
            live: int64 scalar tensor.
            out: uint8, changed in place where the planes lie.
        """
        ...

    def tally_sparse(
        self,
        payloads: Tensor,
        body_at: int,
        code: SparseCode,
        spans: Spans,
        margin: int,
        undecided: Tensor,
        live: Tensor,
        out: Tensor,
    ) -> Tensor:
        """Do what `decode_sparse` of each body and `tally_carry` of their planes do, without the planes.

        Args:
            payloads: uint8 `[world_size, payload_bytes]`, contiguous, each with a body of `code` from byte `body_at`.
            body_at: see above.
            code: the sizes; `code.num_bits` is that of a plane with all pieces.
            spans: this owner's pieces, as `tally_carry` takes them, each behind the one before in the planes.
            margin: least lead, at least 1.
            undecided: int16 `[2, num_owned_elements]`; half `live` is read and the other written.
            live: int64 scalar tensor.
            out: uint8 `[2 * plane_bytes]`, changed in place where the planes lie.

        Returns:
            bool `[world_size]`: False for a body that `encode_sparse` does not write; if any is, `out` and the spare
            half mean nothing.
        """
        ...

    def settle_votes(
        self,
        planes: Tensor,
        spans: Spans,
        caps: Tensor,
        starts: Tensor,
        margin: int,
        undecided: Tensor,
        live: Tensor,
        *,
        forget: bool = False,
    ) -> Tensor:
        """Keep at most `caps` verdicts of each piece, as `settle_carry` does; where one is kept, take it off the votes.

        That is `R' -= margin * verdict`, in place in the spare half of `undecided`. With `forget`, votes of a piece
        with more verdicts than its cap that still reach the margin become 0. Returns the verdicts that each piece had
        before, int64 `[num_pieces]`.
        """
        ...

    def tally_standing(
        self, payloads: Tensor, body_at: int, num_bytes: int, margin: int, standing: Tensor, live: Tensor, out: Tensor
    ) -> None:
        """Add each worker's ballots to its standing ballot and count those.

        A worker's standing ballot on a component is in {-1, 0, +1}: a new ballot takes the place of a 0, adds nothing
        to its like, and wipes out its opposite. The verdict is the majority of the standing ballots, with the margin.
        Nothing is wiped out by verdicts yet: `settle_standing` follows.

        Args:
            payloads: as `tally` takes them: mask plane of `num_bytes` at `body_at`, sign plane after it.
            body_at: byte in a row where the mask plane begins.
            num_bytes: bytes of one plane.
            margin: least lead, at least 1.
            standing: uint8 `[2, world_size, 2 * num_bytes]`: halves, workers, mask plane and sign plane, the latter 0
                where there is no ballot. Half `live` is read and the other written.
            live: int64 scalar tensor.
            out: uint8 `[2 * num_bytes]`, changed in place: planes of the verdicts.
        """
        ...

    def settle_standing(
        self, planes: Tensor, spans: Spans, caps: Tensor, starts: Tensor, standing: Tensor, live: Tensor
    ) -> Tensor:
        """Keep at most `caps` verdicts of each piece, as `settle_carry` does; wipe out all standing ballots under one.

        `planes` is uint8 `[2 * num_bytes]`, into which the spans' places count. Changes the spare half of `standing` in
        place. Returns the verdicts that each piece had before, int64 `[num_pieces]`.
        """
        ...

    def count_votes(self, payloads: Tensor, body_at: int, num_bytes: int) -> Tensor:
        """Return the ones in each row's mask plane, int64 `[num_rows]`: the votes that a sender has cast.

        Args:
            payloads: as `tally` takes them.
            body_at: byte in a row where the mask plane begins.
            num_bytes: bytes of the plane.
        """
        ...

    def encode_sparse(self, planes: Tensor, num_bytes: int, code: SparseCode, out: Tensor) -> Tensor:
        """Write a mask and a sign plane as an Elias-Fano index set with one sign bit an index (`wire.sparse`).

        Args:
            planes: uint8 `[2 * num_bytes]`, mask plane then sign plane.
            num_bytes: bytes of one plane.
            code: the sizes; `code.num_bits == 8 * num_bytes`.
            out: uint8 `[code.num_bytes]`, changed in place, every byte.

        Returns:
            bool scalar tensor: False if there were more votes than `code.num_slots`, and `out` means nothing.
        """
        ...

    def decode_sparse(self, body: Tensor, code: SparseCode, num_bytes: int, out: Tensor) -> Tensor:
        """Undo `encode_sparse`: write both planes, every byte of them, into `out` (uint8 `[2 * num_bytes]`).

        Returns:
            bool scalar tensor: False if the body is not what `encode_sparse` writes for any planes, to the last bit
            (indices not increasing, beyond the end, bits in the padding, a sign in an unused slot); `out` then means
            nothing, but nothing outside of it was written.
        """
        ...

    def unpack(self, payload: Tensor, spans: Spans, value: Tensor, out: Tensor) -> Tensor:
        """Write each span's verdicts into `out` (float32) as `-value`, `+0.0` or `+value`.

        Args:
            payload: uint8, the buffer that the spans' planes lie in.
            spans: the pieces of `out`.
            value: float32 scalar tensor: the loss scale, or 1.
            out: float32, changed in place.

        Returns:
            How many verdicts of each row are not 0, int64 `[num_rows]`.
        """
        ...


@cache
def _load(device_type: str) -> Kernels:
    if device_type == "cpu":
        from distsign.kernels import cpu  # noqa: PLC0415  (Numba takes a second to import)

        return cast("Kernels", cpu)
    why = "has no fused kernels for it"
    if device_type == "cuda":
        try:
            from distsign.kernels import cuda  # noqa: PLC0415  (optional, and takes seconds to import)
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            why = "needs the package triton for its kernels there, which is not installed (pip install triton)"
        else:
            return cast("Kernels", cuda)
    _log.warning(
        "device type %r: distsign %s and uses its plain torch reference: packing takes tens of passes over each "
        "gradient instead of one. Compare the step time with the no-op hook's before you rely on it.",
        device_type,
        why,
    )
    return cast("Kernels", reference)


def kernels_for(device: torch.device | str) -> Kernels:
    """Return the fastest backend for a device; a missing one is said once in the log, with what it costs.

    Example:
        >>> kernels_for("cpu").__name__
        'distsign.kernels.cpu'
    """
    return _load(torch.device(device).type)
