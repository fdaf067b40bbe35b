"""Liars: what they send in place of what they would honestly send, knowing all that a step has shown anybody."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from distsign.wire.header import HEADER_BYTES

__all__ = [
    "ATTACKS",
    "Adaptive",
    "AllVotes",
    "Attack",
    "Collusion",
    "Honest",
    "LyingOwners",
    "Malformed",
    "PoisonFlood",
    "RandomBallots",
    "SignFlip",
    "StaleRepeats",
    "Targeted",
    "View",
]


@dataclass(frozen=True)
class View:
    """What liars see before they send; of n components, f liars and h honest workers.

    Attributes:
        step: counts from 0.
        ballots: int8 `[f, n]`, those that the liars would honestly cast.
        gradients: float32 `[f, n]`, theirs.
        honest_ballots: int8 `[h, n]`; more than a real liar sees, which knows its own shard's alone.
        honest_gradients: float32 `[h, n]`; likewise.
        verdicts: int8 `[n]`, of the last step; zeros before there are any.
        generator: for whatever is random.
    """

    step: int
    ballots: Tensor
    gradients: Tensor
    honest_ballots: Tensor
    honest_gradients: Tensor
    verdicts: Tensor
    generator: torch.Generator

    @property
    def against(self) -> Tensor:
        """The direction that does most harm, int8 `[n]`: against the mean of the honest gradients."""
        return -self.honest_gradients.mean(0).sign().to(torch.int8)

    def alike(self, ballots: Tensor) -> Tensor:
        """Return the same ballots, int8 `[n]`, for each liar: `[f, n]`."""
        return ballots.expand_as(self.ballots)


class Attack:
    """What liars do; this one's are honest. One object is one run: it may remember what it has seen."""

    lies_as_owner = False
    """Whether liars answer with the opposite of what they have counted, on the shards that they own."""

    def ballots(self, view: View) -> Tensor:
        """Return what the liars vote, int8 `[f, n]` of -1, 0, +1."""
        return view.ballots

    def gradients(self, view: View) -> Tensor:
        """Return what the liars send where gradients are averaged instead, float32 `[f, n]`.

        Nothing bounds a number that is averaged: ballots against the honest become ten times their gradient.
        """
        size = view.honest_gradients.abs().mean(0)
        return 10.0 * size * self.ballots(view)

    def poisons(self, step: int) -> bool:
        """Return whether the liars say that their gradients hold a NaN."""
        del step
        return False

    def damage(self, payload: Tensor, generator: torch.Generator) -> Tensor:
        """Return the bytes that a liar sends to one owner, uint8, of the same length."""
        del generator
        return payload


class Honest(Attack):
    """No attack."""

    def gradients(self, view: View) -> Tensor:
        """Return the true ones."""
        return view.gradients


class SignFlip(Attack):
    """Each liar inverts its own ballots, and knows of nobody else's."""

    def __init__(self, scale: float = 10.0) -> None:
        self.scale = scale

    def ballots(self, view: View) -> Tensor:
        """Return the opposite of the honest ballots."""
        return -view.ballots

    def gradients(self, view: View) -> Tensor:
        """Return the opposite of the gradients, `scale` times as long."""
        return -self.scale * view.gradients


class RandomBallots(Attack):
    """Each liar votes at random, on as many components as it honestly would."""

    def ballots(self, view: View) -> Tensor:
        """Return its honest ballots, on components and with signs of a dice."""
        order = torch.rand(view.ballots.shape, generator=view.generator).argsort(1)
        signs = 2 * torch.randint(0, 2, view.ballots.shape, generator=view.generator, dtype=torch.int8) - 1
        return view.ballots.abs().gather(1, order) * signs


class AllVotes(Attack):
    """All liars vote alike on every component, most of which honest workers leave out."""

    def ballots(self, view: View) -> Tensor:
        """Return votes against the honest gradients everywhere."""
        return view.alike(view.against)


class Collusion(Attack):
    """All liars vote alike against the honest majority, and only where there is one."""

    def ballots(self, view: View) -> Tensor:
        """Return the opposite of the honest tally's sign."""
        return view.alike(-view.honest_ballots.sum(0, dtype=torch.int32).sign().to(torch.int8))


