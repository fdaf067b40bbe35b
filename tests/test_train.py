"""`launch.train`: options, whole runs on real ranks, and going on where a run stopped."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from distsign.exchange import EXCHANGES
from distsign.traffic import ring_all_reduce_bytes
from launch import checkpoint
from launch import train as train_module
from launch.hooks import Traffic
from launch.metrics import MetricsFile, read_lines
from launch.options import WIRES, TrainOptions, UsageError, parse_options
from launch.runtime import Ranks, choose_device
from launch.schemes import CONFIDENCES, OPTIMIZERS, make_confidence, make_optimizer
from launch.specs import example_of
from launch.train import Trainer
from tests.distributed.ranks import REPOSITORY, RankPool, pool
from tests.distributed.torchrun import launch

SMALL = ["--data", "digits", "--batch-size", "8", "--device", "cpu"]
VOTE = ["--hook", "sign-vote", "--confidence", "adaptive", "--optimizer", "sign-adam-pp"]
NUM_PARAMETERS = 61_706


def train(rank: int, world_size: int, argv: list[str]) -> dict[str, Any]:
    """Run on the ranks of a pool; return the parameters, what was measured, or the user's mistake."""
    options = parse_options([*SMALL, *argv])
    ranks = Ranks(rank, world_size, rank, world_size)
    try:
        trainer = Trainer(options, ranks, choose_device(options.device, ranks))
        trainer.run()
    except UsageError as error:
        return {"error": str(error)}
    traffic = trainer.combiner.traffic(trainer.progress.step)
    trainer.close()
    return {"parameters": torch.cat([p.detach().flatten() for p in trainer.net.parameters()]), "traffic": traffic}


def take_over(rank: int, world_size: int, argv: list[str]) -> dict[str, Any]:
    """Go on from a checkpoint, but take no step; return what this rank took over."""
    trainer = Trainer(parse_options([*SMALL, *argv]), Ranks(rank, world_size, rank, world_size), torch.device("cpu"))
    trainer._resume()
    found = {"hook": trainer.combiner.state_dict(), "num_losses": trainer.progress.num_losses}
    trainer.close()
    return found


