"""`launch.liars`: a training with liars as a program, for people and for studies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distsign.robustness import ATTACKS
from launch import liars
from launch.metrics import read_lines

SMALL = ["--data", "digits", "--steps", "2", "--batch-size", "2"]


def run(*arguments: str) -> dict[str, Any]:
    return liars.run(liars.make_parser().parse_args([*SMALL, *arguments]))


def test_what_is_written(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    done = run("--attack", "sign-flip", "--liars", "3", "--metrics", str(file))
    start, test, end = read_lines(file)
    assert (start["event"], test["event"], end["event"]) == ("start", "test", "end")
    assert start["metric"] == "test_accuracy" and end["test_accuracy"] == done["test_accuracy"]
    assert done["fp32_bytes"] / (done["sent_bytes"] + done["received_bytes"]) == pytest.approx(16, rel=0.05)


def test_a_run_that_ends_early_says_how_far_it_came() -> None:
    done = run("--attack", "malformed", "--liars", "1")
    assert done["ended_early"] and done["step"] == 0
    assert done["sent_bytes"] == done["received_bytes"] == done["fp32_bytes"] == 0


@pytest.mark.parametrize("attack", [name for name in ATTACKS if name != "none"])
def test_every_attack_against_every_kind_of_defence(attack: str) -> None:
    for defence in (["--defence", "median"], ["--max-poison-streak", "1", "--margin", "2", "--exchange", "all_gather"]):
        done = run("--attack", attack, "--liars", "2", *defence)
        assert 0 <= done["test_accuracy"] <= 1
        # Only payloads can be malformed.
        assert (done["ended_early"] is not None) == (attack == "malformed" and defence[0] != "--defence")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--liars", "8", "--attack", "random"], "--liars must be 0 to 7, some of --workers, got 8"),
        (["--liars", "1"], "give both or neither"),
        (["--attack", "random"], "give both or neither"),
        (["--margin", "9"], "margin"),
        (["--max-density", "2"], "max_density"),
        (["--confidence", "rsm"], "rms"),
        (["--steps", "0"], "--steps"),
        (["--defence", "hope"], "invalid choice: 'hope'"),
        (["--what"], "unrecognized arguments: --what"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        liars.main([*SMALL, *arguments])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("launch.liars: error: ") and words in said
    assert len(said.splitlines()) == 1


def test_it_answers_a_study() -> None:
    cells = [{"ranks": 1, "arguments": [*SMALL, "--seed=3"]}, {"ranks": 2, "arguments": SMALL}]
    found = liars.answer({"cells": [*cells, {"ranks": 1, "arguments": ["--liars=1"]}]})
    assert json.loads(json.dumps(found)) == found
    fine, many, alone = found["cells"]
    assert fine["options"]["seed"] == 3 and "metrics" not in fine["options"]
    assert "expected ranks = 1" in many["error"] and "give both" in alone["error"]
    assert found["choices"]["attack"] == list(ATTACKS) and "metrics" not in found["choices"]
