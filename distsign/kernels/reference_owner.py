"""The oracle of what an owner keeps between steps, in plain torch; `Kernels` says what each function does."""

from __future__ import annotations

import torch
from torch import Tensor

from distsign.kernels.reference_bits import pack_bytes, pack_plane, rows, unpack_bytes, unpack_plane
from distsign.kernels.reference_sparse import decode_sparse
from distsign.kernels.spans import Spans, plane_bytes
from distsign.wire.sparse import SparseCode

__all__ = ["settle_standing", "settle_votes", "tally_carry", "tally_sparse", "tally_standing"]

_MOST = 32767


def tally_carry(  # noqa: D103
    payloads: Tensor, body_at: int, spans: Spans, margin: int, undecided: Tensor, live: Tensor, out: Tensor
) -> None:
    half = int(live)
    for length, mask_at, sign_at, home in rows(spans.length, spans.mask_at, spans.sign_at, spans.home):
        here, num_bytes = slice(home, home + length), plane_bytes(length)
        votes = undecided[half, here].int()
        tally = torch.zeros_like(votes)
        for body in payloads[:, body_at:]:
            mask = unpack_plane(body[mask_at : mask_at + num_bytes], length)
            sign = unpack_plane(body[sign_at : sign_at + num_bytes], length)
            tally += mask * (1 - 2 * sign)
        votes = (votes + tally).clamp(-_MOST, _MOST)
        undecided[1 - half, here] = votes.to(torch.int16)
        decided = votes.abs() >= margin
        out[mask_at : mask_at + num_bytes] = pack_plane(decided)
        out[sign_at : sign_at + num_bytes] = pack_plane(decided & (votes < 0))


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
    bodies = payloads[:, body_at : body_at + code.num_bytes]
    planes = torch.zeros(payloads.shape[0], out.numel(), dtype=torch.uint8, device=payloads.device)
    ok = [decode_sparse(body, code, out.numel() // 2, row) for body, row in zip(bodies, planes, strict=True)]
    tally_carry(planes, 0, spans, margin, undecided, live, out)
    return torch.stack(ok)


def _keep_votes(planes: Tensor, length: int, mask_at: int, sign_at: int, cap: int, start: int) -> int:
    """Keep at most `cap` votes of a piece, from byte `start` on and around; return how many there were."""
    mask = planes[mask_at : mask_at + plane_bytes(length)]
    sign = planes[sign_at : sign_at + plane_bytes(length)]
    votes = unpack_bytes(mask).reshape(-1)[:length].nonzero().flatten()
    behind = votes < 8 * start
    kept = torch.cat([votes[~behind], votes[behind]])[:cap]
    keep = torch.zeros(8 * mask.numel(), dtype=torch.bool, device=planes.device)
    keep[kept] = True
    mask &= pack_bytes(keep.reshape(-1, 8))
    sign &= mask
    return votes.numel()


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
    counts = torch.zeros(spans.length.size, dtype=torch.int64, device=planes.device)
    spare = undecided[1 - int(live)]
    for k, (length, mask_at, sign_at, home) in enumerate(rows(spans.length, spans.mask_at, spans.sign_at, spans.home)):
        counts[k] = _keep_votes(planes, length, mask_at, sign_at, int(caps[k]), int(starts[k]))
        mask = unpack_plane(planes[mask_at : mask_at + plane_bytes(length)], length)
        sign = unpack_plane(planes[sign_at : sign_at + plane_bytes(length)], length)
        votes = spare[home : home + length]
        votes -= (margin * mask * (1 - 2 * sign)).to(torch.int16)
        if forget and counts[k] > caps[k]:
            votes.masked_fill_(votes.abs() >= margin, 0)
    return counts


def tally_standing(  # noqa: D103
    payloads: Tensor, body_at: int, num_bytes: int, margin: int, standing: Tensor, live: Tensor, out: Tensor
) -> None:
    half = int(live)
    lead = torch.zeros(8 * num_bytes, dtype=torch.int32, device=payloads.device)
    for w in range(payloads.shape[0]):
        pending = torch.zeros_like(lead)
        for planes in (payloads[w, body_at : body_at + 2 * num_bytes], standing[half, w]):
            mask, sign = unpack_bytes(planes).reshape(2, -1)
            pending += mask * (1 - 2 * sign)
        pending = pending.clamp(-1, 1)
        standing[1 - half, w] = pack_bytes(torch.stack([pending != 0, pending < 0]).reshape(-1, 8))
        lead += pending
    decided = lead.abs() >= margin
    out[: 2 * num_bytes] = pack_bytes(torch.stack([decided, decided & (lead < 0)]).reshape(-1, 8))


def settle_standing(  # noqa: D103
    planes: Tensor, spans: Spans, caps: Tensor, starts: Tensor, standing: Tensor, live: Tensor
) -> Tensor:
    counts = torch.zeros(spans.length.size, dtype=torch.int64, device=planes.device)
    spare = standing[1 - int(live)]
    for k, (length, mask_at, sign_at) in enumerate(rows(spans.length, spans.mask_at, spans.sign_at)):
        counts[k] = _keep_votes(planes, length, mask_at, sign_at, int(caps[k]), int(starts[k]))
        verdicts = planes[mask_at : mask_at + plane_bytes(length)]
        spare[:, mask_at : mask_at + plane_bytes(length)] &= ~verdicts
        spare[:, sign_at : sign_at + plane_bytes(length)] &= ~verdicts
    return counts
