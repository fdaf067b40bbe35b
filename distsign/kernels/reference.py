"""The oracle: the kernels in plain torch, on any device, written to be read and not to be fast.

`Kernels` in the package's `__init__` says what each function takes and returns.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distsign.kernels.reference_bits import pack_bytes, pack_plane, rows, unpack_bytes, unpack_plane
from distsign.kernels.reference_carry import active, pack_carry, settle_carry
from distsign.kernels.reference_owner import settle_standing, settle_votes, tally_carry, tally_sparse, tally_standing
from distsign.kernels.reference_sparse import decode_sparse, encode_sparse
from distsign.kernels.spans import BLOCK, LANES, Spans, plane_bytes

__all__ = [
    "active",
    "count_votes",
    "decode_sparse",
    "encode_sparse",
    "moments",
    "pack",
    "pack_carry",
    "settle_carry",
    "settle_standing",
    "settle_votes",
    "tally",
    "tally_carry",
    "tally_sparse",
    "tally_standing",
    "unpack",
]

_MAGNITUDE = 0x7FFFFFFF
_INFINITY = 0x7F800000


def _fold(terms: Tensor) -> Tensor:
    """Sum a float64 vector in the one order that every backend follows.

    Blocks of 32 rows of 16 lanes: rows are added one after the other, then lanes are halved; the sums of the blocks are
    summed in the same way until one is left.
    """
    while True:
        blocks = torch.nn.functional.pad(terms, (0, -terms.numel() % BLOCK)).reshape(-1, 32, LANES)
        lanes = torch.zeros_like(blocks[:, 0])
        for i in range(32):
            lanes = lanes + blocks[:, i]
        while lanes.shape[1] > 1:
            lanes = lanes[:, : lanes.shape[1] // 2] + lanes[:, lanes.shape[1] // 2 :]
        terms = lanes[:, 0]
        if terms.numel() <= 1:
            return terms.sum()


def _sqrt(x: Tensor) -> Tensor:
    """Take the correctly rounded root, which torch's own on the CPU is not always."""
    return torch.as_tensor(np.sqrt(x.numpy())) if x.device.type == "cpu" else x.sqrt()


def moments(grad: Tensor, spans: Spans) -> Tensor:  # noqa: D103
    out = torch.zeros(spans.num_rows, 2, dtype=torch.float64, device=grad.device)
    for start, length, row in rows(spans.start, spans.length, spans.row):
        if length:
            x = grad[start : start + length].double()
            mean = _fold(x) / length
            out[row, 0] = mean
            out[row, 1] = _sqrt((_fold(x * x) / length - mean * mean).clamp(min=0.0))
    return out


def pack(grad: Tensor, spans: Spans, thresholds: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D103
    counts = torch.zeros(spans.length.size, dtype=torch.int64, device=grad.device)
    finite = torch.ones((), dtype=torch.bool, device=grad.device)
    limits = thresholds.abs().view(torch.int32)  # the bits of -0.0 would be the smallest integer
    places = rows(spans.start, spans.length, spans.row, spans.mask_at, spans.sign_at)
    for k, (start, length, row, mask_at, sign_at) in enumerate(places):
        x = grad[start : start + length].view(torch.int32)
        magnitude = x & _MAGNITUDE
        votes = magnitude > limits[row]
        finite = finite & (magnitude < _INFINITY).all()
        counts[k] = votes.sum()
        out[mask_at : mask_at + plane_bytes(length)] = pack_plane(votes)
        out[sign_at : sign_at + plane_bytes(length)] = pack_plane(votes & (x < 0))
    return counts, finite


def count_votes(payloads: Tensor, body_at: int, num_bytes: int) -> Tensor:  # noqa: D103
    return unpack_bytes(payloads[:, body_at : body_at + num_bytes]).sum((1, 2))


def tally(payloads: Tensor, body_at: int, num_bytes: int, margin: int, out: Tensor) -> None:  # noqa: D103
    mask = unpack_bytes(payloads[:, body_at : body_at + num_bytes])
    sign = unpack_bytes(payloads[:, body_at + num_bytes : body_at + 2 * num_bytes])
    lead = (mask * (1 - 2 * sign)).sum(0)
    decided = lead.abs() >= margin
    out[:num_bytes] = pack_bytes(decided)
    out[num_bytes : 2 * num_bytes] = pack_bytes(decided & (lead < 0))


def unpack(payload: Tensor, spans: Spans, value: Tensor, out: Tensor) -> Tensor:  # noqa: D103
    counts = torch.zeros(spans.num_rows, dtype=torch.int64, device=out.device)
    for start, length, row, mask_at, sign_at in rows(
        spans.start, spans.length, spans.row, spans.mask_at, spans.sign_at
    ):
        mask = unpack_plane(payload[mask_at : mask_at + plane_bytes(length)], length)
        sign = unpack_plane(payload[sign_at : sign_at + plane_bytes(length)], length)
        # where, not a product: an abstention is +0.0 whatever the value is.
        signed = torch.where(sign.bool(), -value, value)
        out[start : start + length] = torch.where(mask.bool(), signed, torch.zeros_like(signed))
        counts[row] += mask.sum()
    return counts
