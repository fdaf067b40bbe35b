"""A short soak: faults of most kinds are survived, and a soak sees it where one is not."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import checkpoint
from launch.netlab import Lab
from tests import forked, soak, soak_faults, soak_plan, soak_round
from tests.soak_faults import RATE, Strike
from tests.soak_life import End, trouble_of_loss, trouble_of_words
from tests.soak_plan import Fault, Round, draw_round
from tests.soak_report import report
from tests.soak_round import Lives, Run, Setting, run_round
from tests.test_netlab import PREFIX, namespaces, needs_lab

TIMEOUT_S = 3.0
LOCAL = Setting(3, TIMEOUT_S, None)


@pytest.fixture(scope="module")
def _forked() -> None:
    forked.start()


needs_ranks = pytest.mark.usefixtures("_forked")


def plan_of(*kinds: str, way: str = "standing ballots") -> Round:
    """Return a round with these faults, on one rank after the other."""
    faults = [Fault(kind, k % 3, 9 + 3 * k, 0.01, (0.3, 0.6, 0.4)) for k, kind in enumerate(kinds)]
    return Round(seed=5, num_steps=9 + 3 * len(kinds) + 12, faults=faults, way=way)


def assert_survived(line: dict[str, Any], plan: Round) -> None:
    assert [fault["why"] for fault in line["faults"] if "why" in fault] == []
    assert sorted(fault["kind"] for fault in line["faults"]) == sorted(fault.kind for fault in plan.faults)
    assert line["equal"] and line["has_trained"], line["different"]
    assert line["strays"] == []
    assert not [each for each in multiprocessing.active_children() if each.name.startswith("soak")]


@needs_ranks
def test_a_few_faults_and_the_same_end(tmp_path: Path) -> None:
    kinds = (soak_plan.KILL, soak_plan.NAN, soak_plan.WIRE, soak_plan.FLIP, soak_plan.TRUNCATE, soak_plan.KILL_STARTING)
    plan = plan_of(*kinds)
    line = run_round(LOCAL, plan, tmp_path)
    assert_survived(line, plan)
    assert line["lives"] == 6 and line["steps_lost"] > 0
    kept = checkpoint.read(str(tmp_path / "faulty" / "run.pt"))
    own = kept["ranks"][1]["hook"]
    assert all(kept["shared"]["optimizer"]["state"].values()) and own["voter"] and own["owner"], "nothing to lose"
    assert all("momentum_buffer" in each for each in kept["shared"]["optimizer"]["state"].values())


@needs_ranks
@pytest.mark.parametrize("way", [way for way in soak_plan.WAYS if way != "standing ballots"])
def test_other_ways_to_vote(tmp_path: Path, way: str) -> None:
    plan = plan_of(soak_plan.INF, soak_plan.WIRE, way=way)
    assert_survived(run_round(LOCAL, plan, tmp_path), plan)


@needs_lab
@needs_ranks
def test_links(tmp_path: Path) -> None:
    plan = plan_of(soak_plan.CUT, soak_plan.SLOW)
    with Lab(3, RATE, prefix=PREFIX) as lab:
        assert_survived(run_round(Setting(3, TIMEOUT_S, lab), plan, tmp_path), plan)


@needs_ranks
def test_one_bit_of_the_end_state_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(Run):
        def go(self, *args: Any) -> Lives:
            lives = super().go(*args)
            if self.folder.name == "faulty":
                content = checkpoint.read(str(self.file))
                content["shared"]["model"]["conv1.bias"].view(torch.int32)[1] ^= 1
                checkpoint.write(str(self.file), content)
            return lives

    monkeypatch.setattr(soak_round, "Run", Forgetful)
    line = run_round(LOCAL, Round(5, 9, []), tmp_path)
    assert not line["equal"] and line["different"] == [".shared.model.conv1.bias"]


@needs_ranks
def test_a_hang_is_seen_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks would wait for a minute."""
    monkeypatch.setattr(soak_faults, "SLACK_S", 1.0)
    plan = plan_of(soak_plan.FREEZE)
    run = Run(Setting(3, 1.0, None), plan, tmp_path / "run")
    argv = run.argv()
    monkeypatch.setattr(run, "argv", lambda: [*argv, "--timeout", "60"])
    lives = run.go(plan.faults)
    [found] = lives.strikes
    assert found.hangs and found.why == "rank 1 hangs; rank 2 hangs"
    assert lives.num_lives == 2 and lives.strays == []


@needs_lab
def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.soak", "--faults", "5", "--out", str(tmp_path)]
    running = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        until = time.monotonic() + 100
        while not list(tmp_path.glob("round-0000/*/life-0-rank-2.txt")) and time.monotonic() < until:
            assert running.poll() is None, running.communicate()
            time.sleep(0.1)
        left = [name for name in all_namespaces() if f"-{running.pid}-" in name]
        assert left
        os.killpg(running.pid, signal.SIGINT)
        _, words = running.communicate(timeout=60)  # to the end of all that hold the pipe, ranks too
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == 130, words
    assert "Traceback" not in words and "the same command goes on" in words
    assert not set(left) & set(all_namespaces())


