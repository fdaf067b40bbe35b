"""`launch.train`: going on where a run stopped, bit for bit, or saying why not."""

from __future__ import annotations

import itertools
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import checkpoint
from launch.metrics import MetricsFile, read_lines
from launch.options import parse_options
from launch.runtime import Ranks
from launch.train import Trainer
from tests.distributed.ranks import pool
from tests.train_cases import SMALL, VOTE, in_one_process, train


def take_over(rank: int, world_size: int, argv: list[str]) -> dict[str, Any]:
    """Go on from a checkpoint, but take no step; return what this rank took over."""
    trainer = Trainer(parse_options([*SMALL, *argv]), Ranks(rank, world_size, rank, world_size), torch.device("cpu"))
    trainer._resume()
    found = {"hook": trainer.combiner.state_dict(), "num_losses": trainer.progress.num_losses}
    trainer.close()
    return found


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "median_step_s"} for line in lines if line["event"] != "start"]


RMS = [*VOTE, "--confidence", "rms:k=4"]


@pytest.mark.parametrize(
    ("world_size", "argv"),
    [
        (4, [*VOTE, "--confidence", "target-density:density=0.05", "--bucket-cap-mb", "0.05"]),
        (2, ["--optimizer", "adam", "--hook", "none"]),
        (2, [*RMS, "--momentum", "0"]),
        (2, [*RMS, "--optimizer", "signum", "--owner-carry", "plain", "--margin", "2"]),
        (2, [*RMS, "--optimizer", "sign-adam", "--owner-carry", "standing", "--bucket-cap-mb", "0.05"]),
        (2, [*RMS, "--optimizer", "adamw", "--bits-per-param", "0.2", "--margin", "2", "--weight-decay", "0.1"]),
    ],
)
def test_a_run_resumed_at_any_step_repeats_an_unbroken_one_bit_for_bit(
    tmp_path: Path, world_size: int, argv: list[str]
) -> None:
    argv = [*argv, "--steps", "12", "--eval-every", "3"]
    stops = sorted(random.Random(" ".join(argv)).sample(range(1, 12), 3))

    def run(name: str, *more: str) -> list[dict[str, Any]]:
        files = ["--checkpoint", str(tmp_path / f"{name}.pt"), "--metrics", str(tmp_path / f"{name}.jsonl")]
        return pool(world_size).run(train, [*argv, *files, *more], deadline_s=90)

    unbroken = run("unbroken")
    run("broken", "--stop-after", str(stops[0]))
    for before, stop in itertools.pairwise(stops):
        run("broken", "--resume", "--stop-after", str(stop - before))
    resumed = run("broken", "--resume")
    for a, b in zip(unbroken, resumed, strict=True):
        assert torch.equal(a["parameters"], b["parameters"])
        assert a["traffic"] == b["traffic"]
    lines = [read_lines(tmp_path / f"{name}.jsonl") for name in ("unbroken", "broken")]
    assert without_times(lines[0]) == without_times(lines[1])
    checkpoints = [checkpoint.read(str(tmp_path / f"{name}.pt")) for name in ("unbroken", "broken")]
    assert equal(*checkpoints)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"

    def error(*more: str) -> str:
        results = pool(2).run(train, ["--optimizer", "adam", "--steps", "2", "--checkpoint", str(path), *more])
        first, second = (result.get("error") for result in results)
        assert first == second, "the ranks must agree"
        return str(first)

    assert error("--resume").startswith(f"--checkpoint {path} is not there, and there is none before it: leave out")
    assert error("--resume", "if-there") == "None"
    assert f"--checkpoint {path} belongs to another run: --lr was 0.001, is 0.002" in error("--resume", "--lr", "2e-3")
    assert "--seed was 0, is 1" in error("--resume", "--seed", "1")
    saved = checkpoint.read(str(path))
    saved["shared"]["model"].pop("conv1.bias")
    checkpoint.write(str(path), saved)
    assert f"--checkpoint {path} does not fit this model: Error(s) in loading state_dict for" in error("--resume")
    checkpoint_before = Path(checkpoint.previous_of(str(path)))
    path.write_bytes(path.read_bytes()[:-5])
    damaged = error("--resume")
    assert damaged.startswith(f"--checkpoint {path} is damaged: it has ")
    assert f". The one before it, {checkpoint_before}, of step 2, is whole: --resume previous takes it" in damaged
    assert error("--resume", "if-there") == error("--resume", "previous") == "None"
    argv = ["--optimizer", "adam", "--steps", "3", "--checkpoint", str(path), "--resume"]
    results = pool(3).run(train, argv)
    assert all(
        "was written by 2 ranks, for 2 steps; for 3 ranks this would be 3: give --steps 2" in r["error"]
        for r in results
    )


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    argv = ["--steps", "3", "--checkpoint", str(path), "--checkpoint-every", "1"]
    assert in_one_process(*argv, "--stop-after", "2").returncode == 0
    path.write_bytes(path.read_bytes()[:1000])
    done = in_one_process(*argv, "--resume", "if-there", "--metrics", str(tmp_path / "m.jsonl"))
    assert done.returncode == 0, done.stderr
    words = f"launch.train: warning: --checkpoint {path} is damaged: it has 955 bytes after its header, which says "
    assert words in done.stderr and f": going on from {path}.previous, of step 1" in done.stderr
    assert read_lines(tmp_path / "m.jsonl")[0]["first_step"] == 1
    steps = [checkpoint.read(name)["shared"]["step"] for name in (str(path), checkpoint.previous_of(str(path)))]
    assert steps == [3, 2]


