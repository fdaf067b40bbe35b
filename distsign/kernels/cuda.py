"""The kernels on CUDA devices: typed wrappers around the Triton bodies in `triton_*`.

Holds bit for bit with `reference`; `tests/test_kernels_cuda.py` keeps it so, in Triton's interpreter where there is
no device. Nothing here waits for the device: tables of pieces are uploaded once (`chunks`), the kernels read which half
of a memory is live, and sizes follow from shapes alone. One launch serves all pieces of a bucket.
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distsign.kernels import triton_moments, triton_owner, triton_settle, triton_sparse, triton_voter
from distsign.kernels.chunks import chunks_of, upload
from distsign.kernels.memory import CarryRule, Memory
from distsign.kernels.spans import BLOCK, Spans
from distsign.kernels.triton_bits import OPTIONS
from distsign.wire.sparse import SparseCode

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

_PIECES = 128
"""Pieces whose moments one program finishes."""


def _launch(kernel: Any, num_programs: int, first: Tensor, *args: Any, **constants: Any) -> None:
    """Run a kernel on the device of `first`, its first argument, on that device's current stream."""
    if num_programs:
        # Triton launches on the current device, whatever device the tensors are on.
        with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
            kernel[(num_programs,)](first, *args, **constants, **OPTIONS)


def _programs(size: int, per_program: int) -> int:
    return (size + per_program - 1) // per_program


# --------------------------------------------------------------------------------------------------------------- voter


@dataclass(frozen=True)
class _Fold:
    """The levels of the moments' sums: each one's pieces, with `home` at 512 times the place of the piece's sums."""

    levels: list[Spans]
    num_sums: list[int]
    first: dict[torch.device, Tensor]  # place of each piece's last sum


_folds: weakref.WeakKeyDictionary[Spans, _Fold] = weakref.WeakKeyDictionary()


