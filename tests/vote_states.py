"""What the states of all ranks of a vote hold together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def undecided(states: list[dict[str, Any]], name: str, per_node: int = 1) -> Tensor:
    """Return the undecided votes on a parameter, put together from the owners in all columns."""
    parts = {
        (rank % per_node, start): value
        for rank, state in enumerate(states)
        for (found, start, _), value in state["owner"].items()
        if found == name
    }
    return torch.cat([parts[place] for place in sorted(parts)])


def unsent(states: list[dict[str, Any]], name: str, per_node: int = 1) -> Tensor:
    """Return the sum over voters, ranks or nodes, of what they have not sent of a parameter; float64, flat."""
    nodes = [states[k : k + per_node] for k in range(0, len(states), per_node)]
    whole = [torch.cat([state["voter"][name]["carry"].double().flatten() for state in node]) for node in nodes]
    return torch.stack(whole).sum(0)
