"""In-place arithmetic on lists of tensors, with factors that may live on a device and may be gated there.

Every function takes a factor as a float or as a tensor of no dimensions. A gate, `ok`, is None or a bool tensor of no
dimensions on the tensors' device: the host never looks at it, so a step can be skipped without waiting for the device.
"""

from __future__ import annotations

from typing import TypeAlias, cast

import torch
from torch import Tensor

__all__ = ["Scalar", "add_", "blend_", "gated", "on_host", "scale_", "wide_dtype"]

Scalar: TypeAlias = float | Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which parameters of `dtype` are averaged and updated: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def on_host(value: Scalar) -> Scalar:
    """Return a number in the host's memory as a float, so that it can be an argument to a kernel on any device."""
    return cast(float, value.item()) if isinstance(value, Tensor) and value.device.type == "cpu" else value


def gated(value: Scalar, ok: Tensor | None, otherwise: float, dtype: torch.dtype, device: torch.device) -> Scalar:
    """Return `value`, or where there is a gate, a tensor that is `otherwise` if the gate is false."""
    if ok is None and not isinstance(value, Tensor):
        return value
    if not isinstance(value, Tensor):
        value = torch.full((), value, dtype=dtype, device=device)
    value = value.to(device=device, dtype=dtype, non_blocking=True).reshape(())
    return value if ok is None else torch.where(ok, value, otherwise)


def scale_(tensors: list[Tensor], factor: Scalar) -> None:
    """Multiply in place, `t = factor * t`."""
    torch._foreach_mul_(tensors, factor)


def add_(tensors: list[Tensor], others: list[Tensor], factor: Scalar) -> None:
    """Add in place, `t = t + factor * o`."""
    if isinstance(factor, Tensor):
        torch._foreach_add_(tensors, torch._foreach_mul(others, factor))
    else:
        torch._foreach_add_(tensors, others, alpha=factor)


def blend_(averages: list[Tensor], values: list[Tensor], beta: float, ok: Tensor | None) -> None:
    """Update exponential averages in place, `a = beta * a + (1 - beta) * x`.

    Args:
        averages: float32 or float64, changed in place.
        values: x, like `averages`.
        beta: decay, in [0, 1).
        ok: None, or the gate: where it is false the averages stay as they are, whatever the values hold.
    """
    if ok is not None:
        values = [torch.where(ok, value, 0.0) for value in values]
    scale_(averages, gated(beta, ok, 1.0, averages[0].dtype, averages[0].device))
    add_(averages, values, 1.0 - beta)
