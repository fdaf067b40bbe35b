"""Runs of `launch.train` that are small enough for tests, on the ranks of a pool or in a process."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import torch

from launch.options import UsageError, parse_options
from launch.runtime import Ranks, choose_device
from launch.train import Trainer
from tests.distributed.ranks import REPOSITORY

SMALL = ["--data", "digits", "--batch-size", "8", "--device", "cpu"]
VOTE = ["--hook", "sign-vote", "--confidence", "adaptive", "--optimizer", "sign-adam-pp"]


def train(rank: int, world_size: int, argv: list[str]) -> dict[str, Any]:
    """Run on the ranks of a pool; return the parameters, what was measured, or the user's mistake."""
    options = parse_options([*SMALL, *argv])
    ranks = Ranks(rank, world_size, rank, world_size)
    try:
        trainer = Trainer(options, ranks, choose_device(options.device, ranks))
        trainer.run()
    except UsageError as error:
        return {"error": str(error)}
    traffic = trainer.combiner.traffic(trainer.progress.step)
    trainer.close()
    return {"parameters": torch.cat([p.detach().flatten() for p in trainer.net.parameters()]), "traffic": traffic}


def in_one_process(*argv: str, as_file: bool = False) -> subprocess.CompletedProcess[str]:
    start = [str(REPOSITORY / "launch" / "train.py")] if as_file else ["-m", "launch.train"]
    command = [sys.executable, *start, *SMALL, *argv]
    # Started as a file it must find its package by itself, from any folder.
    cwd = "/" if as_file else REPOSITORY
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=100, check=False)
