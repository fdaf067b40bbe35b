"""`torchrun --max-restarts`: a run that loses ranks goes on from its last checkpoint, and ends as an unbroken one."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from launch.checkpoint import read

from .losing import SMALL, STARTED_WITHIN_S, VOTE
from .torchrun import Launch, launch

NUM_STEPS = 60
RUN = ["-m", "launch.train", *SMALL, *VOTE, "--lr", "0.02", "--steps", str(NUM_STEPS), "--timeout", "8"]


def argv(checkpoint: Path) -> list[str]:
    return [*RUN, "--checkpoint", str(checkpoint), "--checkpoint-every", "4", "--resume", "if-there"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    path = tmp_path_factory.mktemp("unbroken") / "run.pt"
    done = launch(argv(path), 2, deadline_s=150)
    assert done.returncode == 0, done.stderr
    return read(str(path))


def step_of(checkpoint: Path) -> int:
    try:
        return int(read(str(checkpoint))["shared"]["step"])
    except FileNotFoundError:  # not yet, or between the two renames
        return 0


def wait_past(checkpoint: Path, step: int, running: Launch) -> int:
    """Wait for a checkpoint of a later step, and return its step."""
    until = time.monotonic() + STARTED_WITHIN_S
    while (found := step_of(checkpoint)) <= step:
        assert time.monotonic() < until and running.process.poll() is None, running.output().stderr
        time.sleep(0.01)
    return found


def ranks_of(running: Launch) -> set[int]:
    """Return the ids of the ranks' processes."""
    ranks = set()
    for pid in running.pids():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # ended since
            if b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes():
                ranks.add(pid)
    return ranks


def wait_ranks(running: Launch, others_than: set[int]) -> set[int]:
    """Wait until the ranks of a new life have replaced the former ones, and return them."""
    until = time.monotonic() + STARTED_WITHIN_S
    while len(found := ranks_of(running)) != 2 or found & others_than:
        assert time.monotonic() < until and running.process.poll() is None, running.output().stderr
        time.sleep(0.05)
    return found


def assert_same(found: object, wanted: object, where: str = "") -> None:
    assert type(found) is type(wanted), where
    if isinstance(wanted, torch.Tensor):
        assert isinstance(found, torch.Tensor) and torch.equal(found, wanted), where
    elif isinstance(wanted, dict):
        assert isinstance(found, dict) and found.keys() == wanted.keys(), where
        for key, value in wanted.items():
            assert_same(found[key], value, f"{where}/{key}")
    elif isinstance(wanted, (list, tuple)):
        assert isinstance(found, (list, tuple)) and len(found) == len(wanted), where
        for k, value in enumerate(wanted):
            assert_same(found[k], value, f"{where}/{k}")
    else:
        assert found == wanted, where


@pytest.mark.timeout(240)  # three starts of torch beside whatever else runs, and `wait` below
def test_two_losses_and_the_same_end(tmp_path: Path, unbroken: dict[str, object]) -> None:
    """One rank is killed in the first life, one frozen in the second, each a moment after some checkpoint."""
    draw = random.Random(7)
    checkpoint = tmp_path / "run.pt"
    lost_at = []
    # A frozen rank hears no SIGTERM: torchrun kills it after so long.
    with Launch(argv(checkpoint), 2, torchrun_args=["--max-restarts=2", "--shutdown-timeout=3"]) as running:
        former: set[int] = set()
        for number in (signal.SIGKILL, signal.SIGSTOP):
            # The ranks first, their checkpoints afterwards: one that the former life wrote as it died is not theirs.
            former = wait_ranks(running, others_than=former)
            step = wait_past(checkpoint, step_of(checkpoint) + draw.randrange(4, 12), running)
            time.sleep(draw.random() * 0.1)
            os.kill(draw.choice(sorted(former)), number)
            lost_at.append(step)
        done = running.wait(150)
    assert done.returncode == 0, done.stderr
    assert 0 < lost_at[0] < lost_at[1] < NUM_STEPS
    assert_same(read(str(checkpoint)), unbroken)
