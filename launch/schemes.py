"""Confidence functions and optimizers by name, and the one place that turns options into them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from distsign import (
    AdaptiveConfidence,
    FixedConfidence,
    RMSConfidence,
    SignAdam,
    SignAdamPP,
    SignSGD,
    Signum,
    SignVoteState,
    TargetDensity,
)
from distsign.confidence import Confidence
from launch.specs import make_from_spec

if TYPE_CHECKING:
    from launch.options import TrainOptions

CONFIDENCES: dict[str, Callable[..., Confidence]] = {
    "fixed": FixedConfidence,
    "adaptive": AdaptiveConfidence,
    "rms": RMSConfidence,
    "target-density": TargetDensity,
}
"""Confidence functions by the name that `--confidence` knows."""


def make_confidence(spec: str) -> Confidence:
    """Make a confidence function from `NAME` or `NAME:KEY=VALUE,...`.

    Raises:
        ValueError: the name or a key is unknown, a value is no number or out of range.

    Example:
        >>> make_confidence("adaptive:beta2=2")
        AdaptiveConfidence(beta1=0.9, beta2=2.0)
    """
    confidence: Confidence = make_from_spec("confidence function", spec, CONFIDENCES)
    return confidence


@dataclass(frozen=True)
class OptimizerEntry:
    """An optimizer by name.

    Attributes:
        make: its class.
        momentum: which of its arguments `--momentum` is; None where it has none.
        own: whether it is one of distsign's, which take `vote_state` and `confidence`.
        l2: whether its weight decay is added to the gradient, which under a vote is a verdict.
    """

    make: Callable[..., Optimizer]
    momentum: str | None = None
    own: bool = False
    l2: bool = False


OPTIMIZERS = {
    "sign-adam-pp": OptimizerEntry(SignAdamPP, momentum="momentum", own=True),
    "sign-adam": OptimizerEntry(SignAdam, momentum="betas", own=True),
    "sign-sgd": OptimizerEntry(SignSGD, own=True),
    "signum": OptimizerEntry(Signum, momentum="momentum", own=True),
    "adam": OptimizerEntry(torch.optim.Adam, momentum="betas", l2=True),
    "adamw": OptimizerEntry(torch.optim.AdamW, momentum="betas"),
    "sgd": OptimizerEntry(torch.optim.SGD, momentum="momentum", l2=True),
}
"""Optimizers by the name that `--optimizer` knows."""


def make_optimizer(model: nn.Module, options: "TrainOptions", vote_state: SignVoteState | None) -> Optimizer:
    """Make the optimizer of a run, and give the vote its parameters' names.

    Args:
        model: the model as DDP wraps it.
        options: those of the run.
        vote_state: the vote's, where there is one.

    Raises:
        ValueError: the optimizer refuses a value.
    """
    entry = OPTIMIZERS[options.optimizer]
    arguments: dict[str, Any] = {"lr": options.lr, "weight_decay": options.weight_decay}
    if options.momentum is not None:
        assert entry.momentum is not None
        arguments[entry.momentum] = options.momentum if entry.momentum != "betas" else (options.momentum, 0.999)
    if entry.own:
        arguments["vote_state"] = vote_state
        if vote_state is None and options.confidence is not None:
            arguments["confidence"] = make_confidence(options.confidence)
    elif vote_state is not None:
        vote_state.track(model.named_parameters())
    return entry.make(model.named_parameters(), **arguments)
