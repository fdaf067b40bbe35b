"""What hooks and optimizers compute, as calls that can be timed, for a gradient of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

from distsign.collectives import Link
from distsign.confidence import RMSConfidence
from distsign.exchange import VoteExchange
from distsign.kernels import kernels_for
from distsign.optim import SignAdamPP
from distsign.options import VoteOptions
from distsign.pipeline import VotePipeline
from distsign.registry import ParameterRegistry
from distsign.rivals.top_k import TopK
from distsign.simulator.profile import FEW_TENSORS
from distsign.statistics import VoteCounts
from distsign.voter import rotating_starts

__all__ = ["BITS", "MANY_TENSORS", "POWER_RANKS", "Probe", "probes", "vote_probes"]

BITS = 0.1
"""The budget at which sparse kernels are timed: most of their time is spent on planes, whatever the budget."""
POWER_RANKS = (1, 4)
"""Of PowerSGD, with which it is timed."""
MANY_TENSORS = 36
"""What a tensor costs by itself is seen from so many of them beside a few."""

_DENSITY = 0.001
_ONE_IN = 101
"""About one component in so many has a verdict at `BITS`."""


@dataclass(frozen=True)
class Probe:
    """A kernel of some size.

    Args:
        name: in `Profile.kernels`; PowerSGD has one name for several ranks.
        elements: as the schemes count them.
        run: the call.
        by_tensor: whether it goes through tensors one by one.
        rank: PowerSGD's; 1 elsewhere.
    """

    name: str
    elements: int
    run: Callable[[], object]
    by_tensor: bool = False
    rank: int = 1


def probes(
    num_elements: int,
    world_size: int,
    device: torch.device,
    alone: dist.ProcessGroup,
    num_tensors: int = FEW_TENSORS,
) -> list[Probe]:
    """Return all kernels for a bucket of so many elements.

    Args:
        num_elements: at least 1024 per tensor.
        world_size: voters.
        device: where the gradient lies.
        alone: of this rank only.
        num_tensors: in which the elements lie.
    """
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(num_elements, generator=generator).to(device)
    tensors = list(torch.tensor_split(gradient, num_tensors))
    found = [*_dense(gradient), *_top_k(gradient, tensors), *_steps(tensors)]
    found += _power_sgd(gradient.clone(), tensors, alone)
    for bits in (None, BITS):
        found += vote_probes(gradient, [tensor.numel() for tensor in tensors], world_size, bits)
    return found


def _dense(gradient: Tensor) -> list[Probe]:
    n, half = gradient.numel(), gradient.bfloat16()
    rows = gradient[: n // 2 * 2].view(2, -1)
    return [
        Probe("to_half", n, lambda: gradient.to(torch.bfloat16).div_(4)),
        Probe("from_half", n, lambda: gradient.copy_(half)),
        Probe("node_mean", n, lambda: torch.cat([rows[0], rows[1]]).view(2, -1).sum(0)),
    ]


@dataclass(frozen=True)
class _Bucket:
    """As much of DDP's bucket as torch's PowerSGD asks for."""

    gradient: Tensor
    tensors: list[Tensor]

    def index(self) -> int:
        return 0

    def is_last(self) -> bool:
        return True

    def buffer(self) -> Tensor:
        return self.gradient

    def gradients(self) -> list[Tensor]:
        return self.tensors


def _power_sgd(gradient: Tensor, tensors: Sequence[Tensor], alone: dist.ProcessGroup) -> list[Probe]:
    """Return the whole hook, whose all-reduces in a group of one rank take next to nothing."""
    sides = [int(tensor.numel() ** 0.5) for tensor in tensors]
    matrices = [tensor[: side * side].view(side, side) for tensor, side in zip(tensors, sides, strict=True)]
    bucket, n = _Bucket(gradient, matrices), sum(matrix.numel() for matrix in matrices)

    def hook(rank: int) -> Callable[[], object]:
        state = powerSGD_hook.PowerSGDState(alone, matrix_approximation_rank=rank, start_powerSGD_iter=2)
        state.iter = state.start_powerSGD_iter
        return lambda: powerSGD_hook.powerSGD_hook(state, bucket).wait()

    return [Probe("power_sgd", n, hook(rank), by_tensor=True, rank=rank) for rank in POWER_RANKS]


def _top_k(gradient: Tensor, tensors: Sequence[Tensor]) -> list[Probe]:
    """Return the rival's own encoding, with the passes over its mean, and the decoding of one rank's payload."""
    rival, means = TopK(_DENSITY), [torch.zeros_like(tensor) for tensor in tensors]

    def encode() -> list[Tensor]:
        payloads = [rival.encode(f"p{k}", tensor) for k, tensor in enumerate(tensors)]
        for mean in means:
            mean.zero_().div_(4)
        return payloads

    def decode() -> None:
        for payload, mean in zip(payloads, means, strict=True):
            rival.accumulate(payload.clone(), mean)

    payloads = encode()
    slots = sum(payload.numel() for payload in payloads) // 8
    return [
        Probe("top_k_encode", gradient.numel(), encode),
        Probe("top_k_decode", slots, decode, by_tensor=True),
    ]


class _VoteState:
    """The part of a vote's state that an optimizer asks for."""

    def track(self, named_parameters: Iterable[tuple[str, Tensor]], /) -> None:
        pass

    def lr_scale(self, param: Tensor, /) -> float:
        del param
        return 1.0


