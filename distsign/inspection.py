"""What a rank holds payloads against, and how all ranks learn what any of them has seen amiss in a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distsign.admission import Admission
from distsign.collectives import Link
from distsign.digest import find_damaged
from distsign.payload import Form
from distsign.wire.header import Header, PayloadError

__all__ = ["Inspection"]


class Inspection:
    """Look at each payload that comes, and tell the others of it at the end of a step.

    A rank calls, in each step, `check` and `require` as payloads come, `tell` after the last of them, and `agree`.

    On the CPU what cannot be read is an error at once, and damage one in `agree`. On CUDA, where that would wait for
    the device, both poison the step, and `raise_if_mismatched` reports them later.

    Args:
        ranks: link among all ranks.
        voters: link among those whose ballots meet.
        node: link among the ranks of this node; of this rank alone for a vote of all.
        admission: it knows who has sent poison to this rank, and is told who has to any.
        checksum: whether payloads end with one.
        tells_poison: whether ranks tell each other who has sent poison.
    """

    def __init__(
        self, ranks: Link, voters: Link, node: Link, admission: Admission, *, checksum: bool, tells_poison: bool
    ) -> None:
        self._ranks, self._voters, self._node, self._admission = ranks, voters, node, admission
        self._checksum, self._tells_poison = checksum, tells_poison
        # Of this step: 1 + the rank that wrote a payload which came here damaged, or 0.
        self._damage = torch.zeros((), dtype=torch.int64)
        self._word: Callable[[], Tensor] | None = None  # of all voters on this step, on its way
        self._mismatch: Tensor | None = None  # on CUDA: whether anything was amiss so far

    # ---------------------------------------------------------------------------------------------- as payloads come

    def check(self, form: Form, rows: Tensor, owners: Sequence[int], column: int, own: range) -> Tensor:
        """Hold each header and checksum against what is expected; return which payloads carry poison or came damaged.

        Args:
            form: of the payloads.
            rows: uint8 `[num_rows, any]`, in each the payloads on the pieces of these owners: a row for the ballots of
                each voter, or a single one for the verdicts of all owners themselves, in order.
            owners: see above.
            column: number in its node of the ranks that wrote them.
            own: numbers of the payloads that this rank wrote itself, row by row.

        Returns:
            bool `[num_rows, num_owners]`.

        Raises:
            PayloadError: on the CPU, if a header is another than expected. On CUDA all payloads are flagged then.
        """
        on_cpu = rows.device.type == "cpu"
        if self._checksum:
            damaged = find_damaged(rows, [form.sizes[owner] for owner in owners], own)
            if not on_cpu or damaged.any():
                self._note_damage(form, damaged, column)
        else:
            damaged = rows.new_zeros(rows.shape[0], len(owners), dtype=torch.bool)
        if on_cpu and form.has_usual_headers(rows, owners):
            return damaged
        headers, poisoned, foreign = form.read_headers(rows, owners)
        foreign = foreign & ~damaged  # a damaged header is not to be believed
        if on_cpu:
            if foreign.any():
                k, row = foreign.t().nonzero()[0].tolist()
                sender = owners[k] if form.verdict else row
                data = bytes(headers[row, k].tolist())
                Header.expect(data, form.headers[owners[k]], sender=sender, receiver=self._voters.rank)
            return poisoned | damaged
        return poisoned | damaged | self._remember(foreign.any())  # of what came damaged `agree` takes note

    def require(self, ok: Tensor, poisoned: Tensor, what: str) -> Tensor:
        """Demand that bodies could be read; return whether the step is poisoned, bool scalar tensor.

        Args:
            ok: bool `[num_payloads]`, whether the bodies are what a distsign writes; on CUDA also one for all.
            poisoned: bool scalar tensor; the body of a poisoned payload is void.
            what: was in them, for the error.

        Raises:
            PayloadError: on the CPU, if any could not.
        """
        if ok.device.type != "cpu":
            return poisoned | self._remember(~ok.all())
        if not (poisoned or ok.all()):
            senders = ", ".join(str(k) for k, fine in enumerate(ok.tolist()) if not fine)
            raise PayloadError(
                f"rank {self._voters.rank} cannot read the {what} of rank {senders}: the body is not one that this "
                "distsign writes. It was damaged on its way, or its sender does not run the same distsign"
            )
        return poisoned

    def _note_damage(self, form: Form, damaged: Tensor, column: int) -> None:
        """Remember for `tell` a rank whose payload came damaged, bool `[num_rows, num_owners]` as of `check`."""
        num_voters, ranks_per_node = self._voters.world_size, self._node.world_size
        writers = form.layout.table(
            ("writers", column), lambda: [1 + k * ranks_per_node + column for k in range(num_voters)], damaged.device
        )
        of_each = damaged * (writers if form.verdict else writers.unsqueeze(1))
        self._damage = torch.maximum(self._damage.to(damaged.device), of_each.max())

    def _remember(self, bad: Tensor) -> Tensor:
        self._mismatch = bad if self._mismatch is None else self._mismatch | bad
        return bad

    # ---------------------------------------------------------------------------------------- at the end of a step

    def tell(self) -> None:
        """Send word to all ranks of what this one has seen in the step, whose last payloads it has just read.

        On the CPU it travels while verdicts are written; `agree` waits for that of the others. A rank that fails in
        between, out of memory say, fails alone: the others end this step, and learn of it in the next.
        """
        damage, self._damage = self._damage, torch.zeros_like(self._damage)
        word = [damage.view(1).view(torch.uint8)] * self._checksum
        word += [self._admission.seen.to(torch.uint8)] * self._tells_poison
        if word:
            mine = torch.cat(word)
            sizes = [mine.numel()] * self._voters.world_size
            self._word = self._voters.begin_share(mine, sizes, "word of damage and poison")

    def agree(self) -> Tensor:
        """Let all ranks learn, at the end of a step, whose payload came damaged, and who sent poison to anybody.

        All must call it, after `tell`. Without it a rank might take a step that another does not: what came damaged to
        one has reached the others well. Who floods with poison is left out by all alike; owners know of what came to
        them alone, and tell; where every rank gets all ballots, none needs to believe it. One message says both.

        Returns:
            bool scalar tensor, with a checksum on the device of the payloads, alike on all ranks: whether the step
            must be poisoned.

        Raises:
            PayloadError: on the CPU, on all ranks alike, if a payload came damaged; it names who wrote it and who got
                it.
        """
        seen, damage = self._admission.seen, torch.zeros_like(self._damage)
        word, self._word = self._word, None
        assert (word is None) == (not self._checksum and not self._tells_poison), "agree comes after tell"
        of_voters = None if word is None else word()
        if of_voters is not None and not self._says_nothing(of_voters):
            seen, damage = self._agreed(of_voters.view(self._voters.world_size, -1), seen, damage)
            if self._checksum:
                self._require_undamaged(damage)
        self._admission.commit(seen)
        return (damage != 0).any()

    def _says_nothing(self, word: Tensor) -> bool:
        """Return whether nobody has seen anything, as nearly always; False where looking would wait for a device."""
        return word.device.type == "cpu" and self._node.world_size == 1 and not word.numpy().any()

    def _agreed(self, of_voters: Tensor, seen: Tensor, damage: Tensor) -> tuple[Tensor, Tensor]:
        """Return who was seen to send poison, and each rank's damage in order of rank; or as given, if not told of it.

        Args:
            of_voters: uint8 `[num_voters, any]`, the word of each.
            seen: bool `[num_voters]`.
            damage: int64.
        """
        split = damage.itemsize * self._checksum
        told = of_voters[:, split:].amax(0) if self._tells_poison else of_voters[0, :0]
        in_node = torch.cat([of_voters[:, :split].flatten(), told])
        of_node = self._node.share(in_node, [in_node.numel()] * self._node.world_size, "word of damage and poison")
        of_node = of_node.view(self._node.world_size, -1)
        split *= self._voters.world_size
        if self._checksum:
            damage = of_node[:, :split].flatten().view(torch.int64).view(of_node.shape[0], -1).t().flatten()
        if self._tells_poison:
            seen = of_node[:, split:].amax(0) != 0
        return seen, damage

    def _require_undamaged(self, everyones: Tensor) -> None:
        bad = (everyones != 0).any()
        if bad.device.type != "cpu":
            self._remember(bad)
        elif bad:
            receiver = int(everyones.ne(0).nonzero()[0])
            raise PayloadError(
                f"a payload that rank {int(everyones[receiver]) - 1} wrote did not reach rank {receiver} as it was "
                "written: its checksum does not match. All ranks have left the step out; go on from a checkpoint, and "
                "look at the link between these ranks and at their memory"
            )

    def raise_if_mismatched(self) -> None:
        """Raise what was found amiss on CUDA since. Waits for the device.

        Raises:
            PayloadError: if any payload so far was not what this rank expected.
        """
        if self._mismatch is not None and bool(self._mismatch):
            raise PayloadError(
                f"a payload that reached {self._ranks.describe()} had a header other than expected, or there was one "
                "whose checksum did not match; that step was poisoned on all ranks. The ranks do not train the same "
                "model with the same options, or a link or a memory is faulty"
            )
