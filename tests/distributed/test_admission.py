"""Ranks whose ballots are too dense, and ranks that send poison every step, among honest ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distsign import AdaptiveConfidence, RMSConfidence, SignAdamPP, SignVoteState
from distsign.plan import Column
from distsign.traffic import report_bytes

from .oracle import Case, batch, build, digest
from .ranks import RankPool

Pools = Callable[[int], RankPool]
STREAK = 3


def overwrite_ballots(state: SignVoteState, byte: int) -> None:
    """Let a rank send planes of nothing but this byte: 255 votes against everything, 0 abstains."""
    pipeline = state._pipeline

    def cast(column: Column, grads: list[Tensor], raw: Tensor, scale: Tensor) -> Tensor:
        payloads = type(pipeline).cast(pipeline, column, grads, raw, scale)
        for owner, payload in enumerate(torch.split(payloads, list(column.ballots.sizes))):
            start, end, _ = column.ballots._cuts(owner)
            payload[start:end] = byte
        return payloads

    pipeline.cast = cast  # type: ignore[method-assign]


def train_with_rank_0_sending(rank: int, byte: int, case: Case) -> str:
    net, model, state = build(case)
    if rank == 0:
        overwrite_ballots(state, byte)
    optimizer = SignAdamPP(model.named_parameters(), lr=1e-2, vote_state=state)
    for step in range(4):
        optimizer.zero_grad()
        model(batch(rank, step, 0, torch.float32)).square().mean().backward()
        optimizer.step()
    state.close()
    return digest(net)


def train_beside_a_dense_liar(rank: int, world_size: int, options: dict[str, Any]) -> list[str]:
    capped, free = Case(options={**options, "max_density": 0.5}), Case(options=options)
    return [train_with_rank_0_sending(rank, byte, case) for case in (capped, free) for byte in (255, 0)]


@pytest.mark.parametrize(
    "options",
    [
        {"exchange": "two_phase"},
        {"exchange": "all_gather"},
        {"exchange": "two_phase", "carry": True, "wire": "planes", "owner_carry": "standing"},
    ],
    ids=["two-phase", "all-gather", "carries"],
)
def test_ballots_above_the_cap_are_abstentions(rank_pool: Pools, options: dict[str, Any]) -> None:
    found = rank_pool(3).run(train_beside_a_dense_liar, options)
    assert len(set(map(str, found))) == 1
    capped, capped_abstaining, free, free_abstaining = found[0]
    assert capped == capped_abstaining
    assert free != free_abstaining


def train_above_the_cap(rank: int, world_size: int, case: Case) -> tuple[str, float, float]:
    net, model, state = build(case)
    optimizer = SignAdamPP(model.named_parameters(), lr=1e-2, vote_state=state)
    for step in range(12):
        optimizer.zero_grad()
        model(batch(rank, step, 0, torch.float32)).square().mean().backward()
        optimizer.step()
    traffic = state.traffic()
    state.close()
    return digest(net), traffic.ballot_density, traffic.verdict_density


@pytest.mark.parametrize(
    ("confidence", "options"),
    [
        (AdaptiveConfidence(), {}),
        (AdaptiveConfidence(), {"carry": True, "wire": "planes"}),
        (AdaptiveConfidence(), {"carry": True}),
        (RMSConfidence(k=2), {"bits_per_param": 0.5}),
    ],
    ids=["no-carry", "planes", "slots", "budget"],
)
def test_honest_workers_keep_to_the_cap_and_are_heard(
    rank_pool: Pools, confidence: Any, options: dict[str, Any]
) -> None:
    """Their own density would be far above it: unless they hold back, no ballot of theirs would count."""
    case = Case(confidence=confidence, options={**options, "max_density": 0.02})
    found = rank_pool(3).run(train_above_the_cap, case)
    assert len({digest for digest, _, _ in found}) == 1
    for _, ballots, verdicts in found:
        assert 0.005 < ballots < 0.0205  # a piece that is smaller than 50 may have one vote
        assert verdicts > 0.001
    free = replace(case, options={**options, "max_density": 1.0})
    assert rank_pool(3).run(train_above_the_cap, free)[0][1] > 0.0205


def train_in_a_flood(rank: int, world_size: int, options: dict[str, Any], resume_at: int) -> tuple[str, list[int]]:
    """Rank 1 sends poison in steps 0 to 9. Return the parameters' digest, and which steps were poisoned."""
    case = Case(options={**options, "max_poison_streak": STREAK})
    net, model, state = build(case)
    optimizer = SignAdamPP(model.named_parameters(), lr=1e-2, vote_state=state)
    poisoned = []
    for step in range(16):
        if step == resume_at:
            saved, weights, moments = state.state_dict(), net.state_dict(), optimizer.state_dict()
            state.close()
            again = build(case)
            again[0].load_state_dict(weights)
            net, model, state = again
            optimizer = SignAdamPP(model.named_parameters(), lr=1e-2, vote_state=state)
            optimizer.load_state_dict(moments)
            state.load_state_dict(saved)
        optimizer.zero_grad()
        loss = model(batch(rank, step, 0, torch.float32)).square().mean()
        (loss * float("nan") if rank == 1 and step < 10 else loss).backward()
        if all(p.grad.isnan().any() for p in net.parameters()):
            poisoned.append(step)
        else:
            assert all(p.grad.isfinite().all() for p in net.parameters())
        optimizer.step()
        # Left out after the third step of poison, back after the third without.
        assert state.traffic().left_out_ranks == ((1,) if STREAK - 1 <= step < 10 + STREAK - 1 else ()), step
    assert all(each.isfinite().all() for each in state._pipeline.memory.voter.stats)
    state.close()
    return digest(net), poisoned


