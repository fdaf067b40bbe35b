"""Nests of dicts, lists and tuples, and the tensors in them, so that each can travel in its own way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["put_tensors", "take_tensors"]


@dataclass(frozen=True)
class _Place:
    """Stands in a nest for a tensor that travels apart."""

    index: int


def take_tensors(value: Any, tensors: list[Tensor]) -> Any:
    """Return the nest with placeholders for its tensors, which are appended to `tensors`."""
    if isinstance(value, Tensor):
        tensors.append(value.detach().contiguous())
        return _Place(len(tensors) - 1)
    if isinstance(value, dict):
        return {key: take_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([take_tensors(item, tensors) for item in value])
    return value


def put_tensors(nest: Any, tensors: list[Tensor]) -> Any:
    """Undo `take_tensors`."""
    if isinstance(nest, _Place):
        return tensors[nest.index]
    if isinstance(nest, dict):
        return {key: put_tensors(item, tensors) for key, item in nest.items()}
    if isinstance(nest, (list, tuple)):
        return type(nest)([put_tensors(item, tensors) for item in nest])
    return nest
