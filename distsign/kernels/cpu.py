"""The kernels on the CPU: typed wrappers around the compiled bodies in `jit`.

Holds bit for bit with `reference`; `tests/test_kernels.py` keeps it so.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numba  # noqa: F401  (before the lock: importing takes a second that ranks can spend at the same time)
import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from distsign.kernels.spans import Spans

# The first import compiles for some seconds, later ones read Numba's cache. Of the ranks that start together on one
# machine, one compiles and the others wait for what it leaves.
with FileLock(Path(tempfile.gettempdir()) / f"distsign-numba-{os.getuid()}.lock"):
    from distsign.kernels import jit, jit_owner

__all__ = ["moments", "pack", "tally", "unpack"]


def moments(grad: Tensor, spans: Spans) -> Tensor:  # noqa: D103
    out = torch.zeros(spans.num_rows, 2, dtype=torch.float64)
    jit.find_moments(grad.numpy(), spans.start, spans.length, spans.row, out.numpy())
    return out


def pack(grad: Tensor, spans: Spans, thresholds: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D103
    counts = torch.zeros(thresholds.numel(), dtype=torch.int64)
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


def tally(payloads: Tensor, body_at: int, num_bytes: int, margin: int, out: Tensor) -> None:  # noqa: D103
    world_size = payloads.shape[0]
    if margin > world_size:  # no lead can reach it, and the counter's constants would leave their range
        out[: 2 * num_bytes] = 0
        return
    # At least two places: the first worker's two-bit number needs both.
    num_places = max(2, (2 * world_size).bit_length())
    jit_owner.count_ballots(
        payloads.numpy(), body_at, num_bytes, world_size + margin, world_size - margin, num_places, out.numpy()
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
