"""The kernels of one device as contenders, on one gradient: `codec` times them on the CPU, `cuda` on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import Contender
from distsign.kernels import CarryRule, Kernels, Memory, Spans, kernels_for
from distsign.wire.sparse import SparseCode

NUM_PIECES = 16
NUM_WORKERS = 4
GRANULE = 512 * NUM_PIECES * NUM_WORKERS
"""Sizes are multiples of it: whole blocks in each piece, also in a worker's share."""

DENSITIES = (0.1, 0.03, 0.01, 0.003, 0.001)
COPY = "torch copy_"
ONE_SIGMA, RMS_THRESHOLD = 1.0, 4.0


@dataclass(frozen=True, kw_only=True)
class KernelCase(Contender):
    """A kernel to be timed.

    Args:
        num_bytes: least that must be read and written, by which bandwidth is reckoned.
        target: most that it may take, in times of the copy; None where none was set.
    """

    num_bytes: int
    target: float | None = None


def spans_of(num_elements: int) -> Spans:
    """Return `NUM_PIECES` equal pieces; their mask planes lie one after the other, then their sign planes."""
    length = np.full(NUM_PIECES, num_elements // NUM_PIECES, dtype=np.int64)
    start = np.cumsum(length) - length
    mask_at = start // 8
    return Spans(start, length, np.arange(NUM_PIECES), mask_at, num_elements // 8 + mask_at, start)


def planes_at(kernels: Kernels, num_elements: int, density: float, device: str, generator: torch.Generator) -> Tensor:
    """Return planes of random votes, uint8 `[num_elements // 4]`."""
    votes = (torch.rand(num_elements, generator=generator, device=device) < density).float()
    votes *= torch.randint(0, 2, (num_elements,), generator=generator, device=device) * 2 - 1
    planes = torch.empty(num_elements // 4, dtype=torch.uint8, device=device)
    kernels.pack(votes, spans_of(num_elements), torch.full((NUM_PIECES,), 0.5, device=device), planes)
    return planes


def num_votes(planes: Tensor) -> int:
    """Return how many votes the planes hold."""
    mask = planes[: planes.numel() // 2].cpu().numpy()
    return int(np.unpackbits(mask).sum())


def cases(num_elements: int, device: str, densities: tuple[float, ...] = DENSITIES) -> list[KernelCase]:
    """Return all cases for a gradient of so many float32, a multiple of `GRANULE`; the copy comes first."""
    assert num_elements % GRANULE == 0
    kernels = kernels_for(device)
    generator = torch.Generator(device).manual_seed(0)
    grad = torch.randn(num_elements, generator=generator, device=device)
    out = torch.zeros_like(grad)
    return [
        KernelCase(name=COPY, run=partial(out.copy_, grad), num_bytes=8 * num_elements),
        KernelCase(name="read (torch sum)", run=grad.sum, num_bytes=4 * num_elements),
        *_planes_cases(kernels, grad, out),
        *_carry_cases(kernels, grad),
        *_owner_cases(kernels, num_elements, device, generator),
        _settle_case(kernels, grad, generator),
        *_sparse_cases(kernels, num_elements, device, generator, densities),
    ]


def _planes_cases(kernels: Kernels, grad: Tensor, out: Tensor) -> Iterator[KernelCase]:
    spans, moved = spans_of(grad.numel()), grad.numel() * 17 // 4
    thresholds = torch.full((NUM_PIECES,), ONE_SIGMA, device=grad.device)
    planes = torch.zeros(grad.numel() // 4, dtype=torch.uint8, device=grad.device)
    kernels.pack(grad, spans, thresholds, planes)
    value = torch.ones((), device=grad.device)
    pack = partial(kernels.pack, grad, spans, thresholds, torch.zeros_like(planes))
    yield KernelCase(name="moments", run=partial(kernels.moments, grad, spans), num_bytes=4 * grad.numel())
    yield KernelCase(name="pack planes", run=pack, num_bytes=moved, target=0.7)
    yield KernelCase(
        name="unpack planes", run=partial(kernels.unpack, planes, spans, value, out), num_bytes=moved, target=0.7
    )


def _carry_cases(kernels: Kernels, grad: Tensor) -> Iterator[KernelCase]:
    num, spans = grad.numel(), spans_of(grad.numel())
    yes = torch.ones(NUM_PIECES, dtype=torch.bool, device=grad.device)
    one, corrections = torch.ones((), device=grad.device), torch.full((NUM_PIECES,), 0.9, device=grad.device)
    live = torch.zeros((), dtype=torch.int64, device=grad.device)
    # Half 0 is read and half 1 written each time, as if each step were poisoned: runs are alike, and no carry runs off.
    for name, dtype, squares, moved, target in (
        ("pack_carry float32", torch.float32, False, 12, 1.2),
        ("pack_carry bfloat16", torch.bfloat16, False, 8, 1.2),
        ("pack_carry float32 with RMS", torch.float32, True, 20, 3.0),
        ("pack_carry bfloat16 with RMS", torch.bfloat16, True, 12, 3.0),
    ):
        carry = (torch.stack([grad.flip(0), grad]) * 0.5).to(dtype)
        memory = Memory(carry, torch.ones(2, num, dtype=dtype, device=grad.device) if squares else None, live)
        level = torch.full((NUM_PIECES,), RMS_THRESHOLD if squares else ONE_SIGMA, device=grad.device)
        rule = CarryRule(level, yes, one, corrections if squares else None, 0.99 if squares else 0.0)
        planes = torch.zeros(num // 4, dtype=torch.uint8, device=grad.device)
        run = partial(kernels.pack_carry, grad, spans, rule, memory, planes, clear=True)
        yield KernelCase(name=name, run=run, num_bytes=num * moved + num // 4, target=target)


def _owner_cases(kernels: Kernels, num: int, device: str, generator: torch.Generator) -> Iterator[KernelCase]:
    """What an owner does: it counts its share, a W-th of the components, but the ballots of W workers."""
    share = num // NUM_WORKERS
    payloads = torch.stack([planes_at(kernels, share, 0.3, device, generator) for _ in range(NUM_WORKERS)])
    verdicts = torch.zeros(share // 4, dtype=torch.uint8, device=device)
    undecided = torch.zeros(2, share, dtype=torch.int16, device=device)
    live, moved = torch.zeros((), dtype=torch.int64, device=device), (NUM_WORKERS + 1) * share // 4
    tally = partial(kernels.tally, payloads, 0, share // 8, 1, verdicts)
    carried = partial(kernels.tally_carry, payloads, 0, spans_of(share), 1, undecided, live, verdicts)
    yield KernelCase(name=f"tally, W={NUM_WORKERS}, a W-th", run=tally, num_bytes=moved)
    yield KernelCase(name=f"tally_carry, W={NUM_WORKERS}, a W-th", run=carried, num_bytes=moved + 4 * share)


def _settle_case(kernels: Kernels, grad: Tensor, generator: torch.Generator) -> KernelCase:
    """Return settle_carry where a fifth of the votes does not fit; the planes are restored before each run."""
    num, density = grad.numel(), 0.01
    wanted = planes_at(kernels, num, density, str(grad.device), generator)
    planes = wanted.clone()
    caps = torch.full((NUM_PIECES,), max(1, int(0.8 * density * num / NUM_PIECES)))
    starts = torch.full((NUM_PIECES,), num // NUM_PIECES // 8 // 3)
    memory = Memory(torch.stack([grad, grad]), None, torch.zeros((), dtype=torch.int64, device=grad.device))
    settle = partial(kernels.settle_carry, planes, spans_of(num), caps, starts, memory)
    setup = partial(planes.copy_, wanted)
    return KernelCase(name="settle_carry, p=0.01", run=settle, setup=setup, num_bytes=num // 4)


def _sparse_cases(
    kernels: Kernels, num: int, device: str, generator: torch.Generator, densities: tuple[float, ...]
) -> Iterator[KernelCase]:
    for density in densities:
        planes = planes_at(kernels, num, density, device, generator)
        code = SparseCode(num, num_votes(planes))
        body = torch.zeros(code.num_bytes, dtype=torch.uint8, device=device)
        encode = partial(kernels.encode_sparse, planes, num // 8, code, body)
        decode = partial(kernels.decode_sparse, body, code, num // 8, torch.zeros_like(planes))
        assert _succeeds(encode) and _succeeds(decode)
        moved = num // 4 + code.num_bytes
        yield KernelCase(name=f"encode_sparse, p={density:g}", run=encode, num_bytes=moved)
        yield KernelCase(name=f"decode_sparse, p={density:g}", run=decode, num_bytes=moved)


def _succeeds(coder: Callable[[], Tensor]) -> bool:
    return bool(coder())
