"""Every hook by its name in a training run on four ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distsign.rivals import RIVALS
from launch.hooks import HOOKS
from launch.options import parse_options
from launch.runtime import Ranks
from launch.train import Trainer

from .ranks import pool

SMALL = ["--data", "digits", "--batch-size", "8", "--device", "cpu", "--bucket-cap-mb", "0.05"]
OPTIMIZERS = {"gradient": "adam", "signs": "sign-sgd", "direction": "sgd"}
EARLY = {"one-bit-adam": "one-bit-adam:warmup_steps=2", "dgc": "dgc:warmup_steps=2"}


def train(rank: int, world_size: int, argv: list[str]) -> tuple[torch.Tensor, float, float]:
    """Return the parameters, and the sums of bytes that this rank and an fp32 all-reduce would have carried."""
    trainer = Trainer(parse_options([*SMALL, *argv]), Ranks(rank, world_size, rank, world_size), torch.device("cpu"))
    trainer.run()
    traffic = trainer.combiner.traffic(trainer.progress.step)
    trainer.close()
    parameters = torch.cat([p.detach().flatten() for p in trainer.net.parameters()])
    return parameters, traffic.sent_bytes + traffic.received_bytes, traffic.fp32_bytes


def test_the_vote_and_all_rivals_are_there() -> None:
    assert set(HOOKS) == {"sign-vote", *RIVALS} and len(RIVALS) == 14


@pytest.mark.parametrize("name", RIVALS)
def test_rivals_train(name: str) -> None:
    optimizer = OPTIMIZERS[getattr(RIVALS[name], "gives", "gradient")]
    results = pool(4).run(
        train, ["--hook", EARLY.get(name, name), "--optimizer", optimizer, "--steps", "5"], deadline_s=90
    )
    assert len({tuple(parameters.tolist()) for parameters, _, _ in results}) == 1, "the replicas differ"
    assert results[0][0].isfinite().all()
    sent, fp32 = (sum(result[k] for result in results) for k in (1, 2))
    assert sent == fp32 if name == "none" else 0 < sent < fp32


def test_a_rival_goes_on_where_it_stopped(tmp_path: Path) -> None:
    argv = ["--hook", "top-k:density=0.01", "--optimizer", "adam", "--steps", "6", "--bucket-cap-mb", "25"]
    whole = pool(2).run(train, argv)
    files = ["--checkpoint", str(tmp_path / "run.pt")]
    pool(2).run(train, [*argv, *files, "--stop-after", "3"])
    again = pool(2).run(train, [*argv, *files, "--resume"])
    assert torch.equal(whole[0][0], again[0][0]) and whole[0][1] == again[0][1]
    words = "what --hook top-k:density=0.01 keeps cannot be cut anew: the checkpoint was written by 2 ranks"
    pool(4).run_expecting(words, train, [*argv, *files, "--batch-size", "4", "--resume"], in_step=True)
