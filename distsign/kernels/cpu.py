"""The kernels on the CPU: typed wrappers around the compiled bodies in `jit`.

Holds bit for bit with `reference`; `tests/test_kernels.py` keeps it so.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numba  # noqa: F401  (before the lock: importing takes a second that ranks can spend at the same time)
import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from torch import Tensor

from distsign.kernels.memory import CarryRule, Memory
from distsign.kernels.spans import Spans
from distsign.wire.sparse import SparseCode

# The first import compiles for some seconds, later ones read Numba's cache. Of the ranks that start together on one
# machine, one compiles and the others wait for what it leaves.
with FileLock(Path(tempfile.gettempdir()) / f"distsign-numba-{os.getuid()}.lock"):
    from distsign.kernels import (  # noqa: F401  (jit_step is loaded here and used by optim)
        jit,
        jit_carry,
        jit_carry_settle,
        jit_owner,
        jit_settle,
        jit_sparse,
        jit_step,
    )

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

_NO_CARRY = np.zeros(0, np.float32)


def moments(grad: Tensor, spans: Spans) -> Tensor:  # noqa: D103
    out = torch.zeros(spans.num_rows, 2, dtype=torch.float64)
    jit.find_moments(grad.numpy(), spans.start, spans.length, spans.row, out.numpy())
    return out


def pack(grad: Tensor, spans: Spans, thresholds: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D103
    counts = torch.zeros(spans.length.size, dtype=torch.int64)
    finite = jit.pack_ballots(
        grad.numpy().view(np.uint32),
        spans.start,
        spans.length,
        spans.row,
        spans.mask_at,
        spans.sign_at,
        thresholds.abs().numpy().view(np.uint32),  # the bits of -0.0 would be the largest integer
        out.numpy(),
        counts.numpy(),
    )
    return counts, torch.tensor(finite)


def active(grad: Tensor, spans: Spans) -> Tensor:  # noqa: D103
    out = torch.zeros(spans.num_rows, dtype=torch.bool)
    jit_carry_settle.find_active(grad.numpy().view(np.uint32), spans.start, spans.length, spans.row, out.numpy())
    return out


def _kept(memory: Tensor) -> npt.NDArray[Any]:
    """Return what is kept as float32, or as the bits of bfloat16."""
    if memory.dtype == torch.float32:
        return memory.numpy()
    assert memory.dtype == torch.bfloat16
    return memory.view(torch.int16).numpy().view(np.uint16)


def pack_carry(  # noqa: D103
    grad: Tensor, spans: Spans, rule: CarryRule, memory: Memory, out: Tensor, *, clear: bool
) -> tuple[Tensor, Tensor]:
    counts = torch.zeros(spans.length.size, dtype=torch.int64)
    corrections = torch.ones_like(rule.thresholds) if rule.corrections is None else rule.corrections
    square = memory.carry.new_zeros(2, 0) if memory.square is None else memory.square
    finite = jit_carry.pack_carried(
        grad.numpy().view(np.uint32),
        spans.start,
        spans.length,
        spans.row,
        spans.mask_at,
        spans.sign_at,
        spans.home,
        rule.thresholds.abs().numpy().view(np.uint32),
        rule.active.numpy(),
        corrections.numpy(),
        np.float32(rule.unscale.item()),
        np.float32(rule.decay),
        np.float32(1.0 - rule.decay),
        np.uint32(rule.dither),
        _kept(memory.carry),
        _kept(square),
        int(memory.live),
        clear,
        out.numpy(),
        counts.numpy(),
    )
    return counts, torch.tensor(finite)


def settle_carry(  # noqa: D103
    planes: Tensor, spans: Spans, caps: Tensor, starts: Tensor, memory: Memory | None
) -> Tensor:
    counts = torch.zeros(spans.length.size, dtype=torch.int64)
    carry = _NO_CARRY if memory is None else _kept(memory.carry)[1 - int(memory.live)]
    jit_carry_settle.settle(
        planes.numpy(),
        spans.length,
        spans.mask_at,
        spans.sign_at,
        spans.home,
        caps.numpy(),
        starts.numpy(),
        carry,
        counts.numpy(),
    )
    return counts


def _places(payloads: Tensor) -> int:
    """Return the binary places that count to twice the workers; the first one's two-bit number needs two."""
    return max(2, (2 * payloads.shape[0]).bit_length())


def count_votes(payloads: Tensor, body_at: int, num_bytes: int) -> Tensor:  # noqa: D103
    assert payloads.shape[1] >= body_at + num_bytes
    counts = torch.empty(payloads.shape[0], dtype=torch.int64)
    jit_owner.count_votes(payloads.numpy(), body_at, num_bytes, counts.numpy())
    return counts


