"""`launch.train --check`: say of many command lines at once whether they can be run, and train nothing.

`distsign study` asks this of its program before the first cell is trained. One JSON document comes in,
`{"cells": [{"ranks": 4, "arguments": ["--lr=0.1", ...]}, ...]}`, and one goes out: `file`, this program's source;
`choices`, for each option that a study may set the values that it knows, null where any will do; and `cells`, for each
command line either `options`, all of them with what they are by default, or `error`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any, TextIO

from launch.data import DataError
from launch.options import UsageError, make_parser, parse_options
from launch.tasks import TASKS

FLAG = "--check"

OF_ONE_RUN = frozenset({"metrics", "checkpoint", "checkpoint_every", "stop_after", "resume"})
"""Where a run keeps its files and how it is cut into pieces: no part of what is computed."""


def answer(asked: TextIO, answers: TextIO) -> None:
    """Read the question, write the answer; see the module for both."""
    try:
        cells = [(list(cell["arguments"]), int(cell["ranks"])) for cell in json.load(asked)["cells"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            'on standard input --check wants a JSON document, {"cells": [{"ranks": 4, "arguments": ["--lr=0.1"]}]}, as '
            f"distsign study sends it: {error}"
        ) from error
    checked = [_check(arguments, num_ranks) for arguments, num_ranks in cells]
    json.dump({"file": os.path.abspath(__file__), "choices": _choices(), "cells": checked}, answers)
    answers.write("\n")


def _choices() -> dict[str, list[str] | None]:
    """Return the options by the name they have on the command line, without the dashes."""
    return {
        action.option_strings[-1].removeprefix("--"): None if action.choices is None else list(action.choices)
        for action in make_parser()._actions
        if action.dest not in OF_ONE_RUN | {"help"}
    }


def _check(arguments: Sequence[str], num_ranks: int) -> dict[str, Any]:
    os.environ["LOCAL_WORLD_SIZE"] = str(num_ranks)  # as under torchrun; the hierarchical exchange wants to know
    try:
        options = parse_options(list(arguments))
        options.check_ranks(num_ranks)
        dataset = TASKS[options.task].dataset
        if dataset is not None:
            dataset.find(options.data)
    except (UsageError, DataError) as error:
        return {"error": str(error)}
    values = dataclasses.asdict(options)
    return {"options": {name: value for name, value in values.items() if name not in OF_ONE_RUN}}
