"""`launch.train`: what it is told, and one clear line for what cannot be."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from distsign.exchange import EXCHANGES
from launch import check
from launch.options import WIRES, TrainOptions, UsageError, parse_options
from launch.runtime import Ranks, choose_device
from launch.schemes import CONFIDENCES, make_confidence, make_optimizer
from launch.specs import example_of
from tests.distributed.ranks import pool
from tests.distributed.torchrun import launch
from tests.train_cases import SMALL, VOTE, in_one_process, train


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


def test_batch_larger_than_the_data() -> None:
    results = pool(2).run(train, ["--batch-size", "1000"])
    assert all("--batch-size 1000 on 2 ranks is more than the data have" in result["error"] for result in results)


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


def test_trajectory_has_all_that_decides_the_numbers() -> None:
    options = parse_options([])
    assert set(options.trajectory()) < set(TrainOptions.__dataclass_fields__)
    assert {"lr", "seed", "batch_size", "hook", "confidence"} <= set(options.trajectory())
    assert "metrics" not in options.trajectory()
    json.dumps(options.trajectory())


@pytest.mark.parametrize("asked", ["", "--lr 0.1", "[]", '{"cells": [{"ranks": 2}]}'])
def test_what_is_no_question_of_a_study_is_one_clear_line(asked: str) -> None:
    with pytest.raises(UsageError, match="on standard input --check wants a JSON document"):
        check.answer(io.StringIO(asked), io.StringIO())
