"""Checkpoint files that were cut, changed, swapped or half written: an error that says so, or the one before them."""

from __future__ import annotations

import errno
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch import checkpoint
from launch.checkpoint import UnusableError, previous_of, read, write
from launch.options import UsageError
from launch.runtime import Ranks
from tests.distributed.ranks import REPOSITORY

TRAJECTORY = {"task": "fashion-mnist-lenet", "width": 1, "lr": 1e-3, "num_steps": 9}
NUM_KILLS = 60


def content_of(step: int, num_elements: int = 500) -> dict[str, Any]:
    shared = {"options": dict(TRAJECTORY), "step": step, "model": {"w": torch.full((num_elements,), float(step))}}
    return {"shared": shared, "ranks": [{"rng": torch.arange(step)}]}


def choose(path: str, resume: str, **changed: Any) -> checkpoint.Checkpoint | None:
    return checkpoint.choose(path, resume, {**TRAJECTORY, **changed}, world_size=1)


def refusal(path: str, resume: str, **changed: Any) -> str:
    with pytest.raises(UsageError) as caught:
        choose(path, resume, **changed)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "run.pt")


@pytest.fixture
def two(path: str) -> str:
    for step in (1, 2):
        write(path, content_of(step))
    return path


def step_of(found: checkpoint.Checkpoint | None) -> int:
    assert found is not None
    assert torch.equal(found.shared["model"]["w"], torch.full((500,), float(found.shared["step"])))
    return int(found.shared["step"])


def test_the_one_before_is_kept(two: str) -> None:
    assert step_of(choose(two, "must")) == step_of(choose(two, "if-there")) == 2
    assert step_of(choose(two, "previous")) == 1
    write(two, content_of(3))
    assert [read(name)["shared"]["step"] for name in (two, previous_of(two))] == [3, 2]
    assert sorted(os.listdir(Path(two).parent)) == ["run.pt", "run.pt.previous"]


