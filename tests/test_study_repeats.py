"""A study of real training runs says the same, bit for bit, when it is run again from the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distsign.cli import main

STUDY = """
name = "signADAM++ twice"
ranks = 2
seeds = [0]
[defaults]
data = "digits"
device = "cpu"
batch-size = 8
steps = 6
eval-every = 2
optimizer = "sign-adam-pp"
hook = "sign-vote"
[[tasks]]
task = "fashion-mnist-lenet"
[[schemes]]
name = "signADAM++"
confidence = "adaptive"
lr = 4e-3
[[schemes]]
name = "the recipe"
confidence = "rms:k=4"
momentum = 0
lr = 1e-2
"""
TIMES_AND_PLACES = {"median_step_s", "options"}


def rows(out: Path) -> dict[str, Any]:
    """Return what each cell measured, but for times and the names of files."""
    found = {}
    for line in (out / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        events = [{k: v for k, v in event.items() if k not in TIMES_AND_PLACES} for event in row["metrics"]]
        found[row["key"]] = events
    return found


def test_sign_adam_pp_repeats_bit_for_bit(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(STUDY)
    for name in ("once", "again"):
        assert main(["study", str(tmp_path / "study.toml"), "--out", str(tmp_path / name), "--jobs", "2"]) == 0
    once, again = rows(tmp_path / "once"), rows(tmp_path / "again")
    assert len(once) == 2 and once == again
    ends = [events[-1] for events in once.values()]
    assert len({json.dumps(end) for end in ends}) == 2, "cells that all say the same show nothing"
