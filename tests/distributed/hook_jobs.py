"""What the ranks do in the tests of the hook."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel as DDP

from distsign import AdaptiveConfidence, Confidence, FixedConfidence, SignAdamPP, SignVoteState, sign_vote_hook
from distsign.layout import Shape
from distsign.registry import VoteError
from distsign.traffic import step_bytes
from distsign.vote import majority_vote
from tests import GROUP_BYTES

from .oracle import Case, Net, Oracle, batch, build, digest, impatient_group


def train_against_oracle(
    rank: int, world_size: int, case: Case, group: dist.ProcessGroup | None = None
) -> tuple[str, dict[str, float]]:
    """Train, hold every verdict of every step to the oracle's, and return a digest of the parameters."""
    net, model, state = build(case, group)
    oracle = Oracle(case, net, group)
    optimizer = SignAdamPP(model.named_parameters(), lr=1e-2, vote_state=state)
    num_ballots = num_verdicts = num_elements = 0
    for step in range(case.num_steps):
        forward = {"use_branch": case.branch and step % 2 == 1 and rank == 0} if case.branch else {}
        batches = [batch(rank, step, part, case.dtype) for part in range(case.num_accumulated)]
        ballots = oracle.ballots(oracle.gradients(net, batches, **forward))
        verdicts = oracle.verdicts(ballots)
        optimizer.zero_grad()
        for part, x in enumerate(batches):
            last = part == len(batches) - 1
            with contextlib.nullcontext() if last else model.no_sync():
                model(x, **forward).float().square().mean().backward()
        for name, parameter in net.named_parameters():
            if parameter.grad is None:  # unused on all ranks
                assert not verdicts[name].any(), name
                continue
            assert torch.equal(parameter.grad.to(torch.int8), verdicts[name]), f"step {step}, {name}"
            assert parameter.grad.dtype == parameter.dtype
        num_ballots += sum(int(b.count_nonzero()) for b in ballots.values())
        num_verdicts += sum(int(v.count_nonzero()) for v in verdicts.values())
        num_elements += sum(b.numel() for b in ballots.values())
        optimizer.step()
    traffic = state.traffic()
    assert traffic.ballot_density == num_ballots / num_elements
    assert traffic.verdict_density == num_verdicts / num_elements
    assert 0.0 < traffic.verdict_density < 1.0, "a vote that always abstains tests nothing"
    state.close()
    return digest(net), {"sent": traffic.sent_bytes, "received": traffic.received_bytes}


def train_in_subgroup(rank: int, world_size: int, members: list[int]) -> str | None:
    group = dist.new_group(members)
    try:
        if rank not in members:
            return None
        return train_against_oracle(dist.get_rank(group), len(members), Case(), group)[0]
    finally:
        dist.barrier()
        dist.destroy_process_group(group)


def train_long(rank: int, world_size: int, num_steps: int) -> str:
    net, model, state = build(Case())
    start = digest(net)
    optimizer = SignAdamPP(model.named_parameters(), lr=1e-3, weight_decay=0.01, vote_state=state)
    for step in range(num_steps):
        optimizer.zero_grad()
        model(batch(rank, step, 0, torch.float32)).square().mean().backward()
        optimizer.step()
    state.close()
    assert digest(net) != start
    return digest(net)


def count_traffic(rank: int, world_size: int, exchange: str, checksum: bool = False) -> None:
    """Hold the counted bytes of each step to the formula, for the groups that DDP's buckets of that step form."""
    _, model, state = build(Case(options={"exchange": exchange, "checksum": checksum}, ddp={"bucket_cap_mb": 0.05}))
    model._comm_hooks.clear()
    order = {id(p): index for index, p in enumerate(model.parameters())}
    state.track(model.named_parameters())
    groups: list[list[Shape]] = []

    def recording_hook(vote_state: SignVoteState, bucket: dist.GradBucket) -> Any:
        if bucket.index() == 0:
            groups[:] = [[]]
        elif sum(s.num_elements for s in groups[-1]) // 4 >= GROUP_BYTES:
            groups.append([])
        groups[-1].extend(Shape(order[id(p)], p.numel()) for p in bucket.parameters())
        return sign_vote_hook(vote_state, bucket)

    recording_hook.__annotations__.clear()
    model = DDP(model.module, bucket_cap_mb=0.05)
    model.register_comm_hook(state, recording_hook)
    for step in range(4):
        before = state.traffic()
        model.zero_grad()
        model(batch(rank, step, 0, torch.float32)).square().mean().backward()
        after = state.traffic()
        want = step_bytes(groups, world_size, rank, exchange, checksum=checksum)
        assert after.sent_bytes - before.sent_bytes == want.sent_bytes, (step, rank)
        assert after.received_bytes - before.received_bytes == want.received_bytes, (step, rank)
        num_elements = sum(p.numel() for p in model.parameters())
        assert after.fp32_bytes == 4 * 4 * num_elements * (step + 1) * (world_size - 1) // world_size
        assert step == 0 or len(groups) >= 2, [[s.num_elements for s in g] for g in groups]
    state.close()


