"""`make demo`: what sign votes save and what they cost, on real data and real ranks, in a few minutes.

torchrun starts the ranks on this machine twice, on the same seed: float32 all-reduce with Adam, then sign votes with
signADAM++. The outcome is one table, the same as JSON, and a picture of accuracy against bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from launch.data import DIGITS, DataError
from launch.fetch import fetch_fashion_mnist
from launch.metrics import read_lines
from launch.options import UsageError, parse_options

TASK = "fashion-mnist-lenet"


@dataclass(frozen=True)
class Scheme:
    """One of the two runs: its name in files and in the table, and its part of the command line."""

    name: str
    title: str
    arguments: tuple[str, ...]


SCHEMES = (
    Scheme("adam", "Adam, fp32 all-reduce", ("--optimizer", "adam", "--lr", "4e-3", "--hook", "none")),
    Scheme(
        "sign-vote",
        "signADAM++, sign votes",
        (
            *("--optimizer", "sign-adam-pp", "--momentum", "0", "--lr", "0.04"),
            *("--hook", "sign-vote", "--confidence", "rms:k=20"),
        ),
    ),
)


class RunError(RuntimeError):
    """A run that failed; its own output, above, says why."""

    def __init__(self, scheme: Scheme, code: int) -> None:
        super().__init__(f"the run '{scheme.title}' ended with code {code}; what it said stands above")
        self.code = code if code > 0 else 1


TABLE, PICTURE = "demo.json", "demo.png"


def main(argv: list[str] | None = None) -> None:
    """Run the demo; does not return where something fails."""
    options = _parse(argv)
    # As Ctrl-C does, it must end the ranks and leave no half of a result.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for scheme in SCHEMES:
            parse_options(_arguments(scheme, options)).check_ranks(options.ranks)
        _demonstrate(options)
    except (UsageError, DataError) as error:
        _fail(str(error), 2)
    except RunError as error:
        _fail(str(error), error.code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _demonstrate(options: argparse.Namespace) -> None:
    folder = fetch_fashion_mnist(options.data, say=lambda text: print(f"demo: {text}", flush=True))
    data = DIGITS if folder is None else str(folder)
    words = "scikit-learn's digits in place of Fashion-MNIST" if folder is None else f"the files in {folder}"
    print(f"data: {words}", flush=True)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    # Earlier results stay until there are new ones of both runs: what lies together must belong together.
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=out) as unfinished:
        results = [f"{scheme.name}.jsonl" for scheme in SCHEMES] + [TABLE, PICTURE]
        runs = {scheme: _run(scheme, options, data, Path(unfinished) / f"{scheme.name}.jsonl") for scheme in SCHEMES}
        _report(options, runs, Path(unfinished))
        for name in results:
            (out / name).unlink(missing_ok=True)
        for name in results:
            (Path(unfinished) / name).replace(out / name)
    print(f"table:   {out / TABLE}\npicture: {out / PICTURE}")


def _report(options: argparse.Namespace, runs: dict[Scheme, list[dict[str, Any]]], out: Path) -> None:
    """Print the table, and write it and the picture."""
    from launch.picture import draw_accuracy_against_bytes

    rows = [summarize(scheme.title, lines) for scheme, lines in runs.items()]
    start, end = next((lines[0], lines[-1]) for lines in runs.values())
    device = "CPU" if start["device"] == "cpu" else "GPU"
    head = (
        f"LeNet, {start['num_parameters']:,} parameters, {start['world_size']} ranks on {device}, "
        f"{start['num_steps']:,} steps of {options.batch_size:,} images a rank, seed {options.seed}"
    )
    print(f"\n{head}\ndata: {start['data']}\n\n{format_table(rows)}\n")
    facts = {key: start[key] for key in ("data", "machine", "python", "torch")}
    result = {"title": head, **facts, "traffic_of": end["traffic_of"], "schemes": rows}
    (out / TABLE).write_text(json.dumps(result, indent=2) + "\n")
    curves = {scheme.title: [line for line in lines if line["event"] == "test"] for scheme, lines in runs.items()}
    draw_accuracy_against_bytes(curves, f"{start['data'].split(' (')[0]}, {head}", out / PICTURE)


def summarize(title: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one scheme's part of the table from its metrics.

    Args:
        title: the scheme, as the table calls it.
        lines: those of its metrics file.

    Returns:
        Bytes and densities are those of the whole run and the mean over the ranks, as in the picture; `fp32_ratio` and
        `bf16_ratio` say how many times fewer bytes went over the link than in a ring all-reduce.
    """
    end = lines[-1]
    num_bytes = end["sent_bytes"] + end["received_bytes"]
    return {
        "scheme": title,
        "test_accuracy": end["test_accuracy"],
        "sent_bytes": end["sent_bytes"],
        "received_bytes": end["received_bytes"],
        "bytes_are": end["kind"],
        "fp32_ratio": end["fp32_bytes"] / num_bytes if num_bytes else None,
        "bf16_ratio": end["bf16_bytes"] / num_bytes if num_bytes else None,
        "ballot_density": end["ballot_density"],
        "verdict_density": end["verdict_density"],
        "median_step_s": end["median_step_s"],
    }


