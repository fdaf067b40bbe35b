"""The training program of a study: asked, before anything is trained, which cells it can run.

A program takes `--check` alone, reads `{"cells": [{"ranks": 4, "arguments": ["--lr=0.1", "--seed=0"]}]}` from stdin
and writes one line of JSON: `file`, where its source is; `choices`, its options with the values that each may have, or
null; `cells`, for each either `options`, complete with defaults, or `error`. With `--metrics=FILE` it writes JSON lines
there, whose `event` is `start`, `test` or `end`. `launch.train` is such a program.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distsign.simulator.units import nearest
from distsign.study.plan import RANKS, Cell, Study

__all__ = ["Checked", "Program", "ask"]


@dataclass(frozen=True)
class Program:
    """What torchrun starts.

    Attributes:
        command: its part of the command line: a file, or `-m` and a module.
        file: its source, from which the version of the code is read.
    """

    command: tuple[str, ...]
    file: Path


@dataclass(frozen=True)
class Checked:
    """A cell that the program can run.

    Attributes:
        cell: as the study asks for it.
        configuration: all that decides its numbers: program, ranks, and every option with its value.
        key: of the configuration.
    """

    cell: Cell
    configuration: Mapping[str, Any]
    key: str


def ask(study: Study) -> tuple[Program, list[Checked]]:
    """Ask the study's program about all cells, in one process.

    Returns:
        The program, and the cells in the order of the study.

    Raises:
        ValueError: the program cannot be found, does not answer, or cannot run a cell; or two cells are one and the
            same configuration.
    """
    command = _command(study)
    cells = study.cells()
    question = {"cells": [{"ranks": cell.ranks, "arguments": cell.arguments()} for cell in cells]}
    answer = _answer(study, command, json.dumps(question))
    _check_names(study, answer["choices"])
    checked: dict[str, Checked] = {}
    for cell, found in zip(cells, answer["cells"], strict=True):
        if "error" in found:
            raise ValueError(f"{study.path}: {cell.label}: {found['error']}")
        configuration = {"program": study.program, RANKS: cell.ranks, "options": found["options"]}
        key = key_of(configuration)
        if key in checked:
            raise ValueError(
                f"{study.path}: {cell.label}: this is the same configuration as {checked[key].cell.label}: "
                "leave one of them out"
            )
        checked[key] = Checked(cell, configuration, key)
    return Program(command, Path(answer["file"])), list(checked.values())


def key_of(configuration: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits that stand for a configuration, whatever the order of its keys.

    Example:
        >>> key_of({"a": 1, "b": 0.5}) == key_of({"b": 0.5, "a": 1})
        True
        >>> key_of({"a": 1}) == key_of({"a": 2})
        False
    """
    text = json.dumps(configuration, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _command(study: Study) -> tuple[str, ...]:
    """Return the program's command line; a file's name is relative to the study's folder."""
    try:
        words = shlex.split(study.program)
    except ValueError as error:
        raise ValueError(f"{study.path}: program {study.program!r} is no command line: {error}") from error
    if not words:
        raise ValueError(f'{study.path}: program is empty: expected a file, or "-m MODULE"')
    if words[0] == "-m":
        return tuple(words)
    file = study.path.parent / words[0]
    if not file.is_file():
        raise ValueError(f"{study.path}: there is no program {file}: name a file beside the study, or -m MODULE")
    return str(file.resolve()), *words[1:]


def _answer(study: Study, command: Sequence[str], question: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, *command, "--check"], input=question, capture_output=True, text=True, check=False
    )
    said = done.stderr.strip().splitlines()
    if done.returncode != 0 and said and re.match(".*: (No module named|Error while finding module)", said[-1]):
        raise ValueError(
            f"{study.path}: the program {study.program!r} cannot be found: run the study in a checkout of distsign, "
            "or name another with program = ..."
        )
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
        is_good = {"file", "choices", "cells"} <= answer.keys()
    except (IndexError, json.JSONDecodeError, AttributeError):
        is_good = False
    if done.returncode != 0 or not is_good:
        last = f": {said[-1]}" if said else ""
        raise ValueError(
            f"{study.path}: the program {study.program!r} does not answer --check as distsign.study.program says "
            f"(exit code {done.returncode}){last}"
        )
    return answer  # type: ignore[no-any-return]


def _check_names(study: Study, choices: Mapping[str, Sequence[str] | None]) -> None:
    """Refuse options and values that the program does not know, with the nearest that it does."""
    known = [*(name for name in choices if name != "seed"), RANKS]
    for layer in study.layers():
        for option, value in layer.options.items():
            if option not in known:
                raise ValueError(f"{study.path}: {layer.where}: {nearest('option', option, known)}")
            for each in value if isinstance(value, list) else [value]:
                allowed = choices.get(option)
                if allowed is not None and each not in allowed:
                    raise ValueError(f"{study.path}: {layer.where}: {nearest(option, str(each), allowed)}")
