"""A transcription of votes with carries that knows nothing of buckets, planes or payloads."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distsign import RMSConfidence, SignVoteState
from distsign.layout import Shape, shards

from .oracle import Case, Net

CARRY = Case(confidence=RMSConfidence(k=3.0, start=1.5, warmup_steps=5), num_steps=8)


def plane_order(length: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the element of each bit of a piece's plane, in order (`kernels`, vertical planes)."""
    full = length // 512 * 512
    block = np.arange(512).reshape(32, 16).T.reshape(-1)
    return np.concatenate([(np.arange(0, full, 512)[:, None] + block).reshape(-1), np.arange(full, length)])


def keep_some(votes: Tensor, cap: int, turn: int) -> Tensor:
    """Return the votes of one piece that fit, in the order of its plane from a rotating start."""
    order = plane_order(votes.numel())
    first = 8 * ((turn * 2654435769) % 2**32 * ((votes.numel() + 7) // 8) >> 32)
    order = np.concatenate([order[first:], order[:first]])
    chosen = order[votes.numpy()[order] != 0][:cap]
    kept = torch.zeros_like(votes)
    kept[chosen] = votes[chosen]
    return kept


@dataclass
class Kept:
    """What one worker and one owner remember of a parameter."""

    carry: Tensor
    square: Tensor
    undecided: Tensor
    standing: Tensor  # [world_size, n]
    steps: int = 0


@dataclass
class CarryOracle:
    """One worker's ballots and all owners' verdicts, a parameter at a time."""

    case: Case
    net: Net
    rank: int
    world_size: int
    kept: dict[str, Kept] = field(default_factory=dict)
    num_poisoned: int = 0

    def warm_up(self, clean_steps: int) -> float:
        confidence = self.case.confidence
        if not isinstance(confidence, RMSConfidence) or "bits_per_param" in self.case.options:
            return 1.0
        first, share = confidence.start / confidence.k, min(1.0, clean_steps / confidence.warmup_steps)
        return float(first ** (1.0 - share))

    def step(self, gradients: dict[str, Tensor], state: SignVoteState, turn: int) -> dict[str, Tensor]:
        """Return the verdicts of one step; the state tells by which density it voted."""
        pipeline = state._pipeline
        self.next: dict[str, Kept] = {}
        found = {}
        self.num_ballots = 0
        for name, p in self.net.named_parameters():
            row = pipeline._registry.row(p)
            assert row is not None
            n = p.numel()
            old = self.kept.get(name) or Kept(
                torch.zeros(n), torch.zeros(n), torch.zeros(n, dtype=torch.int32), torch.zeros(self.world_size, n)
            )
            factor = float(self.warm_up(turn - 1 - self.num_poisoned))
            ballots, new = self.vote(gradients[name].reshape(-1).float(), old, factor, turn)
            pieces = shards(Shape(row, n), self.world_size)
            density = pipeline.density
            if density is not None:
                of = np.broadcast_to(density, (len(pipeline._registry) * self.world_size,))[row * self.world_size :]
                caps = [min(b - a, max(1, math.floor(of[owner] * (b - a)))) for owner, a, b in pieces]
                fits = [keep_some(ballots[a:b], c, turn + 7 * row) for (_, a, b), c in zip(pieces, caps, strict=True)]
                fit = torch.cat([*fits, torch.zeros(0)])
                forgotten = ballots != 0 if "bits_per_param" in self.case.options else fit != 0
                new.carry = torch.where(forgotten, 0.0, new.carry)
                ballots = fit
            self.num_ballots += int(ballots.count_nonzero())
            everyone = [torch.empty_like(ballots) for _ in range(self.world_size)]
            dist.all_gather(everyone, ballots)
            verdict = self.decide(torch.stack(everyone), new)
            if density is not None and self.case.options.get("owner_carry"):
                parts = [keep_some(verdict[a:b], c, turn + 7 * row) for (_, a, b), c in zip(pieces, caps, strict=True)]
                wanted, verdict = verdict, torch.cat([*parts, torch.zeros(0)])
            self.settle(verdict, new)
            if "bits_per_param" in self.case.options and isinstance(self.case.confidence, RMSConfidence):
                for (_, a, b), cap in zip(pieces, caps, strict=True):
                    votes = new.undecided[a:b]
                    if int(wanted[a:b].count_nonzero()) > cap:
                        votes[votes.abs() >= self.case.options.get("margin", 1)] = 0
            found[name] = verdict.reshape(p.shape)
            self.next[name] = new
        return found

    def vote(self, g: Tensor, old: Kept, factor: float, turn: int) -> tuple[Tensor, Kept]:
        """Return one worker's wanted ballots, and what it remembers if all of them are sent."""
        new = replace(old)
        if not g.any():
            return torch.zeros_like(g), new
        confidence = self.case.confidence
        if isinstance(confidence, RMSConfidence):
            new.steps = old.steps + 1
            decay = np.float32(confidence.decay)
            v = decay * old.square.numpy() + np.float32(1.0 - confidence.decay) * (g.numpy() * g.numpy())
            correction = np.float32(math.sqrt(1.0 - confidence.decay**new.steps))
            with np.errstate(all="ignore"):
                added = (g.numpy() * correction) / np.sqrt(v)
            u = torch.from_numpy(np.where(v > np.float32(1e-30), old.carry.numpy() + added, old.carry.numpy()))
            new.square = torch.from_numpy(v)
            if self.dtype == torch.bfloat16:
                upper = (v.view(np.uint32) + np.uint32(turn * 40503 % 65536)) & np.uint32(0xFFFF0000)
                new.square = torch.from_numpy(upper.view(np.float32))
            alpha = confidence.k * factor
        else:
            u = old.carry + g
            alpha = confidence.alpha * factor  # type: ignore[attr-defined]
        ballots = torch.where(u.abs() > np.float32(alpha), u.sign(), 0.0)
        kept = u if self.capped else torch.where(ballots != 0, 0.0, u)
        new.carry = kept.to(self.dtype).float()
        return ballots, new

    @property
    def dtype(self) -> torch.dtype:
        found = self.case.options.get("carry_dtype", torch.float32)
        assert isinstance(found, torch.dtype)
        return found

    @property
    def capped(self) -> bool:
        return self.case.options.get("wire") != "planes"

    def decide(self, ballots: Tensor, new: Kept) -> Tensor:
        """Return the verdicts that reach the margin, wanted or not."""
        margin = self.case.options.get("margin", 1)
        kind = self.case.options.get("owner_carry")
        if kind == "standing":
            new.standing = (new.standing + ballots).clamp(-1, 1)
            tally = new.standing.sum(0)
        elif kind:
            new.undecided = new.undecided + ballots.sum(0).to(torch.int32)
            tally = new.undecided.float()
        else:
            tally = ballots.sum(0)
        return torch.where(tally.abs() >= margin, tally.sign(), 0.0)

    def settle(self, verdict: Tensor, new: Kept) -> None:
        """Take from what is kept what a verdict has used."""
        new.undecided = new.undecided - self.case.options.get("margin", 1) * verdict.to(torch.int32)
        new.standing = torch.where(verdict != 0, 0.0, new.standing)

    def commit(self) -> None:
        """The step was clean."""
        self.kept = self.next


def options_of(case: Case) -> Case:
    """Return the case as `build` takes it."""
    options = dict(case.options)
    dtype = options.pop("carry_dtype", None)
    return replace(case, options=options if dtype is None else {**options, "carry": dtype})
