"""The demo: the whole command on few steps, and its table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from launch.demo import SCHEMES, format_table, summarize
from launch.metrics import read_lines
from launch.options import parse_options
from launch.picture import draw_accuracy_against_bytes
from tests.distributed.ranks import REPOSITORY


def run_demo(*argv: str, deadline_s: float = 110) -> subprocess.CompletedProcess[str]:
    """Run the demo in a session of its own, of which nothing is left when the time is over."""
    process = start_demo(*argv)
    try:
        stdout, stderr = process.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            stdout, stderr = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            stdout, stderr = process.communicate()
        pytest.fail(f"the demo took more than {deadline_s} s\n{stdout}\n{stderr}")
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def start_demo(*argv: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launch.demo", "--data", "digits", *argv]
    return subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_demo_from_end_to_end(tmp_path: Path) -> None:
    (tmp_path / "demo.png").write_text("of an earlier run")
    (tmp_path / "notes.txt").write_text("the user's own")
    done = run_demo("--ranks", "2", "--steps", "30", "--batch-size", "8", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "digits" in done.stdout.splitlines()[0]
    table, picture = tmp_path / "demo.json", tmp_path / "demo.png"
    assert str(table) in done.stdout
    assert str(picture) in done.stdout
    assert is_png(picture)
    result = json.loads(table.read_text())
    assert "digits" in result["data"]
    adam, vote = result["schemes"]
    assert adam["fp32_ratio"] == pytest.approx(1)
    assert adam["bf16_ratio"] == pytest.approx(0.5)
    assert vote["fp32_ratio"] > 15  # the first steps are the dense ones
    assert vote["bytes_are"] == "counted"
    assert 0 < vote["ballot_density"] < 1 and 0 < vote["verdict_density"] < 1
    assert vote["median_step_s"] > 0
    assert format_table(result["schemes"]) in done.stdout
    for row, name in ((adam, "adam"), (vote, "sign-vote")):
        lines = read_lines(tmp_path / f"{name}.jsonl")
        last_test, end = lines[-2], lines[-1]
        assert end["traffic_of"] == last_test["traffic_of"] == result["traffic_of"]
        assert "mean over the ranks" in result["traffic_of"]
        for key in ("sent_bytes", "received_bytes"):
            # The table, the picture, which draws the lines of tests, and the ranks agree.
            assert row[key] == last_test[key] == sum(rank[key] for rank in end["ranks"]) / 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adam.jsonl",
        "demo.json",
        "demo.png",
        "notes.txt",
        "sign-vote.jsonl",
    ]


def test_ctrl_c_leaves_the_earlier_results_and_says_one_line(tmp_path: Path) -> None:
    for name in ("adam.jsonl", "sign-vote.jsonl", "demo.json", "demo.png"):
        (tmp_path / name).write_text("of an earlier run")
    process = start_demo("--ranks", "2", "--steps", "100000", "--batch-size", "8", "--out", str(tmp_path))
    deadline = threading.Timer(90, process.kill)
    deadline.start()
    assert process.stderr is not None
    seen = ""
    while "step/s" not in seen and "s/step" not in seen:
        piece = process.stderr.read(1)
        if not piece:
            break
        seen += piece
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all its processes at once
    _, rest = process.communicate(timeout=30)
    deadline.cancel()
    assert process.returncode == 130, seen + rest
    assert rest.endswith("launch.demo: error: interrupted\n")
    assert "Traceback" not in rest
    # What is left of the bar, which rewrites its line, then the error; and nothing of torchrun's.
    assert [line for line in rest.splitlines() if line and "it/s" not in line and "step" not in line] == [
        "launch.demo: error: interrupted"
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"adam.jsonl", "sign-vote.jsonl", "demo.json", "demo.png"}
    assert {path.read_text() for path in tmp_path.iterdir()} == {"of an earlier run"}


def test_wrong_options_end_the_demo_before_anything_starts(tmp_path: Path) -> None:
    done = run_demo("--batch-size", "0", "--out", str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "launch.demo: error: --batch-size must be 1 or more, got 0\n"
    assert not (tmp_path / "out").exists()


def test_a_failing_run_ends_the_demo(tmp_path: Path) -> None:
    done = run_demo("--ranks", "2", "--batch-size", "1000", "--out", str(tmp_path))
    assert done.returncode == 1
    assert "launch.train: error: --batch-size 1000 on 2 ranks is more than the data have" in done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        "launch.demo: error: the run 'Adam, fp32 all-reduce' ended with code 1"
    )
    assert not (tmp_path / "demo.json").exists()


def test_damaged_data_end_the_demo_before_any_run(tmp_path: Path) -> None:
    done = run_demo("--data", str(tmp_path / "absent"), "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.startswith("launch.demo: error: the data folder")
    assert not (tmp_path / "out").exists()


def test_the_schemes_are_valid_command_lines() -> None:
    for scheme in SCHEMES:
        parse_options(list(scheme.arguments))


def lines(density: float | None, sent: int, received: int) -> list[dict[str, Any]]:
    end = {"event": "end", "kind": "counted", "test_accuracy": 0.912345, "median_step_s": 0.0123}
    end |= {"fp32_bytes": 64_000_000, "bf16_bytes": 32_000_000, "sent_bytes": sent, "received_bytes": received}
    end |= {"ballot_density": density, "verdict_density": density}
    return [{"event": "start"}, end]


def test_table() -> None:
    row = summarize("votes", lines(0.125, 2_000_000, 2_000_000))
    assert row["sent_bytes"] == row["received_bytes"] == 2_000_000
    assert row["fp32_ratio"] == 16
    assert row["bf16_ratio"] == 8
    text = format_table([row, summarize("alone", lines(None, 0, 0))])
    for cells in (
        ("test accuracy", "91.23 %", "91.23 %"),
        ("sent per rank (mean)", "2.00 MB", "0.00 MB"),
        ("fewer than fp32 all-reduce", "16.00 x", "-"),
        ("ballots that are not 0", "12.50 %", "-"),
        ("median step", "12.3 ms", "12.3 ms"),
    ):
        line = next(line for line in text.splitlines() if line.startswith(cells[0]))
        assert line.removeprefix(cells[0]).split("  ")[-1].strip() == cells[2]
        assert cells[1] in line
    assert len({len(line) for line in text.splitlines()}) == 1, "the columns are aligned"


def test_picture_without_any_bytes(tmp_path: Path) -> None:
    nothing = [{"sent_bytes": 0, "received_bytes": 0, "test_accuracy": 0.5}]
    draw_accuracy_against_bytes({"alone": nothing}, "one rank", tmp_path / "p.png")
    assert is_png(tmp_path / "p.png")
