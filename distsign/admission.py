"""Whose ballots an owner counts: none that are denser than allowed, and none of a worker that floods with poison."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distsign.kernels import Kernels
from distsign.payload import Opened

__all__ = ["Admission"]

_log = logging.getLogger(__name__)


class Admission:
    """Decide which workers' ballots count. Whoever is left out abstains, whatever it sends.

    A worker that sends poison in N = `max_poison_streak` steps in a row is left out from the next step on, and let back
    in after N steps in a row without. To pause now and then helps it little: each worker has a score, which a step with
    poison raises by N, at most to N², and one without lowers by 1, at least to 0. At N² it is left out, and at N² - N
    it counts again, so that one that begins anew is left out at once. In the long run it poisons one step in N + 1.

    Steps in which half of the workers or more send poison change no score: that is the model, or a loss scale that is
    too large, and no flood.

    Args:
        num_voters: workers whose payloads come.
        max_density: largest share of an owner's components on which a worker may vote; None for any.
        max_poison_streak: see above; None to let every poison pass.
        word: what a voter is in reports, `"rank"` or `"node"`.

    Attributes:
        left_out: bool `[num_voters]`, True for workers that flood with poison; alike on all ranks.
        seen: bool `[num_voters]`, who has sent poison in this step, as far as this rank knows.
    """

    def __init__(
        self,
        num_voters: int,
        max_density: float | None = None,
        max_poison_streak: int | None = None,
        word: str = "rank",
    ) -> None:
        self.max_density = max_density
        self.max_poison_streak = max_poison_streak
        self.left_out = torch.zeros(num_voters, dtype=torch.bool)
        self.seen = torch.zeros_like(self.left_out)
        self._score = torch.zeros(num_voters, dtype=torch.int64)
        self._word = word
        self._told: list[int] = []
        self._news: tuple[Tensor, Any] | None = None

    def poison(self, sent: Tensor) -> Tensor:
        """Note who sent poison; return whether any worker that counts did, bool scalar tensor.

        Args:
            sent: bool `[num_voters]`.
        """
        if sent.device.type == "cpu" and not (some := sent.any()):  # nearly always; elsewhere it would be waited for
            return some
        self._move(sent.device)
        self.seen = self.seen | sent
        return (sent & ~self.left_out).any()

    def mean(self, raw: Tensor) -> Tensor:
        """Return the mean of the averaged components over the workers that count, float32 `[num_raw]`.

        Added in order of rank, so that whoever adds them comes to the same bits. If it is not finite, those who sent a
        number that is too large for any sum of all workers have poisoned the step.

        Args:
            raw: float32 `[num_voters, num_raw]`.
        """
        if not raw.shape[1]:
            return raw[0]
        self._move(raw.device)
        rows = raw.masked_fill(self.left_out.unsqueeze(1), 0.0)
        total = rows[0].clone()
        for row in rows[1:]:
            total += row
        found = total / (~self.left_out).sum().clamp(min=1)
        largest = torch.finfo(torch.float32).max / raw.shape[0]
        excessive = ~(raw.abs() <= largest).all(1)
        self.seen = self.seen | (excessive & ~found.isfinite().all())
        return found

    def admit(self, ballots: Opened, most: int, kernels: Kernels) -> Opened:
        """Return the ballots that count: those of whoever is left out, or votes too densely, become abstentions.

        Args:
            ballots: of all workers.
            most: votes that each may have; without a `max_density` of no account.
            kernels: backend of the device.
        """
        self._move(ballots.rows.device)
        out = self.left_out
        # Slots that no density cap could fill need no counting, which would decode every body once more.
        if self.max_density is not None and ballots.capacity > most:
            votes = ballots.num_votes(kernels)
            if votes.device.type != "cpu" or int(votes.numpy().max()) > most:  # seldom, and operations on tensors cost
                out = out | (votes > most)
        elif self.max_poison_streak is None:
            return ballots
        return ballots.without(out)

    def _move(self, device: torch.device) -> None:
        if self.left_out.device != device:
            self.left_out, self.seen = self.left_out.to(device), self.seen.to(device)
            self._score = self._score.to(device)

    def begin_step(self) -> None:
        """Forget what a step that broke off has seen, and report what the last one came to."""
        self.seen = torch.zeros_like(self.seen)
        if self._news is not None:
            left_out, event = self._news
            self._news = None
            if event is not None:
                event.synchronize()
            self._tell(left_out)

    def commit(self, seen: Tensor) -> None:
        """End the step, poisoned or not.

        Args:
            seen: bool `[num_voters]`, who sent poison to any rank; alike on all.
        """
        if self.max_poison_streak is None:
            return
        streak, seen = self.max_poison_streak, seen.to(self.left_out.device)
        if seen.device.type == "cpu" and not (seen.any() or self._score.any()):
            return  # nearly always
        most, few = streak**2, 2 * seen.sum() < seen.numel()
        score = torch.where(seen, self._score + streak, self._score - 1).clamp(0, most)
        self._score = torch.where(few, score, self._score)
        self.left_out = (self._score == most) | (self.left_out & (self._score > most - streak))
        if self.left_out.device.type == "cpu":
            self._tell(self.left_out)
            return
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._news = self.left_out.to("cpu", non_blocking=True), event
        event.record()

    def _tell(self, left_out: Tensor) -> None:
        now = left_out.nonzero().flatten().tolist()
        for number in sorted({*now} ^ {*self._told}):
            if number in now:
                _log.warning(
                    "%s %d sends poison (NaN or infinity) step after step: its ballots are left out until it has sent "
                    "none for %d steps in a row",
                    self._word,
                    number,
                    self.max_poison_streak,
                )
            else:
                _log.warning("the ballots of %s %d, free of poison again, count again", self._word, number)
        self._told = now

    def numbers(self) -> tuple[int, ...]:
        """Return who is left out now as a flood of poison. Waits for the device."""
        return tuple(self.left_out.nonzero().flatten().tolist())

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        score = self._score.tolist()
        return {"left_out": self.left_out.int().tolist(), "score": score, "max_poison_streak": self.max_poison_streak}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from `state_dict()` of as many workers and the same `max_poison_streak`; else let all begin anew.

        A score counts in units of it.
        """
        anew = [0] * self._score.numel()
        known = {} if state is None else state
        if len(known.get("score", ())) != len(anew) or known.get("max_poison_streak") != self.max_poison_streak:
            known = {"left_out": anew, "score": anew}
        self.left_out = torch.tensor(known["left_out"], dtype=torch.bool, device=self.left_out.device)
        self._score = torch.tensor(known["score"], dtype=torch.int64, device=self._score.device)
        self._news, self._told = None, list(self.numbers())
