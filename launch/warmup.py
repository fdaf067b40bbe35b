"""Compiling the library's CPU kernels once a machine, before the ranks need them all at the same moment."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.nn.parallel import DistributedDataParallel

from distsign import AdaptiveConfidence, SignVoteState, sign_vote_hook


def compile_kernels() -> None:
    """Take one step alone, on a model of one layer, so that Numba compiles the kernels and keeps them on disk.

    That takes about 20 s of one core the first time, a moment afterwards. Ranks that start together on few cores would
    otherwise each compile them, and steps, or tests with a deadline, would wait for the slowest. There must be no
    process group; there is none afterwards.
    """
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        with torch.random.fork_rng(devices=[]):
            model = DistributedDataParallel(nn.Linear(64, 64))
            model.register_comm_hook(SignVoteState(confidence=AdaptiveConfidence()), sign_vote_hook)
            model(torch.ones(1, 64)).sum().backward()
    finally:
        dist.destroy_process_group()
