"""Payloads that a link damages, on real ranks: with a checksum who gets one says so, and does not take the step."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distsign import AdaptiveConfidence, SignAdamPP, SignVoteState, sign_vote_hook
from distsign.collectives import Link
from distsign.inspection import Inspection
from distsign.wire import PayloadError

from . import hook_jobs
from .carry_oracle import CARRY
from .oracle import Case, batch, build, digest, impatient_group
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
) -> tuple[int, str]:
    """What rank 2 receives of another is damaged in the third step; return the step that broke off here, and why.

    `call` 0 is ballots, 1 verdicts; later ones are of the step's second exchange. Within a node 0 is gradients.
    """
    # A rank that closed its links while it knows of an error keeps some of them open: the others may wait for it.
    net, model, state = build(replace(case, options={**case.options, "checksum": True}), impatient_group(6.0))
    optimizer = SignAdamPP(model.named_parameters(), lr=1e-2, vote_state=state)
    for step in range(5):
        optimizer.zero_grad()
        before = digest(net)
        try:
            model(batch(rank, step, 0, torch.float32)).square().mean().backward()
        except RuntimeError as error:
            with pytest.raises(RuntimeError, match="the vote on .* failed"):
                optimizer.step()
            assert digest(net) == before
            state.close()  # as by the end of a process, the others learn of it by its sockets
            return step, str(error)
        optimizer.step()
        if rank == 2 and step == 0:
            DamagedLink(state, sender, call, bit, name).install()
    raise AssertionError("nobody noticed")


def require_told(found: list[tuple[int, str]], writer: int, step_of_others: int, receivers: Sequence[int]) -> None:
    """Who got the payload must have named its writer, and left the step out; the others must know that it is gone."""
    for rank, (step, said) in enumerate(found):
        words = f"a payload that rank {writer} wrote did not reach rank {rank} as it was written: its checksum does not"
        assert re.search(rf"the vote on .* failed in step {step + 1} on rank {rank} ", said), said
        if rank in receivers:
            assert step == 2 and f"PayloadError: {words}" in said, said
        else:
            assert step == step_of_others and re.search("LinkError: .* did not get through", said), (step, said)


@pytest.mark.parametrize(
    ("name", "call", "bit", "step_of_others"),
    [
        ("planes", 0, 0, 2),  # the version
        ("planes", 1, 17, 2),  # poison
        ("planes", 2, 12345, 2),
        ("planes", 3, -1, 3),  # the checksum itself; the last that travels in a step
        ("sparse", 0, 70, 2),
        ("sparse", 1, 16, 3),
        ("excluded", 1, -40, 2),
        ("all-gather", 0, 99, 2),
        ("streak", 1, 17, 2),
    ],
)
def test_who_gets_it_names_who_wrote_it(rank_pool: Pools, name: str, call: int, bit: int, step_of_others: int) -> None:
    require_told(rank_pool(3).run(train_on_a_damaged_link, CASES[name], call, bit), 1, step_of_others, [2])


@pytest.mark.parametrize(
    ("name", "sender", "call", "bit", "writer", "receivers"),
    [
        ("_voters", 0, 0, 99, 0, [2]),  # rank 2 votes with rank 0: its ballots
        ("_voters", 0, 1, 99, 0, [2, 3]),  # and its verdicts, which it hands on to rank 3, of the same node
        ("_node", 1, 1, 99, 1, [2]),  # by rank 3: verdicts of rank 1, which votes with it
        ("_node", 1, 1, -1, 3, [2]),  # and its own, in the place that rank 2 has among those who vote with it
    ],
)
def test_damage_between_nodes_and_within(
    rank_pool: Pools, name: str, sender: int, call: int, bit: int, writer: int, receivers: list[int]
) -> None:
    found = rank_pool(4).run(train_on_a_damaged_link, CASES["nodes"], call, bit, sender, name)
    require_told(found, writer, 2, receivers)


def train_on_a_damaged_link_as_on_a_device(
    rank: int, world_size: int, case: Case, call: int, bit: int, sender: int, name: str, checksum: bool
) -> tuple[list[int], list[str], str]:
    """Return the steps that were left out here, the parameters after each step, and what was raised in the end.

    Of a CUDA device nothing is looked at within a step, and what is amiss is raised later. Here CPU tensors are treated
    so.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Inspection, "defers", staticmethod(lambda device: True))
        net, model, state = build(replace(case, options={**case.options, "checksum": checksum}))
        optimizer = SignAdamPP(model.named_parameters(), lr=1e-2, vote_state=state)
        left_out, digests = [], []
        for step in range(5):
            optimizer.zero_grad()
            model(batch(rank, step, 0, torch.float32)).square().mean().backward()
            left_out += [step] if any(p.grad is not None and p.grad.isnan().any() for p in net.parameters()) else []
            before = digest(net)
            optimizer.step()
            digests.append(digest(net))
            assert step not in left_out or digests[-1] == before
            if rank == 2 and step == 0:
                DamagedLink(state, sender, call, bit, name).install()
        with pytest.raises(PayloadError) as caught:
            state.traffic()
        state.close()
        return left_out, digests, str(caught.value)


