"""The demo: the whole command on few steps, and its table."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.demo import SCHEMES, format_table, summarize
from launch.options import parse_options
from launch.picture import draw_accuracy_against_bytes
from tests.distributed.ranks import REPOSITORY


def run_demo(*argv: str, deadline_s: float = 110) -> subprocess.CompletedProcess[str]:
    """Run the demo in a session of its own, of which nothing is left when the time is over."""
    command = [sys.executable, "-m", "launch.demo", "--data", "digits", *argv]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        stdout, stderr = process.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # torchrun passes it on to its ranks
        try:
            stdout, stderr = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            stdout, stderr = process.communicate()
        pytest.fail(f"the demo took more than {deadline_s} s\n{stdout}\n{stderr}")
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_demo_from_end_to_end(tmp_path: Path) -> None:
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
    assert vote["fp32_ratio"] > 15
    assert vote["bytes_are"] == "counted"
    assert 0 < vote["ballot_density"] < vote["verdict_density"] < 1
    assert vote["median_step_s"] > 0
    assert format_table(result["schemes"]) in done.stdout


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


def rank(sent: int, received: int, density: float | None) -> dict[str, Any]:
    return {"sent_bytes": sent, "received_bytes": received, "ballot_density": density, "verdict_density": density}


def lines(density: float | None, sent: int, received: int) -> list[dict[str, Any]]:
    end = {"event": "end", "kind": "counted", "test_accuracy": 0.912345, "median_step_s": 0.0123}
    end |= {"fp32_bytes": 64_000_000, "bf16_bytes": 32_000_000}
    end["ranks"] = [rank(sent, received, density), rank(3 * sent, 3 * received, density)]
    return [{"event": "start", "data": "Fashion-MNIST (Debian: /usr)"}, end]


def test_table() -> None:
    row = summarize("votes", lines(0.125, 1_000_000, 1_000_000))
    assert row["sent_bytes"] == row["received_bytes"] == 2_000_000
    assert row["fp32_ratio"] == 16
    assert row["bf16_ratio"] == 8
    text = format_table([row, summarize("alone", lines(None, 0, 0))])
    for cells in (
        ("test accuracy", "91.23 %", "91.23 %"),
        ("bytes sent per rank", "2.00 MB", "0.00 MB"),
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
