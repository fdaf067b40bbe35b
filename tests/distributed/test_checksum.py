"""Payloads that a link damages, on real ranks: with a checksum all ranks say so, and none takes the step."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distsign import AdaptiveConfidence, SignAdamPP, SignVoteState, sign_vote_hook
from distsign.collectives import Link
from distsign.traffic import step_bytes

from . import hook_jobs
from .carry_oracle import CARRY
from .oracle import Case, batch, build, digest
from .ranks import RankPool

Pools = Callable[[int], RankPool]

CASES = {
    "planes": Case(),
    "sparse": replace(CARRY, options={"bits_per_param": 0.1, "owner_carry": True}),
    "excluded": Case(options={"exclude": ["gain", "first.bias", "last.bias"]}),
    "all-gather": Case(options={"exchange": "all_gather"}),
    "streak": Case(options={"max_poison_streak": 3}),
    "nodes": Case(options={"max_poison_streak": 3, "exchange": "hierarchical", "ranks_per_node": 2}),
}


class DamagedLink:
    """Flips one bit of what a rank receives from another, in one of its calls from the third step on.

    `name` is that of the link in the exchange: among voters, or within a node.
    """

    def __init__(self, state: SignVoteState, sender: int, call: int, bit: int, name: str = "_voters") -> None:
        self.state, self.sender, self.call, self.bit, self.name = state, sender, call, bit, name
        self.num_calls = 0

    def damage(self, found: Tensor, at: int, size: int) -> None:
        if self.state._counts.num_steps == 3:
            if self.num_calls == self.call:
                bit = self.bit % (8 * size)
                found[at + bit // 8] ^= 1 << bit % 8
            self.num_calls += 1

    def all_to_all(self, source: Tensor, send: list[int], receive: list[int], what: str) -> Tensor:
        found = Link.all_to_all(self.link, source, send, receive, what)
        self.damage(found, sum(receive[: self.sender]), receive[self.sender])
        return found

    def all_gather(self, source: Tensor, what: str) -> Tensor:
        found = Link.all_gather(self.link, source, what)
        if source.dtype == torch.uint8:
            self.damage(found.view(-1), self.sender * source.numel(), source.numel())
        return found

    def install(self) -> None:
        assert self.state._pipeline.exchange is not None
        self.link = getattr(self.state._pipeline.exchange, self.name)
        self.link.all_to_all = self.all_to_all  # type: ignore[method-assign]
        self.link.all_gather = self.all_gather  # type: ignore[method-assign]


def train_on_a_damaged_link(
    rank: int, world_size: int, case: Case, call: int, bit: int, sender: int = 1, name: str = "_voters"
) -> None:
    """What rank 2 receives of another is damaged in the third step; the optimizer must not have moved since the second.

    `call` 0 is ballots, 1 verdicts; later ones are of the step's second exchange. Within a node 0 is gradients.
    """
    net, model, state = build(replace(case, options={**case.options, "checksum": True}))
    optimizer = SignAdamPP(model.named_parameters(), lr=1e-2, vote_state=state)
    for step in range(4):
        optimizer.zero_grad()
        before = digest(net)
        try:
            model(batch(rank, step, 0, torch.float32)).square().mean().backward()
        except RuntimeError:
            assert step == 2 and digest(net) == before
            with pytest.raises(RuntimeError, match="its checksum does not match"):
                optimizer.step()
            assert digest(net) == before
            raise
        optimizer.step()
        if rank == 2 and step == 0:
            DamagedLink(state, sender, call, bit, name).install()


@pytest.mark.parametrize(
    ("name", "call", "bit"),
    [
        ("planes", 0, 0),  # the version
        ("planes", 1, 17),  # poison
        ("planes", 2, 12345),
        ("planes", 3, -1),  # the checksum itself
        ("sparse", 0, 70),
        ("sparse", 1, 16),
        ("excluded", 1, -40),
        ("all-gather", 0, 99),
        ("streak", 1, 17),  # word of damage and of poison travel together
    ],
)
def test_all_ranks_name_who_wrote_and_who_got_it(rank_pool: Pools, name: str, call: int, bit: int) -> None:
    words = "a payload that rank 1 wrote did not reach rank 2 as it was written: its checksum does not match"
    rank_pool(3).run_expecting(
        rf"VoteError: the vote on .*PayloadError: {re.escape(words)}",
        train_on_a_damaged_link,
        CASES[name],
        call,
        bit,
        in_step=True,
    )


@pytest.mark.parametrize(
    ("name", "sender", "call", "bit", "writer"),
    [
        ("_voters", 0, 0, 99, 0),  # rank 2 votes with rank 0: its ballots
        ("_voters", 0, 1, 99, 0),  # and its verdicts
        ("_node", 1, 1, 99, 1),  # by rank 3, of the same node: verdicts of rank 1, which votes with it
        ("_node", 1, 1, -1, 3),  # and its own, in the place that rank 2 has among those who vote with it
    ],
)
def test_damage_between_nodes_and_within(
    rank_pool: Pools, name: str, sender: int, call: int, bit: int, writer: int
) -> None:
    words = f"a payload that rank {writer} wrote did not reach rank 2 as it was written: its checksum does not match"
    rank_pool(4).run_expecting(
        rf"VoteError: the vote on .*PayloadError: {re.escape(words)}",
        train_on_a_damaged_link,
        CASES["nodes"],
        call,
        bit,
        sender,
        name,
        in_step=True,
    )


def fail_after_telling(rank: int, world_size: int, culprit: int, timeout_s: float) -> tuple[int, str]:
    """One rank runs out of memory in its second step, when it has sent word to the others; return who stopped when."""
    _, model, state = build(Case(options={"checksum": True}), dist.new_group(timeout=timedelta(seconds=timeout_s)))
    for step in range(4):
        model.zero_grad()
        try:
            model(batch(rank, step, 0, torch.float32)).square().mean().backward()
        except RuntimeError as error:
            # Alive, but voting no more: its links stay open until the others have given up.
            time.sleep(2 * timeout_s if rank == culprit else 0.0)
            return step, str(error)
        if rank == culprit and step == 0:
            assert state._pipeline.exchange is not None
            inspection = state._pipeline.exchange.inspection
            inspection.tell = partial(_tell_and_fail, inspection.tell)  # type: ignore[method-assign]
    raise AssertionError("nobody noticed")


def _tell_and_fail(tell: Callable[[], None]) -> None:
    tell()
    raise MemoryError("planted")


def test_a_rank_that_fails_after_its_word_fails_alone_and_the_others_learn_in_the_next_step(rank_pool: Pools) -> None:
    found = rank_pool(3).run(fail_after_telling, 1, 3.0)
    assert [step for step, _ in found] == [2, 1, 2]
    assert "MemoryError: planted" in found[1][1]
    for _, words in (found[0], found[2]):
        assert re.search(r"the vote on .* failed in step 3 .*LinkError: .* did not get through", words), words
    rank_pool(3).close()  # the group of the ranks that gave up is of no use to a later job


def train_both_ways(rank: int, world_size: int, case: Case) -> list[str]:
    digests = []
    for checksum in (False, True):
        net, model, state = build(replace(case, options={**case.options, "checksum": checksum}))
        optimizer = SignAdamPP(model.named_parameters(), lr=1e-2, vote_state=state)
        for step in range(4):
            optimizer.zero_grad()
            model(batch(rank, step, 0, torch.float32)).square().mean().backward()
            optimizer.step()
        digests.append(digest(net))
        state.close()
    return digests


@pytest.mark.parametrize("name", ["planes", "excluded", "all-gather", "streak", "nodes"])
def test_a_checksum_changes_no_verdict(rank_pool: Pools, name: str) -> None:
    results = rank_pool(4 if name == "nodes" else 3).run(train_both_ways, CASES[name])
    assert len({each for both in results for each in both}) == 1


@pytest.mark.parametrize("exchange", ["two_phase", "all_gather"])
def test_counted_bytes_equal_the_formula(rank_pool: Pools, exchange: str) -> None:
    rank_pool(3).run(hook_jobs.count_traffic, exchange, checksum=True)


def count_hierarchical(rank: int, world_size: int) -> tuple[int, int, int, int]:
    """Return what a step of one small group with a checksum has added, beside one without."""
    added = []
    for checksum in (False, True):
        options = {"exchange": "hierarchical", "ranks_per_node": 2, "checksum": checksum}
        _, model, state = build(Case(AdaptiveConfidence(), options, ddp={}))
        model(batch(rank, 0, 0, torch.float32)).square().mean().backward()
        added.append(state.traffic())
        state.close()
    before, after = added
    names = ("sent_bytes", "received_bytes", "sent_within_bytes", "received_within_bytes")
    return tuple(getattr(after, name) - getattr(before, name) for name in names)  # type: ignore[return-value]


def test_counted_bytes_between_nodes(rank_pool: Pools) -> None:
    with_, without = (
        step_bytes([], 4, 0, "hierarchical", ranks_per_node=2, checksum=checksum) for checksum in (True, False)
    )
    payloads = 4 * (1 + 1)  # ballots to the other node and verdicts to it
    shared = 4 * 2  # the verdicts of both nodes to the other rank of this one
    for found in rank_pool(4).run(count_hierarchical):
        assert found == (
            with_.sent_bytes - without.sent_bytes + payloads + shared,
            with_.received_bytes + payloads + shared,
            with_.sent_within_bytes + shared,
            with_.received_within_bytes + shared,
        )


def mixed(rank: int, world_size: int) -> None:
    _, model, state = build(Case(options={"checksum": rank == 1}))
    model(batch(rank, 0, 0, torch.float32)).square().mean().backward()


def test_ranks_that_do_not_agree_on_it_are_named(rank_pool: Pools) -> None:
    words = "ValueError: .*checksum is False on ranks 0 and 2, but True on rank 1"
    rank_pool(3).run_expecting(words, mixed, in_step=True)


def overflow_of_a_mean(rank: int, world_size: int) -> str:
    """Finite gradients of an excluded parameter, with a sum that is not."""
    net = torch.nn.Linear(3, 2)
    for parameter in net.parameters():
        torch.nn.init.ones_(parameter)
    model = torch.nn.parallel.DistributedDataParallel(net)
    state = SignVoteState(confidence=AdaptiveConfidence(), exclude=["bias"])
    model.register_comm_hook(state, sign_vote_hook)
    optimizer = SignAdamPP(model.named_parameters(), lr=1e-2, vote_state=state)
    before = digest(net)
    (3e38 * net.bias.new_ones(2) * model(torch.ones(1, 3))).sum().backward()
    optimizer.step()
    assert digest(net) == before and state.traffic().num_poisoned_steps == 1
    state.close()
    return before


def test_a_mean_that_overflows_is_poison(rank_pool: Pools) -> None:
    rank_pool(2).run(overflow_of_a_mean)
