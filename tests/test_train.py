"""`launch.train`: whole runs on real ranks, and what they say and write."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from distsign.traffic import ring_all_reduce_bytes
from launch import train as train_module
from launch.hooks import Traffic
from launch.metrics import read_lines
from launch.options import parse_options
from launch.runtime import Ranks
from launch.schemes import OPTIMIZERS
from launch.train import Trainer
from tests.distributed.ranks import RankPool, pool
from tests.distributed.torchrun import launch
from tests.train_cases import SMALL, VOTE, in_one_process, train

NUM_PARAMETERS = 61_706


@pytest.fixture
def ranks4() -> RankPool:
    return pool(4)


def check_run(ranks: RankPool, argv: list[str], metrics: Path, num_steps: int) -> list[dict[str, Any]]:
    results = ranks.run(train, [*argv, "--steps", str(num_steps), "--metrics", str(metrics)], deadline_s=90)
    for result in results:
        assert "error" not in result, result["error"]
        assert torch.equal(result["parameters"], results[0]["parameters"])
    lines = read_lines(metrics)
    assert [line["event"] for line in lines] == ["start", "test", "end"]
    assert "digits" in lines[0]["data"]
    assert lines[0]["num_steps"] == lines[1]["step"] == num_steps
    assert len(lines[2]["ranks"]) == len(results)
    assert lines[1]["median_step_s"] > 0
    return lines


@pytest.mark.parametrize(("hook", "bytes_per_element"), [("none", 4), ("bf16", 2), ("fp16", 2)])
def test_all_reduce_hooks(ranks4: RankPool, tmp_path: Path, hook: str, bytes_per_element: int) -> None:
    argv = ["--optimizer", "adam", "--lr", "2e-3", "--hook", hook]
    lines = check_run(ranks4, argv, tmp_path / "metrics.jsonl", 25)
    end = lines[-1]
    assert end["kind"] == "formula"
    assert end["sent_bytes"] + end["received_bytes"] == 25 * ring_all_reduce_bytes(NUM_PARAMETERS, bytes_per_element, 4)
    assert end["ballot_density"] is None
    assert end["test_accuracy"] > 0.4


def test_sign_votes(ranks4: RankPool, tmp_path: Path) -> None:
    lines = check_run(ranks4, [*VOTE, "--lr", "4e-3"], tmp_path / "metrics.jsonl", 40)
    end = lines[-1]
    assert end["kind"] == "counted"
    for rank in end["ranks"]:
        assert 0 < 15 * (rank["sent_bytes"] + rank["received_bytes"]) < rank["fp32_bytes"]
        assert rank["fp32_bytes"] == 40 * ring_all_reduce_bytes(NUM_PARAMETERS, 4, 4)
        assert 0 < rank["ballot_density"] < rank["verdict_density"] < 1
    assert end["test_accuracy"] > 0.4


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_steps_on_verdicts(ranks4: RankPool, name: str) -> None:
    argv = [*VOTE, "--optimizer", name, "--confidence", "target-density:density=0.1", "--steps", "3"]
    results = ranks4.run(train, argv, deadline_s=60)
    for result in results:
        assert torch.isfinite(result["parameters"]).all()
        assert torch.equal(result["parameters"], results[0]["parameters"])


@pytest.mark.parametrize("task", ["fashion-mnist-lstm", "stdlib-gpt"])
def test_other_tasks(task: str, tmp_path: Path) -> None:
    argv = [*VOTE, "--task", task, "--steps", "2", "--metrics", str(tmp_path / "m.jsonl")]
    results = pool(2).run(train_task, argv, deadline_s=100)
    assert torch.equal(results[0], results[1])
    end = read_lines(tmp_path / "m.jsonl")[-1]
    assert end["kind"] == "counted"
    assert 0 < end[{"stdlib-gpt": "bits_per_byte"}.get(task, "test_accuracy")] < 9


def train_task(rank: int, world_size: int, argv: list[str]) -> torch.Tensor:
    data = [] if "stdlib-gpt" in argv else ["--data", "digits"]
    options = parse_options(["--batch-size", "2", "--device", "cpu", *data, *argv])
    trainer = Trainer(options, Ranks(rank, world_size, rank, world_size), torch.device("cpu"))
    trainer.run()
    trainer.close()
    return torch.cat([p.detach().flatten() for p in trainer.net.parameters()])


@pytest.mark.parametrize("as_file", [False, True])
def test_plain_python_is_one_rank(tmp_path: Path, as_file: bool) -> None:
    metrics = tmp_path / "m.jsonl"
    done = in_one_process(*VOTE, "--steps", "3", "--metrics", str(metrics), as_file=as_file)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("test_accuracy 0.")
    end = read_lines(metrics)[-1]
    assert end["sent_bytes"] == 0
    assert end["ballot_density"] == end["verdict_density"] > 0


def test_traffic_is_the_mean_over_the_ranks() -> None:
    ranks = [Traffic(100, 300, 8, 4, "counted", 0.25, 0.5), Traffic(200, 300, 8, 4, "counted", 0.75, 0.5)]
    assert Traffic.mean(ranks) == Traffic(150, 300, 8, 4, "counted", 0.5, 0.5)
    assert Traffic.mean([Traffic(1, 2, 3, 4, "formula")]) == Traffic(1, 2, 3, 4, "formula")


@pytest.mark.parametrize(("loading_s", "said"), [(0.3, True), (0.0, False)])
def test_compiling_is_said_where_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], loading_s: float, said: bool
) -> None:
    monkeypatch.setattr(train_module, "COMPILED_WITHIN_S", 0.1)
    monkeypatch.setattr(train_module, "kernels_for", lambda device: time.sleep(loading_s))
    trainer = Trainer.__new__(Trainer)
    trainer.options, trainer.ranks, trainer.device = parse_options(VOTE), Ranks(0, 1, 0, 1), torch.device("cpu")
    trainer._compile_kernels()
    time.sleep(0.2)
    assert ("launch.train: loading the kernels; the first time" in capsys.readouterr().err) == said


def test_that_nobody_votes_is_said_once() -> None:
    silent = [*VOTE, "--confidence", "fixed:alpha=1e9"]
    done = in_one_process(*silent, "--steps", "3", "--eval-every", "1")
    assert done.returncode == 0, done.stderr
    words = "launch.train: warning: no component has voted in 3 steps, so nothing is learned: lower the threshold of "
    assert done.stderr.count(f"{words}--confidence fixed:alpha=1e9") == 1
    assert done.stderr.count("warning: no component") == 1
    assert "warning" not in in_one_process(*VOTE, "--steps", "3", "--eval-every", "1").stderr


def test_torchrun_trains(tmp_path: Path) -> None:
    metrics = tmp_path / "m.jsonl"
    done = launch(
        ["launch/train.py", *SMALL, *VOTE, "--steps", "4", "--eval-every", "2", "--metrics", str(metrics)],
        2,
        deadline_s=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test_accuracy 0.") == 1, "rank 0 alone speaks"
    assert done.stderr.count("0/4 [") == 1, "rank 0 alone has a progress bar"
    assert [line["event"] for line in read_lines(metrics)] == ["start", "test", "test", "end"]


def test_the_schedule_in_steps_is_a_tenth_after_half_and_a_hundredth_after_five_sixths() -> None:
    argv = ["--optimizer", "sgd", "--schedule", "steps", "--lr", "0.5", "--steps", "12"]
    lrs = pool(2).run(learning_rates, argv, deadline_s=60)[0]
    assert lrs == pytest.approx([0.5] * 6 + [0.05] * 4 + [0.005] * 2)


def learning_rates(rank: int, world_size: int, argv: list[str]) -> list[float]:
    trainer = Trainer(parse_options([*SMALL, *argv]), Ranks(rank, world_size, rank, world_size), torch.device("cpu"))
    found = []
    for step in range(trainer.num_steps):
        trainer._set_lr(step)
        found.append(trainer.optimizer.param_groups[0]["lr"])
    trainer.close()
    return found