class Targeted(Attack):
    """All liars vote alike against the largest components, as dense as a cap on the density may just let pass.

    Args:
        factor: on the density of the honest ballots.
    """

    def __init__(self, factor: float = 2.5) -> None:
        self.factor = factor

    def ballots(self, view: View) -> Tensor:
        """Return votes against the honest gradients where these are largest."""
        size = view.honest_gradients.mean(0).abs()
        density = view.honest_ballots.ne(0).float().mean().item()
        most = min(size.numel(), round(self.factor * density * size.numel()))
        chosen = torch.zeros_like(view.against)
        chosen[size.topk(most).indices] = 1
        return view.alike(view.against * chosen)


class StaleRepeats(Attack):
    """Each liar sends what it would have sent some steps ago, again and again for as many steps.

    Args:
        period: steps for which the same is sent.
    """

    def __init__(self, period: int = 20) -> None:
        self.period = period
        self._kept: tuple[Tensor, Tensor] | None = None

    def _repeated(self, view: View) -> tuple[Tensor, Tensor]:
        if self._kept is None or view.step % self.period == 0:
            self._kept = view.ballots.clone(), view.gradients.clone()
        return self._kept

    def ballots(self, view: View) -> Tensor:
        """Return the kept ballots."""
        return self._repeated(view)[0]

    def gradients(self, view: View) -> Tensor:
        """Return the kept gradients."""
        return self._repeated(view)[1]


class Adaptive(Attack):
    """All liars watch the verdicts, and vote to undo the last ones; on everything else they vote honestly.

    Needs nothing but what every worker is told.
    """

    def ballots(self, view: View) -> Tensor:
        """Return votes against the last verdicts."""
        return torch.where(view.verdicts != 0, -view.verdicts, view.ballots)


class PoisonFlood(Attack):
    """Liars say that their gradients hold a NaN, which stops everybody.

    Args:
        pause_every: in one of so many steps they send none, so as never to have sent it in many in a row; None for all.
    """

    def __init__(self, pause_every: int | None = None) -> None:
        if pause_every is not None and pause_every < 2:
            raise ValueError(f"pause_every must be 2 steps or more, or None, got {pause_every!r}")
        self.pause_every = pause_every

    def poisons(self, step: int) -> bool:
        """Return whether this is a step without a pause."""
        return self.pause_every is None or (step + 1) % self.pause_every != 0

    def gradients(self, view: View) -> Tensor:
        """Return NaN."""
        return torch.full_like(view.gradients, float("nan"))


class Malformed(Attack):
    """Liars send bytes that are no payload.

    Args:
        kind: `"noise"`, a body of random bytes; `"oversized"`, a header that claims 2**40 - 1 elements; `"version"`, a
            format that does not exist.
    """

    def __init__(self, kind: str = "oversized") -> None:
        if kind not in {"noise", "oversized", "version"}:
            raise ValueError(f"kind must be 'noise', 'oversized' or 'version', got {kind!r}")
        self.kind = kind

    def damage(self, payload: Tensor, generator: torch.Generator) -> Tensor:
        """Return what is no payload."""
        payload = payload.clone()
        if self.kind == "version":
            payload[0] = 99
        elif self.kind == "oversized":
            payload[3:HEADER_BYTES] = 255
        else:
            body = payload[HEADER_BYTES:]
            body[:] = torch.randint(0, 256, body.shape, generator=generator, dtype=torch.uint8)
        return payload


class LyingOwners(Attack):
    """Liars vote honestly, and announce the opposite of what they have counted as owners."""

    lies_as_owner = True

    def gradients(self, view: View) -> Tensor:
        """Return the true ones: a ring all-reduce has owners too, but the average is taken to be right."""
        return view.gradients


ATTACKS: dict[str, Callable[[], Attack]] = {
    "none": Honest,
    "sign-flip": SignFlip,
    "random": RandomBallots,
    "all-votes": AllVotes,
    "collusion": Collusion,
    "targeted": Targeted,
    "stale": StaleRepeats,
    "adaptive": Adaptive,
    "poison": PoisonFlood,
    "pulsed-poison": partial(PoisonFlood, 3),
    "malformed": Malformed,
    "lying-owners": LyingOwners,
}
"""Attacks by name; each call makes one for a run of its own."""
