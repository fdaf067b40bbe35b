"""Pieces cut into chunks of one size, as a table on the device: what one program of a launch works on.

A launch covers all pieces of a bucket: program `c` reads row `c` of the table, and everything it needs is there. The
table depends on the spans alone, so it is made and uploaded once for each `Spans` and each device; a step uploads
nothing and waits for nothing.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distsign.kernels.spans import BLOCK, Spans

__all__ = ["CHUNK", "FIELDS", "Chunks", "chunks_of", "upload"]

CHUNK = 8 * BLOCK
"""Elements of a chunk: 128 words of a plane, one for each thread of four warps."""

FIELDS = 8
"""Columns of the table; see `Chunks`. With eight, a program's row is two sectors of one cache line."""


@dataclass(frozen=True, eq=False)
class Chunks:
    """The chunks of a `Spans`, in order.

    Attributes:
        table: int64 `[num_chunks, FIELDS]` on the device: first element in the flat tensor; elements; row; bytes where
            the chunk's part of the mask plane and of the sign plane begin; first element in what is kept; piece; the
            chunk's number within its piece.
        num_chunks: rows of the table; an empty piece has none.
        largest: elements of the longest piece.
        lengths: int64 `[num_pieces]` on the device, elements of each piece.
        rows: int64 `[num_pieces]` on the device, row of each piece.
    """

    table: Tensor
    num_chunks: int
    largest: int
    lengths: Tensor
    rows: Tensor


_cache: weakref.WeakKeyDictionary[Spans, dict[torch.device, Chunks]] = weakref.WeakKeyDictionary()


def _or_zeros(places: npt.NDArray[np.int64], like: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return places if places.size else np.zeros_like(like)


def _table(spans: Spans) -> npt.NDArray[np.int64]:
    per_piece = (spans.length + CHUNK - 1) // CHUNK
    piece = np.repeat(np.arange(spans.length.size), per_piece)
    number = np.arange(piece.size) - np.repeat(np.cumsum(per_piece) - per_piece, per_piece)
    elements, plane = number * CHUNK, number * (CHUNK // 8)
    columns = [
        spans.start[piece] + elements,
        np.minimum(spans.length[piece] - elements, CHUNK),
        spans.row[piece],
        _or_zeros(spans.mask_at, spans.length)[piece] + plane,
        _or_zeros(spans.sign_at, spans.length)[piece] + plane,
        _or_zeros(spans.home, spans.length)[piece] + elements,
        piece,
        number,
    ]
    assert len(columns) == FIELDS
    return np.ascontiguousarray(np.stack(columns, axis=1))


def chunks_of(spans: Spans, device: torch.device) -> Chunks:
    """Return the chunks of these spans on this device, made at the first call."""
    per_device = _cache.setdefault(spans, {})
    if device not in per_device:
        table = _table(spans)
        per_device[device] = Chunks(
            torch.from_numpy(table).to(device),
            table.shape[0],
            int(spans.length.max(initial=0)),
            torch.from_numpy(spans.length.copy()).to(device),
            torch.from_numpy(spans.row.copy()).to(device),
        )
    chunks = per_device[device]
    if device.type == "cuda":
        # The spans may die, and their tables with them, while a launch on another stream still reads those.
        stream = torch.cuda.current_stream(device)
        for tensor in (chunks.table, chunks.lengths, chunks.rows):
            tensor.record_stream(stream)
    return chunks


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device without waiting for it; the caller may change the tensor afterwards."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
