"""The states of a vote for another number of ranks, or other nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distsign.layout import Shape, shards
from distsign.statistics import counts_elsewhere

__all__ = ["reshard"]


State = Mapping[str, Any]
Kept = Mapping[str, Tensor]


def reshard(states: Sequence[State], world_size: int, ranks_per_node: int = 1) -> list[dict[str, Any]]:
    """Turn the states of all ranks of a run into those of a run with another number of ranks, or other nodes.

    What the carries hold is conserved in sum: voter j of the new run takes over the unsent gradients of the old voters
    j, j + num_voters, ...; new voters begin with none, and with the mean of squares of an old one. Undecided votes go
    to the new owners of their components. Standing ballots are dropped: their workers are gone. A voter is a rank, or,
    in the hierarchical exchange, a node, whose ranks each have a share of the parameters. A vote by all-gather stays
    one, if there are no nodes now.

    Args:
        states: `SignVoteState.state_dict()` of every old rank, in order.
        world_size: number of new ranks.
        ranks_per_node: of the new run, with the hierarchical exchange.

    Returns:
        One state a new rank, for `SignVoteState.load_state_dict`.

    Raises:
        ValueError: if there is no state, if they are not those of one run, or if nodes do not divide the ranks.
    """
    if not states or world_size < 1 or ranks_per_node < 1 or world_size % ranks_per_node:
        raise ValueError(
            f"reshard needs the states of all old ranks and at least one new rank, in nodes of one size: got "
            f"{len(states)} states, world_size={world_size} and ranks_per_node={ranks_per_node}"
        )
    per_node = _nodes_of(states)
    nodes = [_joined(states[k : k + per_node]) for k in range(0, len(states), per_node)]
    undecided = _undecided(states, per_node)
    num_voters, nothing = world_size // ranks_per_node, dict.fromkeys(states[0]["traffic"], 0)
    # Where all ballots go to all ranks, each counts every shard itself.
    for_all = ranks_per_node == 1 and states[0].get("exchange") == "all_gather"
    exchange = "hierarchical" if ranks_per_node > 1 else "all_gather" if for_all else "two_phase"
    new: list[dict[str, Any]] = []
    for voter in range(num_voters):
        heirs = nodes[voter::num_voters] or [nodes[voter % len(nodes)]]
        merged = {name: _merged([heir[name] for heir in heirs], fresh=voter >= len(nodes)) for name in nodes[0]}
        owners = range(num_voters) if for_all else range(voter, voter + 1)
        for column in range(ranks_per_node):
            rank = len(new)
            fresh = rank >= len(states)
            counts = states[0 if fresh else rank]["counts"]
            if world_size != len(states):
                counts = counts_elsewhere(counts, len(states), fresh=fresh)
            shares = {
                name: _share(kept, index, column, ranks_per_node) for index, (name, kept) in enumerate(merged.items())
            }
            new.append(
                {
                    **states[0],
                    "traffic": nothing if fresh else states[rank]["traffic"],
                    "counts": counts,
                    "voter": shares,
                    "owner": _owned(undecided, list(merged), owners, num_voters, column, ranks_per_node),
                    "num_voters": num_voters,
                    "ranks_per_node": ranks_per_node,
                    "exchange": exchange,
                }
            )
    return new


def _nodes_of(states: Sequence[State]) -> int:
    """Return how many ranks made a node in the run of which these are all states."""
    kinds = {(state["num_voters"], state.get("ranks_per_node")) for state in states}
    num_voters, given = kinds.pop()
    per_node: int = given or max(1, len(states) // num_voters)  # earlier versions did not say
    if kinds or num_voters * per_node != len(states):
        others = "".join(f" or {voters}" for voters, _ in kinds)
        nodes = f" nodes of {per_node} ranks" if per_node > 1 else ""
        raise ValueError(
            f"reshard needs the states of all ranks of one run: got {len(states)} states of a vote among "
            f"{num_voters}{others}{nodes}"
        )
    return per_node


def _joined(columns: Sequence[State]) -> dict[str, Kept]:
    """Put together what the ranks of a node remember of their shares, by parameter.

    Statistics of the confidence function are those of one rank that has a share: a small parameter belongs to one
    alone, and of a large one each has as much.
    """
    found: dict[str, Kept] = {}
    for index, name in enumerate(columns[0]["voter"]):
        shares = [state["voter"][name] for state in columns]
        parts = {key: torch.cat([share[key] for share in shares]) for key in ("carry", "square") if key in shares[0]}
        found[name] = {"stats": shares[index % len(shares)]["stats"], **parts}
    return found


def _merged(kept: list[Kept], *, fresh: bool) -> dict[str, Tensor]:
    """Merge what several old voters remember of a parameter into what one new voter does."""
    merged = {"stats": kept[0]["stats"].clone()}
    if "carry" in kept[0]:
        total = torch.stack([each["carry"].float() for each in kept]).sum(0)
        merged["carry"] = (torch.zeros_like(total) if fresh else total).to(kept[0]["carry"].dtype)
    if "square" in kept[0]:
        mean = torch.stack([each["square"].double() for each in kept]).mean(0)  # the sum may be beyond float32
        merged["square"] = mean.to(kept[0]["square"].dtype)
    return merged


def _share(kept: Kept, index: int, column: int, num_columns: int) -> dict[str, Tensor]:
    """Return what a rank of a node remembers of its share of a parameter."""
    if "carry" not in kept:
        return dict(kept)
    a, b = _bounds(index, kept["carry"].numel(), column, num_columns)
    return {key: value if key == "stats" else value[a:b].clone() for key, value in kept.items()}


def _bounds(index: int, num_elements: int, column: int, num_columns: int) -> tuple[int, int]:
    """Return where a column's share of a parameter begins and ends."""
    mine = [(a, b) for k, a, b in shards(Shape(index, num_elements), num_columns) if k == column]
    return mine[0] if mine else (0, 0)


def _undecided(states: Sequence[State], per_node: int) -> dict[str, Tensor]:
    """Return the undecided votes of each parameter, int16 `[num_elements]`, put together from all owners."""
    pieces: dict[str, dict[tuple[int, int], Tensor]] = {}
    for rank, state in enumerate(states):
        for (name, start, _), value in state["owner"].items():
            if value.dtype == torch.int16:  # standing ballots are planes, uint8
                pieces.setdefault(name, {})[rank % per_node, start] = value
    return {name: torch.cat([parts[place] for place in sorted(parts)]) for name, parts in pieces.items()}


def _owned(
    undecided: Mapping[str, Tensor], names: list[str], owners: range, num_voters: int, column: int, num_columns: int
) -> dict[tuple[str, int, int], Tensor]:
    found = {}
    for index, name in enumerate(names):
        if name not in undecided:
            continue
        first, last = _bounds(index, undecided[name].numel(), column, num_columns)
        for owner, a, b in shards(Shape(index, last - first), num_voters):
            if owner in owners and b > a:
                found[name, a, b - a] = undecided[name][first + a : first + b].clone()
    return found
