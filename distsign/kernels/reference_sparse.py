"""The oracle of the sparse codec, in plain torch; `wire.sparse` has the format."""

from __future__ import annotations

import torch
from torch import Tensor

from distsign.kernels.reference_bits import pack_bytes, unpack_bytes
from distsign.wire.sparse import SparseCode

__all__ = ["decode_sparse", "encode_sparse"]


def encode_sparse(planes: Tensor, num_bytes: int, code: SparseCode, out: Tensor) -> Tensor:  # noqa: D103
    assert planes.numel() == 2 * num_bytes and code.num_bits == 8 * num_bytes and out.numel() == code.num_bytes
    mask, sign = unpack_bytes(planes).reshape(2, -1)
    position = mask.nonzero().flatten()
    vote = torch.arange(position.numel(), device=planes.device)
    if vote.numel() > code.num_slots:
        return torch.zeros((), dtype=torch.bool, device=planes.device)
    y = position - vote
    bits = torch.zeros(8 * code.num_bytes, dtype=torch.int32, device=planes.device)
    bits[(y >> code.low_bits) + vote] = 1
    field_at = code.num_high_bits + vote * (code.low_bits + 1)
    for place in range(code.low_bits):
        bits[field_at + place] = ((y >> place) & 1).int()
    bits[field_at + code.low_bits] = sign[position]
    out[:] = pack_bytes(bits.reshape(-1, 8))
    return torch.ones((), dtype=torch.bool, device=planes.device)


def decode_sparse(body: Tensor, code: SparseCode, num_bytes: int, out: Tensor) -> Tensor:  # noqa: D103
    assert out.numel() == 2 * num_bytes and code.num_bits == 8 * num_bytes
    refused = torch.zeros((), dtype=torch.bool, device=body.device)
    if body.numel() != code.num_bytes:
        return refused
    bits = unpack_bytes(body).reshape(-1).long()
    ones = bits[: code.num_high_bits].nonzero().flatten()
    vote = torch.arange(ones.numel(), device=body.device)
    if vote.numel() > code.num_slots:
        return refused
    y = (ones - vote) << code.low_bits
    field_at = code.num_high_bits + vote * (code.low_bits + 1)
    for place in range(code.low_bits):
        y |= bits[field_at + place] << place
    position = y + vote
    if not ((position < code.num_bits).all() and (position.diff() > 0).all()):
        return refused
    planes = torch.zeros(2, code.num_bits, dtype=torch.int32, device=body.device)
    planes[0, position] = 1
    planes[1, position] = bits[field_at + code.low_bits].int()
    out[:] = pack_bytes(planes.reshape(-1, 8))
    # What is left over has to be zeros: then this is the one body of these votes.
    return (bits[code.num_high_bits + vote.numel() * (code.low_bits + 1) :] == 0).all()
