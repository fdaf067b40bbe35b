"""The hot loops, behind one interface; all backends agree bit for bit.

A backend is a module with the functions of `Kernels`: `reference` is plain torch, slow, and runs on any device; `cpu`
is Numba. `kernels_for` picks the fast one for a device.

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
from distsign.kernels.spans import BLOCK, Spans, plane_bytes

__all__ = ["BLOCK", "Kernels", "Spans", "kernels_for", "plane_bytes"]

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
            `(counts, finite)`: int64 `[num_rows]` ballots cast, and a bool, False if any element was NaN or infinite
            (what the planes then hold must not be used).
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

    def unpack(self, payload: Tensor, spans: Spans, value: Tensor, out: Tensor) -> Tensor:
        """Write each span's verdicts into `out` (float32) as `-value`, `+0.0` or `+value`.

        Args:
            payload: uint8, the buffer that the spans' planes lie in.
            spans: the pieces of `out`.
            value: float32 scalar tensor: the loss scale, or 1.
            out: float32, changed in place.

        Returns:
            How many verdicts are not 0, an int64 scalar tensor.
        """
        ...


@cache
def _load(device_type: str) -> Kernels:
    if device_type == "cpu":
        from distsign.kernels import cpu  # noqa: PLC0415  (Numba takes a second to import)

        return cast("Kernels", cpu)
    _log.warning(
        "distsign has no fused kernels for device type %r yet and uses its plain torch reference there: packing takes "
        "tens of passes over each gradient instead of one. Compare the step time with the no-op hook's before you rely "
        "on it.",
        device_type,
    )
    return cast("Kernels", reference)


def kernels_for(device: torch.device | str) -> Kernels:
    """Return the fastest backend for a device; a missing one is said once in the log, with what it costs.

    Example:
        >>> kernels_for("cpu").__name__
        'distsign.kernels.cpu'
    """
    return _load(torch.device(device).type)
