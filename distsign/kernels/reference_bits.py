"""Bits in bytes and vertical planes, in plain torch: what the parts of the oracle share."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distsign.kernels.spans import BLOCK, LANES

__all__ = ["pack_bytes", "pack_plane", "rows", "unpack_bytes", "unpack_plane"]


def rows(*columns: npt.NDArray[np.int64]) -> Iterator[tuple[int, ...]]:
    """Go through columns of the same length, row by row."""
    return zip(*(column.tolist() for column in columns), strict=True)


def pack_bytes(bits: Tensor) -> Tensor:
    """Pack `[..., 8]` zeros and ones into bytes, lowest bit first."""
    weights = 2 ** torch.arange(8, dtype=torch.int32, device=bits.device)
    return (bits.to(torch.int32) * weights).sum(-1).to(torch.uint8).reshape(-1)


def unpack_bytes(packed: Tensor) -> Tensor:
    """Undo `pack_bytes`: int32 zeros and ones, `[..., 8]`."""
    places = torch.arange(8, dtype=torch.int32, device=packed.device)
    return (packed.to(torch.int32)[..., None] >> places) & 1


def pack_plane(bits: Tensor) -> Tensor:
    """Pack zeros and ones, one an element, into a plane as the package's docstring describes it."""
    full = bits.numel() // BLOCK * BLOCK
    blocks = bits[:full].reshape(-1, 32, LANES).transpose(1, 2).reshape(-1, 8)
    tail = torch.nn.functional.pad(bits[full:].to(torch.int32), (0, -bits.numel() % 8)).reshape(-1, 8)
    return torch.cat([pack_bytes(blocks), pack_bytes(tail)])


def unpack_plane(packed: Tensor, num_elements: int) -> Tensor:
    """Undo `pack_plane`: int32 zeros and ones, `[num_elements]`."""
    full = num_elements // BLOCK * BLOCK
    blocks = unpack_bytes(packed[: full // 8]).reshape(-1, LANES, 32).transpose(1, 2).reshape(-1)
    tail = unpack_bytes(packed[full // 8 :]).reshape(-1)[: num_elements - full]
    return torch.cat([blocks, tail])
