"""Confidence functions and optimizers by name, and the one place that turns options into them."""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
        decays: whether it has a weight decay at all.
        package: that has to be installed for it, beside torch.
    """

    make: Callable[..., Optimizer]
    momentum: str | None = None
    own: bool = False
    l2: bool = False
    decays: bool = True
    package: str | None = None

    def require_package(self) -> None:
        """Refuse an optimizer whose package is missing, without importing it: that takes seconds.

        Raises:
            ValueError: names the package and how to get it.
        """
        if self.package is not None and importlib.util.find_spec(self.package.replace("-", "_")) is None:
            raise ValueError(f"needs the package {self.package}, which is missing: pip install 'distsign[launch]'")


def _of_pytorch_optimizer(name: str, **differing: Any) -> OptimizerEntry:
    """Return the entry of a class of the package pytorch-optimizer, which is imported where one is made."""

    def make(*args: Any, **kwargs: Any) -> Optimizer:
        made: Optimizer = getattr(importlib.import_module("pytorch_optimizer"), name)(*args, **kwargs)
        return made

    return OptimizerEntry(make, package="pytorch-optimizer", **differing)


OPTIMIZERS = {
    "sign-adam-pp": OptimizerEntry(SignAdamPP, momentum="momentum", own=True),
    "sign-adam": OptimizerEntry(SignAdam, momentum="betas", own=True),
    "sign-sgd": OptimizerEntry(SignSGD, own=True),
    "signum": OptimizerEntry(Signum, momentum="momentum", own=True),
    "adam": OptimizerEntry(torch.optim.Adam, momentum="betas", l2=True),
    "adamw": OptimizerEntry(torch.optim.AdamW, momentum="betas"),
    "sgd": OptimizerEntry(torch.optim.SGD, momentum="momentum", l2=True),
    "amsgrad": OptimizerEntry(partial(torch.optim.Adam, amsgrad=True), momentum="betas", l2=True),
    "nadam": OptimizerEntry(torch.optim.NAdam, momentum="betas", l2=True),
    "adamax": OptimizerEntry(torch.optim.Adamax, momentum="betas", l2=True),
    "adagrad": OptimizerEntry(torch.optim.Adagrad, l2=True),
    "adadelta": OptimizerEntry(torch.optim.Adadelta, l2=True),
    "rmsprop": OptimizerEntry(torch.optim.RMSprop, momentum="momentum", l2=True),
    "rprop": OptimizerEntry(torch.optim.Rprop, decays=False),
    "adabound": _of_pytorch_optimizer("AdaBound", momentum="betas"),
    "msvag": _of_pytorch_optimizer("MSVAG", momentum="beta", decays=False),
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
    arguments: dict[str, Any] = {"lr": options.lr}
    if entry.decays:
        arguments["weight_decay"] = options.weight_decay
    if options.momentum is not None:
        assert entry.momentum is not None
        arguments[entry.momentum] = options.momentum if entry.momentum != "betas" else (options.momentum, 0.999)
    if entry.own:
        arguments["vote_state"] = vote_state
        if vote_state is None and options.confidence is not None:
            arguments["confidence"] = make_confidence(options.confidence)
        if vote_state is None and options.l2:
            arguments |= {"weight_decay": options.l2, "decoupled": False}
    elif vote_state is not None:
        vote_state.track(model.named_parameters())
    return entry.make(model.named_parameters(), **arguments)