def damages(whole: bytes, rng: random.Random) -> Iterator[tuple[bytes, str]]:
    """Yield bytes that are no longer the checkpoint, and what must be said of them."""
    cuts = {0, 1, 19, 20, 21, 28, 29, 44, 45, 46, len(whole) // 2, len(whole) - 1} | {
        *rng.sample(range(len(whole)), 20)
    }
    for cut in sorted(cuts):
        yield whole[:cut], "is damaged: it " + ("ends after" if cut < 45 else "has .* bytes after its header")
    yield whole + b"\0", "is damaged: it has"
    for bit in itertools.chain(range(8 * 45), rng.sample(range(8 * 45, 8 * len(whole)), 300)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        where = bit // 8
        reason = "is no checkpoint of launch.train: it begins" if where < 20 else "is a checkpoint of format"
        yield bytes(changed), reason if where < 21 else "is damaged: it"


def test_any_damage_is_found_and_the_one_before_offered(two: str) -> None:
    whole = Path(two).read_bytes()
    for data, reason in damages(whole, random.Random(1)):
        Path(two).write_bytes(data)
        with pytest.raises(UnusableError, match=reason):
            read(two)
        for resume in ("must", "if-there"):
            if resume == "must":
                said = refusal(two, resume)
                assert said.startswith(f"--checkpoint {two} is ")
                assert f". The one before it, {two}.previous, of step 1, is whole: --resume previous takes it" in said
            else:
                found = choose(two, resume)
                assert step_of(found) == 1 and found is not None and found.warning is not None
                assert found.warning.endswith(f": going on from {two}.previous, of step 1")


def test_a_damaged_file_does_not_take_the_place_of_a_good_one_before(two: str) -> None:
    Path(two).write_bytes(Path(two).read_bytes()[:-1])
    write(two, content_of(3))
    assert [read(name)["shared"]["step"] for name in (two, previous_of(two))] == [3, 1]


def test_what_is_said_where_nothing_is_left(two: str) -> None:
    Path(previous_of(two)).write_bytes(b"")
    Path(two).write_bytes(b"PK\3\4 a file of somebody else")
    for resume in ("must", "if-there"):
        said = refusal(two, resume)
        assert f"--checkpoint {two} is no checkpoint of launch.train: it begins with other bytes, and the one" in said
        assert f"{two}.previous is damaged: it ends after 0 bytes, within its header; put a copy" in said
    assert refusal(two, "previous").startswith(f"--resume previous: {two}.previous is damaged: it ends after 0 bytes")
    os.remove(previous_of(two))
    assert "begins with other bytes, and there is none before it: put a copy in its place" in refusal(two, "if-there")
    assert refusal(two, "previous") == f"--resume previous: {two}.previous is not there"
    os.remove(two)
    assert refusal(two, "must").startswith(f"--checkpoint {two} is not there, and there is none before it: leave out")
    assert choose(two, "if-there") is None


def test_a_crash_between_the_two_renames(two: str) -> None:
    os.replace(two, previous_of(two))
    found = choose(two, "if-there")
    assert (
        found is not None
        and found.warning == f"--checkpoint {two} is not there: going on from {two}.previous, of step 2"
    )
    assert f"--checkpoint {two} is not there. The one before it, {two}.previous, of step 2" in refusal(two, "must")


def test_a_checkpoint_of_another_model_is_no_damage(two: str) -> None:
    for resume, name in (("must", two), ("if-there", two), ("previous", previous_of(two))):
        said = refusal(two, resume, width=2)
        assert said.startswith(
            f"--checkpoint {name} belongs to another run: --width was 1, is 2; give the same options"
        )


class Evil:
    """Unpickled without care, it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_code_is_not_run(path: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    write(path, {"shared": Evil(trace), "ranks": []})  # with a header and a digest that are right
    assert "holds something else than numbers, words and tensors, which is not loaded" in refusal(path, "must")
    assert not trace.exists()
    for strange in ([1], {"shared": {}}):
        write(path, strange)  # type: ignore[arg-type]
        with pytest.raises(UnusableError, match="is no checkpoint of launch.train"):
            read(path)


def write_until_killed(path: str, first: int, done: int, kill_at: int | None) -> None:
    """Write one checkpoint after another, and tell each that is done; die by one's own hand at a chosen operation."""
    count = itertools.count()

    def hook(event: str, args: tuple[Any, ...]) -> None:
        touches = event in {"os.rename", "os.remove", "os.listdir"} or (
            event == "open" and str(args[0]).startswith(path)
        )
        if touches and next(count) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    for step in itertools.count(first):
        write(path, content_of(step, 200_000))
        os.write(done, step.to_bytes(4, "little"))


def kill_many(path: str, seed: int) -> None:
    """Kill writers at each operation on a file in turn, then at random moments; what survives must be whole."""
    torch.set_num_threads(1)  # a fork inherits no thread, and would wait for OpenMP's for ever
    rng = random.Random(seed)
    last = num_partials = num_gaps = 0
    write(path, content_of(last, 200_000))
    for trial in range(NUM_KILLS):
        told, done = os.pipe()
        kill_at = trial if trial < NUM_KILLS // 3 else None
        child = os.fork()
        if child == 0:
            write_until_killed(path, last + 1, done, kill_at)
        os.close(done)
        if kill_at is None:
            time.sleep(rng.uniform(0, 0.05))
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        steps = os.read(told, 1 << 16)
        os.close(told)
        last = int.from_bytes(steps[-4:], "little") if steps else last
        num_partials += any("partial" in name for name in os.listdir(Path(path).parent))
        num_gaps += not Path(path).exists()
        found = choose(path, "if-there")
        assert found is not None and found.shared["step"] in (last, last + 1), (trial, found, last)
        assert (found.shared["model"]["w"] == found.shared["step"]).all()
        last = found.shared["step"]
    # Else nobody was killed where it matters.
    assert num_partials > NUM_KILLS // 3 and num_gaps > 0, (num_partials, num_gaps)


def test_whenever_a_writer_is_killed_a_whole_checkpoint_is_left(path: str) -> None:
    code = f"from tests.test_checkpoint import kill_many; kill_many({path!r}, 3)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=False, cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def alone() -> Iterator[Ranks]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks(0, 1, 0, 1)
    dist.destroy_process_group()


def test_a_full_disk_is_said_and_costs_nothing_that_was_written(
    two: str, alone: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    content = content_of(3)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_room)
        with pytest.raises(UsageError, match="of step 3 cannot be written: No space left on device; what was written"):
            checkpoint.save(two, content["shared"], content["ranks"][0], alone)
    found = checkpoint.load(two, "must", TRAJECTORY, alone)
    assert step_of(found) == 2 and found is not None and found.own is not None
    assert torch.equal(found.own["rng"], torch.arange(2)) and not found.ranks
    checkpoint.save(two, content["shared"], content["ranks"][0], alone)
    assert step_of(choose(two, "must")) == 3
