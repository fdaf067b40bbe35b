"""A training program that trains nothing, for tests of the study's runner: it answers and writes as one that does.

It keeps a journal beside itself: a line when a cell starts and one when it ends. A cell whose lr is `--hold-from` or
more waits while there is a file `hold` beside it. Nothing of torch is imported: it must start at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser()
    out.add_argument("--task", choices=("easy", "hard"), default="easy")
    out.add_argument("--lr", type=float, default=0.1)
    out.add_argument("--hold-from", type=float, default=1e9)
    out.add_argument("--work-s", type=float, default=0.0)
    out.add_argument("--ending", choices=("well", "by-error", "without-end"), default="well")
    out.add_argument("--seed", type=int, default=0)
    out.add_argument("--metrics")
    return out


def check() -> None:
    cells = [vars(parser().parse_args(cell["arguments"])) for cell in json.load(sys.stdin)["cells"]]
    for cell in cells:
        del cell["metrics"]
    choices = {action.option_strings[-1][2:]: action.choices for action in parser()._actions[1:]}
    del choices["metrics"]
    print(
        json.dumps(
            {"file": str(Path(__file__).resolve()), "choices": choices, "cells": [{"options": c} for c in cells]}
        )
    )


def write_in_journal(word: str, options: argparse.Namespace) -> None:
    with (HERE / "journal").open("a") as file:
        file.write(f"{word} {options.lr:g}/{options.seed} {os.getpid()}\n")


def main() -> None:
    if sys.argv[1:] == ["--check"]:
        check()
        return
    options = parser().parse_args()
    write_in_journal("start", options)
    with (HERE / "cores").open("a") as file:
        file.write(f"{len(os.sched_getaffinity(0))}\n")
    time.sleep(options.work_s)
    while options.lr >= options.hold_from and (HERE / "hold").exists():
        time.sleep(0.01)
    if options.ending == "by-error":
        print("the last words of a cell", file=sys.stderr)
        sys.exit(3)
    lines = [
        {"event": "start", "metric": "test_accuracy", "higher_is_better": True, "num_steps": 30, "data": "made up"},
        *({"event": "test", **measured(options, step)} for step in (10, 20, 30)),
        {"event": "end", **measured(options, 30)},
    ]
    Path(options.metrics).write_text(
        "".join(json.dumps(line) + "\n" for line in lines[: -1 if options.ending != "well" else None])
    )
    write_in_journal("end", options)


def measured(options: argparse.Namespace, step: int) -> dict[str, float | str]:
    return {
        "step": step,
        "epoch": step / 10,
        "test_accuracy": 1 - options.lr / step - options.seed / 1000,
        "train_loss": options.lr * 10 / step,
        "sent_bytes": 1e6 * step * options.lr,
        "received_bytes": 1e6 * step * options.lr,
        "fp32_bytes": 8e6 * step,
        "kind": "counted",
        "median_step_s": 0.01,
    }


if __name__ == "__main__":
    main()
