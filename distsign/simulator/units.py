"""Quantities as people write them: `1gbit`, `25Gb/s`, `100MB/s`, `50us`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["format_bandwidth", "format_bytes", "format_seconds", "nearest", "parse_bandwidth", "parse_seconds"]

_NUMBER = r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)"
_BANDWIDTH = re.compile(_NUMBER + r"\s*([kmgt]?i?)(bits?|bytes?|b)(?:/s|ps|/sec)?", re.IGNORECASE)
_SECONDS = re.compile(_NUMBER + r"\s*(ns|us|µs|ms|s)", re.IGNORECASE)
_PREFIX = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30, "ti": 2.0**40}
_SECOND = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}


def parse_bandwidth(text: str) -> float:
    """Return bytes per second.

    Args:
        text: a number and a unit. `bit` and `b` are bits, `byte` and `B` are bytes; `k`, `M`, `G`, `T` are decimal,
            `Ki` and so on binary; `/s` or `ps` may follow.

    Raises:
        ValueError: if it cannot be read, or is not above zero.

    Example:
        >>> parse_bandwidth("1gbit"), parse_bandwidth("25Gb/s"), parse_bandwidth("100MB/s")
        (125000000.0, 3125000000.0, 100000000.0)
    """
    match = _BANDWIDTH.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"cannot read the bandwidth {text!r}: expected a number and a unit such as 1gbit, 25Gb/s or 100MB/s"
        )
    number, prefix, unit = match.groups()
    is_bytes = unit.lower().startswith("byte") or unit == "B"
    value = float(number) * _PREFIX[prefix.lower()] / (1 if is_bytes else 8)
    if not 0 < value < math.inf:
        raise ValueError(f"a bandwidth must be above zero, got {text!r}")
    return value


def parse_seconds(text: str) -> float:
    """Return seconds.

    Args:
        text: a number and one of ns, us, ms, s.

    Raises:
        ValueError: if it cannot be read, or is below zero.

    Example:
        >>> parse_seconds("50us"), parse_seconds("120 ms")
        (5e-05, 0.12)
    """
    match = _SECONDS.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"cannot read the time {text!r}: expected a number and a unit such as 50us, 120ms or 1.5s")
    # Divided, so that 50us is the float that is written 5e-05.
    value = float(match[1]) / round(1 / _SECOND[match[2].lower()])
    if not 0 <= value < math.inf:
        raise ValueError(f"a time must be zero or more, got {text!r}")
    return value


def format_bandwidth(bytes_per_s: float) -> str:
    """Return a bandwidth as people read it, in bits.

    Example:
        >>> format_bandwidth(125e6), format_bandwidth(6.25e6)
        ('1 Gbit/s', '50 Mbit/s')
    """
    return f"{_scaled(8 * bytes_per_s)}bit/s"


def format_bytes(num_bytes: float) -> str:
    """Return bytes with three digits.

    Example:
        >>> format_bytes(44_739_242), format_bytes(12)
        ('44.7 MB', '12 B')
    """
    return f"{_scaled(num_bytes)}B"


def format_seconds(seconds: float) -> str:
    """Return a time with three digits.

    Example:
        >>> format_seconds(0.0123), format_seconds(75)
        ('12.3 ms', '75 s')
    """
    for unit in ("s", "ms", "us"):
        if abs(seconds) >= _SECOND[unit]:
            break
    return f"{seconds / _SECOND[unit]:.3g} {unit}" if abs(seconds) < 1000 else f"{seconds:,.0f} s"


def _scaled(value: float) -> str:
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * factor:
            return f"{value / factor:.3g} {prefix}" if value < 1e15 else f"{value / factor:,.0f} {prefix}"
    return f"{value:.3g} "


def nearest(what: str, name: str, known: Iterable[str]) -> str:
    """Return the message for an unknown name, with the names that are nearest to it.

    Example:
        >>> nearest("scheme", "fp23", ["fp32", "planes"])
        "unknown scheme 'fp23': did you mean fp32? Known: fp32, planes"
    """
    names = list(known)
    close = get_close_matches(name.lower(), names, n=3, cutoff=0.5)
    meant = f"did you mean {' or '.join(close)}? " if close else ""
    return f"unknown {what} {name!r}: {meant}Known: {', '.join(names)}"