@pytest.mark.parametrize(
    ("name", "world_size", "sender", "call", "bit", "link"),
    [
        ("planes", 3, 1, 0, 0, "_voters"),
        ("planes", 3, 1, 1, 17, "_voters"),
        ("planes", 3, 1, 3, -1, "_voters"),
        ("sparse", 3, 1, 1, 16, "_voters"),
        ("excluded", 3, 1, 1, -40, "_voters"),
        ("all-gather", 3, 1, 0, 99, "_voters"),
        ("streak", 3, 1, 1, 17, "_voters"),
        ("nodes", 4, 0, 1, 99, "_voters"),
        ("nodes", 4, 1, 1, 99, "_node"),
    ],
)
def test_on_a_device_all_leave_the_step_out(
    rank_pool: Pools, name: str, world_size: int, sender: int, call: int, bit: int, link: str
) -> None:
    job, damage = train_on_a_damaged_link_as_on_a_device, (call, bit, sender, link)
    found = rank_pool(world_size).run(job, CASES[name], *damage, True)
    for left_out, digests, said in found:
        assert left_out == [2] and digests == found[0][1]
        assert "some rank had a header or a body other than expected, or its checksum did not match; all ranks" in said


@pytest.mark.parametrize("call", [0, 1])
def test_on_a_device_reports_of_poison_tell_of_strange_headers(rank_pool: Pools, call: int) -> None:
    """The version is damaged, of ballots and of verdicts; there is no checksum."""
    found = rank_pool(3).run(train_on_a_damaged_link_as_on_a_device, CASES["streak"], call, 0, 1, "_voters", False)
    for left_out, digests, said in found:
        assert left_out == [2] and digests == found[0][1]
        assert "some rank had a header or a body other than expected; all ranks left that step out" in said


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


def count_hierarchical(rank: int, world_size: int) -> list[tuple[int, ...]]:
    """Return what a step of one small group costs, without a checksum and with one."""
    counted = []
    names = ("sent_bytes", "received_bytes", "sent_within_bytes", "received_within_bytes")
    for checksum in (False, True):
        options = {"exchange": "hierarchical", "ranks_per_node": 2, "checksum": checksum}
        _, model, state = build(Case(AdaptiveConfidence(), options, ddp={}))
        model(batch(rank, 0, 0, torch.float32)).square().mean().backward()
        counted.append(tuple(getattr(state.traffic(), name) for name in names))
        state.close()
    return counted


def test_counted_bytes_between_nodes(rank_pool: Pools) -> None:
    payloads = 4 * (1 + 1)  # ballots to the other node and verdicts to it
    shared = 4 * 2  # the verdicts of both nodes to the other rank of this one
    for without, with_ in rank_pool(4).run(count_hierarchical):
        added = tuple(b - a for a, b in zip(without, with_, strict=True))
        assert added == (payloads + shared, payloads + shared, shared, shared)


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
