"""Bytes from shapes, held to messages that are counted one by one; and what a rank counts of its votes."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as power_sgd

from distsign.layout import Layout, Shape, shard_table, shards
from distsign.payload import forms
from distsign.plan import Part, Plan, exchange_groups
from distsign.sizes import payload_sizes
from distsign.statistics import VoteCounts
from distsign.traffic import (
    ExchangeBytes,
    GroupMessages,
    Traffic,
    all_gather_bytes,
    exchange_bytes,
    power_sgd_elements,
    ring_all_reduce_bytes,
    step_bytes,
    top_k_slots,
)
from tests import GROUP_BYTES

EXCHANGES = ("two_phase", "all_gather")


def messages(sizes: list[int], exchange: str) -> list[tuple[int, int, int]]:
    """List every message of an exchange as `(sender, receiver, bytes)`, those of a rank to itself among them."""
    ranks = range(len(sizes))
    if exchange == "all_gather":
        return [(a, b, sum(sizes)) for a in ranks for b in ranks]
    ballots = [(voter, owner, sizes[owner]) for voter in ranks for owner in ranks]
    verdicts = [(owner, voter, sizes[owner]) for owner in ranks for voter in ranks]
    return ballots + verdicts


@given(st.lists(st.integers(8, 10_000), min_size=1, max_size=9), st.sampled_from(EXCHANGES))
def test_an_exchange_counted_message_by_message(sizes: list[int], exchange: str) -> None:
    sent, received = [0] * len(sizes), [0] * len(sizes)
    for sender, receiver, num_bytes in messages(sizes, exchange):
        if sender != receiver:
            sent[sender] += num_bytes
            received[receiver] += num_bytes
    for rank in range(len(sizes)):
        assert exchange_bytes(sizes, rank, exchange) == ExchangeBytes(sent[rank], received[rank])


def test_two_phases_are_the_default() -> None:
    assert exchange_bytes([108, 58, 9], rank=1) == exchange_bytes([108, 58, 9], 1, "two_phase")
    # Ballots to owners 0 and 2, and verdicts to both.
    assert exchange_bytes([108, 58, 9], rank=1) == ExchangeBytes(108 + 9 + 2 * 58, 108 + 9 + 2 * 58)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_one_rank_has_nobody_to_talk_to(exchange: str) -> None:
    assert exchange_bytes([1000], 0, exchange) == ExchangeBytes(0, 0)
    assert step_bytes([[Shape(0, 5000)]], 1, 0, exchange) == ExchangeBytes(0, 0)
    assert ring_all_reduce_bytes(1000, 4, 1) == 0


@given(st.lists(st.lists(st.integers(0, 5000), max_size=4), max_size=4), st.integers(1, 9), st.sampled_from(EXCHANGES))
def test_a_step_is_the_sum_of_its_groups(sizes: list[list[int]], world_size: int, exchange: str) -> None:
    numbers = iter(range(100))
    shapes = [[Shape(next(numbers), n) for n in group] for group in sizes]
    for rank in range(world_size):
        sent = received = 0
        for group in shapes:
            payloads = list(Layout.build([group], world_size).sizes)
            for sender, receiver, num_bytes in messages(payloads, exchange):
                sent += num_bytes if sender == rank != receiver else 0
                received += num_bytes if receiver == rank != sender else 0
        assert step_bytes(shapes, world_size, rank, exchange) == ExchangeBytes(sent, received)


def test_a_step_written_out() -> None:
    # 4096 elements in four shards of 1024, 128 bytes a plane; parameter 1 of 10 elements, 2 bytes a plane, is rank 1's.
    sizes = [8 + 256, 8 + 256 + 4, 8 + 256, 8 + 256]
    up = sum(sizes) - sizes[1]
    down = 3 * sizes[1]
    assert step_bytes([[Shape(0, 4096), Shape(1, 10)]], 4, 1) == ExchangeBytes(up + down, up + down)


@given(st.integers(0, 1000), st.sampled_from([2, 4]), st.integers(1, 9))
def test_a_ring_all_reduce_counted_chunk_by_chunk(num_elements: int, bytes_per_element: int, world_size: int) -> None:
    chunks = [(k + 1) * num_elements // world_size - k * num_elements // world_size for k in range(world_size)]
    total = 0
    for _phase in ("reduce-scatter", "all-gather"):
        for step in range(world_size - 1):
            for rank in range(world_size):
                sent = chunks[(rank - step) % world_size] * bytes_per_element
                total += 2 * sent  # its neighbour receives it
    mean = Fraction(total, world_size)
    assert ring_all_reduce_bytes(num_elements, bytes_per_element, world_size) == mean.numerator // mean.denominator


def test_planes_in_two_phases_are_a_sixteenth_of_fp32() -> None:
    """Two bits in place of 32, each way. The headers weigh next to nothing here."""
    both = step_bytes([[Shape(0, 1 << 20)]], 4, 2)
    fp32 = ring_all_reduce_bytes(1 << 20, 4, 4)
    ratio = fp32 / (both.sent_bytes + both.received_bytes)
    assert 15.99 < ratio <= 16


SHAPES = st.lists(st.integers(0, 9000), min_size=1, max_size=6)


@given(SHAPES, st.integers(1, 40))
def test_the_table_of_shards_has_the_shards(sizes: list[int], world_size: int) -> None:
    shapes = [Shape(3 * k, n) for k, n in enumerate(sizes)]
    owners, lengths = shard_table(shapes, world_size)
    found = sorted(zip(owners.tolist(), lengths.tolist(), strict=True))
    assert found == sorted((owner, stop - start) for each in shapes for owner, start, stop in shards(each, world_size))


@given(
    SHAPES,
    st.integers(1, 9),
    st.sampled_from([None, 0.001, 0.03, 0.4, 1.0]),
    st.sampled_from(["auto", "planes", "sparse"]),
    st.booleans(),
    st.integers(0, 50),
)
def test_sizes_without_a_layout_are_those_of_the_payloads(
    sizes: list[int], world_size: int, density: float | None, wire: str, owner_carry: bool, num_raw: int
) -> None:
    shapes = [Shape(k, n) for k, n in enumerate(sizes)]
    want = forms(Layout.build([shapes], world_size), density, wire, owner_carry=owner_carry, num_raw=num_raw)
    for form, voters in zip(want, (1, 1 if owner_carry else world_size), strict=True):
        found = payload_sizes(shapes, world_size, density, wire, voters=voters, num_raw=num_raw)
        assert tuple(found.tolist()) == form.sizes


@given(SHAPES, st.integers(1, 4), st.integers(1, 4), st.sampled_from([None, 0.02]))
def test_messages_between_and_within_nodes_are_those_of_the_plan(
    sizes: list[int], num_nodes: int, per_node: int, density: float | None
) -> None:
    shapes = [Shape(k, n) for k, n in enumerate(sizes)]
    parts = [[Part(k, n, voted=True) for k, n in enumerate(sizes)]]
    plan = Plan.build(
        parts,
        [0] * len(sizes),
        per_node,
        num_nodes,
        density=density,
        wire="auto",
        owner_carry=True,
        device=torch.device("cpu"),
    )
    world_size = num_nodes * per_node
    found = GroupMessages.build(shapes, world_size, "hierarchical", density=density, ranks_per_node=per_node)
    for k, column in enumerate(plan.columns):
        assert tuple(found.ballots[k].tolist()) == column.ballots.sizes
        assert tuple(found.verdicts[k].tolist()) == column.verdicts.sizes
        assert found.gradient_bytes[k] == 4 * column.num_elements
    each = [found.of_rank(rank) for rank in range(world_size)]
    assert sum(one.sent_bytes for one in each) == sum(one.received_bytes for one in each) == found.total_bytes
    within = sum(one.sent_within_bytes for one in each)
    assert within == sum(one.received_within_bytes for one in each)
    assert per_node > 1 or within == 0


def test_power_sgd_reduces_what_torch_says() -> None:
    """A matrix that would not shrink by half is reduced as it is; a kernel of a convolution is a matrix of its rows."""
    shapes = [(100, 50), (100,), (8, 3, 3, 3), (6, 5), ()]
    assert power_sgd_elements(shapes, 1) == (100 + 1, 100 + 8 + 6, 50 + 27 + 5)
    assert power_sgd_elements(shapes, 4) == (100 + 216 + 30 + 1, 400, 200)


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 12))
def test_a_matrix_is_compressed_where_torch_does(rows: int, columns: int, rank: int) -> None:
    least = min(rows, columns, rank)
    compressed, whole, _ = power_sgd._should_compress(rows, columns, least, 2)
    want = (0, rows * least, columns * least) if compressed else (whole, 0, 0)
    assert power_sgd_elements([(rows, columns)], rank) == want


def test_top_k_sends_its_slots_to_all() -> None:
    assert [top_k_slots(n, 0.01) for n in (0, 1, 100, 101)] == [0, 1, 1, 2]
    assert all_gather_bytes(16, 5) == ExchangeBytes(64, 64)


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=20), st.sampled_from([None, 0.05, 0.5]))
def test_groups_are_full_but_for_the_last(elements: list[int], bits: float | None) -> None:
    groups = exchange_groups(elements, bits)
    assert [k for group in groups for k in group] == list(range(len(elements)))
    for group in groups[:-1]:
        sizes = [elements[k] * (bits or 2.0) / 8 for k in group]
        assert sum(sizes) >= GROUP_BYTES > sum(sizes[:-1])


def test_exchange_bytes_add_up() -> None:
    assert ExchangeBytes(1, 2) + ExchangeBytes(30, 40) == ExchangeBytes(31, 42)
    assert ExchangeBytes() == ExchangeBytes(0, 0)


# ---------------------------------------------------------------------------------------------------------- statistics


def step(counts: VoteCounts, groups: list[tuple[int, int, int]], *, poisoned: bool = False) -> None:
    """Count a step of groups, each with its elements, ballots and verdicts."""
    counts.begin_step()
    for num_elements, num_ballots, num_verdicts in groups:
        counts.exchanged(num_elements)
        counts.ballots(num_elements, torch.tensor(num_ballots))
        counts.verdicts(torch.tensor(num_elements), torch.tensor(num_verdicts))
    counts.end_step(torch.tensor(poisoned))


def test_before_the_first_step_all_is_zero() -> None:
    assert VoteCounts().traffic(ExchangeBytes(), 4) == Traffic(0, 0, 0, 0, 0, 0, 0, 0, 0.0, 0.0)


def test_densities_are_shares_of_all_elements() -> None:
    counts = VoteCounts()
    step(counts, [(1000, 100, 50), (200, 20, 0)])
    step(counts, [(1000, 300, 10), (200, 0, 0)])
    assert counts.traffic(ExchangeBytes(11, 22, 3, 4), 3) == Traffic(
        sent_bytes=11,
        received_bytes=22,
        sent_within_bytes=3,
        received_within_bytes=4,
        fp32_bytes=ring_all_reduce_bytes(2400, 4, 3),
        bf16_bytes=ring_all_reduce_bytes(2400, 2, 3),
        num_steps=2,
        num_poisoned_steps=0,
        ballot_density=420 / 2400,
        verdict_density=60 / 2400,
    )


def test_poisoned_steps_count_as_traffic_but_not_as_votes() -> None:
    counts = VoteCounts()
    step(counts, [(1000, 100, 50)])
    step(counts, [(1000, 999, 999)], poisoned=True)
    found = counts.traffic(ExchangeBytes(), 2)
    assert (found.num_steps, found.num_poisoned_steps) == (2, 1)
    assert (found.ballot_density, found.verdict_density) == (0.1, 0.05)
    assert found.fp32_bytes == ring_all_reduce_bytes(2000, 4, 2)


def test_a_step_that_broke_off_leaves_no_votes() -> None:
    counts = VoteCounts()
    counts.begin_step()
    counts.ballots(1000, torch.tensor(900))
    step(counts, [(1000, 100, 50)])
    found = counts.traffic(ExchangeBytes(), 2)
    assert (found.ballot_density, found.verdict_density) == (0.1, 0.05)


def test_counts_go_on_from_a_checkpoint() -> None:
    first, whole = VoteCounts(), VoteCounts()
    for counts in (first, whole):
        step(counts, [(1000, 100, 50)])
        step(counts, [(1000, 700, 50)], poisoned=True)
    resumed = VoteCounts()
    resumed.load_state_dict(first.state_dict())
    for counts in (resumed, whole):
        step(counts, [(500, 5, 1)])
    assert resumed.traffic(ExchangeBytes(1, 1), 4) == whole.traffic(ExchangeBytes(1, 1), 4)
    assert resumed.state_dict() == whole.state_dict()


def test_traffic_has_the_documented_names() -> None:
    names = {field.name for field in dataclasses.fields(Traffic)}
    assert names >= {
        "sent_bytes",
        "received_bytes",
        "fp32_bytes",
        "bf16_bytes",
        "num_steps",
        "ballot_density",
        "verdict_density",
    }
