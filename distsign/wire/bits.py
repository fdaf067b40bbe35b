"""Bits packed eight a byte, lowest bit first, and floats as their bytes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["float_bytes", "num_bit_bytes", "pack_bits", "read_floats", "unpack_bits"]


def num_bit_bytes(num_bits: int) -> int:
    """Return the bytes that so many bits fill, the last one padded."""
    return (num_bits + 7) // 8


def pack_bits(bits: Tensor) -> Tensor:
    """Return bits, bool of any shape, as uint8 `[num_bit_bytes(n)]`.

    Example:
        >>> pack_bits(torch.tensor([True, False, True])).tolist()
        [5]
    """
    flat = bits.reshape(-1)
    if flat.device.type == "cpu":
        return torch.from_numpy(np.packbits(flat.numpy(), bitorder="little"))
    padded = flat.new_zeros(8 * num_bit_bytes(flat.numel()), dtype=torch.uint8)
    padded[: flat.numel()] = flat
    return (padded.view(-1, 8) << _shifts(flat.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, num_bits: int) -> Tensor:
    """Return bits again, row by row: bool `[..., num_bits]` of uint8 `[..., num_bit_bytes(num_bits)]`.

    Example:
        >>> unpack_bits(torch.tensor([[5], [2]], dtype=torch.uint8), 3).int().tolist()
        [[1, 0, 1], [0, 1, 0]]
    """
    if packed.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1, count=num_bits, bitorder="little")).bool()
    return ((packed.unsqueeze(-1) >> _shifts(packed.device)) & 1).bool().flatten(-2)[..., :num_bits]


def float_bytes(values: Tensor) -> Tensor:
    """Return float32 as their bytes, uint8 `[4 n]`."""
    return values.float().reshape(-1).contiguous().view(torch.uint8)


def read_floats(packed: Tensor) -> Tensor:
    """Return float32 from their bytes."""
    return packed.contiguous().view(torch.float32)


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
