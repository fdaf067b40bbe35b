"""Ranks for benchmarks: a function runs on each, on shaped links in the lab or on this machine's loopback.

    results = run_on_ranks("benchmarks.exchange:measure", settings, num_ranks=4, rate="1gbit", deadline_s=300)

Started as `python -m benchmarks.ranks`, this module is one rank. Ranks find each other through a file, so that the link
carries nothing but what is measured.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common import REPOSITORY
from distsign.memory import keep_freed_memory
from launch.netlab import Lab
from launch.netns import LabUnavailable, parse_rate
from launch.netrun import Job, LabTimeout, RankProcess, output_tail

LOOPBACK = "loopback"
GROUP_TIMEOUT = timedelta(seconds=120)


class RanksFailed(RuntimeError):
    """Ranks failed or were too slow; the message says what they wrote."""


def run_on_ranks(
    job: str, settings: dict[str, Any], *, num_ranks: int, rate: str, deadline_s: float, ranks_per_node: int = 1
) -> list[Any]:
    """Run a function on ranks.

    Args:
        job: `module:function`; it gets the settings, and returns what JSON can hold.
        settings: what JSON can hold.
        num_ranks: in all.
        rate: of each link, as the lab takes it: `1gbit`, or `none` for links that are not shaped; or `loopback`.
        deadline_s: seconds after which the ranks are ended.
        ranks_per_node: that share a node's link, and reach each other past it; on loopback there are no nodes.

    Returns:
        What each rank returned. Rank 0's output has been passed on.

    Raises:
        RanksFailed: a rank failed, or the deadline passed.
        LabUnavailable: this machine cannot make the lab.
    """
    with tempfile.TemporaryDirectory(prefix="distsign-bench-") as folder:
        command = [sys.executable, "-m", "benchmarks.ranks", job, json.dumps(settings), folder]
        try:
            if rate == LOOPBACK:
                started = _start_on_loopback(command, num_ranks)
                started.wait(deadline_s)
            else:
                with Lab(num_ranks // ranks_per_node, rate, prefix="distsign-bench") as lab:
                    started = lab.start(command, ranks_per_node=ranks_per_node, cwd=REPOSITORY, output="rank0")
                    started.wait(deadline_s)
        except LabTimeout as error:
            raise RanksFailed(str(error)) from error
        if started.first_failure is not None:
            tails = "\n".join(output_tail(rank) for rank in started.ranks if rank.returncode)
            raise RanksFailed(f"rank {started.first_failure.rank} of {num_ranks} failed first ({rate})\n{tails}")
        return [json.loads(_result_file(folder, rank).read_text()) for rank in range(num_ranks)]


def _start_on_loopback(command: Sequence[str], num_ranks: int) -> Job:
    job = Job([], lambda: [], mark=f"DISTSIGN_BENCH_JOB={uuid.uuid4().hex}")
    cores = len(os.sched_getaffinity(0))
    common = {
        "WORLD_SIZE": str(num_ranks),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": str(max(1, cores // num_ranks)),
        "PYTHONFAULTHANDLER": "1",
    }
    for rank in range(num_ranks):
        env = {**os.environ, **common, "RANK": str(rank), **job.environment}
        job.ranks.append(RankProcess(rank, 0, command, env=env, cwd=REPOSITORY, output="rank0"))
    return job


def _result_file(folder: str, rank: int) -> Path:
    return Path(folder) / f"rank{rank}.json"


def add_options(arguments: argparse.ArgumentParser, *, ranks: int | None, rates: Sequence[str]) -> None:
    """Add what benchmarks on ranks have in common."""
    if ranks is not None:
        arguments.add_argument("--ranks", type=int, default=ranks)
    words = f"links, such as 1gbit; none: namespaces without shaping; {LOOPBACK}: no namespaces, needs no root"
    arguments.add_argument("--rates", nargs="+", default=list(rates), metavar="RATE", type=_rate, help=words)


def _rate(text: str) -> str:
    try:
        return text if text == LOOPBACK or parse_rate(text) is None else text
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def exit_code_of(measure: Callable[[], None], name: str) -> int:
    """Run what uses ranks; turn what may well happen into one clear message and an exit code."""
    try:
        measure()
    except LabUnavailable as error:
        print(f"{name}: {error}; or take --rates {LOOPBACK}", file=sys.stderr)
        return 2
    except RanksFailed as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


# ---------------------------------------------------------------------------------------------------------- on a rank


def say(text: str) -> None:
    """Let rank 0 tell how far the work is."""
    if dist.get_rank() == 0:
        print(f"  {text}", file=sys.stderr, flush=True)


def timed_together(run: Callable[[], object]) -> float:
    """Return the milliseconds of a call that all ranks begin together. The slowest rank's are what counts."""
    dist.barrier()
    begin = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begin)


def largest(value: float) -> float:
    """Return the largest of all ranks' values, so that all of them decide alike."""
    box = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return float(box)


def slowest(of_ranks: Sequence[Sequence[float]]) -> list[float]:
    """Return for each repetition the time of its slowest rank."""
    return [max(times) for times in zip(*of_ranks, strict=True)]


def interface_bytes() -> int | None:
    """Return what this rank's link has sent and received so far, Ethernet headers included; None on loopback."""
    name = os.environ["GLOO_SOCKET_IFNAME"]
    if name == "lo":  # everybody's
        return None
    folder = Path("/sys/class/net") / name / "statistics"
    return sum(int((folder / f"{way}_bytes").read_text()) for way in ("tx", "rx"))


def interface_difference(before: int | None) -> int | None:
    """Return what has passed since, on a link that all ranks have done with."""
    dist.barrier()
    after = interface_bytes()
    return None if after is None or before is None else after - before


def main(argv: Sequence[str]) -> None:
    """Be one rank: join the others, run the job, leave the result."""
    keep_freed_memory()  # what it costs to lack it differs from rank to rank
    job, settings, folder = argv
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    module, function = job.split(":")
    run = getattr(importlib.import_module(module), function)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=GROUP_TIMEOUT)
    result = run(json.loads(settings))
    _result_file(folder, rank).write_text(json.dumps(result))
    dist.barrier()
    sys.stderr.flush()
    os._exit(0)  # Gloo's threads may hold up an ordinary exit


if __name__ == "__main__":
    main(sys.argv[1:])