def _steps(tensors: Sequence[Tensor]) -> list[Probe]:
    def stepper(make: Callable[[list[Tensor]], torch.optim.Optimizer], grads: Sequence[Tensor]) -> Callable[[], object]:
        parameters = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        return make(list(parameters)).step

    def vote(parameters: list[Tensor]) -> torch.optim.Optimizer:
        named = [(f"p{k}", parameter) for k, parameter in enumerate(parameters)]
        return SignAdamPP(named, lr=1e-4, momentum=0.0, vote_state=_VoteState())

    n, verdicts = sum(tensor.numel() for tensor in tensors), [tensor.sign() for tensor in tensors]
    few = [grad * (torch.arange(grad.numel(), device=grad.device) % _ONE_IN == 0) for grad in verdicts]
    return [
        Probe("step_mean", n, stepper(lambda params: torch.optim.SGD(params, lr=1e-3), verdicts), by_tensor=True),
        Probe("step_planes", n, stepper(vote, verdicts), by_tensor=True),
        Probe("step_sparse", n, stepper(vote, few), by_tensor=True),
    ]


class _Alike(Link):
    """A link to ranks that all send what this one sends: nothing travels, and each has to be answered.

    Args:
        world_size: number of ranks.
    """

    def __init__(self, world_size: int) -> None:
        super().__init__(None)
        self.world_size = world_size

    def all_to_all(self, source: Tensor, send: list[int], receive: list[int], what: str = "") -> Tensor:
        """Return the ballots on this rank's share, from all; of verdicts, which all ranks get, this rank's own."""
        if source.dim() > 1:
            return source[self.rank]
        return torch.split(source, send)[self.rank].repeat(self.world_size)


def vote_probes(gradient: Tensor, lengths: Sequence[int], world_size: int, bits: float | None) -> list[Probe]:
    """Return casting, counting and reading, as the pipeline does it for one exchange group."""
    device, n = gradient.device, gradient.numel()
    kernels, coded = kernels_for(device), "planes" if bits is None else "sparse"
    registry, link = ParameterRegistry(), _Alike(world_size)
    registry.track((f"p{k}", torch.nn.Parameter(torch.empty(length))) for k, length in enumerate(lengths))
    pipeline = VotePipeline(_options(bits), registry, VoteCounts())
    pipeline.meet(world_size, column=0)
    pipeline.start(exchange := VoteExchange(link, "two_phase", admission=pipeline.memory.admission))
    pipeline.grow(device)
    plan = pipeline.plan((tuple(range(len(lengths))),), device)
    (column,), owner = plan.columns, pipeline.memory.owner
    scale, raw = torch.ones((), dtype=torch.float64, device=device), torch.zeros(0, device=device)
    clean, starts = torch.zeros((), dtype=torch.bool, device=device), rotating_starts(column.layout, 0)
    out = torch.empty_like(gradient)

    def cast() -> Tensor:
        sealed = pipeline.cast(column, [gradient], raw, scale)
        pipeline.memory.voter.commit(clean)
        return sealed

    def count(shard: int) -> Tensor:
        link.rank = shard
        verdicts = exchange.vote(column.ballots, column.verdicts, payload, owner, starts, kernels)
        owner.commit(clean)
        return verdicts

    payload = cast()
    answer = torch.cat([count(shard) for shard in range(world_size)])
    return [
        Probe(f"cast_{coded}", n, cast, by_tensor=True),
        Probe(f"count_{coded}", n, lambda: count(0), by_tensor=True),
        Probe(f"read_{coded}", n, lambda: pipeline.take([out], plan, [answer], scale), by_tensor=True),
    ]


def _options(bits: float | None) -> VoteOptions:
    confidence = RMSConfidence(k=1.0 if bits is None else 4.0)
    return VoteOptions.check(confidence=confidence, carry=True, wire="auto" if bits else "planes", bits_per_param=bits)
