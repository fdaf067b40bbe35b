"""The shaped-link lab: run any command as ranks on links whose bandwidth is real, on one machine.

    python -m launch.netlab --ranks 4 --rate 1gbit -- python launch/train.py --hook sign-vote

starts the command four times, each in a network namespace of its own behind a 1 Gbit/s link, with the environment
that torchrun would give it (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and Gloo pointed
at the link. It ends with what every interface has sent and received, by the kernel's own count, and removes all that it
made, on failure and on Ctrl-C too. Needs Linux, root and iproute2; ``launch/netns.py`` has the links and how they are
shaped.

As a library:

    with Lab(4, "1gbit") as lab:
        ranks = lab.run([sys.executable, "job.py"], deadline_s=60)
        print(ranks[0].stdout, lab.counters())

The exit code is that of the first rank that failed (128 + n for signal n); 124 where the deadline passed; 2 for a wrong
option or a machine that cannot make the lab.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from launch.netns import BURST_S, INTERFACE, Counters, LabUnavailable, Network, node_address
from launch.netrun import Job, LabTimeout, Output, RankProcess, output_tail

MASTER_PORT = 29500


class Lab(Network):
    """Nodes behind shaped links, and commands that run on them as ranks. See ``Network`` for the arguments.

    >>> with Lab(2, "100mbit") as lab:  # doctest: +SKIP
    ...     ranks = lab.run([sys.executable, "job.py"], deadline_s=60)
    ...     lab.counters()[0].tx_bytes
    """

    def __init__(
        self, num_nodes: int, rate: str = "none", *, burst_s: float = BURST_S, prefix: str = "distsign-lab"
    ) -> None:
        super().__init__(num_nodes, rate, burst_s=burst_s, prefix=prefix)
        self._num_jobs = 0
        self._jobs: list[Job] = []

    def start(
        self,
        argv: Sequence[str],
        *,
        ranks_per_node: int = 1,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        output: Output = "capture",
    ) -> Job:
        """Start a command as ranks, `ranks_per_node` on every node, and return at once.

        Ranks of one node share its namespace and reach each other over its loopback, which is not shaped.

        Args:
            argv: The command. All ranks get the same one and tell themselves apart by their environment.
            ranks_per_node: Ranks on each node, numbered node by node as torchrun does.
            env: Added to the ranks' environment.
            cwd: Their working directory.
            output: ``"capture"`` keeps stdout and stderr per rank; ``"rank0"`` passes rank 0's on and keeps the rest;
                ``"all"`` passes all on, each line marked with its rank.

        Raises:
            ValueError: `ranks_per_node` below 1, or the command is not there.
        """
        if ranks_per_node < 1:
            raise ValueError(f"ranks_per_node must be at least 1, got {ranks_per_node}")
        environment = {**os.environ, **(env or {})}
        if not argv or shutil.which(argv[0], path=environment.get("PATH")) is None:
            raise ValueError(f"no such command: {argv[0]!r}" if argv else "no command to run")
        world_size = self.num_nodes * ranks_per_node
        common = {
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(ranks_per_node),
            "GROUP_WORLD_SIZE": str(self.num_nodes),
            "MASTER_ADDR": node_address(0),
            # Another port each time: an earlier job's connections may linger.
            "MASTER_PORT": str(MASTER_PORT + self._num_jobs % 1000),
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // world_size)),
            "PYTHONFAULTHANDLER": "1",  # past the deadline, SIGABRT makes a rank show its stacks
        }
        self._num_jobs += 1
        job = Job([], self.pids, mark=f"DISTSIGN_LAB_JOB={uuid.uuid4().hex}")
        self._jobs.append(job)
        for rank in range(world_size):
            node, local_rank = divmod(rank, ranks_per_node)
            own = {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "GROUP_RANK": str(node)}
            full = {**os.environ, **common, **(env or {}), **own, **job.environment}
            command = self.command(node, argv)
            job.ranks.append(RankProcess(rank, node, command, env=full, cwd=cwd, output=output))
        return job

    def run(
        self,
        argv: Sequence[str],
        *,
        ranks_per_node: int = 1,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        output: Output = "capture",
        deadline_s: float | None = None,
    ) -> list[RankProcess]:
        """Run a command as ranks to its end: ``start`` and ``wait``.

        Returns:
            The ranks with their exit codes and output. A rank that failed is no error here.

        Raises:
            ValueError: As for ``start``.
            LabTimeout: The deadline, in seconds, passed.
        """
        job = self.start(argv, ranks_per_node=ranks_per_node, env=env, cwd=cwd, output=output)
        return job.wait(deadline_s)

    def close(self) -> None:
        """End all ranks and remove the namespaces."""
        try:
            for job in self._jobs:
                job.stop()
        finally:
            super().close()


def counters_table(before: Sequence[Counters], after: Sequence[Counters]) -> str:
    """Return a table of what each node's interface has sent and received, at two times and between them."""
    moments = ("before", "after", "difference")
    rows = [["node", "", *(f"{what} {when}" for what in ("bytes", "packets") for when in moments)]]
    for node, (first, last) in enumerate(zip(before, after, strict=True)):
        for direction, name in (("sent", "tx"), ("received", "rx")):
            counts = [
                getattr(c, f"{name}_{what}") for what in ("bytes", "packets") for c in (first, last, last - first)
            ]
            rows.append([str(node), direction, *(f"{count:,}" for count in counts)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exit with one line: argparse would put the whole usage in front of it."""
        self.exit(2, f"netlab: {message}\n")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    options, command = list(argv), []
    if "--" in options:
        at = options.index("--")
        options, command = options[:at], options[at + 1 :]
    parser = _Parser(prog="python -m launch.netlab", usage="%(prog)s [options] -- command …", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--ranks", type=int, required=True, help="number of ranks")
    parser.add_argument("--ranks-per-node", type=int, default=1, help="ranks that share a node and its link (1)")
    parser.add_argument("--rate", default="none", help="rate of each link, such as 50mbit or 1gbit; none: not shaped")
    burst_help = f"milliseconds at the full rate that pass unshaped after a pause ({BURST_S * 1e3:g})"
    parser.add_argument("--burst-ms", type=float, default=BURST_S * 1e3, metavar="MS", help=burst_help)
    parser.add_argument("--deadline", type=float, metavar="S", help="seconds after which all ranks are ended")
    parser.add_argument("--output", choices=("rank0", "all"), default="rank0", help="whose output is shown (rank0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings, exit code and counters there")
    parser.add_argument("--prefix", default="distsign-lab", help="how names of namespaces begin (distsign-lab)")
    args = parser.parse_args(options)
    args.command = command
    if not command:
        parser.error("no command: put it after --")
    if args.ranks < 1 or args.ranks_per_node < 1 or args.ranks % args.ranks_per_node:
        parser.error(f"--ranks {args.ranks} must be a positive multiple of --ranks-per-node {args.ranks_per_node}")
    if args.deadline is not None and not args.deadline > 0:
        parser.error(f"--deadline must be above zero seconds, got {args.deadline:g}")
    if args.json is not None and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: there is no directory {args.json.parent}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    args = _parse(sys.argv[1:] if argv is None else argv)
    begin = time.monotonic()
    try:
        num_nodes = args.ranks // args.ranks_per_node
        with Lab(num_nodes, args.rate, burst_s=args.burst_ms / 1e3, prefix=args.prefix) as lab:
            before = lab.counters()
            job = lab.start(args.command, ranks_per_node=args.ranks_per_node, output=args.output)
            begin = time.monotonic()
            try:
                job.wait(args.deadline)
                code = _exit_code(job.first_failure)
            except LabTimeout as error:
                print(f"netlab: {error}", file=sys.stderr)
                code = 124
            wall_s = time.monotonic() - begin
            after = lab.counters()
    except (ValueError, LabUnavailable) as error:
        print(f"netlab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if job.first_failure is not None:
        failed = job.first_failure
        print(f"netlab: rank {failed.rank} failed first, with exit code {failed.returncode}", file=sys.stderr)
        for rank in job.ranks:
            if rank.returncode != 0 and (tail := output_tail(rank)):
                print(tail, file=sys.stderr)
    print(f"netlab: {shlex.join(args.command)}", file=sys.stderr)
    print(f"netlab: {args.ranks} ranks, {args.rate} links, {wall_s:.2f} s, exit code {code}", file=sys.stderr)
    print(counters_table(before, after), file=sys.stderr)
    if args.json is not None:
        _write_json(args, code, wall_s, before, after)
    return code


def _exit_code(failed: RankProcess | None) -> int:
    code = 0 if failed is None else failed.process.returncode
    return 128 - code if code < 0 else code


def _write_json(
    args: argparse.Namespace, code: int, wall_s: float, before: Sequence[Counters], after: Sequence[Counters]
) -> None:
    nodes = [
        {"before": dataclasses.asdict(b), "after": dataclasses.asdict(a), "diff": dataclasses.asdict(a - b)}
        for b, a in zip(before, after, strict=True)
    ]
    report = {
        "command": args.command,
        "ranks": args.ranks,
        "ranks_per_node": args.ranks_per_node,
        "rate": args.rate,
        "burst_s": args.burst_ms / 1e3,
        "exit_code": code,
        "wall_s": wall_s,
        "nodes": nodes,
    }
    args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
