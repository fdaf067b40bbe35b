"""What hooks and optimizers compute, as calls that can be timed, for a gradient of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from distsign.confidence import RMSConfidence
from distsign.kernels import kernels_for
from distsign.layout import Layout, Shape
from distsign.optim import SignAdamPP
from distsign.owner import make_owner
from distsign.payload import density_for, forms
from distsign.plan import COALESCE_BYTES
from distsign.voter import Voter, rotating_starts

__all__ = ["BITS", "POWER_RANK", "Probe", "probes"]

BITS = 0.1
"""The budget at which sparse kernels are timed: most of their time is spent on planes, whatever the budget."""

_NUM_PARAMETERS = 4
POWER_RANK = 4
_DENSITY = 0.001
_ONE_IN = 101
"""About one component in so many has a verdict at `BITS`."""


@dataclass(frozen=True)
class Probe:
    """A kernel of some size.

    Args:
        name: in `Profile.kernels`.
        elements: as the schemes count them.
        run: the call.
    """

    name: str
    elements: int
    run: Callable[[], object]


def probes(num_elements: int, world_size: int, device: torch.device) -> list[Probe]:
    """Return all kernels for a bucket of so many elements.

    Args:
        num_elements: at least 4096.
        world_size: voters.
        device: where the gradient lies.
    """
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(num_elements, generator=generator).to(device)
    found = [*_dense(gradient), *_power_sgd(gradient), *_top_k(gradient, world_size), *_steps(gradient)]
    for bits in (None, BITS):
        found += _vote(gradient, world_size, bits)
    return found


def _dense(gradient: Tensor) -> list[Probe]:
    n, half = gradient.numel(), gradient.bfloat16()
    rows = gradient[: n // 2 * 2].view(2, -1)
    return [
        Probe("to_half", n, lambda: gradient.to(torch.bfloat16).div_(4)),
        Probe("from_half", n, lambda: gradient.copy_(half)),
        Probe("node_mean", n, lambda: torch.cat([rows[0], rows[1]]).view(2, -1).sum(0)),
    ]


def _power_sgd(gradient: Tensor) -> list[Probe]:
    side = int(gradient.numel() ** 0.5)
    matrix = gradient[: side * side].view(side, side)
    factor = torch.randn(side, POWER_RANK).to(gradient.device)
    one = factor[:, :1].contiguous()
    kept = torch.zeros_like(matrix)
    return [
        Probe("power_sgd_pass", matrix.numel(), lambda: torch.add(matrix, matrix, out=kept)),
        Probe("power_sgd_read", matrix.numel(), lambda: matrix @ one),
        Probe("power_sgd_factor", POWER_RANK * matrix.numel(), lambda: matrix @ factor),
        Probe("power_sgd_orthogonal", POWER_RANK * factor.numel(), lambda: torch.linalg.qr(factor)),
    ]


def _top_k(gradient: Tensor, world_size: int) -> list[Probe]:
    slots = max(1, int(_DENSITY * gradient.numel()))
    into = torch.zeros_like(gradient)

    def choose() -> Tensor:
        found = gradient.abs().topk(slots, sorted=False).indices
        into.zero_()  # what the others' components are added to
        return gradient[found]

    where = gradient.abs().topk(slots).indices.repeat(world_size)
    values = gradient[where]
    return [
        Probe("top_k_choose", gradient.numel(), choose),
        Probe("top_k_scatter", where.numel(), lambda: into.index_add_(0, where, values)),
    ]


class _VoteState:
    """The part of a vote's state that an optimizer asks for."""

    def track(self, named_parameters: Iterable[tuple[str, Tensor]], /) -> None:
        pass

    def lr_scale(self, param: Tensor, /) -> float:
        del param
        return 1.0


def _steps(gradient: Tensor) -> list[Probe]:
    def stepper(make: Callable[[Tensor], torch.optim.Optimizer], grad: Tensor) -> Callable[[], object]:
        parameter = torch.nn.Parameter(torch.zeros_like(gradient))
        parameter.grad = grad
        optimizer = make(parameter)
        return optimizer.step

    def vote(parameter: Tensor) -> torch.optim.Optimizer:
        return SignAdamPP([("p", parameter)], lr=1e-4, momentum=0.0, vote_state=_VoteState())

    n, verdicts = gradient.numel(), gradient.sign()
    few = verdicts * (torch.arange(n, device=gradient.device) % _ONE_IN == 0)
    return [
        Probe("step_mean", n, stepper(lambda p: torch.optim.SGD([p], lr=1e-3), verdicts)),
        Probe("step_planes", n, stepper(vote, verdicts)),
        Probe("step_sparse", n, stepper(vote, few)),
    ]


def _vote(gradient: Tensor, world_size: int, bits: float | None) -> list[Probe]:
    """Return casting, counting and reading, as pipeline and exchange do it for one exchange group."""
    device, n = gradient.device, gradient.numel()
    kernels, coded = kernels_for(device), "planes" if bits is None else "sparse"
    lengths = [(k + 1) * n // _NUM_PARAMETERS - k * n // _NUM_PARAMETERS for k in range(_NUM_PARAMETERS)]
    voter = Voter(RMSConfidence(k=1.0 if bits is None else 4.0), torch.float32)
    voter.grow(lengths, device)
    shapes = [Shape(k, length, voter.home(k)) for k, length in enumerate(lengths)]
    layout = Layout.build([shapes], world_size)
    density = None if bits is None else density_for(bits, shapes, world_size, COALESCE_BYTES)
    ballots, verdicts = forms(layout, density, "auto", owner_carry=bits is not None)
    starts = rotating_starts(layout, 0)
    rows, scale = torch.arange(_NUM_PARAMETERS, device=device), torch.ones((), dtype=torch.float64, device=device)
    clean, raw = torch.zeros((), dtype=torch.bool, device=device), torch.zeros(0, device=device)
    owner = make_owner(None if bits is None else "plain", 1, world_size, forget=bits is not None)

    def cast() -> Tensor:
        planes = torch.empty(layout.buffer_bytes, dtype=torch.uint8, device=device)
        found = voter.cast(
            [gradient],
            layout,
            rows,
            scale=scale,
            kernels=kernels,
            out=planes,
            caps=ballots.caps,
            starts=starts,
            forget=bits is not None,
        )
        sealed = ballots.seal(planes, found.crowded, raw, clean, kernels)
        voter.commit(clean)
        return sealed

    def count(shard: int, received: Tensor) -> Tensor:
        found = ballots.open(shard, received)
        planes, crowded, _ = owner.count(found, layout, shard, verdicts.caps, starts, kernels)
        return verdicts.seal_one(shard, planes, None if found.crowded is None else crowded, raw, clean, kernels)

    payload = cast()
    parts = torch.split(payload, list(ballots.sizes))
    received = parts[0].repeat(world_size, 1)
    answer = torch.cat([count(k, part.repeat(world_size, 1)) for k, part in enumerate(parts)])
    out = torch.empty_like(gradient)

    def read() -> object:
        planes = verdicts.open_all(answer, kernels)[0]
        return kernels.unpack(planes, layout.pieces[0], scale.float(), out)

    def count_and_commit() -> None:
        count(0, received)
        owner.commit(clean)

    return [
        Probe(f"cast_{coded}", n, cast),
        Probe(f"count_{coded}", n, count_and_commit),
        Probe(f"read_{coded}", n, read),
    ]
