"""The states of a vote for another number of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distsign.layout import Shape, shards

__all__ = ["reshard"]


def reshard(states: Sequence[Mapping[str, Any]], world_size: int) -> list[dict[str, Any]]:
    """Turn the states of all ranks of a run into those of a run with another number of ranks.

    What the carries hold is conserved in sum: rank j of the new run takes over the unsent gradients of the old ranks
    j, j + world_size, ...; new ranks begin with none, and with the mean of squares of rank `j % len(states)`. Undecided
    votes go to the new owners of their components. Standing ballots are dropped: their workers are gone.

    Args:
        states: `SignVoteState.state_dict()` of every old rank, in order.
        world_size: number of new ranks.

    Returns:
        One state a new rank, for `SignVoteState.load_state_dict`.

    Raises:
        ValueError: if there is no state, or they are not those of one run without nodes.
    """
    if not states or world_size < 1:
        raise ValueError(
            f"reshard needs the states of all old ranks and at least one new rank, got {len(states)} states and "
            f"world_size={world_size}"
        )
    voters = {state["num_voters"] for state in states}
    if voters != {len(states)}:
        raise ValueError(
            f"reshard needs the states of all ranks of one run, without the hierarchical exchange: got {len(states)} "
            f"states of a vote among {sorted(voters)}"
        )
    undecided = _undecided(states)
    new: list[dict[str, Any]] = []
    for rank in range(world_size):
        heirs = list(states[rank::world_size]) or [states[rank % len(states)]]
        voter = {
            name: _voter([heir["voter"][name] for heir in heirs], fresh=rank >= len(states))
            for name in states[0]["voter"]
        }
        nothing = dict.fromkeys(states[0]["traffic"], 0)
        new.append(
            {
                **states[0],
                "traffic": nothing if rank >= len(states) else states[rank]["traffic"],
                "voter": voter,
                "owner": _owned(undecided, list(states[0]["voter"]), rank, world_size),
                "num_voters": world_size,
            }
        )
    return new


def _voter(kept: list[Mapping[str, Tensor]], *, fresh: bool) -> dict[str, Tensor]:
    """Merge what several old ranks remember of a parameter into what one new rank does."""
    merged = {"stats": kept[0]["stats"].clone()}
    if "carry" in kept[0]:
        total = torch.stack([each["carry"].float() for each in kept]).sum(0)
        merged["carry"] = (torch.zeros_like(total) if fresh else total).to(kept[0]["carry"].dtype)
    if "square" in kept[0]:
        merged["square"] = torch.stack([each["square"] for each in kept]).mean(0)
    return merged


def _undecided(states: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return the undecided votes of each parameter, int16 `[num_elements]`, put together from all owners."""
    pieces: dict[str, dict[int, Tensor]] = {}
    for state in states:
        for (name, start, _), value in state["owner"].items():
            if value.dtype == torch.int16:  # standing ballots are planes, uint8
                pieces.setdefault(name, {})[start] = value
    return {name: torch.cat([parts[start] for start in sorted(parts)]) for name, parts in pieces.items()}


def _owned(
    undecided: Mapping[str, Tensor], names: list[str], rank: int, world_size: int
) -> dict[tuple[str, int, int], Tensor]:
    found = {}
    for index, name in enumerate(names):
        if name in undecided:
            for owner, a, b in shards(Shape(index, undecided[name].numel()), world_size):
                if owner == rank:
                    found[name, a, b - a] = undecided[name][a:b].clone()
    return found
