"""What the simulator knows of a model: its parameters, when their gradients are ready, and DDP's buckets of them."""

from __future__ import annotations

import math
import pkgutil
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from distsign.layout import Shape
from distsign.simulator.presets import PRESETS, Parameter
from distsign.simulator.units import nearest

__all__ = ["Bucket", "Model", "load_model"]

FIRST_BUCKET_BYTES = 1 << 20
DEFAULT_BUCKET_MB = 25.0


@dataclass(frozen=True)
class Bucket:
    """A bucket of DDP's.

    Args:
        rows: numbers of its parameters in the model's order.
        num_elements: of all of them.
        ready: share of backward after which all their gradients are there.
    """

    rows: tuple[int, ...]
    num_elements: int
    ready: float


@dataclass(frozen=True)
class Model:
    """A model as the simulator sees it.

    Args:
        name: for tables.
        parameters: in the order of `named_parameters()`.

    Raises:
        ValueError: if it has no parameters.

    Example:
        >>> Model.of([4096, 64]).num_elements
        4160
        >>> load_model("resnet18").num_elements
        11689512
    """

    name: str
    parameters: tuple[Parameter, ...]

    def __post_init__(self) -> None:
        if not any(p.num_elements for p in self.parameters):
            raise ValueError(f"the model {self.name!r} has no parameters: nothing would be exchanged")

    @classmethod
    def of(cls, model: nn.Module | Iterable[int | Sequence[int]], name: str = "model") -> Model:
        """Return the model of a module (those of its parameters that need a gradient), or of sizes or shapes."""
        if isinstance(model, nn.Module):
            shapes = [(k, tuple(p.shape)) for k, p in model.named_parameters() if p.requires_grad]
            return cls(name, tuple(Parameter(key, shape) for key, shape in shapes))
        shapes = [(str(k), (n,) if isinstance(n, int) else tuple(n)) for k, n in enumerate(model)]
        return cls(name, tuple(Parameter(key, shape) for key, shape in shapes))

    @cached_property
    def num_elements(self) -> int:
        """Parameters in all."""
        return sum(p.num_elements for p in self.parameters)

    @cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """The parameters as layouts see them."""
        return tuple(Shape(row, p.num_elements) for row, p in enumerate(self.parameters))

    def buckets(self, bucket_mb: float | None = None, bytes_per_element: int = 4) -> list[Bucket]:
        """Return the buckets that DDP forms from its second step on, in the order in which they are exchanged.

        Gradients are taken in reverse order of registration; a bucket is closed once it holds `bucket_mb` or more.

        Args:
            bucket_mb: DDP's `bucket_cap_mb` (MiB); None is its default, 25 MiB after a first bucket of 1 MiB.
            bytes_per_element: of the gradients.

        Raises:
            ValueError: if `bucket_mb` is not above zero, or infinite.

        Example:
            >>> [bucket.rows for bucket in Model.of([1 << 20, 1 << 17, 1 << 18]).buckets()]
            [(2,), (1, 0)]
        """
        if bucket_mb is not None and not 0 < bucket_mb < math.inf:
            raise ValueError(f"a bucket's size must be a number of MiB above zero, got {bucket_mb:g}")
        limit = (DEFAULT_BUCKET_MB if bucket_mb is None else bucket_mb) * (1 << 20)
        limits = [int(limit)] if bucket_mb is not None else [FIRST_BUCKET_BYTES, int(limit)]
        found: list[Bucket] = []
        rows: list[int] = []
        size, done = 0, 0.0
        for row in reversed(range(len(self.parameters))):
            rows.append(row)
            size += self.parameters[row].num_elements
            done += self._work[row]
            if size * bytes_per_element >= limits[min(len(found), len(limits) - 1)] or row == 0:
                found.append(Bucket(tuple(rows), size, min(1.0, done)))
                rows, size = [], 0
        return found

    @cached_property
    def _work(self) -> list[float]:
        """Return each parameter's share of backward: its multiplications, and a little for touching it at all."""
        work = [p.num_elements * (p.uses + 1e-3) for p in self.parameters]
        total = sum(work)
        return [value / total for value in work]


def load_model(text: str) -> Model:
    """Return a model by name, by its sizes, or from a function.

    Args:
        text: a preset (`resnet50`); sizes with commas (`1000000,2048,64`; `12*1049600` for twelve alike); a
            `module:function` that returns a module, or sizes or shapes; or a name that torchvision or timm knows, where
            they are installed.

    Raises:
        ValueError: if none of them has it; the nearest names are given.

    Example:
        >>> load_model("12*1000,10").num_elements
        12010
    """
    if text in PRESETS:
        return Model(text, tuple(PRESETS[text]()))
    if re.fullmatch(r"[\d*,_\s]+", text):
        return Model.of(_sizes(text), text)
    if ":" in text:
        return _from_function(text)
    built = _from_zoo(text)
    if built is not None:
        return Model.of(built, text)
    raise ValueError(nearest("model", text, PRESETS))


def _sizes(text: str) -> list[int]:
    sizes: list[int] = []
    for part in text.split(","):
        times, _, size = part.rpartition("*")
        try:
            sizes += [int(size)] * int(times or 1)
        except ValueError:
            raise ValueError(
                f"cannot read the sizes {text!r}: expected numbers with commas, such as 1000000,64 or 12*1049600,10"
            ) from None
    return sizes


def _from_function(text: str) -> Model:
    try:
        function = pkgutil.resolve_name(text)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"cannot find the model {text!r}, expected module:function: {error}") from error
    if not callable(function):
        raise ValueError(f"{text} is no function but {type(function).__name__}: name one that returns a model")
    try:
        with torch.device("meta"):
            made: Any = function()
    except Exception as error:  # whatever the user's function raises
        raise ValueError(
            f"{text} cannot be called without arguments, or failed: {type(error).__name__}: {error}; name a function "
            "that builds the model by itself"
        ) from error
    try:
        return Model.of(made, text)
    except TypeError as error:
        raise ValueError(
            f"{text} returned {type(made).__name__}: expected a torch.nn.Module, or a list of sizes or shapes"
        ) from error


def _from_zoo(name: str) -> nn.Module | None:
    """Return a model of torchvision or timm on the meta device, without weights; None where neither has it."""
    with torch.device("meta"):
        if find_spec("torchvision") is not None:
            import torchvision

            if name in torchvision.models.list_models():
                made: nn.Module = torchvision.models.get_model(name, weights=None)
                return made
        if find_spec("timm") is not None:
            import timm

            if timm.is_model(name):
                return timm.create_model(name, pretrained=False)  # type: ignore[no-any-return]
    return None