def tally(payloads: Tensor, body_at: int, num_bytes: int, margin: int, out: Tensor) -> None:  # noqa: D103
    jit_owner.count_ballots(payloads.numpy(), body_at, num_bytes, margin, _places(payloads), out.numpy())


def tally_carry(  # noqa: D103
    payloads: Tensor, body_at: int, spans: Spans, margin: int, undecided: Tensor, live: Tensor, out: Tensor
) -> None:
    assert margin < 2**15 and payloads.shape[0] < 2**14
    half = int(live)
    jit_owner.count_onto(
        payloads.numpy(),
        body_at,
        spans.length,
        spans.mask_at,
        spans.sign_at,
        spans.home,
        margin,
        _places(payloads),
        undecided[half].numpy(),
        undecided[1 - half].numpy(),
        out.numpy(),
    )


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
    # The compiled bodies do not check indices: sizes that do not fit together must not get there.
    assert margin < 2**15 and payloads.shape[0] < 2**14
    assert code.num_bits == 4 * out.numel() and payloads.shape[1] >= body_at + code.num_bytes
    ok, half = torch.zeros(payloads.shape[0], dtype=torch.bool), int(live)
    jit_sparse.tally_bodies(
        payloads.numpy(),
        body_at,
        code.num_bytes,
        code.num_slots,
        code.low_bits,
        code.num_high_bits,
        spans.length,
        spans.mask_at,
        spans.sign_at,
        spans.home,
        margin,
        undecided[half].numpy(),
        undecided[1 - half].numpy(),
        out.numpy(),
        ok.numpy(),
    )
    return ok


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
    counts = torch.zeros(spans.length.size, dtype=torch.int64)
    jit_settle.settle_votes(
        planes.numpy(),
        spans.length,
        spans.mask_at,
        spans.sign_at,
        spans.home,
        caps.numpy(),
        starts.numpy(),
        margin,
        forget,
        undecided[1 - int(live)].numpy(),
        counts.numpy(),
    )
    return counts


def tally_standing(  # noqa: D103
    payloads: Tensor, body_at: int, num_bytes: int, margin: int, standing: Tensor, live: Tensor, out: Tensor
) -> None:
    half = int(live)
    jit_owner.count_standing(
        payloads.numpy(),
        body_at,
        num_bytes,
        margin,
        _places(payloads),
        standing[half].numpy(),
        standing[1 - half].numpy(),
        out.numpy(),
    )


def settle_standing(  # noqa: D103
    planes: Tensor, spans: Spans, caps: Tensor, starts: Tensor, standing: Tensor, live: Tensor
) -> Tensor:
    counts = torch.zeros(spans.length.size, dtype=torch.int64)
    jit_settle.settle_standing(
        planes.numpy(),
        spans.length,
        spans.mask_at,
        spans.sign_at,
        caps.numpy(),
        starts.numpy(),
        standing[1 - int(live)].numpy(),
        counts.numpy(),
    )
    return counts


def encode_sparse(planes: Tensor, num_bytes: int, code: SparseCode, out: Tensor) -> Tensor:  # noqa: D103
    # The compiled bodies do not check indices: sizes that do not fit together must not get there.
    assert planes.numel() == 2 * num_bytes and code.num_bits == 8 * num_bytes and out.numel() == code.num_bytes
    fits = jit_sparse.encode_votes(
        planes.numpy(), num_bytes, code.num_slots, code.low_bits, code.num_high_bits, out.numpy()
    )
    return torch.tensor(fits)


def decode_sparse(body: Tensor, code: SparseCode, num_bytes: int, out: Tensor) -> Tensor:  # noqa: D103
    assert out.numel() == 2 * num_bytes and code.num_bits == 8 * num_bytes
    if body.numel() != code.num_bytes:
        return torch.tensor(False)
    return torch.tensor(
        jit_sparse.decode_votes(body.numpy(), code.num_slots, code.low_bits, code.num_high_bits, num_bytes, out.numpy())
    )


def unpack(payload: Tensor, spans: Spans, value: Tensor, out: Tensor) -> Tensor:  # noqa: D103
    counts = torch.zeros(spans.num_rows, dtype=torch.int64)
    bits = value.reshape(1).numpy().view(np.uint32)[0]
    jit.unpack_verdicts(
        payload.numpy(),
        spans.start,
        spans.length,
        spans.row,
        spans.mask_at,
        spans.sign_at,
        bits,
        out.numpy().view(np.uint32),
        counts.numpy(),
    )
    return counts
