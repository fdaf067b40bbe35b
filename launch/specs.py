"""Things by name with values: `NAME:KEY=VALUE,...`, as `--confidence` and `--hook` take them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distsign.simulator.units import nearest


def make_from_spec(kind: str, spec: str, known: Mapping[str, Callable[..., Any]], others: Sequence[str] = ()) -> Any:
    """Make what a spec names.

    Args:
        kind: what it is, for errors.
        spec: `NAME` or `NAME:KEY=VALUE,...`; values are numbers, whole ones where those by default are.
        known: by name, what makes it; its parameters are the keys.
        others: further names that errors mention.

    Raises:
        ValueError: the name or a key is unknown, a value is no number or out of range.

    Example:
        >>> make_from_spec("pair", "both:a=1,b=2.5", {"both": lambda a=0, b=0.0: (a, b)})
        (1, 2.5)
    """
    name, _, values = spec.partition(":")
    if name not in known:
        raise ValueError(nearest(kind, name, [*known, *others]))
    keys = inspect.signature(known[name]).parameters
    arguments: dict[str, float] = {}
    for item in filter(None, values.split(",")):
        key, _, text = item.partition("=")
        if key not in keys:
            has = f"expected {', '.join(keys)}, as in {example_of(name, known[name])}" if keys else "it has no values"
            raise ValueError(f"{name} has no {key!r}: {has}")
        kind_of_number = int if isinstance(keys[key].default, int) else float
        try:
            arguments[key] = kind_of_number(text)
        except ValueError as error:
            what = "a whole number" if kind_of_number is int else "a number"
            raise ValueError(f"{key} must be {what}, got {text!r}, as in {example_of(name, known[name])}") from error
    return known[name](**arguments)


def example_of(name: str, make: Callable[..., Any]) -> str:
    """Return a spec with all values as they are by default.

    Example:
        >>> example_of("top-k", lambda density=0.001: None)
        'top-k:density=0.001'
    """
    values = ",".join(f"{key}={each.default:g}" for key, each in inspect.signature(make).parameters.items())
    return f"{name}:{values}" if values else name
