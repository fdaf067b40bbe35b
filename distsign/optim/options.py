"""What the options of an optimizer may be, and the words for those they may not."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from distsign.confidence import Confidence
from distsign.optim.arithmetic import Scalar

__all__ = [
    "Group",
    "VoteState",
    "check_confidence",
    "check_flag",
    "check_lr",
    "check_number",
    "check_params",
    "check_vote_state",
    "describe",
    "name_confidence",
]

Group: TypeAlias = dict[str, Any]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class VoteState(Protocol):
    """What an optimizer needs from the state of the vote; `SignVoteState` has it."""

    def track(self, named_parameters: Iterable[tuple[str, Tensor]], /) -> object:
        """Take the names of the parameters, which the state's checkpoints are keyed by."""

    def lr_scale(self, param: Tensor, /) -> Scalar:
        """Return the factor on the sign step's learning rate for `param` at this step."""


def _in_range(value: object, low: float, high: float) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and low <= float(value) < high


def check_number(
    label: str, name: str, value: object, meaning: str, *, at_least: float = 0.0, below: float = math.inf
) -> None:
    """Raise a `ValueError` unless `value` is a number in [at_least, below)."""
    if not _in_range(value, at_least, below):
        raise ValueError(f"{label}: {name} must be in [{at_least:g}, {below:g}), got {value!r}: {meaning}")


def check_flag(label: str, name: str, value: object) -> None:
    """Raise a `ValueError` unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{label}: {name} must be True or False, got {value!r}")


def check_lr(label: str, lr: object) -> None:
    """Raise a `ValueError` unless `lr` is a number in [0, inf) or a tensor of one such number."""
    if isinstance(lr, Tensor) and (lr.numel() != 1 or not lr.is_floating_point()):
        raise ValueError(
            f"{label}: lr as a tensor must hold one floating-point number, got shape {tuple(lr.shape)} of {lr.dtype}: "
            "pass torch.tensor(0.001) or 0.001"
        )
    if not _in_range(lr.item() if isinstance(lr, Tensor) else lr, 0.0, math.inf):
        raise ValueError(f"{label}: lr must be a number or a tensor in [0, inf), got {lr!r}: pass for instance 0.001")


def check_confidence(label: str, confidence: object, *, l2: bool, voted: bool) -> None:
    """Raise a `ValueError` unless the confidence can be used.

    Args:
        label: the optimizer's name.
        confidence: what the user gave.
        l2: whether weight decay is added to the gradient.
        voted: whether the gradient is known to be a verdict.
    """
    if confidence is None:
        if l2:
            raise ValueError(
                f"{label}: weight decay as L2 (decoupled=False) needs a confidence, got confidence=None: added to a "
                "verdict it would turn every abstention into a vote for decay. Keep decoupled=True; or under DDP pass "
                "l2= to SignVoteState; or on one worker pass a confidence, FixedConfidence(0.0) for plain signs"
            )
        return
    if not isinstance(confidence, Confidence):
        raise ValueError(
            f"{label}: confidence must be None or a confidence function such as FixedConfidence(5e-4), "
            f"got {confidence!r}"
        )
    if voted:
        raise ValueError(
            f"{label}: confidence={confidence!r} and vote_state were both given, but the gradient is then a verdict "
            "already: whoever sees the raw gradient applies the confidence, once. Pass it to SignVoteState and leave "
            "it out here"
        )


def check_vote_state(label: str, vote_state: object) -> None:
    """Raise a `ValueError` unless `vote_state` is None or looks like a `SignVoteState`."""
    if vote_state is not None and not (hasattr(vote_state, "track") and hasattr(vote_state, "lr_scale")):
        raise ValueError(
            f"{label}: vote_state must be a SignVoteState, got {vote_state!r}: "
            "pass the state that was given to model.register_comm_hook(state, sign_vote_hook)"
        )


def check_params(label: str, group: Group, *, named: bool) -> None:
    """Raise a `ValueError` unless the group's parameters can be optimized, and have names if they must."""
    if named and "param_names" not in group:
        raise ValueError(
            f"{label}: vote_state needs the names of the parameters, got parameters without names: "
            "pass model.named_parameters() in place of model.parameters()"
        )
    for index, p in enumerate(group["params"]):
        if p.dtype not in _DTYPES:
            what_to_do = (
                "the sign of a complex number is not in {-1, 0, +1}; make the parameter real and use "
                "torch.view_as_complex(p) in the model"
            )
            raise ValueError(
                f"{label}: parameters must be float16, bfloat16, float32 or float64, got {p.dtype} for "
                f"{describe(group, index)}: {what_to_do if p.is_complex() else 'leave it out or convert it'}"
            )
        if p.layout != torch.strided:
            raise ValueError(
                f"{label}: parameters must be dense, got {p.layout} for {describe(group, index)}: "
                "convert it with to_dense()"
            )


def describe(group: Group, index: int) -> str:
    """Return words for one parameter of a group: its name, where there is one, and its shape."""
    name = repr(group["param_names"][index]) if "param_names" in group else f"parameter {index}"
    return f"{name} of shape {tuple(group['params'][index].shape)}"


def name_confidence(confidence: Confidence | None) -> str | None:
    """Return a confidence function's words in a checkpoint; a function of one's own needs a `repr` of its options."""
    return None if confidence is None else repr(confidence)
