"""The harness itself: results come back, failures name their rank, and nothing hangs or is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from . import ranks
from .ranks import RankFailure, RankPool, RanksFailed, pool
from .torchrun import Launch, launch


def add_up(rank: int, world_size: int, start: int, step: int = 1) -> int:
    total = torch.tensor([start + step * rank])
    dist.all_reduce(total)
    return int(total)


def describe(rank: int, world_size: int) -> tuple[int, int, int, int, float]:
    return rank, dist.get_rank(), dist.get_world_size(), torch.get_num_threads(), float(torch.rand(()))


def change_environment(rank: int, world_size: int) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = "changed"


def local_world_size(rank: int, world_size: int) -> str:
    return os.environ["LOCAL_WORLD_SIZE"]


def fail_on(rank: int, world_size: int, culprit: int, collective: bool) -> int:
    if rank == culprit:
        print("about to fail")
        raise ValueError(f"planted on {rank}")
    if collective:
        dist.barrier()
    return rank


def exit_on(rank: int, world_size: int, culprit: int) -> int:
    if rank == culprit:
        os._exit(7)
    return rank


def wait_in_vain(rank: int, world_size: int, culprit: int) -> None:
    if rank == culprit:
        time.sleep(600)
    dist.barrier()


def stop_on(rank: int, world_size: int, culprit: int) -> int:
    if rank == culprit:
        os.kill(os.getpid(), signal.SIGSTOP)
    return rank


def own_pid_with_child(rank: int, world_size: int) -> tuple[int, int]:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    return os.getpid(), child.pid


def is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")


def none_running(pids: list[int], within_s: float = 5.0) -> bool:
    end = time.monotonic() + within_s
    while any(map(is_running, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(is_running, pids))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_results_come_back_by_rank(world_size: int) -> None:
    expected = sum(10 + 2 * rank for rank in range(world_size))
    assert pool(world_size).run(add_up, 10, step=2) == [expected] * world_size


def test_ranks_are_set_up_alike_and_kept() -> None:
    first = pool(2).run(describe)
    pids = pool(2).pids
    assert [entry[:4] for entry in first] == [(0, 0, 2, 1), (1, 1, 2, 1)]
    assert pool(2).run(describe) == first, "the seed is the same for each job"
    assert pool(2).pids == pids


def test_environment_is_put_back_after_a_job() -> None:
    pool(2).run(change_environment)
    assert pool(2).run(local_world_size) == ["2", "2"]


def test_a_raised_error_names_its_rank_with_traceback_and_output() -> None:
    with pytest.raises(RanksFailed) as caught:
        pool(2).run(fail_on, 1, False)
    assert [failure.rank for failure in caught.value.failures] == [1]
    for part in ("rank 1: ValueError: planted on 1", "in fail_on", "about to fail"):
        assert part in str(caught.value)
    assert pool(2).pids == [], "the pool is discarded"
    assert pool(2).run(add_up, 1) == [3, 3], "and starts again"


def test_ranks_left_alone_in_a_collective_are_reported_soon_and_replaced() -> None:
    pool(2).run(add_up, 0)
    begin = time.monotonic()
    with pytest.raises(RanksFailed) as caught:
        pool(2).run(fail_on, 0, True)
    assert time.monotonic() - begin < ranks.GROUP_TIMEOUT_S
    assert [failure.type_name for failure in caught.value.failures] == ["ValueError", "RankHung"]
    assert "in barrier" in str(caught.value), "the other rank's stack shows where it waits"


def test_expected_errors_are_returned_and_ranks_in_step_are_kept() -> None:
    pool(2).run(add_up, 0)
    pids = pool(2).pids
    for expected in (ValueError, Exception, r"ValueError: planted on \d"):
        outcome, failure = pool(2).run_expecting(expected, fail_on, 1, False, ranks=[1], in_step=True)
        assert outcome == 0
        assert isinstance(failure, RankFailure)
        assert failure.message == "planted on 1"
    assert pool(2).pids == pids
    assert pool(2).run(add_up, 1) == [3, 3]


@pytest.mark.parametrize(
    ("expected", "on"), [(KeyError, [1]), ("no such words", [1]), (ValueError, [0]), (ValueError, None)]
)
def test_another_failure_than_the_expected_one_is_a_failure(
    expected: type[Exception] | str, on: list[int] | None
) -> None:
    with pytest.raises(RanksFailed, match="planted on 1"):
        pool(2).run_expecting(expected, fail_on, 1, False, ranks=on, in_step=True)


def test_a_dead_rank_is_named_with_its_exit_code() -> None:
    outcomes = pool(2).run_expecting("RankDied: .* exit code 7", exit_on, 1, ranks=[1])
    assert outcomes[0] == 0


def test_past_the_deadline_stacks_are_shown_and_the_ranks_are_gone() -> None:
    pool(2).run(add_up, 0)
    pids = pool(2).pids
    begin = time.monotonic()
    with pytest.raises(RanksFailed, match="deadline of 1 s passed on 2 ranks") as caught:
        pool(2).run(wait_in_vain, 1, deadline_s=1)
    assert time.monotonic() - begin < 10
    assert [failure.type_name for failure in caught.value.failures] == ["RankHung", "RankHung"]
    waiting, sleeping = (failure.details for failure in caught.value.failures)
    assert "in barrier" in waiting
    assert "in wait_in_vain" in sleeping
    assert not any(map(is_running, pids))


def test_a_stopped_rank_may_be_expected() -> None:
    pool(2).run(add_up, 0)
    pids = pool(2).pids
    outcome, failure = pool(2).run(stop_on, 1, return_exceptions=True, may_hang=[1], deadline_s=20)
    assert outcome == 0
    assert failure.type_name == "RankHung"
    assert not any(map(is_running, pids))


def test_jobs_must_be_found_by_name() -> None:
    with pytest.raises(ValueError, match="top level of a module"):
        pool(2).run(lambda rank, world_size: rank)
    with pytest.raises(ValueError, match="world_size must be at least 1"):
        RankPool(0)


def test_idle_pools_make_room_when_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    pool(1).run(add_up, 0)
    pids = pool(1).pids
    monkeypatch.setattr(ranks, "_available_bytes", lambda: 0)
    newcomer = RankPool(2)
    ranks._make_room(newcomer)
    assert pool(1).pids == []
    assert not any(map(is_running, pids))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_ranks_and_what_they_started_end_with_their_parent(how: signal.Signals) -> None:
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"from {ranks.__name__} import pool; from {__name__} import own_pid_with_child as job\n"
            "print(pool(1).run(job), flush=True); import time; time.sleep(600)",
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert parent.stdout is not None
        [pids] = eval(parent.stdout.readline(), {"__builtins__": {}})
        assert all(map(is_running, pids))
    finally:
        parent.send_signal(how)
        parent.wait()
        parent.stdout.close()
    assert none_running(list(pids))


SCRIPT = """
import os, sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
# One write a line: torchrun's children are unbuffered, where print writes the text and its newline apart.
os.write(1, f"rank {dist.get_rank()} of {int(total)}: {sys.argv[1]} {os.environ.get('EXTRA')}\\n".encode())
if sys.argv[1] == "hang":
    open(f"{sys.argv[2]}/{os.getpid()}", "w").close()
    time.sleep(600)
