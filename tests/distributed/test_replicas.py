"""Replicas that are no longer the same, on real ranks: found, and named."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn

from distsign import ReplicaCheck, ReplicaError, SignAdamPP

from .oracle import Case, batch, build
from .ranks import RankPool

Pools = Callable[[int], RankPool]


def train_with_a_fault(rank: int, world_size: int, fault: str, odd: list[int], every: int = 3) -> None:
    """Train 6 steps, and plant a fault after the third, before the check."""
    net, model, state = build(Case())
    optimizer = SignAdamPP(model.named_parameters(), lr=1e-2, vote_state=state)
    replicas = ReplicaCheck(model, optimizer, every=every)
    for step in range(6):
        optimizer.zero_grad()
        model(batch(rank, step, 0, torch.float32)).square().mean().backward()
        optimizer.step()
        if step == 2 and rank in odd:
            plant(fault, net, optimizer)
        replicas.step()
    state.close()


def plant(fault: str, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    weight = net.get_parameter("middle.weight")
    if fault == "parameter":
        weight.data.view(-1).view(torch.int32)[1234] ^= 1
    elif fault == "optimizer state":
        optimizer.state[weight]["momentum_buffer"].view(-1).view(torch.int32)[7] ^= 1 << 31
    elif fault == "lost state":
        optimizer.state[weight].clear()
    elif fault == "learning rate":
        optimizer.param_groups[0]["lr"] *= 2


WORDS = {
    "parameter": "parameter 'middle.weight' on rank 1",
    "optimizer state": "optimizer state 'momentum_buffer' of parameter 'middle.weight' on rank 1",
    "lost state": "optimizer state 'momentum_buffer' of parameter 'middle.weight' on rank 1",
    "learning rate": "option 'lr' of optimizer group 0 on rank 1",
}


@pytest.mark.parametrize("fault", WORDS)
def test_a_fault_on_one_rank_of_three_is_named(rank_pool: Pools, fault: str) -> None:
    words = rf"ReplicaError: the replicas differ, found 3 steps after .*: {re.escape(WORDS[fault])}.*go on from a"
    rank_pool(3).run_expecting(words, train_with_a_fault, fault, [1], in_step=True)


def test_equal_replicas_are_left_alone(rank_pool: Pools) -> None:
    rank_pool(3).run(train_with_a_fault, "none", [])
    rank_pool(3).run(train_with_a_fault, "parameter", [0, 1, 2])


def test_no_check_before_it_is_time(rank_pool: Pools) -> None:
    rank_pool(3).run(train_with_a_fault, "parameter", [1], every=7)


def test_two_ranks_have_no_majority(rank_pool: Pools) -> None:
    words = "ReplicaError: .*parameter 'middle.weight' between the ranks, no majority of which agrees"
    rank_pool(2).run_expecting(words, train_with_a_fault, "parameter", [1], in_step=True)


def errors_of_groups(rank: int, world_size: int) -> tuple[tuple[str, ...], tuple[int, ...], str]:
    """Check in a subgroup, by global ranks; many entries, another shape on one rank, no optimizer."""
    group = dist.new_group([0, 2, 3])
    if rank == 1:
        return (), (), ""
    net = nn.Sequential(*[nn.Linear(2, 3 if rank == 3 else 2) for _ in range(4)])
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    replicas = ReplicaCheck(net, process_group=group)
    try:
        with pytest.raises(ReplicaError) as caught:
            replicas.check()
    finally:
        dist.destroy_process_group(group)
    return caught.value.entries, caught.value.minority, str(caught.value)


def test_a_subgroup_and_many_entries(rank_pool: Pools) -> None:
    results = rank_pool(4).run(errors_of_groups)
    entries, minority, message = results[0]
    assert results[0] == results[2] == results[3]
    assert entries[:2] == ("parameter '0.weight'", "parameter '0.bias'")
    assert len(entries) == 8 and minority == (3,)
    assert "'1.weight' on rank 3 and 5 entries more" in message


@pytest.mark.parametrize("every", [0, -1, 1.5, True, None])
def test_every_must_be_a_number_of_steps(every: object) -> None:
    with pytest.raises(ValueError, match="every must be a number of steps of at least 1, got"):
        ReplicaCheck(nn.Linear(1, 1), every=every)  # type: ignore[arg-type]