def equals_single_worker(rank: int, world_size: int, confidence: Confidence) -> None:
    net, model, state = build(Case(confidence=confidence))
    twin = Net()
    twin.load_state_dict(net.state_dict())
    voted = SignAdamPP(model.named_parameters(), lr=1e-2, vote_state=state)
    alone = SignAdamPP(twin.parameters(), lr=1e-2, confidence=confidence)
    for step in range(20):
        x = batch(rank, step, 0, torch.float32)
        for module, optimizer in ((model, voted), (twin, alone)):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
        assert digest(net) == digest(twin), step
    assert state.traffic().sent_bytes == 0
    state.close()


def train_two_models(rank: int, world_size: int, *, together: bool) -> list[str]:
    """Train two models whose buckets interleave, or take turns; then each alone, which must end the same."""

    def losses(models: list[DDP], step: int) -> list[Tensor]:
        return [m(batch(rank, step, k, torch.float32)).square().mean() for k, m in enumerate(models)]

    digests = []
    for alone in (False, True):
        built = [build(Case(options={"margin": k + 1})) for k in range(2)]
        optimizers = [SignAdamPP(m.named_parameters(), lr=1e-2, vote_state=s) for _, m, s in built]
        models = [m for _, m, _ in built]
        for step in range(4):
            for optimizer in optimizers:
                optimizer.zero_grad()
            if together and not alone:
                torch.stack(losses(models, step)).sum().backward()
            else:
                for loss in losses(models, step):
                    loss.backward()
            for optimizer in optimizers:
                optimizer.step()
        digests.append([digest(net) for net, _, _ in built])
        for _, _, state in built:
            state.close()
    assert digests[0] == digests[1]
    return digests[0]


def train_uneven(rank: int, world_size: int) -> tuple[str, str, str]:
    """Rank r has 2 + r batches. Each verdict must be the majority among the ranks that still train."""
    net, model, state = build(Case())
    oracle = Oracle(Case(), net, None)
    optimizer = SignAdamPP(model.named_parameters(), lr=1e-2, vote_state=state)
    ballots, verdicts = [], []
    with Join([model]):
        for step in range(2 + rank):
            x = batch(rank, step, 0, torch.float32)
            ballots.append(oracle.ballots(oracle.gradients(net, [x])))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            verdicts.append({name: p.grad.to(torch.int8) for name, p in net.named_parameters()})
            optimizer.step()
    stats = {name: state._pipeline.memory.voter.stats[row] for name, row in state._registry.names().items()}
    for name, mine in oracle.stats.items():
        assert torch.equal(stats["module." + name], mine), f"{name}: a joined rank changed its statistics"
    everyone: list[Any] = [None] * world_size
    dist.all_gather_object(everyone, ballots)
    for step, verdict in enumerate(verdicts):
        for name in verdict:
            cast = torch.stack([theirs[step][name] for theirs in everyone if step < len(theirs)])
            assert torch.equal(verdict[name], majority_vote(cast)), (step, name)

    def momenta() -> str:
        return str([float(s["momentum_buffer"].double().sum()) for s in optimizer.state.values()])

    before = momenta()
    state.sync_optimizer(optimizer)
    after = momenta()
    assert rank != world_size - 1 or after == before, "the rank that trained longest has the state to keep"
    # Once more, and now another rank trains longest.
    with Join([model]):
        for step in range(5 if rank == 0 else 2):
            optimizer.zero_grad()
            model(batch(rank, step, 0, torch.float32)).square().mean().backward()
            optimizer.step()
    again = momenta()
    state.sync_optimizer(optimizer)
    assert rank != 0 or momenta() == again
    assert momenta() != after
    state.close()
    return digest(net), before, after


def poison_some(rank: int, world_size: int, value: float, culprit: int) -> str:
    """One rank's gradient goes bad on steps 0 and 2, in the last bucket only."""
    net, model, state = build(Case())
    oracle = Oracle(Case(), net, None)
    optimizer = SignAdamPP(model.named_parameters(), lr=1e-2, weight_decay=0.1, vote_state=state)
    for step in range(5):
        x = batch(rank, step, 0, torch.float32)
        bad = step in (0, 2)
        before = digest(net)
        verdicts = None if bad else oracle.verdicts(oracle.ballots(oracle.gradients(net, [x])))
        optimizer.zero_grad()
        handle = None
        if bad and rank == culprit:
            handle = net.first.weight.register_hook(lambda g: g.index_fill(0, torch.tensor([599]), value))
        model(x).square().mean().backward()
        if handle is not None:
            handle.remove()
        if bad:
            assert net.first.weight.grad.isnan().all()
        else:
            assert verdicts is not None
            for name, p in net.named_parameters():
                assert torch.equal(p.grad.to(torch.int8), verdicts[name]), f"poison left a trace: step {step}, {name}"
        optimizer.step()
        assert (digest(net) == before) == bad, step
    assert state.traffic().num_poisoned_steps == 2
    state.close()
    return digest(net)


