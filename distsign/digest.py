"""Digests of what lies in a tensor, bit by bit: whether two ranks have the same, and whether bytes arrived as sent.

They find faults, not forgers: who knows the function can make another tensor of the same digest.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import xxhash
from torch import Tensor

from distsign.wire.header import CHECKSUM_BYTES

__all__ = ["checksums", "digest", "find_damaged", "write_checksums"]

_COLUMNS, _ROWS = 4096, 256  # words of a row, rows of a block: on the device 8 MB of products at a time


def digest(tensor: Tensor) -> Tensor:
    """Return a digest of a tensor's bytes, as an int64 scalar tensor on the tensor's device. The host never waits.

    On the CPU it is XXH3 of 64 bits (`xxhash`). Elsewhere nothing is copied to the host: the device itself takes a sum
    of its 32-bit words times odd constants, modulo 2^64 (multilinear hashing: Lemire and Kaser, arXiv 1202.4961,
    Sec. 3). Any one changed word changes that sum; several changes cancel out by chance alone, about once in 2^32.
    Digests of different kinds of device, shapes or dtypes are not to be compared.

    Args:
        tensor: any shape, dtype and strides; -0.0 and 0.0, and different NaNs, are different.

    Example:
        >>> bool(digest(torch.tensor([1.0, 2.0])) == digest(torch.tensor([1.0, 2.0])))
        True
        >>> bool(digest(torch.tensor([0.0])) == digest(torch.tensor([-0.0])))
        False
    """
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if data.device.type == "cpu":
        found = xxhash.xxh3_64_intdigest(data.numpy().data)
        return torch.tensor(found - (1 << 63), dtype=torch.int64)
    return _multilinear(data)


def checksums(rows: Tensor) -> Tensor:
    """Return a checksum of each row: the upper half of its digest, uint8 `[num_rows, CHECKSUM_BYTES]`.

    Args:
        rows: `[num_rows, n]`.

    Example:
        >>> checksums(torch.zeros(2, 5, dtype=torch.uint8)).shape
        torch.Size([2, 4])
    """
    found = torch.stack([digest(row) for row in rows])
    return found.unsqueeze(1).view(torch.uint8)[:, -CHECKSUM_BYTES:]


def write_checksums(payloads: Tensor, sizes: Sequence[int]) -> None:
    """Write the checksum of all bytes before it into the last `CHECKSUM_BYTES` of each payload, in place.

    Args:
        payloads: uint8 `[sum(sizes)]`, contiguous: payloads one after the other.
        sizes: bytes of each.
    """
    assert payloads.numel() == sum(sizes)
    if payloads.device.type != "cpu":
        _write_by_tensors(payloads, sizes)
        return
    data, end = payloads.numpy().data, 0
    for size in sizes:
        start, end = end, end + size
        data[end - CHECKSUM_BYTES : end] = _checksum(data[start : end - CHECKSUM_BYTES])


def find_damaged(rows: Tensor, sizes: Sequence[int], own: range) -> Tensor:
    """Return which payloads are not as `write_checksums` left them, bool `[num_rows, len(sizes)]`.

    Args:
        rows: uint8 `[num_rows, sum(sizes)]`, contiguous: in each, payloads of these sizes one after the other.
        sizes: bytes of each payload of a row.
        own: numbers of those that never left this rank, row by row; they are taken to be undamaged.
    """
    assert rows.shape[1] == sum(sizes)
    if rows.device.type != "cpu":
        return _find_by_tensors(rows, sizes, own)
    data, found, start = rows.numpy().reshape(-1).data, [], 0
    for number, size in enumerate([*sizes] * rows.shape[0]):
        payload = data[start : start + size]
        start += size
        if number not in own and _checksum(payload[:-CHECKSUM_BYTES]) != payload[-CHECKSUM_BYTES:]:
            found.append(number)
    damaged = torch.zeros(rows.shape[0], len(sizes), dtype=torch.bool)
    if found:
        damaged.view(-1)[found] = True
    return damaged


def _write_by_tensors(payloads: Tensor, sizes: Sequence[int]) -> None:
    """Do what `write_checksums` does by operations on tensors alone, so that no device is waited for."""
    for payload in torch.split(payloads, list(sizes)):
        payload[-CHECKSUM_BYTES:] = checksums(payload[None, :-CHECKSUM_BYTES])[0]


def _find_by_tensors(rows: Tensor, sizes: Sequence[int], own: range) -> Tensor:
    """Do what `find_damaged` does by operations on tensors alone."""
    parts = torch.split(rows, list(sizes), dim=1)
    damaged = torch.stack(
        [(checksums(part[:, :-CHECKSUM_BYTES]) != part[:, -CHECKSUM_BYTES:]).any(1) for part in parts], dim=1
    )
    damaged.view(-1)[own.start : own.stop] = False
    return damaged


def _checksum(data: memoryview) -> bytes:
    """Return what `checksums` does, on the CPU: payloads are many and short, and torch would take longer over them."""
    return (xxhash.xxh3_64_intdigest(data) ^ 1 << 63).to_bytes(8, "little")[-CHECKSUM_BYTES:]


def _multilinear(data: Tensor) -> Tensor:
    """Return the digest of uint8 `[n]` that is taken with plain tensor operations, on any device."""
    columns, rows = _weights(data.device)
    padding = -data.numel() % 4
    if padding or data.storage_offset() % 4:
        data = torch.nn.functional.pad(data, (0, padding)).clone()  # where words of four bytes may lie
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for block in torch.split(data.view(torch.int32), _COLUMNS * _ROWS):
        whole = block.numel() // _COLUMNS
        sums = (block[: whole * _COLUMNS].view(whole, _COLUMNS) * columns).sum(1)
        rest = block[whole * _COLUMNS :]
        last = (rest * columns[: rest.numel()]).sum()
        # The constants are odd, so that a difference never becomes a multiple of 2^64 by one of them.
        total = total * rows[-1] + (sums * rows[:whole]).sum() + last * rows[whole]
    return total


@cache
def _weights(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return odd int64 constants, `[_COLUMNS]` and `[_ROWS + 2]`, the same in every process.

    SplitMix64 of 0, 1, 2 and so on (Steele, Lea, Flood, OOPSLA 2014, Fig. 17).
    """
    z = np.arange(1, _COLUMNS + _ROWS + 3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    odd = torch.from_numpy(((z ^ (z >> np.uint64(31))) | np.uint64(1)).view(np.int64)).to(device)
    return odd[:_COLUMNS], odd[_COLUMNS:]
