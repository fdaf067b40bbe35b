"""What the ranks do in the tests of carries, budgets, averaged parameters and nodes."""

from __future__ import annotations

import contextlib
import logging
import math
from dataclasses import replace
from logging.handlers import QueueHandler
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel as DDP

from distsign import FixedConfidence, RMSConfidence, SignAdamPP, SignVoteState, sign_vote_hook
from distsign.layout import Shape
from distsign.traffic import step_bytes
from distsign.vote import majority_vote

from .carry_oracle import CARRY, CarryOracle, options_of
from .oracle import Case, Net, Oracle, batch, build, digest


def train_carry_against_oracle(rank: int, world_size: int, case: Case, bad_steps: tuple[int, ...] = ()) -> str:
    """Hold every verdict, and in the end all that is kept, to the oracle; some steps are poisoned by the last rank."""
    net, model, state = build(options_of(case))
    oracle = CarryOracle(case, net, rank, world_size)
    gradients_of = Oracle(case, net, None)
    optimizer = SignAdamPP(net.named_parameters(), lr=1e-2, momentum=0.0, vote_state=state)
    num_verdicts = num_waiting = 0
    for step in range(case.num_steps):
        forward = {"use_branch": step % 2 == 1 and rank == 0} if case.branch else {}
        batches = [batch(rank, step, part, case.dtype) for part in range(case.num_accumulated)]
        gradients = gradients_of.gradients(net, batches, **forward)
        optimizer.zero_grad()
        handle = None
        if step in bad_steps and rank == world_size - 1:
            handle = net.first.weight.register_hook(lambda g: g.index_fill(0, torch.tensor([599]), math.nan))
        for part, x in enumerate(batches):
            last = part == len(batches) - 1
            with contextlib.nullcontext() if last else model.no_sync():
                model(x, **forward).float().square().mean().backward()
        if handle is not None:
            handle.remove()
        before = digest(net)
        if step not in bad_steps:
            verdicts = oracle.step(gradients, state, step + 1)
            oracle.commit()
            for name, p in net.named_parameters():
                assert p.grad is not None or not verdicts[name].any()
                if p.grad is not None:
                    same = torch.equal(p.grad.to(torch.int8), verdicts[name].to(torch.int8))
                    assert same, f"step {step}, {name}: {int(p.grad.count_nonzero())}, {verdicts[name].count_nonzero()}"
                num_verdicts += int(verdicts[name].count_nonzero())
        else:
            oracle.num_poisoned += 1
        optimizer.step()
        assert step not in bad_steps or digest(net) == before
    assert num_verdicts > 0
    saved = state.state_dict()
    for name, p in net.named_parameters():
        mine = saved["voter"][name]
        assert torch.equal(mine["carry"].float(), oracle.kept[name].carry), name
        num_waiting += int(mine["carry"].count_nonzero())
        if isinstance(case.confidence, RMSConfidence):
            assert torch.equal(mine["square"].float(), oracle.kept[name].square), name
            assert mine["stats"].tolist() == [oracle.kept[name].steps]
        assert p.numel() == mine["carry"].numel()
    for (name, start, length), undecided in saved["owner"].items():
        if case.options.get("owner_carry") is True:
            assert torch.equal(undecided.int(), oracle.kept[name].undecided[start : start + length]), name
    assert num_waiting > 0, "a carry that is always empty tests nothing"
    state.close()
    return digest(net)


