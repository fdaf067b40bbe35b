"""The command `distsign`: simulate a cluster, calibrate the simulator on real ranks, run a study."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from distsign.simulator import Cluster, Link, Profile, Scheme, Step, load_model
from distsign.simulator.presets import PRESETS
from distsign.simulator.report import BASELINES, compare, draw, require_drawable
from distsign.simulator.schemes import SCHEMES, default_schemes
from distsign.simulator.units import format_bandwidth, format_seconds, parse_bandwidth, parse_seconds
from distsign.study import command as study

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Exit with one line: argparse would put the whole usage in front of it."""
        self.exit(2, f"distsign: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code: 0, or 2 for bad input, which one line on stderr names."""
    options = _parser().parse_args(_joined(sys.argv[1:] if argv is None else argv))
    try:
        code = int(options.run(options))
        sys.stdout.flush()
        return code
    except ValueError as error:
        sys.stderr.write(f"distsign: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("distsign: interrupted\n")
        return 130
    except BrokenPipeError:  # whoever reads has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _joined(argv: Sequence[str]) -> list[str]:
    """Join `--link -1gbit`, which argparse takes for two options, so that the bandwidth is refused and not the word."""
    found: list[str] = []
    for word in argv:
        if re.match(r"-\.?\d", word) and found and re.fullmatch(r"--[^=]+", found[-1]):
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="distsign", description=__doc__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)
    _add_simulate(commands.add_parser("simulate", help="bytes and time of schemes on a cluster"))
    _add_calibrate(commands.add_parser("calibrate", help="measure links and kernels; run it under torchrun"))
    study.add_arguments(commands.add_parser("study", help="run what is missing of a study file, and report"))
    return parser


# ------------------------------------------------------------------------------------------------------------ simulate


def _add_simulate(parser: argparse.ArgumentParser) -> None:
    kinds = "; ".join(f"{name}: {kind.summary}" for name, kind in SCHEMES.items())
    add = parser.add_argument
    models = f"{', '.join(PRESETS)}; sizes such as 12*1049600,10; module:function; a torchvision or timm name"
    add("--model", required=True, help=models)
    add("--workers", type=int, required=True, help="in all")
    add("--per-node", type=int, default=1, help="workers that share a node's link (1)")
    add("--per-machine", type=int, help="workers that share a machine's cores (those of a node)")
    add("--link", type=_quantity(parse_bandwidth), help="of a node, such as 1gbit, 25Gb/s, 100MB/s (the profile's)")
    add("--latency", type=_quantity(parse_seconds), help="of that link, such as 50us (the profile's, or 0)")
    add("--node-link", type=_quantity(parse_bandwidth), help="between a node's workers, each (the profile's)")
    add("--node-latency", type=_quantity(parse_seconds), help="likewise (the profile's, or 0)")
    add("--scheme", action="append", help=f"again for each one (the usual ones). {kinds}")
    add("--bucket-mb", type=float, help="DDP's bucket_cap_mb, MiB (25, after a first bucket of 1)")
    add("--compute", type=_quantity(parse_seconds), help="forward and backward of a batch on one worker, such as 120ms")
    add("--throughput", type=float, help="in its place: samples per second of one worker alone; with --batch-size")
    add("--batch-size", type=int, help="samples of a worker's batch")
    add("--profile", help="file that distsign calibrate wrote")
    for kind in ("json", "csv", "picture"):
        add(f"--{kind}", type=Path, metavar="FILE", help=f"write {kind} there")
    parser.set_defaults(run=_simulate)


def _quantity(parse: Any) -> Any:
    def read(text: str) -> float:
        try:
            return float(parse(text))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def _simulate(options: argparse.Namespace) -> int:
    sys.path.insert(0, os.getcwd())  # for module:function, as python -m has it
    for path in filter(None, (options.json, options.csv, options.picture)):
        _require_place(path)
    if options.picture:
        require_drawable(options.picture)
    profile = Profile.load(options.profile) if options.profile else Profile.ideal()
    cluster = _cluster(options, profile)
    model = load_model(options.model)
    compute_s = _compute_s(options)

    def step(scheme: Scheme) -> Step:
        return Step(model, cluster, scheme, compute_s=compute_s, profile=profile, bucket_mb=options.bucket_mb)

    baselines = [step(Scheme(name)) for name in BASELINES]
    if options.scheme:
        steps = [step(Scheme.parse(text)) for text in options.scheme]
    else:
        steps = list(_possible(step, default_schemes(cluster)))
    found = compare(steps, baselines)
    write = sys.stdout.write
    link = f"{format_bandwidth(cluster.link.bandwidth_bytes_per_s)}, {format_seconds(cluster.link.latency_s)}"
    write(f"{model.name}, {model.num_elements:,} parameters, compute {format_seconds(compute_s)}\n")
    within = (
        f", within a node {format_bandwidth(cluster.node_link.bandwidth_bytes_per_s)}" if options.per_node > 1 else ""
    )
    write(f"{cluster.num_workers} workers, {cluster.workers_per_node} a node, links of {link}{within}\n")
    if not options.profile:
        write("no profile: only the wire takes time, kernels and calls are free (distsign calibrate measures them)\n")
    if compute_s == 0:
        write("no compute time: nothing can hide behind backward (--compute)\n")
    write(f"\n{found.table()}\n\n{found.advice()}\n")
    if options.json:
        given = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        found.write_json(options.json, {key: value for key, value in given.items() if key != "run"})
    if options.csv:
        found.write_csv(options.csv)
    if options.picture:
        draw(steps, options.picture)
    return 0


def _require_place(path: Path) -> None:
    if str(path) == "-":
        raise ValueError(
            "cannot write to -, which is no file: name one; what is printed goes to standard output by itself"
        )
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder; name a file in it")


def _possible(step: Callable[[Scheme], Step], schemes: Iterable[Scheme]) -> Iterator[Step]:
    """Yield the usual schemes; one that nobody has asked for may not be possible for a model."""
    for scheme in schemes:
        try:
            yield step(scheme)
        except ValueError as error:
            sys.stderr.write(f"distsign: left out {scheme.label}: {error}\n")


def _cluster(options: argparse.Namespace, profile: Profile) -> Cluster:
    bandwidth: float | None = options.link
    if bandwidth is None and profile.link is not None:
        bandwidth = profile.link.bandwidth_bytes_per_s
    if bandwidth is None:
        raise ValueError("the link's bandwidth is not known: give --link, such as --link 1gbit, or a --profile")
    latency = profile.latency_s if options.latency is None else options.latency
    inner = profile.node_link
    node_latency = inner.latency_s if options.node_latency is None else options.node_latency
    return Cluster(
        options.workers,
        Link(bandwidth, latency),
        options.per_node,
        Link(options.node_link or inner.bandwidth_bytes_per_s, node_latency),
        options.per_machine,
    )


def _compute_s(options: argparse.Namespace) -> float:
    if options.throughput is None:
        return float(options.compute or 0.0)
    if options.compute is not None:
        raise ValueError("--compute and --throughput say the same: give one of them")
    if options.batch_size is None:
        raise ValueError("--throughput is samples per second: it needs --batch-size, the samples of a step")
    if not options.throughput > 0 or options.batch_size < 1:
        given = f"--throughput {options.throughput:g} --batch-size {options.batch_size}"
        raise ValueError(f"--throughput must be above zero and --batch-size at least 1, got {given}")
    return float(options.batch_size / options.throughput)


# ----------------------------------------------------------------------------------------------------------- calibrate


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("profile", type=Path, help="file to write")
    parser.add_argument("--backend", choices=("gloo", "nccl"), help="nccl where there are GPUs, else gloo")
    nominal = "what the link is sold as, such as 1gbit: then profiles hold for links of other rates too"
    parser.add_argument("--link", type=_quantity(parse_bandwidth), help=nominal)
    parser.add_argument("--per-machine", type=int, help="ranks that share a machine's cores (LOCAL_WORLD_SIZE)")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="about how long collectives may take, beside kernels and steps (10)"
    )
    quick = "leave out whole steps, most of the time on CPUs; predictions are then 1.4 to 2 times as far off"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.set_defaults(run=_calibrate)


def _calibrate(options: argparse.Namespace) -> int:
    from distsign.simulator.calibrate import calibrate_under_torchrun

    if not options.seconds > 0:
        raise ValueError(f"--seconds must be above zero, got {options.seconds:g}")
    _require_place(options.profile)
    profile = calibrate_under_torchrun(
        backend=options.backend,
        nominal_bytes_per_s=options.link,
        ranks_per_machine=options.per_machine,
        seconds=options.seconds,
        whole_steps=not options.quick,
    )
    if profile is not None:  # on rank 0
        profile.save(options.profile)
        sys.stdout.write(f"written to {options.profile}\n")
        if options.link is not None and not profile.facts["link_is_the_limit"]:
            sys.stdout.write(
                "these ranks did not come near the bandwidth named, or are of one machine and use no link: it was not "
                "measured, and the profile has it as named\n"
            )
    return 0
