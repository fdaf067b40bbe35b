"""The command `distsign`: what it prints and writes, and one clear line for every bad input."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distsign.cli import main
from distsign.simulator import Profile
from tests.distributed.ranks import REPOSITORY

GOOD = ["simulate", "--model", "lenet", "--workers", "4", "--link", "1gbit", "--latency", "50us"]


def test_table_json_csv_and_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "a.json"), "--csv", str(tmp_path / "a.csv")]
    assert main([*GOOD, "--compute", "5ms", "--scheme", "fp32", "--scheme", "planes", *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "lenet, 61,706 parameters, compute 5 ms"
    assert lines[-1].startswith("fastest here: planes, by")
    assert any(line.startswith("planes") for line in lines)
    data = json.loads((tmp_path / "a.json").read_text())
    assert [row["scheme"] for row in data["rows"]] == ["fp32", "planes"]
    assert data["advice"] == lines[-1]
    assert data["settings"]["workers"] == 4
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[1]["sent_bytes"]) == data["rows"][1]["sent_bytes"] > 0


def test_the_usual_schemes_and_a_throughput(capsys: pytest.CaptureFixture[str]) -> None:
    nodes = ["--per-node", "2", "--node-link", "100gbit"]
    assert main([*GOOD, *nodes, "--throughput", "2000", "--batch-size", "32"]) == 0
    out = capsys.readouterr().out
    assert "compute 16 ms" in out
    for name in ("fp32", "bf16", "powersgd:rank=1", "topk:density=0.001", "planes", "hierarchical:bits=0.1"):
        assert f"\n{name} " in out


def test_a_usual_scheme_that_is_impossible_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--model", "64,64", "--workers", "4", "--link", "1gbit"]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("distsign: left out sparse:bits=0.1: bits_per_param=0.1")
    assert "sparse" not in printed.out


def test_a_profile_knows_the_link(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ideal = Profile.ideal()
    made = Profile(ideal.collectives, ideal.kernels, bandwidth_bytes_per_s=1.125e8, latency_s=1e-4, efficiency=0.9)
    made.save(tmp_path / "p.json")
    assert main(["simulate", "--model", "lenet", "--workers", "4", "--profile", str(tmp_path / "p.json")]) == 0
    assert "links of 1 Gbit/s, 100 us" in capsys.readouterr().out


BAD = {
    "unknown model": (["--model", "resnet55"], "unknown model 'resnet55': did you mean resnet50"),
    "unknown scheme": (["--scheme", "plane"], "unknown scheme 'plane': did you mean planes"),
    "zero bandwidth": (["--link", "0gbit"], "must be above zero"),
    "negative bandwidth": (["--link=-1gbit"], "must be above zero"),
    "negative bandwidth, a word of its own": (["--link", "-1gbit"], "must be above zero"),
    "strange unit": (["--link", "1gbot"], "cannot read the bandwidth '1gbot'"),
    "strange time": (["--compute", "1 fortnight"], "cannot read the time"),
    "more per node than workers": (["--per-node", "8"], "8 workers per node, but only 4"),
    "no workers": (["--workers", "0"], "at least 1 worker"),
    "workers that are no number": (["--workers", "many"], "invalid int value"),
    "absent profile": (["--profile", "/absent.json"], "cannot read the profile"),
    "no folder": (["--json", "/absent/a.json"], "there is no folder"),
    "no picture": (["--picture", "/tmp/a.jpgg"], "the name of a picture must end with one of "),
    "a dash": (["--json", "-"], "cannot write to -, which is no file"),
    "both times": (["--compute", "1s", "--throughput", "3"], "give one of them"),
    "throughput without a batch": (["--throughput", "3"], "needs --batch-size"),
    "negative bucket": (["--bucket-mb", "-1"], "must be a number of MiB above zero"),
    "endless bucket": (["--bucket-mb", "inf"], "must be a number of MiB above zero, got inf"),
    "a module that wants arguments": (["--model", "torch.nn:Linear"], "cannot be called without arguments"),
    "a folder as a file": (["--json", "/tmp"], "it is a folder"),
    "impossible budget": (["--scheme", "sparse:bits=1e-5"], "bits_per_param"),
    "unknown option": (["--sheme", "fp32"], "unrecognized arguments"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_line_and_exit_code_2(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    extra, words = BAD[name]
    try:
        code = main([*GOOD, *extra])
    except SystemExit as caught:
        code = int(str(caught.code))
    out, err = capsys.readouterr()
    assert code == 2
    assert words in err
    assert not out  # it is said before anything is computed
    assert err.startswith("distsign: ")
    assert err.count("\n") == 1, err


@pytest.mark.parametrize("text", ["{", '{"format": "distsign-profile", "version": 99}'])
def test_a_bad_profile(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.json").write_text(text)
    assert main([*GOOD, "--profile", str(tmp_path / "p.json")]) == 2
    err = capsys.readouterr().err
    assert ("damaged" in err or "version 99" in err) and err.count("\n") == 1


def test_calibrate_without_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert main(["calibrate", str(tmp_path / "p.json")]) == 2
    assert "start it with torchrun" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main(["calibrate", str(tmp_path / "p.json")]) == 2
    assert "there is one only" in capsys.readouterr().err
    assert main(["calibrate", "/absent/p.json"]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert main(["calibrate", str(tmp_path / "p.json"), "--seconds", "0"]) == 2
    assert "--seconds" in capsys.readouterr().err


@pytest.mark.parametrize(("more", "whole_steps"), [([], True), (["--quick"], False)])
def test_whole_steps_are_calibrated_but_in_a_hurry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], whole_steps: bool
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        "distsign.simulator.calibrate.calibrate_under_torchrun", lambda **options: given.update(options)
    )
    assert main(["calibrate", str(tmp_path / "p.json"), "--seconds", "3", *more]) == 0
    assert (given["whole_steps"], given["seconds"]) == (whole_steps, 3.0)


def test_who_reads_may_stop() -> None:
    command = f"{sys.executable} -m distsign {' '.join(GOOD)} | head -n 1"
    done = subprocess.run(command, shell=True, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("lenet") and "Traceback" not in done.stderr and "Broken" not in done.stderr
