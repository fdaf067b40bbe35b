"""Are the replicas still the same? Compared every so often, because a run that diverges in silence trains nothing.

A vote is exact: all ranks get the same verdicts and take the same step, so that parameters and optimizer state stay
equal bit for bit. What makes them differ is a fault: a flipped bit in memory, a kernel that differs, an initial state
that was not broadcast, a learning rate that one rank alone changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn

from distsign.agreement import ranks_in_words
from distsign.collectives import all_gather, gather_values, ranks_of
from distsign.digest import digest

__all__ = ["ReplicaCheck", "ReplicaError"]

_MAX_NAMED = 3
"""Entries that an error names; it counts the others."""


class ReplicaError(RuntimeError):
    """Parameters or optimizer state are not the same on all ranks.

    Attributes:
        entries: what differs, such as `parameter 'fc.weight'`, in order.
        minority: global ranks that differ from most others in some entry, in order; empty where no majority agrees.
    """

    def __init__(self, message: str, entries: Sequence[str], minority: Sequence[int]) -> None:
        super().__init__(message)
        self.entries = tuple(entries)
        self.minority = tuple(minority)


class ReplicaCheck:
    """Compare a digest of parameters and optimizer state between the ranks, every so many steps.

    As long as all is well a check costs one pass over the memory and an all-gather of 8 bytes a rank; only where a
    difference is found do names travel too. Compared are the parameters, each tensor of the optimizer's state, and the
    options of its groups (`lr` among them). Not compared is what differs by design: carries, which each rank keeps for
    itself, and buffers, which DDP copies from rank 0 at the next forward. Under `Join` with uneven inputs call
    `SignVoteState.sync_optimizer` first.

    Args:
        model: the module or its DDP wrapper.
        optimizer: whose state is compared too; None for the parameters alone.
        every: steps between two checks.
        process_group: whose ranks are compared; None is the default group.

    Raises:
        ValueError: if `every` is not a whole number of at least 1.

    Example:
        >>> net = torch.nn.Linear(2, 2)
        >>> replicas = ReplicaCheck(net, torch.optim.SGD(net.parameters(), lr=0.1), every=100)
        >>> replicas.step()  # after each optimizer.step(), on all ranks
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        every: int = 100,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a number of steps of at least 1, got {every!r}")
        self.every = every
        self._model = model
        self._optimizer = optimizer
        self._group = process_group
        self._num_steps = 0

    def step(self) -> None:
        """Count a step, and check if it is time. All ranks must call it after each of the optimizer's steps.

        Raises:
            ReplicaError: see `check`.
        """
        self._num_steps += 1
        if self._num_steps % self.every == 0:
            self.check()

    def check(self) -> None:
        """Compare now. All ranks must call it; waits for the device and for the other ranks.

        Raises:
            ReplicaError: on all ranks alike, naming what differs and the ranks in the minority.
        """
        found = self._digests()
        together = xxhash.xxh3_64_digest(repr(sorted(found.items())).encode())
        everyones = all_gather(torch.frombuffer(bytearray(together), dtype=torch.uint8), self._group)
        if (everyones != everyones[0]).any():
            raise _error(gather_values(found, self._group), ranks_of(self._group), self._num_steps)

    def _digests(self) -> dict[str, str]:
        """Return a digest of each entry by its name; one wait for the device in all."""
        tensors: dict[str, Tensor] = {}
        found: dict[str, str] = {}
        for name, value in self._entries():
            if isinstance(value, Tensor):
                tensors[name] = value
            else:
                found[name] = repr(value)
        # By device: Adam keeps its step on the CPU, beside state on the GPU.
        for device in {tensor.device for tensor in tensors.values()}:
            mine = {name: tensor for name, tensor in tensors.items() if tensor.device == device}
            values = torch.stack([digest(tensor) for tensor in mine.values()]).tolist()
            for (name, tensor), value in zip(mine.items(), values, strict=True):
                found[name] = f"{value & (2**64 - 1):016x} {tensor.dtype} {tuple(tensor.shape)}"
        return found

    def _entries(self) -> Iterator[tuple[str, Any]]:
        """Yield all that must be alike, with names that are the same on all ranks."""
        name_of = {}
        for name, parameter in self._model.named_parameters():
            name_of[parameter] = name.removeprefix("module.")
            yield f"parameter {name_of[parameter]!r}", parameter
        if self._optimizer is None:
            return
        for number, group in enumerate(self._optimizer.param_groups):
            for option, value in group.items():
                if option != "params":
                    # A confidence function, or whatever else an optimizer is given, may show its address.
                    known = isinstance(value, (Tensor, bool, int, float, str, tuple, type(None)))
                    yield f"option {option!r} of optimizer group {number}", value if known else type(value).__name__
            for position, parameter in enumerate(group["params"]):
                owner = name_of.get(parameter, f"number {position} of group {number}")
                for key, value in self._optimizer.state.get(parameter, {}).items():
                    yield f"optimizer state {key!r} of parameter {owner!r}", value


def _error(everyones: Sequence[dict[str, str]], ranks: Sequence[int], num_steps: int) -> ReplicaError:
    """Say what differs between the ranks' entries."""
    names = list(dict.fromkeys(name for entries in everyones for name in entries))
    differing, minority, words = [], set(), []
    for name in names:
        values = [entries.get(name) for entries in everyones]
        if len(set(values)) == 1:
            continue
        (common, count), *others = Counter(values).most_common()
        odd = [rank for rank, value in zip(ranks, values, strict=True) if value != common]
        tied = others[0][1] == count
        differing.append(name)
        minority |= set() if tied else set(odd)
        where = "between the ranks, no majority of which agrees" if tied else f"on {ranks_in_words(odd)}"
        words.append(f"{name} {where}")
    more = f" and {len(words) - _MAX_NAMED} entries more" if len(words) > _MAX_NAMED else ""
    return ReplicaError(
        f"the replicas differ, found {num_steps} steps after the check began to count: "
        f"{'; '.join(words[:_MAX_NAMED])}{more}. All {len(ranks)} ranks must have the same bits: go on from a "
        "checkpoint of before, and look at the memory and the software of the ranks named",
        differing,
        sorted(minority),
    )
