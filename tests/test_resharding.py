"""States for another number of ranks: nothing that the carries hold is lost or doubled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distsign import reshard
from distsign.layout import Shape, shards
from distsign.statistics import VoteCounts
from distsign.traffic import ExchangeBytes, ring_all_reduce_bytes
from tests.vote_states import undecided, unsent

SIZES = {"weight": 5000, "bias": 7, "big": 4097}


def shares(index: int, n: int, per_node: int) -> list[tuple[int, int]]:
    """Return where each rank of a node has its share of a parameter."""
    found = [(0, 0)] * per_node
    for column, a, b in shards(Shape(index, n), per_node):
        found[column] = (a, b)
    return found


def states_of(world_size: int, per_node: int = 1, *, kind: str = "plain") -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(world_size)
    states, num_voters = [], world_size // per_node
    for rank in range(world_size):
        owner, voter = {}, {}
        for index, (name, n) in enumerate(SIZES.items()):
            first, last = shares(index, n, per_node)[rank % per_node]
            size = last - first
            for k, a, b in shards(Shape(index, size), num_voters):
                if k == rank // per_node and b > a and kind == "plain":
                    owner[name, a, b - a] = torch.randint(-3, 4, (b - a,), generator=generator, dtype=torch.int16)
                elif k == rank // per_node and b > a:
                    owner[name, a, b - a] = torch.ones(num_voters, 2, (b - a + 7) // 8, dtype=torch.uint8)
            voter[name] = {
                "stats": torch.tensor([float(rank)], dtype=torch.float64),
                "carry": torch.randint(-9, 9, (size,), generator=generator).float(),
                "square": torch.rand(size, generator=generator),
            }
        state = {"voter": voter, "owner": owner, "num_voters": num_voters, "ranks_per_node": per_node}
        states.append({**state, "traffic": {"sent_bytes": 10 + rank}, "counts": {"elements": 5000, "num_steps": 3}})
    return states


@pytest.mark.parametrize(("old", "new"), [(4, 2), (4, 3), (2, 4), (3, 3), (1, 5), (5, 1)])
def test_what_is_kept_is_conserved_in_sum(old: int, new: int) -> None:
    before = states_of(old)
    after = reshard(before, new)
    assert len(after) == new
    for index, (name, n) in enumerate(SIZES.items()):
        assert torch.equal(unsent(before, name), unsent(after, name)), name
        assert torch.equal(undecided(before, name), undecided(after, name))
        for rank, state in enumerate(after):
            mine = {(a, b - a) for k, a, b in shards(Shape(index, n), new) if k == rank}
            assert {(a, length) for (found, a, length) in state["owner"] if found == name} == mine
            assert (state["voter"][name]["square"] > 0).any()
    assert {state["num_voters"] for state in after} == {new}


@pytest.mark.parametrize(
    ("old", "old_per_node", "new", "new_per_node"),
    [(4, 2, 6, 2), (6, 3, 4, 2), (4, 2, 3, 1), (3, 1, 8, 4), (4, 4, 4, 2)],
)
def test_what_nodes_keep_is_conserved_in_sum(old: int, old_per_node: int, new: int, new_per_node: int) -> None:
    before = states_of(old, old_per_node)
    after = reshard(before, new, new_per_node)
    assert len(after) == new
    for index, (name, n) in enumerate(SIZES.items()):
        assert torch.equal(unsent(before, name, old_per_node), unsent(after, name, new_per_node)), name
        assert torch.equal(undecided(before, name, old_per_node), undecided(after, name, new_per_node)), name
        for rank, state in enumerate(after):
            a, b = shares(index, n, new_per_node)[rank % new_per_node]
            assert state["voter"][name]["carry"].numel() == state["voter"][name]["square"].numel() == b - a
            assert (state["voter"][name]["square"] > 0).all()
    assert {(s["num_voters"], s["ranks_per_node"]) for s in after} == {(new // new_per_node, new_per_node)}


def test_the_mean_of_the_largest_squares_is_finite() -> None:
    """Though the sum of two is beyond float32."""
    before = states_of(3)
    largest = torch.finfo(torch.bfloat16).max
    for rank, state in enumerate(before):
        for kept in state["voter"].values():
            kept["square"] = torch.full_like(kept["square"], (largest, largest, 1.0)[rank]).bfloat16()
    expected = torch.tensor(2 * largest / 3).bfloat16()
    for kept in reshard(before, 1)[0]["voter"].values():
        assert kept["square"].dtype == torch.bfloat16 and (kept["square"] == expected).all()


def test_states_as_they_were_come_back() -> None:
    for per_node in (1, 2):
        before = states_of(4, per_node)
        after = reshard(before, 4, per_node)
        for old, new in zip(before, after, strict=True):
            assert old["owner"].keys() == new["owner"].keys()
            assert all(torch.equal(old["owner"][key], new["owner"][key]) for key in old["owner"])
            for name, kept in old["voter"].items():
                assert all(torch.equal(kept[key], new["voter"][name][key]) for key in ("carry", "square")), name


def test_statistics_are_of_a_rank_that_has_a_share() -> None:
    before = states_of(6, 3)
    for carry in (True, False):
        for state in before:
            for kept in state["voter"].values():
                if not carry:
                    del kept["carry"], kept["square"]
        for state in reshard(before, 2):
            for index, (name, n) in enumerate(SIZES.items()):
                source = int(state["voter"][name]["stats"])  # of rank `source`, which had its number there
                a, b = shares(index, n, 3)[source % 3]
                assert b > a, (name, source)


def test_where_all_ballots_go_to_all_ranks_each_gets_all_undecided_votes() -> None:
    one = states_of(1)
    before = [{**one[0], "num_voters": 3, "exchange": "all_gather"} for _ in range(3)]
    for state in before:
        state["owner"] = {
            (name, a, b - a): one[0]["owner"][name, 0, n][a:b]
            for index, (name, n) in enumerate(SIZES.items())
            for _, a, b in shards(Shape(index, n), 3)
        }
    for state in reshard(before, 2):
        assert state["exchange"] == "all_gather"
        for name in SIZES:
            assert torch.equal(undecided([state], name), undecided(before, name)), name


def test_states_of_nodes_by_an_earlier_version_are_known_by_their_number() -> None:
    before = states_of(4, 2)
    for state in before:
        del state["ranks_per_node"]
    assert len(reshard(before, 6, 2)) == 6


def test_what_all_reduces_would_have_cost_is_counted_by_the_ranks_that_there_were() -> None:
    before = [{**state, "counts": VoteCounts().state_dict() | {"elements": 5000}} for state in states_of(4)]
    for new, world_size in ((reshard(before, 6), 6), (reshard(reshard(before, 6), 3), 3), (reshard(before, 4), 4)):
        for rank, state in enumerate(new):
            counts = VoteCounts()
            counts.load_state_dict(state["counts"])
            counts.exchanged(700)
            found = counts.traffic(ExchangeBytes(), world_size)
            for width, uncompressed in ((4, found.fp32_bytes), (2, found.bf16_bytes)):
                if world_size == 4:  # as many as before: added up, then by the formula
                    assert uncompressed == ring_all_reduce_bytes(5700, width, 4)
                    continue
                earlier = ring_all_reduce_bytes(5000, width, 4) * (rank < 4)
                assert uncompressed == earlier + ring_all_reduce_bytes(700, width, world_size)


def test_standing_ballots_are_dropped() -> None:
    assert all(not state["owner"] for state in reshard(states_of(3, kind="standing"), 2))


def test_a_part_of_a_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got 2 states of a vote among 3"):
        reshard(states_of(3)[:2], 2)
    with pytest.raises(ValueError, match=r"got 3 states of a vote among 2 nodes of 2 ranks"):
        reshard(states_of(4, 2)[:3], 2)
    with pytest.raises(ValueError, match="got 0 states"):
        reshard([], 2)
    with pytest.raises(ValueError, match="world_size=3 and ranks_per_node=2"):
        reshard(states_of(3), 3, 2)
