"""A small model in many ways, and the oracle that tells what each vote on it must have been."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from distsign import AdaptiveConfidence, Confidence, SignVoteState, sign_vote_hook
from distsign.ballots import cast_ballots
from distsign.vote import majority_vote


class Net(nn.Module):
    """Odd shapes, parameters that are owned whole and cut, enough for several exchange groups, and an unused branch."""

    def __init__(self, *, branch: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(61, 600)
        self.middle = nn.Linear(600, 601)
        self.last = nn.Linear(601, 13)
        self.gain = nn.Parameter(torch.ones(()))
        self.branch = nn.Linear(13, 5) if branch else None

    def forward(self, x: Tensor, *, use_branch: bool = False) -> Tensor:
        y = self.gain * self.last(self.middle(self.first(x).relu()).relu())
        if self.branch is not None and use_branch:
            y = torch.cat([y, self.branch(y)], 1)
        return y


@dataclass
class Case:
    """One way to train."""

    confidence: Confidence = field(default_factory=AdaptiveConfidence)
    options: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=lambda: {"bucket_cap_mb": 0.2})
    dtype: torch.dtype = torch.float32
    num_accumulated: int = 1
    num_steps: int = 4
    branch: bool = False
    half_the_model: bool = False


def batch(rank: int, step: int, part: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 100 * part + rank)
    return torch.randn(7, 61, generator=generator).to(dtype)


def make_net(case: Case) -> Net:
    net = Net(branch=case.branch).to(case.dtype)
    if case.half_the_model:
        net.middle.to(torch.bfloat16)
        net.middle.register_forward_pre_hook(lambda _, args: (args[0].bfloat16(),))
        net.middle.register_forward_hook(lambda _, args, out: out.float())
    return net


def build(case: Case, group: dist.ProcessGroup | None = None) -> tuple[Net, DDP, SignVoteState]:
    torch.manual_seed(5)
    net = make_net(case)
    model = DDP(net, process_group=group, **case.ddp)
    state = SignVoteState(group, confidence=case.confidence, **case.options)
    model.register_comm_hook(state, sign_vote_hook)
    return net, model, state


def digest(module: nn.Module) -> str:
    """Return a digest of all bits of the parameters."""
    data = b"".join(p.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for p in module.parameters())
    return hashlib.sha256(data).hexdigest()


def impatient_group(timeout_s: float) -> dist.ProcessGroup | None:
    """Return a group of all ranks with a short timeout, made when all of them have come.

    A pool's ranks import what a job needs by themselves: on a busy machine one may be seconds later than another.
    """
    dist.barrier()
    return dist.new_group(timeout=timedelta(seconds=timeout_s))


class Oracle:
    """Holds each verdict against ballots cast one parameter at a time, gathered whole and counted in plain integers."""

    def __init__(self, case: Case, net: Net, group: dist.ProcessGroup | None) -> None:
        self.case, self.group = case, group
        self.twin = make_net(case)
        self.stats = {name: case.confidence.init_stats(1)[0] for name, _ in net.named_parameters()}

    def gradients(self, net: Net, batches: list[Tensor], **forward: Any) -> dict[str, Tensor]:
        """Return this rank's own accumulated gradient, by plain autograd."""
        self.twin.load_state_dict(net.state_dict())
        self.twin.zero_grad()
        for x in batches:
            self.twin(x, **forward).float().square().mean().backward()
        l2 = self.case.options.get("l2", 0.0)
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad + p.detach() * torch.tensor(l2).to(p.dtype)
            for name, p in self.twin.named_parameters()
        }

    def ballots(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, grad in gradients.items():
            ballots, self.stats[name] = cast_ballots(self.case.confidence, grad, self.stats[name])
            found[name] = ballots.to(torch.int8)
        return found

    def verdicts(self, ballots: dict[str, Tensor]) -> dict[str, Tensor]:
        margin = self.case.options.get("margin", 1)
        found = {}
        for name, mine in ballots.items():
            all_ballots = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
            dist.all_gather(all_ballots, mine, group=self.group)
            found[name] = majority_vote(torch.stack(all_ballots), margin)
        return found
