"""What the votes of one model remember from step to step, and a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distsign.admission import Admission
from distsign.ladder import DensityLadder
from distsign.layout import Shape, shards
from distsign.options import VoteOptions
from distsign.owner import Piece, make_owner
from distsign.plan import Plan
from distsign.steering import Steering
from distsign.voter import Voter

__all__ = ["VoteMemory"]


class VoteMemory:
    """All that one step leaves to the next, each part by itself; what a step changes counts from `commit` on.

    Args:
        options: what the user chose.

    Attributes:
        voter: this worker's ballots, and what it has not sent.
        owner: this rank's counts, and what they have not decided.
        admission: whose ballots are counted; the same object for as long as there are as many voters.
        steering: the factors on thresholds and learning rate.
        ladder: slots of the payloads; None where a budget or the planes decide them.
        num_voters: whose ballots meet; 1 until the ranks do.
    """

    def __init__(self, options: VoteOptions) -> None:
        self._options = options
        self.num_voters = 0
        self.meet(1)

    def meet(self, num_voters: int) -> None:
        """Take so many voters into account.

        Raises:
            ValueError: if there is something to remember of a vote among another number of them.
        """
        if num_voters == self.num_voters:
            return
        if self.num_voters and self.voter.stats.shape[0]:
            raise ValueError(
                f"this SignVoteState holds what a vote among {self.num_voters} has left, and now there are "
                f"{num_voters} voters: load a checkpoint after init_process_group, and use one state a process group"
            )
        options = self._options
        self.num_voters = num_voters
        word = "rank" if options.ranks_per_node == 1 else "node"
        self.admission = Admission(num_voters, options.max_density, options.max_poison_streak, word)
        self._forget()

    def _forget(self) -> None:
        options = self._options
        self.voter = Voter(options.confidence, options.carry)
        self.owner = make_owner(options.owner_carry, options.margin, self.num_voters, forget=options.forgets)
        self.steering = Steering(options.confidence, budgeted=options.bits_per_param is not None)
        self.ladder: DensityLadder | None = None
        if options.capped and options.bits_per_param is None:
            self.ladder = DensityLadder(options.ranks_per_node, self.num_voters, options.confidence.silent_steps)

    def grow(self, lengths: Sequence[int], device: torch.device) -> None:
        """Make room for all parameters.

        Args:
            lengths: of each row of the registry, the components on which this rank votes.
            device: of the gradients.
        """
        self.voter.grow(lengths, device)
        self.steering.grow(len(lengths), device)
        if self.ladder is not None:
            self.ladder.grow(len(lengths))

    def begin_step(self) -> None:
        """Forget what a step that broke off has left."""
        self.voter.begin_step()
        self.steering.begin_step()
        self.admission.begin_step()
        if self.ladder is not None:
            self.ladder.begin_step()

    def observe(self, plan: Plan, seen: Sequence[Tensor]) -> None:
        """Let what steers see a group's verdicts.

        Args:
            plan: of the group.
            seen: what `Column.seen` returned, by column.
        """
        if self.ladder is not None:
            for column, each in zip(plan.columns, seen, strict=True):
                self.ladder.observe(column.shares, each)
        elif self._options.capped:
            by_param = torch.zeros(4, self.steering.factors.numel(), dtype=torch.int64, device=plan.rows.device)
            for column, each in zip(plan.columns, seen, strict=True):
                by_param.index_add_(1, column.rows, column.by_row(each))
            verdicts, slots, crowded, lengths = by_param[:, plan.rows]
            # A parameter is crowded where most of its components lie in crowded pieces.
            self.steering.observe(plan.rows, verdicts, slots, 2 * crowded > lengths)

    def commit(self, poisoned: Tensor, unfit: Tensor) -> None:
        """Keep what the step has changed, or forget it if it was poisoned.

        Args:
            poisoned: bool scalar tensor, alike on all ranks.
            unfit: bool scalar tensor, whether this rank itself sent poison. The step may go well for the others, where
                this one is left out: it has nothing to remember of it.
        """
        self.voter.commit(poisoned | unfit)
        self.owner.commit(poisoned)
        self.steering.commit(poisoned)
        if self.ladder is not None:
            self.ladder.commit(poisoned)

    def state_dict(self, names: Mapping[str, int]) -> dict[str, Any]:
        """Return what is remembered, filed under the parameters' names, of which the rows are given."""
        name_of = {row: name for name, row in names.items()}
        known = self.voter.stats.shape[0]
        kept = self.owner.kept()
        return {
            "voter": {name: self.voter.kept(row) for name, row in names.items() if row < known},
            "owner": {(name_of[row], start, length): value for (row, start, length), value in kept.items()},
            "num_voters": self.num_voters,
            "ranks_per_node": self._options.ranks_per_node,
            "exchange": self._options.exchange,
            "carry": self._options.carry is not None,
            "owner_carry": self._options.owner_carry,
            "admission": self.admission.state_dict(),
            "steering": self.steering.state_dict(names),
            "ladder": None if self.ladder is None else self.ladder.state_dict(names),
        }

    def load_state_dict(self, state: Mapping[str, Any], names: Mapping[str, int], lengths: Sequence[int]) -> None:
        """Go on from `state_dict()`, forgetting all else.

        Args:
            state: what it returned.
            names: row of each parameter.
            lengths: see `grow`.

        Raises:
            ValueError: if owners, or ranks of a node, keep what others would have to, or if it is of other options or
                sizes.
        """
        self._require_voters(state)
        self._require_kinds(state)
        for name, kept in state["voter"].items():
            _require_size(name, kept, lengths[names[name]])
        self._require_pieces(state["owner"], names, lengths)
        device = self.voter.stats.device
        self._forget()
        self.grow(lengths, device)
        for name, kept in state["voter"].items():
            self.voter.keep(names[name], kept)
        pieces: dict[Piece, Tensor] = {
            (names[name], start, length): value for (name, start, length), value in state["owner"].items()
        }
        self.owner.keep(pieces, device)
        self.admission.load_state_dict(state.get("admission"))  # checkpoints of earlier versions have none
        self.steering.load_state_dict(state["steering"], names)
        # There is none of a state under other options, or of an earlier version's before its first step.
        if self.ladder is not None and state["ladder"] is not None:
            self.ladder.load_state_dict(state["ladder"], names)

    def _require_voters(self, state: Mapping[str, Any]) -> None:
        options = self._options
        per_node, then = options.ranks_per_node, state.get("ranks_per_node", options.ranks_per_node)
        exchange = state.get("exchange", options.exchange)
        if state["owner"] and (exchange == "all_gather") != (options.exchange == "all_gather"):
            raise ValueError(
                f"the checkpoint was written with exchange={exchange!r}, and owners keep undecided votes: these are "
                f"elsewhere with exchange={options.exchange!r}. Go on with the former"
            )
        if then == per_node and (not state["owner"] or state["num_voters"] == self.num_voters):
            return
        written = f"{state['num_voters']} ranks" if then == 1 else f"{state['num_voters']} nodes of {then} ranks"
        now = f"{self.num_voters}" if per_node == 1 else f"{self.num_voters} nodes of {per_node}"
        call = f"{self.num_voters * per_node}" + f", ranks_per_node={per_node}" * (per_node > 1)
        what = "owners keep undecided votes" if then == per_node else "each keeps its share"
        raise ValueError(
            f"the checkpoint was written by {written}, and {what}, but now there are {now}: give all ranks' states to "
            f"distsign.reshard(states, {call}) first"
        )

    def _require_kinds(self, state: Mapping[str, Any]) -> None:
        options = self._options
        # Earlier versions did not say; what they kept shows it on ranks that own something.
        carries = {state["carry"]} if "carry" in state else {"carry" in kept for kept in state["voter"].values()}
        owners = {"plain" if value.dtype == torch.int16 else "standing" for value in state["owner"].values()}
        owners = {state["owner_carry"]} if "owner_carry" in state else owners
        for then, now, name in (
            (carries, options.carry is not None, "carry"),
            (owners, options.owner_carry, "owner_carry"),
        ):
            if then - {now}:
                raise ValueError(
                    f"the checkpoint was written with {name}={min(then - {now})!r}, but here {name} is "
                    f"{getattr(options, name)!r}: what was kept would be lost, or is not there. Use the options that "
                    "the checkpoint was written with"
                )

    def _require_pieces(
        self, owned: Mapping[tuple[str, int, int], Tensor], names: Mapping[str, int], lengths: Sequence[int]
    ) -> None:
        """Demand that undecided votes are of pieces that owners have here."""
        for (name, start, length), value in owned.items():
            row = names[name]
            pieces = {(a, b - a) for _, a, b in shards(Shape(row, lengths[row]), self.num_voters)}
            is_plain = value.dtype == torch.int16
            shape = (length,) if is_plain else (self.num_voters, 2, (length + 7) // 8)
            if (start, length) not in pieces or value.shape != shape:
                raise ValueError(
                    f"the checkpoint keeps undecided votes of {name!r}, {tuple(value.shape)} on {length:,} components "
                    f"from {start:,} on, which is no piece of the {lengths[row]:,} that are voted on here: load the "
                    "checkpoint of this model, with the same parameters excluded"
                )


def _require_size(name: str, kept: Mapping[str, Tensor], length: int) -> None:
    for key in ("carry", "square"):
        if key in kept and kept[key].numel() != length:
            raise ValueError(
                f"the checkpoint keeps {kept[key].numel():,} components of {name!r}, but this rank votes on "
                f"{length:,}: load the checkpoint of this model, with the same parameters excluded"
            )
