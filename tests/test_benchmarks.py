"""The benchmarks run, on tiny sizes, and their results have the ratios that they are for."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import checks, codec, cuda, scaling, simulator_report, simulator_settings, step
from benchmarks.common import Column, Contender, Report, format_table, interleaved, ratio, summary
from benchmarks.ranks import slowest
from benchmarks.simulator_settings import Setting
from benchmarks.step_schemes import FP32, NO_OP, SCHEMES
from distsign.simulator import Profile
from distsign.simulator.units import parse_bandwidth
from tests.distributed.ranks import REPOSITORY

PROFILE = REPOSITORY / "benchmarks" / "results" / "simulator" / "simulator-profile-300mbit-2-1.json"


def read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text())
    assert {"benchmark", "date", "commit", "machine", "torch", "numba", "load_average", "settings"} <= result.keys()
    return result


# ------------------------------------------------------------------------------------------------------------- common


def test_contenders_take_turns_and_setups_are_not_timed() -> None:
    done: list[str] = []

    def timer(run: Any) -> float:
        run()
        return float(len(done))

    contenders = [
        Contender(name="a", run=lambda: done.append("a")),
        Contender(name="b", run=lambda: done.append("b"), setup=lambda: done.append("set up")),
    ]
    times = interleaved(contenders, rounds=2, warm_up=1, timer=timer)
    assert done == ["set up", "b", "a", "a", "set up", "b", "set up", "b", "a"]
    assert times == {"a": [4.0, 9.0], "b": [6.0, 8.0]}


def test_the_time_limit_leaves_three_rounds() -> None:
    times = interleaved([Contender(name="a", run=lambda: None)], rounds=1000, limit_s=0.0)
    assert len(times["a"]) == 3


def test_checks_are_held_against_both_trainers_without() -> None:
    without = {"none": [10.0, 11.0, 12.0], "none again": [12.0, 11.0, 10.0], "replicas": [22.0]}
    rounds = [{**without, "all": [11.2, 11.3, 11.4]}, {**without, "all": [11.4, 11.5, 11.6]}]
    row = checks.row_of("vote", rounds)
    assert (row["none again"], row["all"]) == (pytest.approx(0.0), pytest.approx(0.4 / 11))
    assert row["replicas"] == pytest.approx(22 / 1100)
    assert row["together"] == row["all"] + row["replicas"]
    assert row["error"] == pytest.approx(0.1 / 11)
    assert checks.row_of("vote", rounds[:1])["error"] == math.inf


def test_summary_and_ratio() -> None:
    assert summary([3.0, 1.0, 2.0]) == {"ms": 2.0, "spread": 0.5, "rounds": 3}
    assert summary([4.0]) == {"ms": 4.0, "spread": 0.0, "rounds": 1}
    assert (ratio(1.0, 2.0), ratio(None, 2.0), ratio(1.0, None)) == (0.5, None, None)
    assert slowest([[1.0, 5.0], [2.0, 4.0]]) == [2.0, 5.0]


def test_table_is_aligned_and_shows_what_is_missing() -> None:
    columns = [Column("name", "scheme"), Column("ms", "ms", ".1f")]
    text = format_table(columns, [{"name": "vote", "ms": 1.25}, {"name": "longer name", "ms": None}, {"name": "x"}])
    assert text.splitlines() == [
        "scheme        ms",
        "-----------  ---",
        "vote         1.2",
        "longer name    -",
        "x              -",
    ]


def test_report_writes_all_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("some", argparse.Namespace(quick=True, out=str(tmp_path / "new"), rounds=3))
    report.table("one", [Column("a", "a", "d")], [{"a": 1, "b": 2}], "a note")
    report.table("two", [Column("a", "a", "d")], [{"a": 3}])
    report.write()
    result = read(tmp_path / "new" / "some.json")
    assert result["rows"] == [{"a": 1, "b": 2}, {"a": 3}]
    assert result["notes"] == ["a note"]
    assert result["settings"] == {"quick": True, "rounds": 3}
    assert "cores, load" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------- benchmarks


def test_codec(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.codec", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in read(tmp_path / "codec.json")["rows"]}
    assert rows["torch copy_"]["ratio_to_copy"] == 1
    for name, target in (("pack planes", 0.7), ("unpack planes", 0.7), ("pack_carry float32", 1.2)):
        assert rows[name]["ratio_to_copy"] > 0
        assert rows[name]["target"] == target
        assert name in done.stdout
    assert rows["p=0.01"]["ratio_to_entropy"] < 1.1


def test_step_on_loopback(tmp_path: Path) -> None:
    """No more than it takes to see that ranks start, are timed, and are put beside their rivals."""
    command = [sys.executable, "-m", "benchmarks.step", "--quick", "--rates", "loopback", "--ranks", "2"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in read(tmp_path / "step.json")["rows"]}
    assert list(rows) == [scheme.name for scheme in SCHEMES]
    assert rows[NO_OP]["ratio_to_no_op"] == rows[FP32]["ratio_to_fp32"] == 1
    for scheme in SCHEMES:
        row = rows[scheme.name]
        assert all(row[f"ratio_to_{rival}"] > 0 for rival in ("no_op", "fp32", "bf16", "power_sgd"))
        assert (row["counted_mb"] == 0) == (scheme.name == NO_OP)
        assert row["interface_mb"] is None
        if scheme.is_vote:
            assert row["counted_mb"] < rows[FP32]["counted_mb"] / 15


def test_profile_has_rows_for_each_part() -> None:
    parts = {"whole step": {"ms": 10.0, "cpu_ms": 4.0}, "tally": {"ms": 2.0, "cpu_ms": 1.0}}
    rows = step.profile_rows([{"vote": parts}, {"vote": parts}])
    assert rows[1] == {"name": "vote", "part": "tally", "ms": 2.0, "cpu_ms": 1.0, "share": 0.2}


def test_flatness_takes_the_factor_out() -> None:
    rows: list[dict[str, Any]] = [
        {"name": "planes", "ranks": ranks, "counted_mb": 6.0 * (ranks - 1) / ranks, "interface_mb": None}
        for ranks in (2, 4, 8)
    ]
    scaling.add_flatness(rows)
    assert [row["flatness"] for row in rows] == pytest.approx([1, 1, 1])
    assert rows[0]["interface_flatness"] is None


def test_the_simulator_is_held_to_the_fastest_measured() -> None:
    rows: list[dict[str, Any]] = [
        {"setting": "s", "name": "fp32", "predicted_ms": 10.0, "ms": 8.0, "error": 0.25},
        {"setting": "s", "name": "planes", "predicted_ms": 11.0, "ms": 8.8, "error": 0.25},
        {"setting": "s", "name": "bf16", "predicted_ms": 12.0, "ms": 7.5, "error": -0.2},
    ]
    choice = simulator_report.choice_of(rows)
    assert (choice["predicted"], choice["measured"]) == ("fp32", "bf16")
    assert choice["behind"] == pytest.approx(8.0 / 7.5 - 1)
    assert simulator_report.mean_error(rows) == pytest.approx(0.25)


def test_how_far_two_runs_are_from_each_other(tmp_path: Path) -> None:
    now, then = (simulator_settings.Results(tmp_path / name) for name in ("now", "then"))
    now.add("a", {FP32: 20.0, "planes": 12.0}, {FP32: 10.0, "planes": 4.0}, 1.0)
    now.add("b", {FP32: 1.0}, {FP32: 10.0}, 1.0)
    then.add("a", {FP32: 40.0, "planes": 24.0, "top-k": 1.0}, {FP32: 20.0, "planes": 8.0, "top-k": 1.0}, 1.0)
    then.add("c", {FP32: 1.0}, {FP32: 10.0}, 1.0)
    count, difference, beside = simulator_report.differences(now, then)
    assert count == 2
    assert difference == pytest.approx(1.0)
    assert beside == pytest.approx(0.0)  # all of it was forward and backward


def test_how_far_some_steps_are_off() -> None:
    rows = [{"error": 0.25, "quick_error": 1.0}, {"error": 0.0, "quick_error": -0.5}]
    found = simulator_report.summary_of("all", rows)
    assert found["error"] == pytest.approx(math.sqrt(1.25) - 1)
    assert (found["error_bias"], found["error_large"], found["quick_error_bias"]) == (0.125, 1, 0.25)
    assert found["quick_error"] == pytest.approx(1.0)


def test_the_simulator_holds_settings_out_by_its_rule() -> None:
    assert len({setting.key for setting in simulator_settings.SETTINGS}) == len(simulator_settings.SETTINGS) >= 24
    calibrated = {parse_bandwidth(rate) for rate in simulator_settings.CALIBRATED_RATES}
    assert calibrated.isdisjoint(parse_bandwidth(setting.rate) for setting in simulator_settings.SETTINGS)
    assert {setting.num_ranks for setting in simulator_settings.SETTINGS} >= {2, 3, 4, 6, 8}


@pytest.mark.parametrize(
    ("rate", "calibrated"),
    [("50mbit", "300mbit"), ("500mbit", "300mbit"), ("2gbit", "1500mbit"), ("10gbit", "7gbit"), ("100gbit", "7gbit")],
)
def test_a_setting_takes_the_profile_of_the_nearest_link(rate: str, calibrated: str) -> None:
    assert simulator_settings.calibrated_rate(Setting(2, rate, "lenet x 4")) == calibrated


@pytest.mark.parametrize(("num_ranks", "calibrated"), [(2, 2), (3, 4), (4, 4), (6, 8), (8, 8)])
def test_a_setting_takes_the_profile_of_enough_ranks(num_ranks: int, calibrated: int) -> None:
    assert simulator_settings.calibrated_ranks(Setting(num_ranks, "2gbit", "lenet x 4")) == calibrated


def test_the_report_leaves_out_what_has_no_profile_and_names_the_commits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [Setting(2, rate, "lenet x 4") for rate in ("200mbit", "500mbit", "10gbit")]
    lines = [
        {"key": each.key, "commit": commit, "ms": {NO_OP: 20.0, FP32: 50.0}}
        for each, commit in zip(settings, ("abc", "def", "def"), strict=True)
    ]
    (tmp_path / simulator_settings.MEASURED).write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = simulator_settings.Results(tmp_path)
    profile = Profile.load(PROFILE)  # it serves the second, too
    facts = {name: fact for name, fact in profile.facts.items() if name != "seconds"}  # as those of before have it
    dataclasses.replace(profile, facts=facts).save(results.profile_path(settings[0]))
    assert [results.is_complete(each) for each in settings] == [True, True, False]
    simulator_report.write_report(argparse.Namespace(out=str(tmp_path), quick=False, earlier=None), settings, results)
    said = capsys.readouterr().out
    assert "1 settings were measured and have no profile here" in said
    assert "all 2 held out" in said and "measured by several commits: abc, 1, def, 1" in said
    assert "How long calibrating took" not in said and "a steady machine" not in said


def test_the_report_tells_a_steady_machine_from_one_that_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [Setting(2, rate, "lenet x 4") for rate in ("200mbit", "500mbit")]
    results = simulator_settings.Results(tmp_path)
    profile = Profile.load(PROFILE)
    facts = {**profile.facts, simulator_settings.YARDSTICK: 10.0}
    dataclasses.replace(profile, facts=facts).save(results.profile_path(settings[0]))
    for each, yardstick in zip(settings, (10.4, 10.6), strict=True):
        results.add(each.key, {FP32: 50.0}, {FP32: 20.0}, yardstick)
    assert [results.drift(each) for each in settings] == [pytest.approx(0.04), pytest.approx(0.06)]
    simulator_report.write_report(argparse.Namespace(out=str(tmp_path), quick=False, earlier=None), settings, results)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[3] for line in lines if line[:3] == ["a", "steady", "machine"]] == ["1"]
    assert [line[4] for line in lines if line[:4] == ["one", "that", "had", "changed"]] == ["1"]


def test_a_line_of_results_is_read_back(tmp_path: Path) -> None:
    simulator_settings.Results(tmp_path).add("a setting", {FP32: 50.0}, {FP32: 20.0}, 1.5)
    again = simulator_settings.Results(tmp_path)
    assert again.measured == {"a setting": {FP32: 50.0}} and again.compute == {"a setting": {FP32: 20.0}}
    assert again.yardsticks == {"a setting": 1.5}
    assert list(again.commits) == ["a setting"]


def test_cuda_says_why_it_measures_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cuda.main(["--quick", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "cuda: no CUDA device here: nothing measured\n"
    assert not list(tmp_path.iterdir())


def test_cuda_puts_kernels_beside_the_copy() -> None:
    """The table is made on any device; only the timer needs a GPU."""
    from benchmarks.kernel_cases import GRANULE, cases

    contenders = cases(GRANULE, "cpu", densities=(0.01,))
    rows = cuda.rows_of(contenders, interleaved(contenders, rounds=1, warm_up=0))
    assert rows[0]["share_of_copy_bandwidth"] == 1
    assert all(row["ratio_to_copy"] > 0 for row in rows)


def test_wrong_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for main, argv, words in (
        (scaling.main, ["--ranks", "1"], "--ranks must be 2 or more"),
        (step.main, ["--rates", "fast"], "cannot read the rate 'fast'"),
        (codec.main, ["--rounds", "many"], "invalid int value"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert caught.value.code == 2
        assert words in capsys.readouterr().err