def train_scaled(rank: int, world_size: int, confidence: Confidence, scaled: bool) -> str:
    net, model, state = build(Case(confidence=confidence))
    optimizer = SignAdamPP(model.named_parameters(), lr=1e-2, vote_state=state)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2, enabled=scaled)
    if scaled:
        state.loss_scale = scaler
    for step in range(6):
        optimizer.zero_grad()
        scaler.scale(model(batch(rank, step, 0, torch.float32)).square().mean()).backward()
        values = net.middle.weight.grad.abs().unique().tolist()
        assert values == [0.0, scaler.get_scale()], values
        scaler.step(optimizer)
        scaler.update()
    assert not scaled or scaler.get_scale() == 2.0**15
    state.close()
    return digest(net)


def train_scaled_without_a_word(rank: int, world_size: int, confidence: Confidence, told: float | None) -> bool:
    """Take a step under a `GradScaler` that the state knows nothing of; return whether it was refused."""
    net, model, state = build(Case(confidence=confidence, options={"exclude": ["gain", "first.weight"]}))
    optimizer = SignAdamPP(model.named_parameters(), lr=1e-2, vote_state=state)
    state.loss_scale, before, refused = told, digest(net), False
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaler.scale(model(batch(rank, 0, 0, torch.float32)).square().mean()).backward()
    try:
        scaler.step(optimizer)
    except VoteError as error:
        assert "came to the optimizer as 0.000244 instead of 1" in str(error) and "gradients 4096 times" in str(error)
        refused = True
    assert (digest(net) == before) == refused
    state.close()
    return refused


def train_clipped(rank: int, world_size: int, confidence: Confidence) -> bool:
    """Clip verdicts before a step; return whether the step is that without clipping."""
    ends = []
    for clips in (True, False):
        net, model, state = build(Case(confidence=confidence))
        optimizer = SignAdamPP(model.named_parameters(), lr=1e-2, vote_state=state)
        model(batch(rank, 0, 0, torch.float32)).square().mean().backward()
        if clips:
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            votes = [p.grad.abs().max() for p in net.parameters() if p.grad is not None]
            assert 0 < max(votes) < 1
        optimizer.step()
        ends.append(digest(net))
        state.close()
    return ends[0] == ends[1]


def step_on_a_stranger(rank: int, world_size: int) -> None:
    """The optimizer also has a parameter that DDP does not exchange."""
    _, model, state = build(Case())
    alien = torch.nn.Parameter(torch.ones(3))
    optimizer = SignAdamPP([*model.named_parameters(), ("alien", alien)], lr=1e-2, vote_state=state)
    (model(batch(rank, 0, 0, torch.float32)).square().mean() + alien.sum()).backward()
    optimizer.step()


