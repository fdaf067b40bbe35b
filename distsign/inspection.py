"""What a rank holds payloads against, and how all ranks learn what some of them have seen amiss in a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distsign.admission import Admission
from distsign.collectives import Link
from distsign.digest import find_damaged
from distsign.payload import Form
from distsign.wire.header import Header, PayloadError

__all__ = ["Inspection"]


class Inspection:
    """Look at each payload that comes, and learn at the end of a step what others have seen.

    A rank calls, in each step, `check` and `require` as payloads come, and `agree` after the last of them.

    On the CPU what cannot be read, or came damaged, is an error at once, on the rank that it came to. On CUDA, where
    that would wait for the device, both poison the step, and `raise_if_mismatched` reports them later.

    Args:
        ranks: link among all ranks.
        voters: link among those whose ballots meet.
        node: link among the ranks of this node; of this rank alone for a vote of all.
        admission: it knows who has sent poison to this rank, and is told who has to any.
        checksum: whether payloads end with one.
        tells_poison: whether ranks tell each other who has sent poison.

    Attributes:
        reports: whether ranks ever report to each other; `agree` says when.
    """

    def __init__(
        self, ranks: Link, voters: Link, node: Link, admission: Admission, *, checksum: bool, tells_poison: bool
    ) -> None:
        self._ranks, self._voters, self._node, self._admission = ranks, voters, node, admission
        self._checksum, self._tells_poison, self.reports = checksum, tells_poison, checksum or tells_poison
        # On CUDA: whether a payload of this step was amiss here, and whether any so far.
        self._amiss = torch.zeros((), dtype=torch.bool)
        self._mismatch: Tensor | None = None

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
            PayloadError: on the CPU, if a payload came damaged, or a header is another than expected. On CUDA all
                payloads are flagged then.
        """
        defers = self.defers(rows.device)
        if self._checksum:
            damaged = find_damaged(rows, [form.sizes[owner] for owner in owners], own)
            if defers:
                self._note(damaged.any())
            else:
                self._require_undamaged(form, damaged, owners, column)
        else:
            damaged = rows.new_zeros(rows.shape[0], len(owners), dtype=torch.bool)
        if not defers and form.has_usual_headers(rows, owners):
            return damaged
        headers, poisoned, foreign = form.read_headers(rows, owners)
        foreign = foreign & ~damaged  # a damaged header is not to be believed
        if defers:
            return poisoned | damaged | self._note(foreign.any())
        if foreign.any():
            k, row = foreign.t().nonzero()[0].tolist()
            sender = self.rank_of(owners[k] if form.verdict else row, column)
            data = bytes(headers[row, k].tolist())
            Header.expect(data, form.headers[owners[k]], sender=sender, receiver=self._ranks.rank)
        return poisoned | damaged

    def require(self, ok: Tensor, poisoned: Tensor, what: str, column: int) -> Tensor:
        """Demand that bodies could be read; return whether the step is poisoned, bool scalar tensor.

        Args:
            ok: bool `[num_payloads]`, whether the bodies are what a distsign writes; on CUDA also one for all.
            poisoned: bool scalar tensor; the body of a poisoned payload is void.
            what: was in them, for the error.
            column: see `check`.

        Raises:
            PayloadError: on the CPU, if any could not.
        """
        if self.defers(ok.device):
            return poisoned | self._note(~(ok | poisoned).all())
        if not (poisoned or ok.all()):
            senders = ", ".join(str(self.rank_of(k, column)) for k, fine in enumerate(ok.tolist()) if not fine)
            raise PayloadError(
                f"rank {self._ranks.rank} cannot read the {what} of rank {senders}: the body is not one that this "
                "distsign writes. It was damaged on its way, or its sender does not run the same distsign"
            )
        return poisoned

    @staticmethod
    def defers(device: torch.device) -> bool:
        """Return whether what is amiss poisons the step and is raised later, as to look would wait for the device."""
        return device.type != "cpu"

    def rank_of(self, voter: int, column: int) -> int:
        """Return the rank, among all of the vote, that has this column in a voter's node."""
        return voter * self._node.world_size + column

    def _require_undamaged(self, form: Form, damaged: Tensor, owners: Sequence[int], column: int) -> None:
        """Raise if any payload came damaged, bool `[num_rows, num_owners]` on the CPU; see `check`."""
        if not damaged.any():  # nearly always
            return
        row, k = damaged.nonzero()[0].tolist()
        writer = self.rank_of(owners[k] if form.verdict else row, column)
        raise PayloadError(
            f"a payload that rank {writer} wrote did not reach rank {self._ranks.rank} as it was written: its checksum "
            "does not match. This rank has left the step out; go on from a checkpoint, and look at the link between "
            "these ranks and at their memory"
        )

    def _note(self, amiss: Tensor) -> Tensor:
        self._amiss = self._amiss.to(amiss.device) | amiss
        return amiss

    # ---------------------------------------------------------------------------------------- at the end of a step

    def agree(self, poisoned: Tensor) -> Tensor:
        """Let all ranks learn, at the end of a step, who sent poison to anybody, and on CUDA of damage.

        All must call it. Without it a rank might leave out another worker than others do, or a step: owners know of
        what came to them alone, and what came damaged to one has reached the others well. Where every rank gets all
        ballots, none needs to be told who sent poison.

        On the CPU nothing travels in a step without poison while nobody is left out, and ranks need not ask whether it
        was one: whoever counts and sends poison makes its owners' verdicts say so to all.

        Args:
            poisoned: bool scalar tensor, whether any verdict of the step was; alike on all ranks.

        Returns:
            bool scalar tensor, on the device of `poisoned`: whether a payload was amiss, so that the step must be
            poisoned; never on the CPU, where that is an error at once. Alike on all ranks where these report to each
            other; else only a rank that cannot read verdicts knows of it.
        """
        seen, amiss = self._admission.seen, self._amiss.to(poisoned.device)
        self._amiss = torch.zeros_like(amiss)
        if self._has_to_report(poisoned):
            amiss, seen = self._reported(amiss, seen)
        if self.defers(amiss.device):
            self._mismatch = amiss if self._mismatch is None else self._mismatch | amiss
        self._admission.commit(seen)
        return amiss

    def _has_to_report(self, poisoned: Tensor) -> bool:
        """Return whether ranks have to report to each other what they have seen; alike on all of them."""
        if self.defers(poisoned.device):
            return self.reports  # to look at `poisoned` would wait for the device
        # Of the poison of one that is left out no verdict tells.
        return self._tells_poison and bool(poisoned or self._admission.left_out.any())

    def _reported(self, amiss: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Return whether a payload was amiss on any rank, and bool `[num_voters]`, who was seen to send poison."""
        report = torch.cat([amiss.view(1), seen.to(amiss.device)]).to(torch.uint8)
        for link in (self._voters, self._node):
            sizes = [report.numel()] * link.world_size
            report = link.share(report, sizes, "reports of damage and poison").view(link.world_size, -1).amax(0)
        found = report != 0
        return found[0], found[1:] if self._tells_poison else seen

    def raise_if_mismatched(self) -> None:
        """Raise what was found amiss on CUDA since. Waits for the device.

        Raises:
            PayloadError: if any payload so far was not what this rank expected.
        """
        if self._mismatch is not None and bool(self._mismatch):
            whom = "some rank" if self.reports else self._ranks.describe()
            amiss = ", or its checksum did not match" if self._checksum else ""
            then = (
                "all ranks left that step out" if self.reports else "this rank left that step out, and others may not"
            )
            raise PayloadError(
                f"a payload that reached {whom} had a header or a body other than expected{amiss}; {then}. Compare the "
                "replicas, or go on from a checkpoint. The ranks do not train the same model with the same options, "
                "or a link or a memory is faulty"
            )