def resume_with_carries(rank: int, world_size: int, case: Case) -> None:
    """Twelve steps at once; and six, a checkpoint, a new process's worth of objects, and six."""

    def train(built: tuple[Net, Any, SignVoteState], optimizer: SignAdamPP, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            built[1](batch(rank, step, 0, torch.float32)).square().mean().backward()
            optimizer.step()

    def optimizer_of(built: tuple[Net, Any, SignVoteState]) -> SignAdamPP:
        return SignAdamPP(built[1].named_parameters(), lr=1e-2, momentum=0.0, vote_state=built[2])

    unbroken, broken, resumed = (build(options_of(case)) for _ in range(3))
    train(unbroken, optimizer_of(unbroken), range(12))
    optimizer = optimizer_of(broken)
    train(broken, optimizer, range(6))
    saved = {"net": broken[0].state_dict(), "optimizer": optimizer.state_dict(), "vote": broken[2].state_dict()}
    optimizer = optimizer_of(resumed)
    resumed[0].load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    resumed[2].load_state_dict(saved["vote"])
    train(resumed, optimizer, range(6, 12))
    assert digest(unbroken[0]) == digest(resumed[0])
    whole, parts = unbroken[2].state_dict(), resumed[2].state_dict()
    for kind in ("voter", "owner"):
        assert whole[kind].keys() == parts[kind].keys()
        flat = [(a, b) for key in whole[kind] for a, b in _pairs(whole[kind][key], parts[kind][key])]
        assert bool(flat) == bool(whole[kind]) and all(torch.equal(a, b) for a, b in flat), kind
        assert flat or (kind == "owner" and case.options.get("owner_carry") is None)
    assert whole["steering"] == parts["steering"] and whole["ladder"] == parts["ladder"]
    for built in (unbroken, broken, resumed):
        built[2].close()


def _pairs(a: Any, b: Any) -> list[tuple[Tensor, Tensor]]:
    return [(a[key], b[key]) for key in a] if isinstance(a, dict) else [(a, b)]


def count_budget(rank: int, world_size: int, bits_per_param: float) -> tuple[int, int]:
    """Each step's bytes are those of the formula, the same in every step, and within the budget."""
    net, model, state = build(Case(CARRY.confidence, {"bits_per_param": bits_per_param}))
    optimizer = SignAdamPP(model.named_parameters(), lr=1e-2, momentum=0.0, vote_state=state)
    num_elements = sum(p.numel() for p in net.parameters())
    seen = set()
    for step in range(6):
        before = state.traffic()
        optimizer.zero_grad()
        model(batch(rank, step, 0, torch.float32)).square().mean().backward()
        optimizer.step()
        after = state.traffic()
        seen.add((after.sent_bytes - before.sent_bytes, after.received_bytes - before.received_bytes))
    assert len(seen) == 1, seen
    sent, received = seen.pop()
    order = [[Shape(row, p.numel()) for row, p in enumerate(net.parameters())]]
    want = step_bytes(order, world_size, rank, density=state._pipeline.density)
    assert (sent, received) == (want.sent_bytes, want.received_bytes)
    state.close()
    return sent, math.floor(bits_per_param * num_elements / 8)


def train_excluding(rank: int, world_size: int, case: Case, excluded: list[str]) -> str:
    """Excluded gradients are the plain mean, in the order of the ranks; the others are verdicts."""
    net, model, state = build(case)
    gradients_of = Oracle(case, net, None)
    state.track(model.named_parameters())
    optimizer = SignAdamPP(net.named_parameters(), lr=1e-2, momentum=0.0, vote_state=state)
    for step in range(case.num_steps):
        x = batch(rank, step, 0, case.dtype)
        mine = gradients_of.gradients(net, [x])
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        for name, p in net.named_parameters():
            if name in excluded:
                everyone = [torch.empty_like(mine[name]) for _ in range(world_size)]
                dist.all_gather(everyone, mine[name].contiguous())
                mean = everyone[0].float()
                for other in everyone[1:]:
                    mean = mean + other.float()
                same = torch.equal(p.grad, (mean / world_size).to(p.dtype))
                assert same, (step, name, p.grad.flatten()[:3], mean.flatten()[:3], world_size)
            else:
                assert set(p.grad.unique().tolist()) <= {-1.0, 0.0, 1.0}, (step, name)
        optimizer.step()
    poisoned = batch(rank, 99, 0, case.dtype)
    handle = None
    if rank == 0:
        handle = net.last.bias.register_hook(lambda g: g.index_fill(0, torch.tensor([3]), math.inf))
    before = digest(net)
    optimizer.zero_grad()
    model(poisoned).float().square().mean().backward()
    optimizer.step()
    assert digest(net) == before and state.traffic().num_poisoned_steps == 1
    if handle is not None:
        handle.remove()
    state.close()
    return digest(net)


def train_hierarchical(rank: int, world_size: int, ranks_per_node: int, options: dict[str, Any]) -> str:
    """Each verdict is the vote between nodes on the mean gradient of each, and few bytes go between nodes."""
    case = Case(FixedConfidence(2e-3), {"exchange": "hierarchical", "ranks_per_node": ranks_per_node, **options})
    net, model, state = build(case)
    gradients_of = Oracle(case, net, None)
    optimizer = SignAdamPP(model.named_parameters(), lr=1e-2, momentum=0.0, vote_state=state)
    num_nodes = world_size // ranks_per_node
    carried = {name: torch.zeros(num_nodes, p.numel()) for name, p in net.named_parameters()}
    said = QueueHandler(SimpleQueue())
    logging.getLogger("distsign.hook").addHandler(said)
    for step in range(5):
        x = batch(rank, step, 0, torch.float32)
        mine = gradients_of.gradients(net, [x])
        optimizer.zero_grad()
        model(x).square().mean().backward()
        for name, p in net.named_parameters():
            everyone = [torch.empty_like(mine[name]) for _ in range(world_size)]
            dist.all_gather(everyone, mine[name].contiguous())
            ballots = []
            for node in range(num_nodes):
                mean = everyone[node * ranks_per_node].clone()
                for other in everyone[node * ranks_per_node + 1 : (node + 1) * ranks_per_node]:
                    mean += other
                u = (mean / ranks_per_node).reshape(-1)
                if options.get("carry"):
                    u = u + carried[name][node]
                votes = u.abs() > np.float32(2e-3)
                carried[name][node] = torch.where(votes, 0.0, u)
                ballots.append(torch.where(votes, u.sign(), 0.0).to(torch.int8))
            want = majority_vote(torch.stack(ballots), options.get("margin", 1)).reshape(p.shape)
            assert torch.equal(p.grad.to(torch.int8), want), (step, name)
        optimizer.step()
    logging.getLogger("distsign.hook").removeHandler(said)
    assert said.queue.qsize() == (num_nodes == 1 and rank == 0), "one voter alone is worth a word, once"
    traffic = state.traffic()
    num_elements = sum(p.numel() for p in net.parameters())
    # Within a node: 4 bytes a component that another rank averages, twice as much as a reduce-scatter of halves.
    assert traffic.sent_within_bytes > 4 * num_elements * (ranks_per_node - 1) / ranks_per_node * 5
    between = traffic.sent_bytes - traffic.sent_within_bytes
    share = num_elements / ranks_per_node
    # Two bits a component of the share, there and back, and headers.
    want = 5 * share / 2 * (num_nodes - 1) / num_nodes
    assert 0.9 * want <= between <= 1.1 * want, (between, want)
    state.close()
    return digest(net)


def train_nodes_by_what_was_seen(rank: int, world_size: int, ranks_per_node: int) -> str:
    """Slots shrink to what is voted, and each piece's number of verdicts is within them."""
    options = {"exchange": "hierarchical", "ranks_per_node": ranks_per_node}
    net, model, state = build(replace(CARRY, options=options))
    optimizer = SignAdamPP(model.named_parameters(), lr=1e-2, momentum=0.0, vote_state=state)
    num_elements, num_nodes = sum(p.numel() for p in net.parameters()), world_size // ranks_per_node
    sent: list[int] = []
    for step in range(16):
        optimizer.zero_grad()
        model(batch(rank, step, 0, torch.float32)).square().mean().backward()
        traffic = state.traffic()
        sent.append(traffic.sent_bytes - traffic.sent_within_bytes - sum(sent))
        densities = state._pipeline.density
        assert isinstance(densities, np.ndarray)
        for row, p in enumerate(net.parameters()):
            index = state._pipeline._registry.row(p)
            assert p.grad is not None and index is not None, row
            mine = densities[index * world_size : (index + 1) * world_size]
            most = sum(max(1.0, num_nodes * density * p.numel()) for density in mine)
            assert p.grad.count_nonzero() <= most
        optimizer.step()
    planes = num_elements / ranks_per_node / 2 * (num_nodes - 1) / num_nodes
    assert state.traffic().verdict_density > 0
    assert min(sent) < 0.5 * planes < max(sent), (sent, planes)
    state.close()
    return digest(net)


def join_with_carries(rank: int, world_size: int, case: Case) -> str:
    """Rank r has 2 + r batches. What a rank kept when it ran out must be what it keeps at the end."""
    net, model, state = build(options_of(case))
    optimizer = SignAdamPP(model.named_parameters(), lr=1e-2, momentum=0.0, vote_state=state)
    mine: dict[str, Any] = {}
    with Join([model]):
        for step in range(2 + rank):
            optimizer.zero_grad()
            model(batch(rank, step, 0, torch.float32)).square().mean().backward()
            optimizer.step()
            mine = state.state_dict()["voter"]
    after = state.state_dict()["voter"]
    for name, kept in mine.items():
        assert all(torch.equal(kept[key], after[name][key]) for key in kept), f"{name}: a joined rank changed its carry"
        assert kept["carry"].any() or kept["carry"].numel() < 20
    state.close()
    return digest(net)


class SteadyAndNoise(torch.nn.Module):
    """A small parameter whose gradient stays as it is, and a large one with nothing but noise."""

    def __init__(self) -> None:
        super().__init__()
        self.steady = torch.nn.Parameter(torch.zeros(20_000))
        self.noise = torch.nn.Parameter(torch.zeros(200_000))

    def forward(self, z: Tensor) -> Tensor:
        return (self.steady * torch.linspace(1, 2, self.steady.numel())).sum() + (self.noise * z).sum()


def count_steady_verdicts(rank: int, world_size: int, num_steps: int) -> float:
    """Return how often a component with a steady gradient got a verdict, on average."""
    net = SteadyAndNoise()
    model = DDP(net)
    state = SignVoteState(confidence=RMSConfidence(k=8, start=8))
    model.register_comm_hook(state, sign_vote_hook)
    counts = torch.zeros(net.steady.numel())
    for step in range(num_steps):
        generator = torch.Generator().manual_seed(step * world_size + rank)
        model.zero_grad()
        model(torch.randn(net.noise.numel(), generator=generator)).backward()
        assert net.steady.grad is not None
        counts += net.steady.grad.abs()
    state.close()
    return float(counts.mean())