@pytest.fixture
def ranks4() -> RankPool:
    return pool(4)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--task", "mnist"], "argument --task: invalid choice: 'mnist'"),
        (["--optimizer", "lion"], "argument --optimizer: invalid choice"),
        (["--hook", "topk"], "--hook topk: unknown hook 'topk': did you mean top-k"),
        (["--hook", "top-k:density=much"], "--hook top-k:density=much: density must be a number, got 'much'"),
        (["--hook", "top-k:rank=1"], "--hook top-k:rank=1: top-k has no 'rank': expected density, as in top-k:dens"),
        (["--hook", "bf16:rank=1"], "bf16 has no 'rank': it has no values"),
        (["--hook", "top-k:density=2"], r"--hook top-k:density=2: density must be in \(0, 1\], got 2"),
        (["--hook", "sign-vote:k=3"], "sign-vote has options of its own and no values: leave out ':k=3'"),
        (
            ["--hook", "dgc", "--optimizer", "adam"],
            "--hook dgc keeps the moments itself.*--optimizer sgd without",
        ),
        (["--hook", "dgc", "--optimizer", "sgd", "--momentum", "0.9"], "got sgd --momentum 0.9"),
        (["--unknown", "1"], "unrecognized arguments: --unknown"),
        (["--lr", "0"], r"--lr must be in \(0, inf\), got 0"),
        (["--lr", "nan"], "--lr must be in .*got nan"),
        (["--lr", "fast"], "--lr: invalid float value: 'fast'"),
        (["--momentum", "1"], r"--momentum must be in \[0, 1\), got 1"),
        (["--momentum", "0.5", "--optimizer", "sign-sgd"], "--momentum is no option of --optimizer sign-sgd"),
        (["--weight-decay", "-1"], "--weight-decay must be 0 or more"),
        (["--batch-size", "0"], "--batch-size must be 1 or more, got 0"),
        (["--width", "0"], "--width must be 1 or more"),
        (["--steps", "0"], "--steps must be 1 or more, got 0"),
        (["--epochs", "0"], "--epochs must be above 0"),
        (["--steps", "5", "--epochs", "1"], "--steps and --epochs"),
        (["--seed", "-1"], r"--seed must be in \[0"),
        (["--bucket-cap-mb", "0"], r"--bucket-cap-mb must be in \(0"),
        (["--hook", "sign-vote"], "--hook sign-vote needs --confidence: one of fixed, adaptive, rms, target-density"),
        ([*VOTE, "--margin", "0"], "--margin must be 1 or more, got 0"),
        ([*VOTE, "--wire", "ternary"], "argument --wire: invalid choice: 'ternary'.*planes.*sparse"),
        ([*VOTE, "--exchange", "gossip"], "argument --exchange: invalid choice: 'gossip'.*two_phase.*all_gather"),
        ([*VOTE, "--wire", "sparse"], "^--wire='sparse' .*needs a carry"),
        ([*VOTE, "--optimizer", "adam", "--weight-decay", "0.1"], "--weight-decay of adam is L2.*use --l2"),
        (["--margin", "2"], "--margin is an option of --hook sign-vote, got --hook none"),
        (["--hook", "bf16", "--l2", "0.1"], "--l2 is an option of --hook sign-vote.*--weight-decay"),
        (["--confidence", "adaptive", "--l2", "0.1", "--weight-decay", "0.1"], "--l2 and --weight-decay are two ways"),
        (["--confidence", "adaptive", "--optimizer", "adam"], "--confidence needs --hook sign-vote, or an optimizer"),
        (["--confidence", "maybe"], "--confidence maybe: unknown confidence function 'maybe'.*Known: fixed, adaptive"),
        (["--confidence", "fixed:beta=1"], "fixed has no 'beta': expected alpha"),
        (["--confidence", "fixed:alpha=x"], "alpha must be a number, got 'x'"),
        (["--confidence", "target-density:density=2"], "--confidence target-density:density=2: density must be in"),
        (["--task", "stdlib-gpt", "--data", "digits"], "--data names a folder of images, task stdlib-gpt"),
        (["--resume"], "--resume needs --checkpoint"),
        (["--checkpoint-every", "5"], "--checkpoint-every needs --checkpoint"),
        (["--stop-after", "5"], "--stop-after needs --checkpoint"),
        (["--check-replicas", "-1"], r"--check-replicas must be 0 \(never\) or more, got -1"),
    ],
)
def test_wrong_options_are_one_clear_line(argv: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        parse_options(argv)
    assert "\n" not in str(caught.value)


def test_every_wire_and_exchange_is_one_that_the_library_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # as under torchrun; the hierarchical exchange wants to know
    for wire in WIRES:
        for exchange in EXCHANGES:
            parse_options([*VOTE, "--confidence", "rms:k=24", "--wire", wire, "--exchange", exchange])


def test_options_that_so_many_ranks_cannot_have() -> None:
    options = parse_options([*VOTE, "--margin", "3"])
    options.check_ranks(3)
    with pytest.raises(UsageError, match="^--margin must be at most the number of voters, 2, got 3"):
        options.check_ranks(2)
    parse_options([]).check_ranks(1)


@pytest.mark.parametrize("flag", ["--metrics", "--checkpoint"])
def test_only_the_last_folder_of_a_path_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    for good in (tmp_path / "file", tmp_path / "new" / "file", Path("/tmp/file")):
        parse_options([flag, str(good)]).check_folders()
    for bad in (tmp_path / "no" / "such" / "file", Path("/no-such-folder/file")):
        with pytest.raises(UsageError, match=f"^{flag} {bad}: there is no folder {bad.parent}: make it, or name"):
            parse_options([flag, str(bad)]).check_folders()
    monkeypatch.chdir(tmp_path)
    parse_options([flag, "new/file"]).check_folders()
    with pytest.raises(UsageError, match=f"no folder {tmp_path}/no/such"):
        parse_options([flag, "no/such/file"]).check_folders()


def test_confidence_by_name() -> None:
    for name, make in CONFIDENCES.items():
        assert repr(make_confidence(example_of(name, make))) == repr(make())
    made = make_confidence("adaptive:beta2=2,beta1=0.5")
    assert (made.beta1, made.beta2) == (0.5, 2.0)  # type: ignore[attr-defined]


def test_environment_that_is_half_a_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match="RANK and WORLD_SIZE must both be numbers"):
        Ranks.from_environment()


def test_cuda_needs_a_gpu_per_rank() -> None:
    num_gpus = torch.cuda.device_count()
    ranks = Ranks(0, num_gpus + 1, 0, num_gpus + 1)
    with pytest.raises(UsageError, match=f"{num_gpus + 1} ranks on this machine, {num_gpus} GPUs"):
        choose_device("cuda", ranks)
    assert choose_device("auto", ranks) == torch.device("cpu")


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