def _fold_of(spans: Spans, device: torch.device) -> _Fold:
    fold = _folds.get(spans)
    if fold is None:
        fold = _folds[spans] = _Fold([], [], {})
        start, length = spans.start, spans.length
        while not fold.levels or length.max(initial=0) > 1:
            num_sums = (length + BLOCK - 1) // BLOCK
            first = np.cumsum(num_sums) - num_sums
            fold.levels.append(Spans(start, length, spans.row, home=BLOCK * first))
            fold.num_sums.append(int(num_sums.sum()))
            start, length = first, num_sums
    if device not in fold.first:
        fold.first[device] = torch.from_numpy(fold.levels[-1].home // BLOCK).to(device)
    if device.type == "cuda":
        fold.first[device].record_stream(torch.cuda.current_stream(device))
    return fold


def moments(grad: Tensor, spans: Spans) -> Tensor:  # noqa: D103
    device, num_pieces = grad.device, spans.length.size
    out = torch.zeros(spans.num_rows, 2, dtype=torch.float64, device=device)
    fold = _fold_of(spans, device)
    terms = squares = grad
    for level, (pieces, num_sums) in enumerate(zip(fold.levels, fold.num_sums, strict=True)):
        chunks = chunks_of(pieces, device)
        sums = torch.empty(2, num_sums, dtype=torch.float64, device=device)
        kernel = triton_moments.fold_kernel
        _launch(kernel, chunks.num_chunks, terms, squares, chunks.table, sums[0], sums[1], FIRST=level == 0)
        terms, squares = sums[0], sums[1]
    chunks, first = chunks_of(spans, device), fold.first[device]
    args = (terms, squares, chunks.lengths, chunks.rows, out, first, num_pieces)
    _launch(triton_moments.finish_kernel, _programs(num_pieces, _PIECES), *args, PIECES=_PIECES)
    return out


def pack(grad: Tensor, spans: Spans, thresholds: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D103
    chunks = chunks_of(spans, grad.device)
    counts = torch.zeros(spans.length.size, dtype=torch.int64, device=grad.device)
    finite = torch.ones((), dtype=torch.bool, device=grad.device)
    args = (grad, chunks.table, thresholds, out, counts, finite.view(torch.uint8))
    _launch(triton_voter.pack_kernel, chunks.num_chunks, *args)
    return counts, finite


def active(grad: Tensor, spans: Spans) -> Tensor:  # noqa: D103
    chunks = chunks_of(spans, grad.device)
    found = torch.zeros(spans.num_rows, dtype=torch.bool, device=grad.device)
    args = (grad.view(torch.int32), chunks.table, found.view(torch.uint8))
    _launch(triton_voter.find_active_kernel, chunks.num_chunks, *args)
    return found


def pack_carry(  # noqa: D103
    grad: Tensor, spans: Spans, rule: CarryRule, memory: Memory, out: Tensor, *, clear: bool
) -> tuple[Tensor, Tensor]:
    chunks = chunks_of(spans, grad.device)
    counts = torch.zeros(spans.length.size, dtype=torch.int64, device=grad.device)
    finite = torch.ones((), dtype=torch.bool, device=grad.device)
    corrections, square, carry = rule.corrections, memory.square, memory.carry
    half_precision = carry.dtype == torch.bfloat16
    kind = torch.int16 if half_precision else torch.float32  # Triton sees the bits
    _launch(
        triton_voter.carry_kernel,
        chunks.num_chunks,
        grad,
        chunks.table,
        rule.thresholds,
        rule.active.view(torch.uint8),
        rule.unscale,
        rule.thresholds if corrections is None else corrections,  # stands in for what is not read
        float(np.float32(rule.decay)),
        float(np.float32(1.0 - rule.decay)),
        rule.dither,
        carry.view(kind),
        grad if square is None else square.view(kind),
        memory.live,
        carry.shape[1],
        out,
        counts,
        finite.view(torch.uint8),
        SQUARE=square is not None,
        CORRECT=corrections is not None,
        CLEAR=clear,
        HALF_PRECISION=half_precision,
    )
    return counts, finite


def unpack(payload: Tensor, spans: Spans, value: Tensor, out: Tensor) -> Tensor:  # noqa: D103
    chunks = chunks_of(spans, out.device)
    counts = torch.zeros(spans.num_rows, dtype=torch.int64, device=out.device)
    args = (payload, chunks.table, value, out.view(torch.int32), counts)
    _launch(triton_voter.unpack_kernel, chunks.num_chunks, *args)
    return counts


# --------------------------------------------------------------------------------------------------------------- owner


def count_votes(payloads: Tensor, body_at: int, num_bytes: int) -> Tensor:  # noqa: D103
    plane = payloads[:, body_at : body_at + num_bytes]
    # Pairs, nibbles and bytes are added up within each byte.
    pairs = plane - ((plane >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return ((nibbles + (nibbles >> 4)) & 0x0F).sum(1, dtype=torch.int64)


def tally(payloads: Tensor, body_at: int, num_bytes: int, margin: int, out: Tensor) -> None:  # noqa: D103
    _tally(payloads, body_at, num_bytes, margin, None, None, out)


def tally_standing(  # noqa: D103
    payloads: Tensor, body_at: int, num_bytes: int, margin: int, standing: Tensor, live: Tensor, out: Tensor
) -> None:
    _tally(payloads, body_at, num_bytes, margin, standing, live, out)


def _tally(
    payloads: Tensor,
    body_at: int,
    num_bytes: int,
    margin: int,
    standing: Tensor | None,
    live: Tensor | None,
    out: Tensor,
) -> None:
    world_size, stride = payloads.shape
    num_programs = _programs(num_bytes, triton_owner.TALLY_BYTES)
    bodies = payloads.view(-1)[body_at:]
    half = 2 * num_bytes * world_size
    kept = (out, out) if standing is None or live is None else (standing, live)  # out stands in for what is not read
    _launch(
        triton_owner.tally_kernel,
        num_programs,
        bodies,
        stride,
        num_bytes,
        margin,
        *kept,
        half,
        out,
        WORLD_SIZE=world_size,
        STANDING=standing is not None,
        BYTES=triton_owner.TALLY_BYTES,
    )


def tally_carry(  # noqa: D103
    payloads: Tensor, body_at: int, spans: Spans, margin: int, undecided: Tensor, live: Tensor, out: Tensor
) -> None:
    chunks = chunks_of(spans, out.device)
    world_size, stride = payloads.shape
    args = (payloads.view(-1)[body_at:], stride, chunks.table, margin, undecided, live, undecided.shape[1], out)
    _launch(triton_owner.tally_carry_kernel, chunks.num_chunks, *args, WORLD_SIZE=world_size)


def tally_sparse(  # noqa: D103
    payloads: Tensor,
    body_at: int,
    code: SparseCode,
    spans: Spans,
    margin: int,
    undecided: Tensor,
    live: Tensor,
    out: Tensor,
) -> Tensor:
    # By way of planes: a list of votes whose length the host does not know would have to be as long as the slots.
    bodies = payloads[:, body_at : body_at + code.num_bytes]
    planes = torch.empty(payloads.shape[0], out.numel(), dtype=torch.uint8, device=payloads.device)
    ok = [decode_sparse(body, code, out.numel() // 2, row) for body, row in zip(bodies, planes, strict=True)]
    tally_carry(planes, 0, spans, margin, undecided, live, out)
    return torch.stack(ok)


# -------------------------------------------------------------------------------------------------------------- settle


def _settle(
    planes: Tensor,
    spans: Spans,
    caps: Tensor,
    starts: Tensor,
    memory: Tensor,
    live: Tensor,
    kind: int,
    *,
    margin: int = 0,
    world_size: int = 1,
) -> Tensor:
    chunks = chunks_of(spans, planes.device)
    cap, start = upload(torch.stack([caps, starts]), planes.device).unbind()
    counts, before = torch.zeros(2, spans.length.size, dtype=torch.int64, device=planes.device).unbind()
    totals = torch.empty(chunks.num_chunks, dtype=torch.int64, device=planes.device)
    _launch(triton_settle.count_kernel, chunks.num_chunks, planes, chunks.table, start, totals, before, counts)
    args = (planes, chunks.table, cap, start, totals, totals.cumsum(0), before, counts, memory, live)
    half = memory.numel() // 2
    kernel = triton_settle.keep_kernel
    _launch(kernel, chunks.num_chunks, *args, half, margin, WORLD_SIZE=world_size, KIND=kind)
    return counts


def settle_carry(  # noqa: D103
    planes: Tensor, spans: Spans, caps: Tensor, starts: Tensor, memory: Memory | None
) -> Tensor:
    if memory is None:
        return _settle(planes, spans, caps, starts, planes, planes, triton_settle.NOTHING)
    return _settle(planes, spans, caps, starts, memory.carry, memory.live, triton_settle.CARRY)


def settle_votes(  # noqa: D103
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
    counts = _settle(planes, spans, caps, starts, undecided, live, triton_settle.VOTES, margin=margin)
    if forget:
        chunks = chunks_of(spans, planes.device)
        crowded = (counts > upload(caps, planes.device)).view(torch.uint8)
        kernel, half = triton_settle.forget_kernel, undecided.shape[1]
        _launch(kernel, chunks.num_chunks, undecided, chunks.table, crowded, live, half, margin)
    return counts


def settle_standing(  # noqa: D103
    planes: Tensor, spans: Spans, caps: Tensor, starts: Tensor, standing: Tensor, live: Tensor
) -> Tensor:
    kind, world_size = triton_settle.STANDING, standing.shape[1]
    return _settle(planes, spans, caps, starts, standing, live, kind, world_size=world_size)


# -------------------------------------------------------------------------------------------------------------- sparse


def _running_ones(source: Tensor, num_bits: int) -> tuple[Tensor, Tensor]:
    """Return the ones of each piece of the first bits, and the sums of these up to each piece, itself included."""
    num_programs = _programs(num_bits, 8 * triton_sparse.PIECE_BYTES)
    totals = torch.empty(num_programs, dtype=torch.int64, device=source.device)
    _launch(triton_sparse.ones_kernel, num_programs, source, num_bits, totals)
    return totals, totals.cumsum(0)


def _words_for(num_bytes: int, device: torch.device) -> Tensor:
    return torch.zeros(_programs(num_bytes, 4), dtype=torch.int32, device=device)


def encode_sparse(planes: Tensor, num_bytes: int, code: SparseCode, out: Tensor) -> Tensor:  # noqa: D103
    assert planes.numel() == 2 * num_bytes and code.num_bits == 8 * num_bytes and out.numel() == code.num_bytes
    if not num_bytes:
        return torch.ones((), dtype=torch.bool, device=planes.device)
    totals, sums = _running_ones(planes, code.num_bits)
    if code.num_slots:
        words = _words_for(code.num_bytes, planes.device)
        sizes = (code.num_slots, code.num_high_bits, code.low_bits)
        args = (planes, num_bytes, code.num_bits, totals, sums, words, *sizes)
        _launch(triton_sparse.encode_kernel, totals.numel(), *args)
        out.copy_(words.view(torch.uint8)[: code.num_bytes])
    return sums[-1].le(code.num_slots)


def decode_sparse(body: Tensor, code: SparseCode, num_bytes: int, out: Tensor) -> Tensor:  # noqa: D103
    assert out.numel() == 2 * num_bytes and code.num_bits == 8 * num_bytes
    if body.numel() != code.num_bytes:
        return torch.zeros((), dtype=torch.bool, device=body.device)
    fine = torch.ones((), dtype=torch.bool, device=body.device)
    if not code.num_high_bits:
        assert not code.num_slots and not code.num_bytes
        out.zero_()
        return fine
    totals, sums = _running_ones(body, code.num_high_bits)
    words = _words_for(2 * num_bytes, body.device)
    flag = fine.view(torch.uint8)
    sizes = (code.num_bits, code.num_bits, code.num_slots, code.num_high_bits, code.low_bits)
    _launch(triton_sparse.decode_kernel, totals.numel(), body, code.num_bytes, totals, sums, words, *sizes, flag)
    num_programs = _programs(code.num_bytes, triton_sparse.PIECE_BYTES)
    last, width = totals.numel() - 1, code.low_bits + 1
    kernel = triton_sparse.padding_kernel
    _launch(kernel, num_programs, body, code.num_bytes, sums, last, code.num_high_bits, width, flag)
    out.copy_(words.view(torch.uint8)[: 2 * num_bytes])
    return fine
