"""What the ranks do in the tests of the simulator."""

from __future__ import annotations

import itertools
import mmap
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from distsign import RMSConfidence, SignVoteState, sign_vote_hook
from distsign.rivals import make_rival
from distsign.simulator import Cluster, Link, Model, Scheme, Step
from distsign.simulator.calibrate import calibrate
from distsign.simulator.probe import Ranks

from .oracle import Net, batch


def count_beside_prediction(rank: int, world_size: int, text: str, options: dict[str, Any], bucket_mb: float) -> None:
    """Hold the bytes that the hook counts in each step to those that are predicted, exactly."""
    torch.manual_seed(5)
    net = Net()
    model = DDP(net, bucket_cap_mb=bucket_mb)
    state = SignVoteState(confidence=RMSConfidence(k=2.0), **options)
    state.track(model.named_parameters())
    model.register_comm_hook(state, sign_vote_hook)
    per_node = options.get("ranks_per_node", 1)
    cluster = Cluster(world_size, Link(1e9), workers_per_node=per_node)
    want = Step(Model.of(net), cluster, Scheme.parse(text), compute_s=0.1, bucket_mb=bucket_mb).bytes_of_rank(rank)
    for step in range(4):
        before = state.traffic()
        model.zero_grad()
        model(batch(rank, step, 0, torch.float32)).square().mean().backward()
        after = state.traffic()
        if step > 0:  # in the first step DDP has one bucket
            for name, value in vars(want).items():
                assert getattr(after, name) - getattr(before, name) == value, (step, rank, name)
    state.close()


def count_rival_beside_prediction(
    rank: int, world_size: int, text: str, name: str, options: dict[str, Any], bucket_mb: float
) -> None:
    """Hold the bytes that a rival counts in each step to those that are predicted, exactly."""
    torch.manual_seed(5)
    # No scalars, which torch's PowerSGD does not take.
    net = nn.Sequential(nn.Linear(50, 301), nn.ReLU(), nn.Linear(301, 31), nn.ReLU(), nn.Linear(31, 3))
    model = DDP(net, bucket_cap_mb=bucket_mb)
    rival = make_rival(name, **options)
    rival.register(model)
    cluster = Cluster(world_size, Link(1e9))
    want = Step(Model.of(net), cluster, Scheme.parse(text), compute_s=0.1, bucket_mb=bucket_mb).bytes_of_rank(rank)
    counted = []
    for step in range(5):
        model.zero_grad()
        model(torch.randn(4, 50)).square().mean().backward()
        traffic = rival.traffic(step + 1)
        counted.append(traffic.sent_bytes + traffic.received_bytes)
    # PowerSGD begins with two plain steps.
    of_steps = [after - before for before, after in itertools.pairwise(counted[1:])]
    assert of_steps == [want.sent_bytes + want.received_bytes] * 3, (of_steps, want)
    rival.close()


def calibrated(rank: int, world_size: int, whole_steps: bool = True) -> dict[str, Any] | None:
    """Calibrate in a hurry, in two nodes."""
    before = torch.get_rng_state()
    profile = calibrate(ranks_per_node=2, ranks_per_machine=world_size, seconds=0.2, repeats=1, whole_steps=whole_steps)
    dist.barrier()
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers are its own"
    assert (profile is None) == (rank != 0)
    if profile is None:
        return None
    return {
        "cores": profile.cores,
        "bandwidth": profile.bandwidth_bytes_per_s,
        "in_step": {name: [vars(point) for point in points] for name, points in profile.in_step.items()},
    }


def timed_while_memory_is_new(rank: int, world_size: int, num_in_vain: int, enough_s: float) -> tuple[int, list[float]]:
    """Time in turn a call of next to nothing, for which rank 1 at first takes new pages, and one of 20 ms.

    Returns:
        How often the first was called, and the seconds that either took.
    """
    ranks, kept = Ranks(1, world_size), []

    def quick() -> None:
        kept.append(mmap.mmap(-1, 4 << 20) if rank == 1 and len(kept) < num_in_vain else None)
        if kept[-1] is not None:
            for start in range(0, 4 << 20, mmap.PAGESIZE):
                kept[-1][start] = 1
            time.sleep(0.05)

    found = ranks.time_in_turn([quick, lambda: time.sleep(0.02)], 5, enough_s=enough_s)
    ranks.close()
    return len(kept), [timing.wall_s for timing in found]
