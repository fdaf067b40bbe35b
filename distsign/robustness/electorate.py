"""The vote of many workers, some of them liars, in one process: the library's own pieces, and no link between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distsign import plan
from distsign.admission import Admission
from distsign.collectives import Link
from distsign.confidence import Confidence
from distsign.exchange import Verdicts, VoteExchange
from distsign.kernels import kernels_for
from distsign.layout import IntArray, Shape
from distsign.options import VoteOptions
from distsign.owner import make_owner
from distsign.payload import Form
from distsign.plan import Column, Part, Plan
from distsign.robustness.attacks import Attack, View
from distsign.sizes import density_for
from distsign.steering import Steering
from distsign.vote import require_margin
from distsign.voter import Voter, rotating_starts

__all__ = ["Combined", "Electorate"]

_OPTIONS = ("margin", "carry", "owner_carry", "exchange", "bits_per_param", "max_density", "max_poison_streak")


@dataclass(frozen=True)
class Combined:
    """What a step came to.

    Attributes:
        direction: float32 `[n]`, what all workers step along: verdicts, or an average.
        poisoned: whether the step is to be left out.
        lr_scale: factor on the learning rate.
        ballot_density: share of the honest workers' ballots that are not 0; 0 without a vote.
    """

    direction: Tensor
    poisoned: bool
    lr_scale: float
    ballot_density: float = 0.0


class _Table(Link):
    """A link whose ranks all sit in one process: what one row sends, every row has."""

    def __init__(self, num_workers: int) -> None:
        super().__init__(None)
        self.world_size = num_workers

    def all_gather(self, source: Tensor, what: str = "an exchange") -> Tensor:
        """Return the rows, which are all workers' already."""
        del what
        return source


