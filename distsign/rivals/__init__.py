"""Other schemes behind DDP's hook, with their bytes counted as ours are: what sign votes are compared with.

    rival = make_rival("top-k", density=0.01)
    rival.register(DistributedDataParallel(net))
    ...
    rival.traffic(num_steps).sent_bytes

Each class names its paper, the equation, what is sent and where it departs. None has the vote's poison: a NaN
on one rank stays in what they keep, as their papers leave it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from distsign.rivals.all_reduce import AllReduce
from distsign.rivals.base import Rival, RivalError
from distsign.rivals.dgc import DGC
from distsign.rivals.ef_sign_sgd import EFSignSGD
from distsign.rivals.lion import DistributedLion
from distsign.rivals.one_bit_adam import OneBitAdam
from distsign.rivals.one_bit_sgd import OneBitSGD
from distsign.rivals.power_sgd import PowerSGD
from distsign.rivals.qsgd import QSGD
from distsign.rivals.sign_sgd import SignSGDVote, SignumVote
from distsign.rivals.terngrad import TernGrad
from distsign.rivals.top_k import TopK

__all__ = ["RIVALS", "Rival", "RivalError", "make_rival"]


def _fp32() -> AllReduce:
    return AllReduce(torch.float32)


def _bf16() -> AllReduce:
    return AllReduce(torch.bfloat16)


def _fp16() -> AllReduce:
    return AllReduce(torch.float16)


RIVALS: dict[str, Callable[..., Rival]] = {
    "none": _fp32,
    "bf16": _bf16,
    "fp16": _fp16,
    "power-sgd": PowerSGD,
    "one-bit-sgd": OneBitSGD,
    "terngrad": TernGrad,
    "qsgd": QSGD,
    "ef-sign-sgd": EFSignSGD,
    "sign-sgd": SignSGDVote,
    "signum": SignumVote,
    "lion": DistributedLion,
    "top-k": TopK,
    "dgc": DGC,
    "one-bit-adam": OneBitAdam,
}
"""Schemes by name; `none` is DDP's own float32 all-reduce."""


def make_rival(name: str, **arguments: float) -> Rival:
    """Make a scheme by its name.

    Raises:
        ValueError: the name is unknown, or a value out of range.

    Example:
        >>> make_rival("top-k", density=0.01).gives
        'gradient'
    """
    if name not in RIVALS:
        raise ValueError(f"unknown scheme {name!r}: expected one of {', '.join(RIVALS)}")
    return RIVALS[name](**arguments)
