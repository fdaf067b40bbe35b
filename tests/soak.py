"""A thousand faults, and the end state of a run without them: `python -m tests.soak --faults 1000 --out FOLDER`.

A soak is made of rounds of about twenty faults, drawn from the seed. Each trains a LeNet by sign votes on three ranks
twice, without faults and with them: ranks are killed, frozen and cut off, their gradients, parameters, payloads and
checkpoints damaged. After a fault that ends the run all ranks are started again with `--resume if-there`. A fault is
survived if every rank that is left ends by itself in time and says why, and the run goes on from its last whole
checkpoint; a round, if its end state is that of the run without faults, bit for bit.

Rounds are lines of FOLDER/rounds.jsonl, written as they end; with the same folder and seed a soak goes on after them.
Links are those of the lab (`launch/netlab.py`); without root and iproute2 their faults are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from launch.metrics import describe_machine, read_lines
from launch.netlab import Lab
from launch.netns import LabUnavailable
from launch.netrun import exit_on_signals
from tests import forked
from tests.soak_faults import RATE, Strike
from tests.soak_plan import Round, draw_round
from tests.soak_report import report
from tests.soak_round import Setting, run_round

FAULTS_PER_ROUND = 20
FILE = "rounds.jsonl"


def soak(options: argparse.Namespace, setting: Setting) -> None:
    """Run the rounds that are missing, until there are as many faults as wanted or the time is up."""
    lines = rounds_of(options)
    done = {line["round"] for line in lines}
    until = time.monotonic() + options.minutes * 60
    count = sum(map(num_faults, lines))
    with tqdm(total=options.faults, initial=count, unit="fault", mininterval=1.0) as bar:
        for number in itertools.count():
            if count >= options.faults or time.monotonic() > until:
                return
            if number in done:
                continue
            left = min(FAULTS_PER_ROUND, options.faults - count)
            plan = draw_round(options.seed, number, left, setting.num_ranks, links=setting.lab is not None)
            line = {
                "soak_seed": options.seed,
                "round": number,
                "drawn": left,
                **one_round(options, setting, plan, number, bar),
            }
            with (options.out / FILE).open("a") as out:
                out.write(json.dumps(line) + "\n")
            count += num_faults(line)


def one_round(
    options: argparse.Namespace, setting: Setting, plan: Round, number: int, bar: tqdm[NoReturn]
) -> dict[str, Any]:
    """Run a round; its files are kept where something went otherwise than it must."""
    folder = options.out / f"round-{number:04}"
    shutil.rmtree(folder, ignore_errors=True)

    def struck(found: Strike) -> None:
        bar.update()
        if found.why is not None:
            tqdm.write(f"soak: {found.kind} on rank {found.rank} after step {found.step}: {found.why}", sys.stderr)

    try:
        line = run_round(setting, plan, folder, struck)
    except (RuntimeError, TimeoutError) as error:
        tqdm.write(f"soak: round {number} was given up: {error}", sys.stderr)
        return {"given_up": str(error)}
    if is_good(line):
        shutil.rmtree(folder)
    return line


def rounds_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the lines of the rounds that have been run with this seed."""
    return [line for line in read_lines(options.out / FILE) if line["soak_seed"] == options.seed]


def num_faults(line: dict[str, Any]) -> int:
    """Return how many faults a round stands for."""
    return int(line["drawn"]) if "given_up" in line else len(line["faults"])


def is_good(line: dict[str, Any]) -> bool:
    """Return whether all of a round was as it must be."""
    return bool(line.get("equal")) and not line["strays"] and all("why" not in fault for fault in line["faults"])


@contextlib.contextmanager
def lab_or_not(num_ranks: int) -> Iterator[tuple[Lab | None, str]]:
    """Yield the lab, or None and why there is none."""
    with contextlib.ExitStack() as stack:
        try:
            lab, why = stack.enter_context(Lab(num_ranks, RATE, prefix="distsign-soak")), ""
        except LabUnavailable as error:
            lab, why = None, str(error)
            stack.callback(exit_on_signals())
        yield lab, why


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tests.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=1000, help="how many (1000)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (0)")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), metavar="FOLDER", help="results (runs/soak)")
    parser.add_argument("--minutes", type=float, default=float("inf"), metavar="N", help="begin no round after so long")
    parser.add_argument("--ranks", type=int, default=3, help="at least 3, for a flipped bit to have a minority (3)")
    parser.add_argument("--timeout", type=float, default=3.0, metavar="SECONDS", help="--timeout of launch.train (3)")
    options = parser.parse_args(argv)
    if options.faults < 1 or options.ranks < 3:
        parser.error("--faults must be 1 or more, --ranks 3 or more")
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 if there were as many faults as wanted, each was survived, and every end state was that of a run without.
    """
    options = parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    is_interrupted, why = False, ""
    try:
        forked.start()
        with lab_or_not(options.ranks) as (lab, why):
            soak(options, Setting(options.ranks, options.timeout, lab))
    except KeyboardInterrupt:
        is_interrupted = True
    finally:
        forked.stop()
    lines = rounds_of(options)
    text = report(lines, options.timeout, why, describe_machine())
    (options.out / "report.txt").write_text(text)
    print(text, end="")
    if is_interrupted:
        print("soak: interrupted; the same command goes on after the rounds above", file=sys.stderr)
        return 130
    short = options.faults - sum(map(num_faults, lines))
    if short > 0:
        print(f"soak: {short} of {options.faults} faults are left: the same command goes on with them", file=sys.stderr)
    return 0 if short <= 0 and all(is_good(line) for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
