"""Walk over parameters in pieces that stay in the cache, and look for non-finite numbers at the price of one read."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["finite_on_devices", "finite_on_host", "tile_limit", "tiles"]

# An optimizer step is a handful of element-wise operations over the same few tensors. Over whole tensors each of them
# goes to main memory; over 1 MiB of float32 at a time only the first does. On two cores with 12.6 M parameters that
# made `p -= lr * sign(g)` 3.9 and the step with momentum 2.6 times as fast. Smaller tiles leave the second core idle.
_HOST_TILE = 1 << 18
# A GPU wants few launches; the limit only bounds the temporaries, to 64 MiB of float32 each.
_DEVICE_TILE = 1 << 24


def tile_limit(device: torch.device) -> int:
    """Return how many elements one tile holds on `device`, about."""
    return _HOST_TILE if device.type == "cpu" else _DEVICE_TILE


def tiles(rows: Iterable[Sequence[Tensor]], limit: int) -> Iterator[list[list[Tensor]]]:
    """Group rows of same-shaped tensors into tiles of about `limit` elements.

    A row that is larger than `limit` and contiguous is cut into flat slices, one tile each; smaller rows are put
    together until they reach the limit. The tensors of a tile are the given ones or views of them, so that writing to
    them in place writes to the rows.

    Args:
        rows: each row holds the tensors that belong together, for instance parameter, gradient and momentum. It is read
            lazily, one row ahead of the tile at most, so that a generator may compute a column on the way.
        limit: elements per tile, at least 1.

    Yields:
        A list of columns: `columns[j][i]` is the j-th tensor of the i-th row, or of a slice of it.

    Example:
        >>> [[len(t) for t in column] for (column,) in tiles([[torch.zeros(2)], [torch.zeros(5)]], limit=4)]
        [[4], [1], [2]]
    """
    pending: list[Sequence[Tensor]] = []
    num_pending = 0
    for row in rows:
        numel = row[0].numel()
        if numel > limit and all(tensor.is_contiguous() for tensor in row):
            flat = [tensor.view(-1) for tensor in row]
            for start in range(0, numel, limit):
                yield [[tensor[start : start + limit]] for tensor in flat]
            continue
        pending.append(row)
        num_pending += numel
        if num_pending >= limit:
            yield [list(column) for column in zip(*pending, strict=True)]
            pending, num_pending = [], 0
    if pending:
        yield [list(column) for column in zip(*pending, strict=True)]


def finite_on_host(grads: Iterable[Tensor]) -> bool:
    """Return whether every number in `grads` is finite, decided on the host.

    `aminmax` carries NaN along, and reading both extremes costs half of a copy of the tensor where `isfinite().all()`
    costs 14 copies and the infinity norm 4.

    Args:
        grads: dense floating-point tensors of at least one element each, any shape and dtype.
    """
    for grad in grads:
        low, high = torch.aminmax(grad)
        if not (math.isfinite(low.item()) and math.isfinite(high.item())):
            return False
    return True


def finite_on_devices(grads: Iterable[Tensor]) -> dict[torch.device, Tensor]:
    """Return for each device of `grads` a flag, the same on all: is every number in all of `grads` finite?

    Nothing waits for the host, unless some of `grads` lie on the CPU and others do not.

    Args:
        grads: dense floating-point tensors of at least one element each, any shape and dtype.

    Returns:
        A bool tensor of no dimensions per device.
    """
    by_device: dict[torch.device, list[Tensor]] = defaultdict(list)
    for grad in grads:
        by_device[grad.device].append(grad)
    flags = [torch.stack(torch._foreach_norm(local, math.inf)).isfinite().all() for local in by_device.values()]
    return {
        device: torch.stack([flag.to(device, non_blocking=device.type != "cpu") for flag in flags]).all()
        for device in by_device
    }