def overflow(rank: int, world_size: int, dtype: torch.dtype, scaled: bool) -> tuple[str, float]:
    """One rank's gradient overflows in step 2: under autocast with a `GradScaler`, or in a model of that dtype."""
    net, model, state = build(Case(dtype=torch.float32 if scaled else dtype))
    optimizer = SignAdamPP(model.named_parameters(), lr=1e-2, vote_state=state)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, enabled=scaled)
    if scaled:
        state.loss_scale = scaler
    for step in range(5):
        before = digest(net)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=scaled):
            out = model(batch(rank, step, 0, next(net.parameters()).dtype))
        assert out.dtype == dtype
        if step == 2 and rank == 1:
            out.register_hook(lambda grad: grad * torch.finfo(dtype).max * torch.finfo(dtype).max)
        scaler.scale(out.float().square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert (digest(net) == before) == (step == 2), step
    assert state.traffic().num_poisoned_steps == 1
    state.close()
    return digest(net), scaler.get_scale()


def resume(rank: int, world_size: int) -> None:
    """Ten steps at once, and five, a checkpoint, a new process's worth of objects, and five."""
    unbroken, broken = build(Case()), build(Case())

    def train(built: tuple[Net, DDP, SignVoteState], optimizer: SignAdamPP, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            built[1](batch(rank, step, 0, torch.float32)).square().mean().backward()
            optimizer.step()

    train(unbroken, SignAdamPP(unbroken[1].named_parameters(), lr=1e-2, vote_state=unbroken[2]), range(10))
    optimizer = SignAdamPP(broken[1].named_parameters(), lr=1e-2, vote_state=broken[2])
    train(broken, optimizer, range(5))
    saved = {"net": broken[0].state_dict(), "optimizer": optimizer.state_dict(), "vote": broken[2].state_dict()}
    resumed = build(Case())
    optimizer = SignAdamPP(resumed[1].named_parameters(), lr=1e-2, vote_state=resumed[2])
    resumed[0].load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    resumed[2].load_state_dict(saved["vote"])
    train(resumed, optimizer, range(5, 10))
    assert digest(unbroken[0]) == digest(resumed[0])
    assert torch.equal(unbroken[2]._pipeline.memory.voter.stats, resumed[2]._pipeline.memory.voter.stats)
    whole, parts = unbroken[2].traffic(), resumed[2].traffic()
    # A new process begins with DDP's first bucket layout again, so that one step more has other headers.
    assert abs(whole.sent_bytes - parts.sent_bytes) < 200
    assert replace(whole, sent_bytes=0, received_bytes=0) == replace(parts, sent_bytes=0, received_bytes=0)
    for built in (unbroken, broken, resumed):
        built[2].close()


def train_zeroing(rank: int, world_size: int, view: bool, zero: str) -> None:
    _, model, state = build(Case(ddp={"gradient_as_bucket_view": view}))
    optimizer = SignAdamPP(model.named_parameters(), lr=1e-2, vote_state=state)
    for step in range(3):
        if zero == "to none":
            optimizer.zero_grad()
        elif zero == "to zero":
            optimizer.zero_grad(set_to_none=False)
        model(batch(rank, step, 0, torch.float32)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    state.close()


def one_step(rank: int, world_size: int, option: str, odd_rank: int) -> None:
    """Train a step with one rank's options different from the others'."""
    odd = rank == odd_rank
    case = Case()
    if option == "margin":
        case.options["margin"] = 2 if odd else 1
    elif option == "confidence" and odd:
        case.confidence = AdaptiveConfidence(beta2=3.0)
    elif option == "unreachable margin":
        case.options["margin"] = 1
    net, model, state = build(case)
    if option == "unreachable margin" and odd:
        state._options = replace(state._options, margin=9)  # as if it had been given before the process group was there
    if option == "loss_scale" and odd:
        state.loss_scale = 8.0
    model(batch(rank, 0, 0, torch.float32)).square().mean().backward()


def vote_after_an_odd_group(rank: int, world_size: int) -> str:
    """One rank is in a group more than the others, as with parallelism of several kinds."""
    extra = dist.new_group([0])
    net, model, state = build(Case())
    optimizer = SignAdamPP(model.named_parameters(), lr=1e-2, vote_state=state)
    model(batch(rank, 0, 0, torch.float32)).square().mean().backward()
    optimizer.step()
    state.close()
    if rank == 0:
        dist.destroy_process_group(extra)
    return digest(net)


def vote_on(rank: int, world_size: int, what: str) -> None:
    """Vote on what can't be voted on."""
    confidence: Confidence = FixedConfidence(1e-3) if what == "fp16" else AdaptiveConfidence()
    dtype = {"fp16": torch.float16, "complex": torch.complex64}[what]
    model = DDP(nn.Linear(3, 3, dtype=dtype))
    state = SignVoteState(confidence=confidence)
    model.register_comm_hook(state, sign_vote_hook)
    model(torch.ones(2, 3, dtype=dtype)).abs().sum().backward()


def skip_a_step(rank: int, world_size: int, absent: int, timeout_s: float) -> None:
    """One rank leaves without a word; the others must be told by an error, in time."""
    _, model, _ = build(Case(), impatient_group(timeout_s))
    for step in range(3):
        if rank == absent and step == 2:
            time.sleep(timeout_s + 6.0)  # alive, but not voting
            return
        model.zero_grad()
        model(batch(rank, step, 0, torch.float32)).square().mean().backward()


def vote_without_a_store(rank: int, world_size: int) -> tuple[str, float]:
    """The vote's group can't be made, for the store never answers, as over a link that is down; what is raised, when.

    Torch waits for it in C++, without the interpreter's lock.
    """
    net, model, state = build(Case(), impatient_group(3.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "new_group", lambda *args, **kwargs: time.sleep(30))
        began = time.monotonic()
        with pytest.raises(RuntimeError) as caught:
            model(batch(rank, 0, 0, torch.float32)).square().mean().backward()
        return str(caught.value), time.monotonic() - began


def unregistered(rank: int, world_size: int) -> None:
    torch.manual_seed(0)
    model = DDP(nn.Linear(3, 3))
    state = SignVoteState(confidence=AdaptiveConfidence())
    optimizer = SignAdamPP(model.named_parameters(), lr=1e-2, vote_state=state)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
