"""What the ranks do in the tests of checkpoints that all of them write."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distsign import SignAdamPP
from distsign.checkpoint import load, save

from .carry_oracle import options_of
from .oracle import Case, batch, build, digest


class Run:
    """A model, its votes and its optimizer, as a process begins with them."""

    def __init__(self, case: Case, momentum: float = 0.9) -> None:
        self.net, self.model, self.state = build(options_of(case))
        self.optimizer = SignAdamPP(
            self.model.named_parameters(), lr=1e-2, momentum=momentum, weight_decay=0.1, vote_state=self.state
        )

    def train(self, rank: int, steps: range) -> None:
        for step in steps:
            self.optimizer.zero_grad()
            self.model(batch(rank, step, 0, torch.float32)).square().mean().backward()
            self.optimizer.step()

    def parts(self, step: int) -> dict[str, Any]:
        return {"model": self.net, "optimizer": self.optimizer, "vote": self.state, "step": step}

    def kept(self) -> dict[str, Any]:
        return {"digest": digest(self.net), "vote": self.state.state_dict(), "optimizer": self.optimizer.state_dict()}


def go_on_at_each(rank: int, world_size: int, case: Case, folder: str, stops: list[int], momentum: float) -> None:
    """Twelve steps, with a checkpoint at each stop; from each of them a new run must come to the same end."""
    unbroken = Run(case, momentum)
    done = 0
    for stop in [*stops, 12]:
        unbroken.train(rank, range(done, stop))
        done = stop
        if stop < 12:
            save(unbroken.parts(stop), f"{folder}/step-{stop}")
    for stop in stops:
        resumed = Run(case, momentum)
        parts = resumed.parts(-1)
        load(parts, f"{folder}/step-{stop}")
        assert parts["step"] == stop
        resumed.train(rank, range(stop, 12))
        # A new process begins with DDP's first layout of buckets again, and each group of them has its own headers.
        different = [path for path in paths(unbroken.kept(), resumed.kept()) if not path.startswith(".vote.traffic")]
        assert not different, f"after a stop at step {stop}: {different[:5]}"
        resumed.state.close()
    unbroken.state.close()


def paths(a: Any, b: Any, path: str = "") -> list[str]:
    """Return where two nests of dicts, lists, tensors and values are not the same, bit for bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.dtype == b.dtype and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
        return [] if same else [path]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [each for key in a for each in paths(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [each for k in range(len(a)) for each in paths(a[k], b[k], f"{path}.{k}")]
    return [] if type(a) is type(b) and a == b else [path]


def train_and_save(rank: int, world_size: int, case: Case, folder: str) -> dict[str, Any]:
    run = Run(case)
    run.train(rank, range(5))
    save(run.parts(5), folder)
    kept = run.kept()
    run.state.close()
    return kept


def load_elsewhere(rank: int, world_size: int, case: Case, folder: str) -> tuple[dict[str, Any], str]:
    """Return what a rank takes over, and a digest of the parameters three steps later."""
    run = Run(case)
    load(run.parts(-1), folder)
    taken_over = copy.deepcopy(run.kept())
    run.train(rank, range(5, 8))
    run.state.close()
    return taken_over, digest(run.net)


def load_only(rank: int, world_size: int, case: Case, folder: str) -> None:
    run = Run(case)
    before = digest(run.net)
    try:
        load(run.parts(-1), folder)
    finally:
        assert digest(run.net) == before, "a checkpoint that was refused has changed the model"
        run.state.close()


def load_where_rank_2_sees_nothing(rank: int, world_size: int, case: Case, folder: str) -> None:
    """Rank 2 sees another folder, as on machines that share none."""
    run = Run(case)
    run.train(rank, range(1))
    save(run.parts(1), folder)
    try:
        load(run.parts(-1), folder if rank != 2 else str(Path(folder) / "elsewhere"))
    finally:
        run.state.close()
