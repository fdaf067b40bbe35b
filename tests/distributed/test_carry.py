"""Carries, budgets and the sparse wire on real ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from distsign import FixedConfidence

from . import carry_jobs as jobs
from .carry_oracle import CARRY
from .oracle import Case
from .ranks import WORLD_SIZES, RankPool, RanksFailed

Pools = Callable[[int], RankPool]

CASES = {
    "planes": replace(CARRY, options={"wire": "planes"}),
    "planes, both carries": replace(CARRY, options={"wire": "planes", "owner_carry": True, "margin": 2}),
    "planes, standing": replace(CARRY, options={"wire": "planes", "owner_carry": "standing", "margin": 2}),
    "sizes by what was seen": replace(CARRY, options={}, num_steps=12),
    "sizes by what was seen, all-gather": replace(CARRY, options={"exchange": "all_gather"}, num_steps=12),
    "sizes by what was seen, both carries": replace(CARRY, options={"owner_carry": True}, num_steps=12),
    "budget": replace(CARRY, options={"bits_per_param": 0.1, "owner_carry": True, "margin": 2}, num_steps=12),
    "budget, sparse, standing": replace(
        CARRY, options={"bits_per_param": 0.05, "owner_carry": "standing", "wire": "sparse", "margin": 2}
    ),
    "budget, all-gather": replace(
        CARRY, options={"bits_per_param": 0.1, "owner_carry": True, "exchange": "all_gather"}
    ),
    "bf16": replace(CARRY, options={"bits_per_param": 0.1, "owner_carry": True, "carry_dtype": torch.bfloat16}),
    "fixed confidence": Case(FixedConfidence(2e-3), {"wire": "planes", "carry": True}),
    "no_sync": replace(CARRY, options={"bits_per_param": 0.1, "owner_carry": True}, num_accumulated=3),
    "unused parameters": replace(
        CARRY,
        options={"bits_per_param": 0.1, "owner_carry": True},
        ddp={"bucket_cap_mb": 0.2, "find_unused_parameters": True},
        branch=True,
    ),
    "one bucket": replace(CARRY, options={"bits_per_param": 0.1, "owner_carry": True}, ddp={}),
}


@pytest.mark.parametrize("name", CASES)
def test_verdicts_and_carries_equal_the_oracle(rank_pool: Pools, name: str) -> None:
    assert len(set(rank_pool(3).run(jobs.train_carry_against_oracle, CASES[name]))) == 1


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_at_every_world_size(rank_pool: Pools, world_size: int) -> None:
    case = replace(CARRY, options={"bits_per_param": 0.1, "owner_carry": True, "margin": min(2, world_size)})
    assert len(set(rank_pool(world_size).run(jobs.train_carry_against_oracle, case))) == 1


@pytest.mark.parametrize(
    "name", ["planes, both carries", "planes, standing", "budget", "sizes by what was seen", "bf16"]
)
def test_a_poisoned_step_leaves_no_trace(rank_pool: Pools, name: str) -> None:
    assert len(set(rank_pool(3).run(jobs.train_carry_against_oracle, CASES[name], (0, 2, 3)))) == 1


@pytest.mark.parametrize(
    "name",
    ["planes, both carries", "sizes by what was seen, both carries", "budget", "budget, sparse, standing", "bf16"],
)
def test_a_resumed_run_repeats_an_unbroken_one(rank_pool: Pools, name: str) -> None:
    rank_pool(3).run(jobs.resume_with_carries, CASES[name])


@pytest.mark.parametrize(
    "case",
    [
        CARRY,
        replace(CARRY, options={"owner_carry": True}),
        replace(CARRY, options={"owner_carry": "standing"}),
        replace(CARRY, options={"bits_per_param": 0.3, "owner_carry": True}),
        replace(CARRY, options={"carry_dtype": torch.bfloat16}),
        Case(options={"carry": True}),
    ],
    ids=["sizes by what was seen", "owner carry", "standing", "budget", "bf16", "adaptive"],
)
def test_a_resumed_run_in_nodes_repeats_an_unbroken_one(rank_pool: Pools, case: Case) -> None:
    """Each rank of a node keeps its own share, which is known before ranks have met."""
    options = {"exchange": "hierarchical", "ranks_per_node": 2, **case.options}
    rank_pool(4).run(jobs.resume_with_carries, replace(case, options=options))


@pytest.mark.parametrize("bits_per_param", [0.05, 0.5])
def test_a_budget_is_kept_and_filled(rank_pool: Pools, bits_per_param: float) -> None:
    results = rank_pool(3).run(jobs.count_budget, bits_per_param)
    # Each rank sends the payloads of ballots but its own, and its own verdicts twice: in all 2 (W - 1) times both.
    payload_bytes = sum(sent for sent, _ in results) / (2 * 2)
    assert 0.95 * results[0][1] < payload_bytes <= results[0][1]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_parameter_that_votes_often_does_not_starve_beside_others(rank_pool: Pools, world_size: int) -> None:
    """Each component passes k = 8 in every ninth step; one that has to wait for a slot must not wait for long.

    With the slots of the average it got an eighth of these verdicts.
    """
    num_steps = 180
    for count in rank_pool(world_size).run(jobs.count_steady_verdicts, num_steps):
        assert 0.6 * num_steps / 9 <= count <= num_steps / 9


EXCLUDED = ["gain", "first.bias", "last.bias"]


@pytest.mark.parametrize(
    "case",
    [
        replace(CARRY, options={"bits_per_param": 0.1, "owner_carry": True, "exclude": EXCLUDED}),
        Case(FixedConfidence(1e-3), {"exclude": ["module.gain", *EXCLUDED[1:]], "exchange": "all_gather"}),
        Case(FixedConfidence(1e-3), {"exclude": EXCLUDED}, dtype=torch.bfloat16),
    ],
    ids=["budget", "all-gather", "bf16"],
)
def test_excluded_parameters_are_averaged(rank_pool: Pools, case: Case) -> None:
    assert len(set(rank_pool(3).run(jobs.train_excluding, case, EXCLUDED))) == 1


def test_excluding_a_stranger_is_refused(rank_pool: Pools) -> None:
    case = Case(options={"exclude": ["elsewhere"]})
    with pytest.raises(RanksFailed, match="exclude names 'elsewhere'"):
        rank_pool(2).run(jobs.train_excluding, case, [])


@pytest.mark.parametrize("options", [{}, {"carry": True, "wire": "planes"}, {"margin": 2}], ids=str)
@pytest.mark.parametrize(("world_size", "ranks_per_node"), [(4, 2), (8, 4), (2, 2)])
def test_nodes_vote_on_their_means(
    rank_pool: Pools, world_size: int, ranks_per_node: int, options: dict[str, object]
) -> None:
    if options.get("margin", 1) > world_size // ranks_per_node:  # type: ignore[operator]
        with pytest.raises(RanksFailed, match="margin must be at most the number of voters"):
            rank_pool(world_size).run(jobs.train_hierarchical, ranks_per_node, options)
        return
    assert len(set(rank_pool(world_size).run(jobs.train_hierarchical, ranks_per_node, options))) == 1


@pytest.mark.parametrize(("world_size", "ranks_per_node"), [(4, 2), (8, 4)])
def test_nodes_send_what_their_pieces_need(rank_pool: Pools, world_size: int, ranks_per_node: int) -> None:
    """Each column of ranks has pieces of its own, with slots of their own; all ranks of a node know all of them."""
    assert len(set(rank_pool(world_size).run(jobs.train_nodes_by_what_was_seen, ranks_per_node))) == 1


def test_nodes_of_different_sizes_are_refused(rank_pool: Pools) -> None:
    with pytest.raises(RanksFailed, match="ranks_per_node=2 does not divide the 3 ranks"):
        rank_pool(3).run(jobs.train_hierarchical, 2, {})


@pytest.mark.parametrize("name", ["planes, both carries", "budget", "sizes by what was seen"])
def test_a_rank_that_has_joined_keeps_its_carry(rank_pool: Pools, name: str) -> None:
    assert len(set(rank_pool(3).run(jobs.join_with_carries, CASES[name]))) == 1
