"""States for another number of ranks: nothing that the carries hold is lost or doubled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distsign import reshard
from distsign.layout import Shape, shards

SIZES = {"weight": 5000, "bias": 7, "big": 4097}


def states_of(world_size: int, *, kind: str = "plain") -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(world_size)
    states = []
    for rank in range(world_size):
        owner = {}
        for index, (name, n) in enumerate(SIZES.items()):
            for k, a, b in shards(Shape(index, n), world_size):
                if k == rank and kind == "plain":
                    owner[name, a, b - a] = torch.randint(-3, 4, (b - a,), generator=generator, dtype=torch.int16)
                elif k == rank:
                    owner[name, a, b - a] = torch.ones(world_size, 2, (b - a + 7) // 8, dtype=torch.uint8)
        voter = {
            name: {
                "stats": torch.tensor([float(rank)], dtype=torch.float64),
                "carry": torch.randint(-9, 9, (n,), generator=generator).float(),
                "square": torch.rand(n, generator=generator),
            }
            for name, n in SIZES.items()
        }
        traffic = {"sent_bytes": 10 + rank}
        states.append(
            {"voter": voter, "owner": owner, "num_voters": world_size, "traffic": traffic, "counts": {"a": 1}}
        )
    return states


def whole(states: list[dict[str, Any]], name: str) -> torch.Tensor:
    parts = {start: v for s in states for (n, start, _), v in s["owner"].items() if n == name}
    return torch.cat([parts[start] for start in sorted(parts)])


@pytest.mark.parametrize(("old", "new"), [(4, 2), (4, 3), (2, 4), (3, 3), (1, 5), (5, 1)])
def test_what_is_kept_is_conserved_in_sum(old: int, new: int) -> None:
    before = states_of(old)
    after = reshard(before, new)
    assert len(after) == new
    for index, (name, n) in enumerate(SIZES.items()):
        carried = [sum(s["voter"][name]["carry"] for s in states) for states in (before, after)]
        assert torch.equal(*carried), name
        assert torch.equal(whole(before, name), whole(after, name))
        for rank, state in enumerate(after):
            mine = {(a, b - a) for k, a, b in shards(Shape(index, n), new) if k == rank}
            assert {(a, length) for (found, a, length) in state["owner"] if found == name} == mine
            assert (state["voter"][name]["square"] > 0).any()
    assert {state["num_voters"] for state in after} == {new}


def test_standing_ballots_are_dropped() -> None:
    assert all(not state["owner"] for state in reshard(states_of(3, kind="standing"), 2))


def test_a_part_of_a_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got 2 states of a vote among \[3\]"):
        reshard(states_of(3)[:2], 2)
    with pytest.raises(ValueError, match="got 0 states"):
        reshard([], 2)