class Electorate:
    """Workers that vote, the last `num_liars` of which lie.

    Without a budget ballots travel as planes.

    Args:
        num_elements: of each parameter.
        num_workers: in all.
        num_liars: of them.
        attack: what these do; an object of its own.
        confidence: of all workers.
        seed: of what is random in the attack.
        options: of `SignVoteState`: margin, carry, owner_carry, exchange (`"two_phase"` or `"all_gather"`),
            bits_per_param, max_density, max_poison_streak.

    Raises:
        ValueError: if an option is out of range.

    Example:
        >>> from distsign import FixedConfidence
        >>> from distsign.robustness import SignFlip
        >>> vote = Electorate([2], 3, 1, SignFlip(), FixedConfidence(0.1), margin=1)
        >>> vote.combine(torch.tensor([[1.0, -1.0], [1.0, 0.0], [1.0, -1.0]])).direction
        tensor([1., 0.])
    """

    def __init__(
        self,
        num_elements: Sequence[int],
        num_workers: int,
        num_liars: int,
        attack: Attack,
        confidence: Confidence,
        *,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if not 0 <= num_liars < num_workers:
            raise ValueError(f"liars must be fewer than the {num_workers} workers, got num_liars={num_liars}")
        unknown = options.keys() - set(_OPTIONS)
        if unknown:
            raise ValueError(f"an Electorate has the options {', '.join(_OPTIONS)}, got {', '.join(sorted(unknown))}")
        budget = options.get("bits_per_param")
        wire = "planes" if budget is None else "auto"
        self.options = VoteOptions.check(confidence=confidence, wire=wire, **options)
        require_margin(self.options.margin, num_workers)
        self.num_workers, self.num_liars = num_workers, num_liars
        self._attack = attack
        self._generator = torch.Generator().manual_seed(seed)
        self._step = 0
        self._last = torch.zeros(sum(num_elements), dtype=torch.int8)
        self._voters = [Voter(confidence, self.options.carry) for _ in range(num_workers)]
        for voter in self._voters:
            voter.grow(list(num_elements), torch.device("cpu"))
        self._steering = Steering(confidence, budgeted=budget is not None)
        self._steering.grow(len(num_elements), torch.device("cpu"))
        self.admission = Admission(num_workers, self.options.max_density, self.options.max_poison_streak)
        self._exchange = VoteExchange(_Table(num_workers), "all_gather", admission=self.admission)
        forget = self.options.forgets
        self._owner = make_owner(self.options.owner_carry, self.options.margin, num_workers, forget=forget)
        self._column = self._plan(num_elements)

    def _plan(self, num_elements: Sequence[int]) -> Column:
        options, density = self.options, None
        if options.bits_per_param is not None:
            shapes = [Shape(row, n) for row, n in enumerate(num_elements)]
            density = density_for(options.bits_per_param, shapes, self.num_workers, plan.COALESCE_BYTES)
            density = min(density, options.max_density or 1.0)
        return Plan.build(
            [[Part(row, n, voted=True) for row, n in enumerate(num_elements)]],
            [self._voters[0].home(row) for row in range(len(num_elements))],
            1,
            self.num_workers,
            density=density,
            wire=options.wire,
            owner_carry=options.owner_carry is not None,
            device=torch.device("cpu"),
        ).columns[0]

    def combine(self, gradients: Tensor) -> Combined:
        """Hold one vote.

        Args:
            gradients: float32 `[num_workers, n]`, all parameters one after the other; those of the liars too are true.

        Raises:
            PayloadError: if a payload is not what an owner expects; a real run ends here.
        """
        self._steering.begin_step()
        self.admission.begin_step()
        starts = rotating_starts(self._column.layout, self._step)
        planes, ballots, poison = self._cast(gradients)
        lies = self._lie(gradients, ballots, planes, starts) if self.num_liars else []
        rows = [*planes[: self.num_workers - self.num_liars], *lies]
        payloads = torch.stack([self._seal(row, w, bool(poison[w])) for w, row in enumerate(rows)])
        found = self._verdicts(payloads, starts)
        direction = torch.zeros(gradients.shape[1])
        counts = kernels_for(direction.device).unpack(found.planes, self._column.targets[0], torch.ones(()), direction)
        self._commit(found, counts, poison)
        self._step += 1
        self._last = direction.to(torch.int8)
        honest = ballots[: self.num_workers - self.num_liars]
        density = honest.ne(0).float().mean().item()
        return Combined(direction, bool(found.poisoned), float(self._steering.lr_scale), density)

    def _cast(self, gradients: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return each worker's true planes, its ballots, int8 `[num_workers, n]`, and whether it has poison."""
        column, kernels, planes = self._column, kernels_for(gradients.device), []
        ballots, poison = torch.zeros(gradients.shape), []
        for voter, gradient, out in zip(self._voters, gradients, ballots, strict=True):
            voter.begin_step()
            planes.append(torch.zeros(column.layout.buffer_bytes, dtype=torch.uint8))
            cast = voter.cast(
                [gradient.contiguous()],
                column.layout,
                column.rows,
                scale=torch.ones((), dtype=torch.float64),
                kernels=kernels,
                out=planes[-1],
                step=self._step,
                factors=self._steering.of(column.rows),
                caps=self._caps(),
                forget=self.options.forgets,
            )
            kernels.unpack(planes[-1], column.targets[0], torch.ones(()), out)
            poison.append(~cast.finite)
        return planes, ballots.to(torch.int8), torch.stack(poison)

    def _caps(self) -> IntArray | None:
        if self._column.ballots.caps is not None or self.options.max_density is None:
            return self._column.ballots.caps
        return self._column.layout.most_votes(self.options.max_density)

    def _lie(self, gradients: Tensor, ballots: Tensor, planes: list[Tensor], starts: IntArray) -> list[Tensor]:
        """Return the planes that the liars send."""
        h = self.num_workers - self.num_liars
        view = View(self._step, ballots[h:], gradients[h:], ballots[:h], gradients[:h], self._last, self._generator)
        column, kernels, lies = self._column, kernels_for(gradients.device), []
        thresholds = torch.full((column.rows.numel(),), 0.5)
        for row in self._attack.ballots(view):
            lies.append(torch.zeros_like(planes[0]))
            kernels.pack(row.float().contiguous(), column.layout.pieces[0], thresholds, lies[-1])
            if column.ballots.caps is not None:  # there are no more slots than these in a payload, whatever one wants
                caps = torch.from_numpy(column.ballots.caps)
                kernels.settle_carry(lies[-1], column.layout.all_pieces, caps, torch.from_numpy(starts), None)
        return lies

    def _seal(self, planes: Tensor, worker: int, poison: bool) -> Tensor:
        form, lies = self._column.ballots, worker >= self.num_workers - self.num_liars
        crowded = None if form.caps is None else torch.zeros(form.caps.size, dtype=torch.bool)
        poisoned = torch.tensor(poison or (lies and self._attack.poisons(self._step)))
        kernels = kernels_for(planes.device)
        payloads = form.seal(planes, crowded, torch.zeros(0), poisoned, kernels)
        if not lies:
            return payloads
        parts = torch.split(payloads, list(form.sizes))
        return torch.cat([self._attack.damage(part, self._generator) for part in parts])

    def _verdicts(self, payloads: Tensor, starts: IntArray) -> Verdicts:
        column, kernels = self._column, kernels_for(payloads.device)
        told = self._exchange.vote(column.ballots, column.verdicts, payloads, self._owner, starts, kernels)
        if self._attack.lies_as_owner and self.options.exchange == "two_phase":
            parts = list(torch.split(told, list(column.verdicts.sizes)))
            for owner in range(self.num_workers - self.num_liars, self.num_workers):
                parts[owner] = _inverted(column.verdicts, owner, parts[owner])
            told = torch.cat(parts)
        return self._exchange.read(column.verdicts, told, kernels)

    def _commit(self, found: Verdicts, counts: Tensor, poison: Tensor) -> None:
        for voter, unfit in zip(self._voters, poison, strict=True):
            voter.commit(found.poisoned | unfit)
        self._owner.commit(found.poisoned)
        if self.options.bits_per_param is not None:
            assert found.crowded is not None
            column = self._column
            verdicts, slots, crowded, lengths = column.by_row(column.seen(counts, found.crowded))
            self._steering.observe(column.rows, verdicts, slots, 2 * crowded > lengths)
        self._steering.commit(found.poisoned)
        self.admission.commit(self.admission.seen)


def _inverted(form: Form, owner: int, payload: Tensor) -> Tensor:
    """Return one owner's payload with every verdict turned into its opposite."""
    kernels = kernels_for(payload.device)
    opened = form.open(owner, payload.unsqueeze(0))
    planes = torch.zeros(2 * opened.num_bytes, dtype=torch.uint8)
    opened.write_planes(0, planes, kernels)
    mask, sign = planes[: opened.num_bytes], planes[opened.num_bytes :]
    lie = torch.cat([mask, mask & ~sign])
    crowded = None if opened.crowded is None else opened.crowded[0]
    return form.seal_one(owner, lie, crowded, opened.raw[0], torch.tensor(False), kernels)[0]