def test_batch_larger_than_the_data() -> None:
    results = pool(2).run(train, ["--batch-size", "1000"])
    assert all("--batch-size 1000 on 2 ranks is more than the data have" in result["error"] for result in results)


def in_one_process(*argv: str, as_file: bool = False) -> subprocess.CompletedProcess[str]:
    start = [str(REPOSITORY / "launch" / "train.py")] if as_file else ["-m", "launch.train"]
    command = [sys.executable, *start, *SMALL, *argv]
    # Started as a file it must find its package by itself, from any folder.
    cwd = "/" if as_file else REPOSITORY
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=100, check=False)


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
    assert ("launch.train: compiling the kernels: once per machine" in capsys.readouterr().err) == said


def test_that_nobody_votes_is_said_once() -> None:
    silent = [*VOTE, "--confidence", "fixed:alpha=1e9"]
    done = in_one_process(*silent, "--steps", "3", "--eval-every", "1")
    assert done.returncode == 0, done.stderr
    words = "launch.train: warning: no component has voted in 3 steps, so nothing is learned: lower the threshold of "
    assert done.stderr.count(f"{words}--confidence fixed:alpha=1e9") == 1
    assert done.stderr.count("warning: no component") == 1
    assert "warning" not in in_one_process(*VOTE, "--steps", "3", "--eval-every", "1").stderr


def test_a_margin_that_no_vote_can_reach_ends_before_the_start() -> None:
    done = in_one_process(*VOTE, "--margin", "9")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("launch.train: error: --margin must be at most the number of voters, 1, got 9")


def test_a_budget_that_is_too_small_for_the_model_ends_before_the_start() -> None:
    done = in_one_process(*VOTE, "--confidence", "rms", "--momentum", "0", "--bits-per-param", "0.001")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("launch.train: error: --bits-per-param=0.001 is 7 bytes for the 61,706 elements of")
    assert "the least is 0.0" in done.stderr and len(done.stderr.splitlines()) == 1


def test_wrong_option_ends_with_code_2() -> None:
    done = in_one_process("--lr", "-1")
    assert done.returncode == 2
    assert done.stderr == "launch.train: error: --lr must be in (0, inf), got -1\n"
    assert done.stdout == ""


def test_truncated_data_end_with_code_2(tmp_path: Path) -> None:
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / f"{name}-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x09123")
    done = in_one_process("--data", str(tmp_path))
    assert done.returncode == 2
    assert "train-images-idx3-ubyte: truncated: expected 17 bytes for 9, got 11; copy" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("nproc", [3])
def test_torchrun_wrong_option_is_said_once_and_all_ranks_end_with_code_2(nproc: int) -> None:
    done = launch(["-m", "launch.train", *SMALL, "--lr", "-1"], nproc, deadline_s=90)
    assert done.returncode != 0
    assert done.stderr.count("launch.train: error: --lr must be in (0, inf), got -1") == 1
    assert done.stderr.count("exitcode  : 2 ") == nproc
    assert "SIGTERM)" not in done.stderr


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


def test_l2_on_one_worker_is_added_before_the_confidence() -> None:
    """Where the gradient is zero, L2 alone decides the sign; decoupled decay leaves the sign alone."""
    found = {}
    for flag in ("--l2", "--weight-decay"):
        options = parse_options(["--optimizer", "sign-sgd", "--confidence", "fixed:alpha=0.01", flag, "0.5"])
        model = torch.nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[1.0, -1.0]]))
        optimizer = make_optimizer(model, options, None)
        model.weight.grad = torch.zeros(1, 2)
        optimizer.step()
        found[flag] = model.weight.detach().flatten().tolist()
    lr = 1e-3
    assert found["--l2"] == pytest.approx([1 - lr, -1 + lr])
    assert found["--weight-decay"] == pytest.approx([1 - lr / 2, -1 + lr / 2])


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


def test_trajectory_has_all_that_decides_the_numbers() -> None:
    options = parse_options([])
    assert set(options.trajectory()) < set(TrainOptions.__dataclass_fields__)
    assert {"lr", "seed", "batch_size", "hook", "confidence"} <= set(options.trajectory())
    assert "metrics" not in options.trajectory()
    json.dumps(options.trajectory())
