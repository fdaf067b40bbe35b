"""Runs of `launch.train` that lose a rank, each rank a process of its own: nobody ends the others but they themselves.

(torchrun would end them as soon as one has died.)
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.metrics import read_lines
from launch.netrun import Job, RankProcess

SMALL = ["--data", "digits", "--batch-size", "8", "--device", "cpu"]
VOTE = ["--hook", "sign-vote", "--confidence", "rms:k=8", "--optimizer", "sign-adam-pp", "--momentum", "0"]
ENDLESS = ["--steps", "1000000", "--eval-every", "100", "--check-replicas", "0"]
TRAIN = [sys.executable, "-m", "launch.train"]
STARTED_WITHIN_S = 120.0
ANSWER_S = 20.0
"""What a busy machine may add to a timeout: the second for the last words, and time to get a core."""


def start_ranks(argv: Sequence[str], world_size: int) -> Job:
    """Start `launch.train` as ranks on the loopback and return at once."""
    job = Job([], lambda: [], mark=f"DISTSIGN_TEST_LOSING={time.monotonic_ns()}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for rank in range(world_size):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        environment = {
            **os.environ,
            **{name: str(value) for name, value in place.items()},
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            **job.environment,
        }
        command = [*TRAIN, *SMALL, *argv]
        job.ranks.append(RankProcess(rank, 0, command, env=environment, cwd=None, output="capture"))
    return job


def wait_until_training(job: Job, metrics: Path, then_s: float) -> None:
    """Wait for the first test, which comes after a hundred steps, and `then_s` seconds more."""
    end = time.monotonic() + STARTED_WITHIN_S
    while all(line["event"] != "test" for line in read_lines(metrics)):
        assert all(rank.returncode is None for rank in job.ranks), [rank.stderr for rank in job.ranks]
        assert time.monotonic() < end, "a hundred steps took too long"
        time.sleep(0.05)
    time.sleep(then_s)


def last_words(job: Job, but: int, within_s: float) -> list[str]:
    """Return what each rank but one said as it ended by itself, with exit code 1.

    Raises:
        AssertionError: one is still there after `within_s` seconds, ended otherwise, or said more or less than a line.
    """
    end = time.monotonic() + within_s
    survivors = [rank for rank in job.ranks if rank.rank != but]
    while any(rank.returncode is None for rank in survivors) and time.monotonic() < end:
        time.sleep(0.05)
    late = [rank.rank for rank in survivors if rank.returncode is None]
    assert not late, f"ranks {late} still run after {within_s:g} s"
    words = []
    for rank in survivors:
        assert rank.returncode == 1, f"rank {rank.rank} ended with {rank.returncode}: {rank.stderr}"
        errors = re.findall(r"^.*launch\.train: error: .*$", rank.stderr.replace("\r", "\n"), re.MULTILINE)
        assert len(errors) == 1, rank.stderr
        assert "Traceback" not in rank.stderr, rank.stderr
        words += errors
    return words


def end(job: Job) -> None:
    """End all ranks, frozen ones too."""
    for rank in job.ranks:
        rank.signal(signal.SIGKILL)
    job.stop()
