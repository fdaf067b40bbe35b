"""Do all ranks want the same? Compared once, before the first exchange, because a difference would end in a hang."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["ranks_in_words", "require_agreement"]


def require_agreement(options: Sequence[Mapping[str, object]]) -> None:
    """Raise unless all ranks have the same options.

    Args:
        options: per rank, names and values, the values comparable with `==`.

    Raises:
        ValueError: naming each option that differs, with the ranks and their values.

    Example:
        >>> require_agreement([{"margin": 1}, {"margin": 2}, {"margin": 1}])
        Traceback (most recent call last):
        ...
        ValueError: the ranks' options differ: margin is 1 on ranks 0 and 2, but 2 on rank 1. Start all with the same
    """
    names = list(dict.fromkeys(name for rank in options for name in rank))
    differences = []
    for name in names:
        ranks_by_value: dict[str, list[int]] = {}
        for rank, values in enumerate(options):
            ranks_by_value.setdefault(repr(values[name]) if name in values else "missing", []).append(rank)
        if len(ranks_by_value) > 1:
            said = [f"{value} on {ranks_in_words(ranks)}" for value, ranks in ranks_by_value.items()]
            differences.append(f"{name} is {', but '.join(said)}")
    if differences:
        raise ValueError(f"the ranks' options differ: {'; '.join(differences)}. Start all with the same")


def ranks_in_words(ranks: Sequence[int]) -> str:
    """Return ranks as an error names them: `rank 1`, or `ranks 0, 1 and 3`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