@pytest.mark.parametrize(
    "argv", [[*VOTE, "--confidence", "rms:k=4", "--owner-carry", "plain"], ["--optimizer", "adam"]]
)
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path, argv: list[str]) -> None:
    """The same steps of it are left, every rank goes on from the same model, and what the carries held is there."""
    path = tmp_path / "run.pt"
    files = [*argv, "--steps", "9", "--eval-every", "3", "--checkpoint", str(path)]
    pool(4).run(train, [*files, "--batch-size", "4", "--stop-after", "4"], deadline_s=90)
    saved = checkpoint.read(str(path))
    taken_over = pool(3).run(take_over, [*files, "--batch-size", "6", "--resume"], deadline_s=90)
    for name in saved["ranks"][0]["hook"].get("voter", ()):
        old, new = (sum(each["hook"]["voter"][name]["carry"] for each in of) for of in (saved["ranks"], taken_over))
        assert torch.allclose(old, new, atol=1e-5) and old.any(), name
    assert sum(own["num_losses"] for own in saved["ranks"]) == sum(own["num_losses"] for own in taken_over) > 0
    results = pool(3).run(train, [*files, "--batch-size", "6", "--resume"], deadline_s=90)
    assert len({tuple(result["parameters"].tolist()) for result in results}) == 1
    finished = checkpoint.read(str(path))
    assert finished["shared"]["step"] == 9 and len(finished["ranks"]) == 3


def train_in_nodes(rank: int, world_size: int, per_node: int, argv: list[str]) -> torch.Tensor:
    """Run on ranks that torchrun would have told to be in nodes of `per_node`; return the parameters."""
    os.environ["LOCAL_WORLD_SIZE"] = str(per_node)
    ranks = Ranks(rank, world_size, rank % per_node, per_node)
    trainer = Trainer(parse_options([*SMALL, *argv]), ranks, torch.device("cpu"))
    trainer.run()
    trainer.close()
    return torch.cat([p.detach().flatten() for p in trainer.net.parameters()])


@pytest.mark.parametrize("per_node", [1, 2, 4])
def test_a_run_goes_on_in_other_nodes_of_as_many_ranks(tmp_path: Path, per_node: int) -> None:
    argv = [*RMS, "--exchange", "hierarchical", "--steps", "6", "--checkpoint", str(tmp_path / "run.pt")]
    pool(4).run(train_in_nodes, 2, [*argv, "--stop-after", "3"])
    results = pool(4).run(train_in_nodes, per_node, [*argv, "--resume"])
    assert all(torch.equal(results[0], result) for result in results)
    saved = checkpoint.read(str(tmp_path / "run.pt"))
    assert saved["shared"]["step"] == 6
    assert {own["hook"]["ranks_per_node"] for own in saved["ranks"]} == {per_node}


def train_with_a_flipped_bit(rank: int, world_size: int, argv: list[str]) -> None:
    trainer = Trainer(parse_options([*SMALL, *argv]), Ranks(rank, world_size, rank, world_size), torch.device("cpu"))
    if rank == 2:
        next(trainer.net.parameters()).data.view(-1).view(torch.int32)[3] ^= 1
    trainer.run()
    trainer.close()


def test_replicas_are_checked_every_so_often_and_before_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    argv = [*VOTE, "--steps", "3", "--checkpoint", str(path), "--check-replicas"]
    words = "ReplicaError: the replicas differ, found {} steps after.*: parameter 'conv1.weight' on rank 2"
    for every, found in (("2", 2), ("50", 3)):
        pool(3).run_expecting(words.format(found), train_with_a_flipped_bit, [*argv, every], in_step=True)
    assert not path.exists()
    pool(3).run(train_with_a_flipped_bit, [*argv, "0"])
    assert path.exists()


def test_metrics_keep_what_a_resumed_run_does_not_write_again(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "m.jsonl"
    first = MetricsFile(str(path))
    first.write({"event": "start", "first_step": 0})
    for step in (1, 2, 3):
        first.write({"event": "test", "step": step})
    with path.open("a") as file:
        file.write('{"event": "te')
    MetricsFile(str(path), first_step=2)
    assert [line.get("step") for line in read_lines(path)] == [None, 1, 2]
    MetricsFile(str(path), first_step=0)
    assert path.read_text() == ""
    MetricsFile(None).write({})