def all_namespaces() -> list[str]:
    return namespaces("distsign-soak")


def test_a_soak_goes_on_after_the_rounds_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []

    def run_quickly(setting: Setting, plan: Round, folder: Path, struck: Any) -> dict[str, Any]:
        folder.mkdir()
        seeds.append(plan.seed)
        if len(seeds) == 2:
            raise RuntimeError("no step")
        if len(seeds) == 3:
            raise KeyboardInterrupt
        return {"faults": [Strike(fault.kind, 0, 0).as_line() for fault in plan.faults], "equal": True, "strays": []}

    monkeypatch.setattr(soak, "run_round", run_quickly)
    options = soak.parse(["--faults", "70", "--out", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        soak.soak(options, LOCAL)
    soak.soak(options, LOCAL)
    lines = soak.rounds_of(options)
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    assert [soak.num_faults(line) for line in lines] == [20, 20, 20, 10]
    assert seeds == [draw_round(0, number, 20, 3, links=False).seed for number in (0, 1, 2, 2)] + seeds[4:]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["round-0001"], "what went wrong is kept"
    options.minutes, options.faults = 0, 1000
    soak.soak(options, LOCAL)
    assert len(soak.rounds_of(options)) == 4


def test_a_schedule_is_a_matter_of_its_seed() -> None:
    assert draw_round(0, 1, 20, 3, links=True) == draw_round(0, 1, 20, 3, links=True)
    assert draw_round(0, 1, 20, 3, links=True) != draw_round(0, 2, 20, 3, links=True)
    drawn = [fault for number in range(50) for fault in draw_round(0, number, 20, 3, links=True).faults]
    assert {fault.kind for fault in drawn} == set(soak_plan.WEIGHTS)
    assert sum(fault.kind == soak_plan.KILL for fault in drawn) >= 100
    assert {draw_round(0, number, 20, 3, links=True).way for number in range(50)} == set(soak_plan.WAYS)
    for number in range(20):
        without = draw_round(0, number, 20, 3, links=False)
        assert len(without.faults) == 20 and not {fault.kind for fault in without.faults} & {*soak_plan.OF_LINKS}


VOTE = "launch.train: error: the vote on 1 bucket(s) failed in step 3: ballots did not get through among ranks [0]"


@pytest.mark.parametrize(
    ("code", "words", "is_well"),
    [
        (1, f"{VOTE}\n", True),
        (1, "launch.train: error: rank 1 of 3 starting, waited in vain for another rank: closed", True),
        (1, "launch.train: error: rank 1 of 3 training, after step 3, waited in vain for another rank", True),
        (None, f"{VOTE}\n", False),
        (-6, f"{VOTE}\n", False),
        (1, f"{VOTE}\n{VOTE}\n", False),
        (1, f"{VOTE}\nTraceback (most recent call last)", False),
        (1, "launch.train: error: something else", False),
        (0, "", False),
    ],
)
def test_how_a_survivor_must_end(code: int | None, words: str, is_well: bool) -> None:
    assert (trouble_of_loss(End(1, code, words)) is None) == is_well


def test_what_a_survivor_must_say() -> None:
    said = "launch.train: error: it was rank 2"
    assert trouble_of_words(End(1, 1, f"a bar\n{said} who\n"), r"rank 2\b") is None
    assert trouble_of_words(End(1, 1, f"{said}1"), r"rank 2\b") is not None
    assert trouble_of_words(End(1, 1, f"Traceback\n{said}"), "rank 2") is not None
    assert trouble_of_words(End(1, 0, said), "rank 2") is not None
    assert trouble_of_words(End(1, None, said), "rank 2") == "rank 1 hangs"


def test_a_report_hides_nothing() -> None:
    hang = Strike(soak_plan.KILL, 2, 9, why="rank 1 hangs", hangs=True)
    strikes = [Strike(soak_plan.KILL, 1, 5, detected_s=0.2), hang]
    line = {
        "soak_seed": 0,
        "round": 4,
        "num_steps": 40,
        "equal": False,
        "different": [".shared.step"],
        "has_trained": True,
        "faults": [strike.as_line() for strike in strikes],
        "not_met": [],
        "strays": ["went on from step 4, expected 8"],
        "lives": 3,
        "steps_lost": 6,
    }
    text = report([line, {"soak_seed": 0, "round": 5, "given_up": "no step"}], 3.0, "no root", {"cores": "2 cores"})
    for words in (
        "1 of 2 faults survived; 1 hangs",
        "0 of 1 rounds ended in the state",
        "round 4 of seed 0: the end states differ in .shared.step",
        "round 4 of seed 0: kill -9: rank 1 hangs",
        "went on from step 4, expected 8",
        "rounds given up: 1\n  no step",
        "No faults of links: no root",
        "6 steps lost, of 40 in all",
    ):
        assert words in text, text