if sys.argv[1] == "exit":
    os._exit(3 if dist.get_rank() == 1 else 0)  # sys.exit with a group that lives on ends in an abort now and then
dist.destroy_process_group()
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "job.py"
    path.write_text(SCRIPT)
    return str(path)


def test_launch_returns_code_and_output(script: str) -> None:
    done = launch([script, "fine"], nproc=2, deadline_s=60, env={"EXTRA": "seen"})
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["rank 0 of 2: fine seen", "rank 1 of 2: fine seen"]


def test_launch_reports_a_failing_rank(script: str) -> None:
    done = launch([script, "exit"], nproc=2, deadline_s=60)
    assert done.returncode == 1
    assert "exitcode  : 3" in done.stderr


def test_launch_past_its_deadline_shows_stacks_and_leaves_nothing(script: str, tmp_path: Path) -> None:
    marks = tmp_path / "pids"
    marks.mkdir()
    with Launch([script, "hang", str(marks)], nproc=2) as running:
        while len(pids := [int(path.name) for path in marks.iterdir()]) < 2:
            assert running.process.poll() is None, running.output().stderr
            time.sleep(0.1)
        with pytest.raises(AssertionError, match="deadline of 1 s passed") as caught:
            running.wait(deadline_s=1)
    assert not any(map(is_running, pids))
    assert 'job.py", line' in str(caught.value), "the stacks say where the ranks were"
