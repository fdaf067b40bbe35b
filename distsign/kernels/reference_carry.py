"""The oracle of what a worker keeps between steps, in plain torch. `Kernels` says what each function does."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distsign.kernels.memory import CarryRule, Memory
from distsign.kernels.reference_bits import pack_bytes, pack_plane, rows, unpack_bytes
from distsign.kernels.spans import BLOCK, LANES, Spans, plane_bytes

__all__ = ["active", "pack_carry", "settle_carry"]

_DEAD = 1e-30


def active(grad: Tensor, spans: Spans) -> Tensor:  # noqa: D103
    out = torch.zeros(spans.num_rows, dtype=torch.bool, device=grad.device)
    for start, length, row in rows(spans.start, spans.length, spans.row):
        out[row] = (grad[start : start + length] != 0).any()
    return out


def _root(x: Tensor) -> Tensor:
    """Take the correctly rounded root, which torch's own on the CPU is not always."""
    return torch.as_tensor(np.sqrt(x.numpy())) if x.device.type == "cpu" else x.sqrt()


def _normalised(carry: Tensor, square: Tensor, g: Tensor, correction: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Return the sum of the carry and the gradient in units of its root mean square, and the new mean square.

    Both are float32, whatever `square` is.
    """
    keep = torch.tensor(decay, dtype=torch.float32, device=g.device)
    add = torch.tensor(1.0 - decay, dtype=torch.float32, device=g.device)
    v = (keep * square.float() + add * (g * g)).clamp(max=torch.finfo(square.dtype).max)
    limit = torch.tensor(_DEAD, dtype=torch.float32, device=g.device)
    return torch.where(v > limit, carry + (g * correction) / _root(v), carry), v


def _dithered(v: Tensor, dither: int) -> Tensor:
    return ((v.view(torch.int32) + dither) >> 16).to(torch.int16).view(torch.bfloat16)


def pack_carry(  # noqa: D103
    grad: Tensor, spans: Spans, rule: CarryRule, memory: Memory, out: Tensor, *, clear: bool
) -> tuple[Tensor, Tensor]:
    counts = torch.zeros(spans.length.size, dtype=torch.int64, device=grad.device)
    finite = torch.ones((), dtype=torch.bool, device=grad.device)
    live = int(memory.live)
    places = rows(spans.start, spans.length, spans.row, spans.mask_at, spans.sign_at, spans.home)
    for k, (start, length, row, mask_at, sign_at, home) in enumerate(places):
        raw = grad[start : start + length]
        finite = finite & raw.isfinite().all()
        here = slice(home, home + length)
        if not rule.active[row]:
            memory.carry[1 - live, here] = memory.carry[live, here]
            if memory.square is not None:
                memory.square[1 - live, here] = memory.square[live, here]
            out[mask_at : mask_at + plane_bytes(length)] = 0
            out[sign_at : sign_at + plane_bytes(length)] = 0
            continue
        carry, g = memory.carry[live, here].float(), raw * rule.unscale
        if memory.square is None:
            u = carry + g
        else:
            correction = torch.ones_like(rule.unscale) if rule.corrections is None else rule.corrections[row]
            u, v = _normalised(carry, memory.square[live, here], g, correction, rule.decay)
            memory.square[1 - live, here] = v if memory.square.dtype == v.dtype else _dithered(v, rule.dither)
        votes = u.abs() > rule.thresholds[row]
        counts[k] = votes.sum()
        out[mask_at : mask_at + plane_bytes(length)] = pack_plane(votes)
        out[sign_at : sign_at + plane_bytes(length)] = pack_plane(votes & (u < 0))
        # Rounded to the nearest on the way into a bfloat16 carry; the vote was decided before.
        rest = torch.where(votes, torch.zeros_like(u), u) if clear else u
        memory.carry[1 - live, here] = rest.to(memory.carry.dtype)
    return counts, finite


def _elements(length: int, device: torch.device) -> Tensor:
    """Return the element that each bit of a plane stands for, in the order of the bits."""
    bits = torch.arange(length, device=device)
    full = length // BLOCK * BLOCK
    return torch.cat([bits[:full].reshape(-1, 32, LANES).transpose(1, 2).reshape(-1), bits[full:]])


def settle_carry(  # noqa: D103
    planes: Tensor, spans: Spans, caps: Tensor, starts: Tensor, memory: Memory | None
) -> Tensor:
    counts = torch.zeros(spans.length.size, dtype=torch.int64, device=planes.device)
    for k, (length, mask_at, sign_at, home) in enumerate(rows(spans.length, spans.mask_at, spans.sign_at, spans.home)):
        mask = planes[mask_at : mask_at + plane_bytes(length)]
        sign = planes[sign_at : sign_at + plane_bytes(length)]
        votes = unpack_bytes(mask).reshape(-1).nonzero().flatten()
        counts[k] = votes.numel()
        first = votes >= 8 * int(starts[k])
        turn = torch.cat([votes[first], votes[~first]])
        kept, dropped = turn[: int(caps[k])], turn[int(caps[k]) :]
        if memory is not None:
            memory.carry[1 - int(memory.live), home + _elements(length, planes.device)[kept]] = 0.0
        unsaid = torch.zeros(8 * mask.numel(), dtype=torch.uint8, device=planes.device)
        unsaid[dropped] = 1
        mask &= ~pack_bytes(unsaid.reshape(-1, 8))
        sign &= ~pack_bytes(unsaid.reshape(-1, 8))
    return counts