@pytest.mark.parametrize(
    "options",
    [
        {"exchange": "two_phase"},
        {"exchange": "all_gather"},
        {"exchange": "two_phase", "carry": True, "owner_carry": "standing"},
        {"exchange": "two_phase", "exclude": ["gain", "first.bias"]},
    ],
    ids=["two-phase", "all-gather", "carries", "averaged"],
)
def test_a_rank_that_floods_with_poison_is_left_out_and_let_back_in(rank_pool: Pools, options: dict[str, Any]) -> None:
    found = rank_pool(3).run(train_in_a_flood, options, -1)
    assert len(set(map(str, found))) == 1
    assert found[0][1] == list(range(STREAK))


@pytest.mark.parametrize("resume_at", [2, 7, 11])
def test_a_resumed_run_knows_the_flood(rank_pool: Pools, resume_at: int) -> None:
    unbroken = rank_pool(3).run(train_in_a_flood, {}, -1)
    assert rank_pool(3).run(train_in_a_flood, {}, resume_at) == unbroken


def reports_cost(rank: int, world_size: int, options: dict[str, Any], poisoned: Sequence[int]) -> int:
    """Return how many bytes more a rank sends in all where ranks that flood with poison are left out.

    Rank 1 sends poison in some of eight steps.
    """
    counted = []
    for streak in (None, STREAK):
        _, model, state = build(Case(options={**options, "max_poison_streak": streak}))
        for step in range(8):
            model.zero_grad()
            loss = model(batch(rank, step, 0, torch.float32)).square().mean()
            (loss * float("nan") if rank == 1 and step in poisoned else loss).backward()
        counted.append(state.traffic().sent_bytes)
        state.close()
    return counted[1] - counted[0]


@pytest.mark.parametrize(
    ("poisoned", "num_reports"),
    [
        ([], 0),
        ([2, 5], 2),
        ([0, 1, 2], 6),  # left out after the third step, until it has sent three without poison
    ],
)
def test_ranks_report_poison_in_as_few_steps_as_predicted(
    rank_pool: Pools, poisoned: list[int], num_reports: int
) -> None:
    each = num_reports * report_bytes(4).sent_bytes
    assert rank_pool(4).run(reports_cost, {}, poisoned) == [each] * 4
    assert rank_pool(4).run(reports_cost, {"exchange": "all_gather"}, poisoned) == [0] * 4


def test_reports_between_nodes_and_within(rank_pool: Pools) -> None:
    each = report_bytes(2, 2).sent_bytes
    assert rank_pool(4).run(reports_cost, {"exchange": "hierarchical", "ranks_per_node": 2}, [3]) == [each] * 4


def go_on_alone(rank: int, world_size: int) -> None:
    """Rank 1 alone goes on from a state in which poison is held against rank 0."""
    _, model, state = build(Case(options={"max_poison_streak": STREAK}))
    state.track(model.named_parameters())
    saved = state.state_dict()
    held = {**saved["admission"], "score": [4, 0, 0]} if rank == 1 else saved["admission"]
    state.load_state_dict({**saved, "admission": held})
    model(batch(rank, 0, 0, torch.float32)).square().mean().backward()


def test_a_state_that_one_rank_alone_has_loaded_is_noticed(rank_pool: Pools) -> None:
    """They would report poison in different steps."""
    words = (
        r"ValueError: .*poison that is held against workers is \{.*\[0, 0, 0\].* on ranks 0 and 2, but .*\[4, 0, 0\]"
    )
    rank_pool(3).run_expecting(words, go_on_alone, in_step=True)