def format_table(rows: list[dict[str, Any]]) -> str:
    """Return the table as text, a column per scheme."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.2f} %"

    def megabytes(value: float) -> str:
        return f"{value / 1e6:,.2f} MB"

    def times(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f} x"

    measures: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
        ("test accuracy", lambda row: percent(row["test_accuracy"])),
        ("sent per rank (mean)", lambda row: megabytes(row["sent_bytes"])),
        ("received per rank (mean)", lambda row: megabytes(row["received_bytes"])),
        ("these bytes are", lambda row: "counted" if row["bytes_are"] == "counted" else "by formula"),
        ("fewer than fp32 all-reduce", lambda row: times(row["fp32_ratio"])),
        ("fewer than bf16 all-reduce", lambda row: times(row["bf16_ratio"])),
        ("ballots that are not 0", lambda row: percent(row["ballot_density"])),
        ("verdicts that are not 0", lambda row: percent(row["verdict_density"])),
        ("median step", lambda row: f"{1e3 * row['median_step_s']:.1f} ms" if row["median_step_s"] else "-"),
    )
    cells = [["", *(row["scheme"] for row in rows)]]
    cells += [[name, *(show(row) for row in rows)] for name, show in measures]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join([c[0].ljust(widths[0]), *map(str.rjust, c[1:], widths[1:])]) for c in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch.demo", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=4, help="processes on this machine")
    parser.add_argument("--epochs", type=float, default=4.0, help="passes over the training data, per run")
    parser.add_argument("--steps", type=int, help="instead of --epochs")
    parser.add_argument("--batch-size", type=int, default=32, help="images per rank and step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", help="folder with Fashion-MNIST's four files, or 'digits'; else found by itself")
    parser.add_argument("--out", default="runs/demo", help="folder for the results")
    options = parser.parse_args(argv)
    if options.ranks < 1:
        parser.error(f"--ranks must be 1 or more, got {options.ranks}")
    return options


def _arguments(scheme: Scheme, options: argparse.Namespace) -> list[str]:
    """Return the command line of `launch.train` for one scheme, but for its files."""
    length = ["--epochs", str(options.epochs)] if options.steps is None else ["--steps", str(options.steps)]
    # A quarter of an epoch at 4 ranks x 32 images: enough points for a curve, and the tests take a tenth of the time.
    often = ["--eval-every", "117"]
    batches = ["--batch-size", str(options.batch_size), "--seed", str(options.seed)]
    return ["--task", TASK, *batches, *length, *often, *scheme.arguments]


def _run(scheme: Scheme, options: argparse.Namespace, data: str, metrics: Path) -> list[dict[str, Any]]:
    """Let torchrun train one scheme; return its metrics."""
    command = [sys.executable, "-m", "launch.quiet_torchrun", "--standalone", "--nproc-per-node", str(options.ranks)]
    command += ["-m", "launch.train", *_arguments(scheme, options), "--data", data, "--metrics", str(metrics)]
    print(f"\n{scheme.title}", flush=True)
    # torchrun warns at length where this is unset. One thread: each rank sets its own share of the cores.
    process = subprocess.Popen(command, env={"OMP_NUM_THREADS": "1", **os.environ})
    try:
        code = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if code != 0:
        raise RunError(scheme, code)
    return read_lines(metrics)


def _fail(message: str, code: int) -> NoReturn:
    print(f"launch.demo: error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
