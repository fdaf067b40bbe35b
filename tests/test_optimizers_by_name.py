"""Every optimizer that `--optimizer` knows: it trains on real ranks, and its entry says of it what is so."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from distsign.cli import main
from launch.options import UsageError, parse_options
from launch.runtime import Ranks
from launch.schemes import OPTIMIZERS
from launch.train import Trainer
from tests.distributed.ranks import pool

OF_OTHERS = [name for name, entry in OPTIMIZERS.items() if not entry.own]
OPTIONS = {"sgd": ["--lr", "0.1", "--momentum", "0.9"], "msvag": ["--lr", "0.1"], "adadelta": ["--lr", "1"]}
"""Of those whose steps are not of the learning rate's own size, as Adam's are."""


def train_with_all(rank: int, world_size: int, names: list[str]) -> dict[str, Any]:
    """Train with each optimizer for some steps; return losses on the first batch before and after, and parameters."""
    found = {}
    for name in names:
        argv = ["--data", "digits", "--batch-size", "16", "--device", "cpu", "--steps", "12", "--schedule", "constant"]
        argv += ["--optimizer", name, *OPTIONS.get(name, ["--lr", "2e-3"])]
        argv += ["--weight-decay", "0.01"] if OPTIMIZERS[name].decays else []  # else adamw would be adam
        trainer = Trainer(parse_options(argv), Ranks(rank, world_size, rank, world_size), torch.device("cpu"))
        first = trainer.task.batch(0, trainer.shard)
        before = trainer.task.loss(trainer.net, first).item()
        for _ in range(12):
            trainer._train_step()
        after = trainer.task.loss(trainer.net, first).item()
        trainer.close()
        found[name] = before, after, torch.cat([p.detach().flatten() for p in trainer.net.parameters()])
    return found


def test_every_optimizer_trains_on_four_ranks() -> None:
    results = pool(4).run(train_with_all, OF_OTHERS, deadline_s=110)
    seen: dict[str, torch.Tensor] = {}
    for name in OF_OTHERS:
        parameters = results[0][name][2]
        assert all(torch.equal(parameters, result[name][2]) for result in results), name
        before, after = (sum(result[name][index] for result in results) / 4 for index in (0, 1))
        assert after < before - 0.001, f"{name} has learnt nothing: {before} to {after}"
        assert not [other for other, theirs in seen.items() if torch.equal(parameters, theirs)], f"{name} is a double"
        seen[name] = parameters


@pytest.mark.parametrize("name", [name for name in OF_OTHERS if OPTIMIZERS[name].decays])
def test_the_table_says_how_weights_decay(name: str) -> None:
    """On a gradient of zero, decoupled decay shrinks by lr * weight_decay a step and nothing else does."""
    entry, parameter = OPTIMIZERS[name], torch.nn.Parameter(torch.ones(3))
    momentum = {"momentum": 0.9} if entry.momentum == "momentum" else {}
    optimizer = entry.make([parameter], lr=0.1, weight_decay=0.1, **momentum)
    for _ in range(2):
        parameter.grad = torch.zeros(3)
        optimizer.step()
    is_decoupled = torch.allclose(parameter.detach(), torch.full((3,), 0.99**2), rtol=1e-6)
    assert is_decoupled != entry.l2


@pytest.mark.parametrize("name", [name for name in OF_OTHERS if OPTIMIZERS[name].momentum])
def test_momentum_arrives(name: str) -> None:
    entry, moved = OPTIMIZERS[name], []
    for value in (0.1, 0.8):
        parameter = torch.nn.Parameter(torch.zeros(1))
        given = (value, 0.999) if entry.momentum == "betas" else value
        optimizer = entry.make([parameter], lr=0.1, **{entry.momentum: given})
        for gradient in (1.0, -0.5, 0.25):
            parameter.grad = torch.full((1,), gradient)
            optimizer.step()
        moved.append(parameter.item())
    assert moved[0] != moved[1]


def test_what_an_optimizer_does_not_have_is_refused() -> None:
    for name, entry in OPTIMIZERS.items():
        for flag, has in (("--weight-decay", entry.decays), ("--momentum", entry.momentum is not None)):
            if has:
                parse_options(["--optimizer", name, flag, "0.1"])
            else:
                with pytest.raises(UsageError, match=f"^{flag} is no option of --optimizer {name}: leave it out$"):
                    parse_options(["--optimizer", name, flag, "0.1"])


def test_a_missing_package_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "pytorch_optimizer" else found(name, *rest)
    )
    words = (
        r"^--optimizer msvag needs the package pytorch-optimizer, which is missing: pip install 'distsign\[launch\]'"
    )
    with pytest.raises(UsageError, match=words):
        parse_options(["--optimizer", "msvag"])
    parse_options(["--optimizer", "amsgrad"])


def test_a_study_names_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = tmp_path / "s.toml"
    study.write_text('[[tasks]]\ntask = "fashion-mnist-lenet"\n[[schemes]]\nname = "a"\noptimizer = "adagrd"\n')
    assert main(["study", str(study), "--dry-run"]) == 2
    assert "adagrad" in capsys.readouterr().err
