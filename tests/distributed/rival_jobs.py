"""What the ranks do in the tests of the rivals, and each rival's equations, written once more in the simplest way.

Gradients are given: the loss is a sum of products with tensors that depend on rank and step. So every rank knows those
of all, and can work out alone what must come back.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from distsign.rivals import make_rival
from distsign.rivals.base import HookRival
from distsign.rivals.elias import read_levels
from distsign.rivals.qsgd import QSGD
from distsign.traffic import ExchangeBytes, power_sgd_elements, ring_all_reduce_bytes
from tests.elias_oracle import qsgd_bytes

SHAPES = {"matrix": (33, 70), "bias": (5,), "kernel": (6, 3, 3, 3), "gain": (), "last": (300, 40)}
BUCKET_CAP_MB = 0.02  # several buckets: of 4,000 components and of 12,000

Memory = defaultdict[tuple[int, str], Tensor | float]
Oracle = Callable[[int, str, list[Tensor], Memory], Tensor]


class Given(nn.Module):
    """A model whose gradients are what it is told."""

    def __init__(self, names: Iterable[str] = SHAPES) -> None:
        super().__init__()
        for name, shape in ((name, SHAPES[name]) for name in names):
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, wanted: dict[str, Tensor]) -> Tensor:
        return torch.stack([(parameter * wanted[name]).sum() for name, parameter in self.named_parameters()]).sum()


def gradient(rank: int, step: int, name: str) -> Tensor:
    generator = torch.Generator().manual_seed(997 * step + 31 * rank + list(SHAPES).index(name))
    found = torch.randn(SHAPES[name], generator=generator)
    return found + 0.3 * torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(len(name)))


# ----------------------------------------------------------------------------------------------------------- equations


def one_bit_sgd(step: int, name: str, grads: list[Tensor], memory: Memory) -> Tensor:
    del step, name
    total = torch.zeros_like(grads[0])
    for rank, g in enumerate(grads):
        u = g + memory[rank, "e"]
        sent = torch.empty_like(u)
        rows, sent_rows = (t.view(len(t), -1) if t.ndim > 1 else t.view(1, -1) for t in (u, sent))
        for row, sent_row in zip(rows, sent_rows, strict=True):
            for chosen in (row >= 0, row < 0):
                sent_row[chosen] = row[chosen].mean()
        memory[rank, "e"] = u - sent
        total += sent
    return total / len(grads)


def ef_sign_sgd(step: int, name: str, grads: list[Tensor], memory: Memory) -> Tensor:
    del step, name
    total = torch.zeros_like(grads[0])
    for rank, g in enumerate(grads):
        u = g + memory[rank, "e"]
        sent = u.abs().mean() * torch.sign(u)
        memory[rank, "e"] = u - sent
        total += sent
    return total / len(grads)


def majority(directions: list[Tensor]) -> Tensor:
    tally = torch.stack([torch.where(d >= 0, 1, -1) for d in directions]).sum(0)
    return torch.where(tally >= 0, 1.0, -1.0)


def sign_sgd(step: int, name: str, grads: list[Tensor], memory: Memory) -> Tensor:
    del step, name, memory
    return majority(grads)


def signum(step: int, name: str, grads: list[Tensor], memory: Memory) -> Tensor:
    del step, name
    for rank, g in enumerate(grads):
        memory[rank, "m"] = 0.9 * memory[rank, "m"] + 0.1 * g
    return majority([torch.as_tensor(memory[rank, "m"]) for rank in range(len(grads))])


def lion(step: int, name: str, grads: list[Tensor], memory: Memory) -> Tensor:
    del step, name
    directions = []
    for rank, g in enumerate(grads):
        directions.append(0.9 * memory[rank, "m"] + 0.1 * g)
        memory[rank, "m"] = 0.99 * memory[rank, "m"] + 0.01 * g
    return majority(directions)


def _keep_largest(values: Tensor, density: float) -> Tensor:
    order = values.abs().flatten().argsort(descending=True)
    where = order[: max(1, math.ceil(density * values.numel()))]
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[where] = True
    return mask.view(values.shape)


def top_k(step: int, name: str, grads: list[Tensor], memory: Memory) -> Tensor:
    del step, name
    total = torch.zeros_like(grads[0])
    for rank, g in enumerate(grads):
        u = g + memory[rank, "e"]
        sent = u * _keep_largest(u, 0.01)
        memory[rank, "e"] = u - sent
        total += sent
    return total / len(grads)


def dgc(step: int, name: str, grads: list[Tensor], memory: Memory) -> Tensor:
    del name
    density = 0.25 if step == 0 else 0.0625 if step == 1 else 0.015625 if step == 2 else 0.01
    total = torch.zeros_like(grads[0])
    for rank, g in enumerate(grads):
        limit = 1.0 / math.sqrt(len(grads))
        u = 0.9 * memory[rank, "u"] + g * min(1.0, limit / g.norm().item())
        v = memory[rank, "v"] + u
        mask = _keep_largest(v, density)
        total += v * mask
        memory[rank, "u"], memory[rank, "v"] = u * ~mask, v * ~mask
    return total / len(grads)


def one_bit_adam(step: int, name: str, grads: list[Tensor], memory: Memory) -> Tensor:
    del name
    mean = torch.stack(grads).mean(0)
    if step < 3:
        memory[0, "m"] = 0.9 * memory[0, "m"] + 0.1 * mean
        memory[0, "v"] = 0.999 * memory[0, "v"] + 0.001 * mean**2
    else:
        m = torch.as_tensor(memory[0, "m"])
        wanted = torch.zeros_like(mean).flatten()
        for rank, g in enumerate(grads):
            u = (0.9 * m + 0.1 * g + memory[rank, "e"]).flatten()
            q = _shard_signs(u, len(grads))
            memory[rank, "e"] = (u - q).view(g.shape)
            wanted += q / len(grads)
        wanted += torch.as_tensor(memory[0, "E"]).flatten()
        found = _shard_signs(wanted, len(grads))
        memory[0, "E"] = (wanted - found).view(mean.shape)
        memory[0, "m"] = found.view(mean.shape)
    found = torch.as_tensor(memory[0, "m"]) / (torch.as_tensor(memory[0, "v"]) ** 0.5 + 1e-8)
    return found.clamp(-0.1 / 0.001**0.5, 0.1 / 0.001**0.5)


def _shard_signs(u: Tensor, world_size: int) -> Tensor:
    shards = [s.abs().mean() * torch.where(s >= 0, 1.0, -1.0) if s.numel() else s for s in u.tensor_split(world_size)]
    return torch.cat(shards)


def mean(step: int, name: str, grads: list[Tensor], memory: Memory) -> Tensor:
    del step, name, memory
    return torch.stack(grads).mean(0)


ORACLES: dict[str, tuple[dict[str, float], Oracle]] = {
    "none": ({}, mean),
    "one-bit-sgd": ({}, one_bit_sgd),
    "ef-sign-sgd": ({}, ef_sign_sgd),
    "sign-sgd": ({}, sign_sgd),
    "signum": ({}, signum),
    "lion": ({}, lion),
    "top-k": ({"density": 0.01}, top_k),
    "dgc": ({"density": 0.01, "warmup_steps": 4, "clip": 1.0}, dgc),
    "one-bit-adam": ({"warmup_steps": 3}, one_bit_adam),
}
"""By name: the values that the test takes, and what must come back."""


# ---------------------------------------------------------------------------------------------------------------- jobs


def start(
    name: str, values: dict[str, float], *, one_bucket: bool = False, parameters: Iterable[str] = SHAPES
) -> tuple[Any, DDP]:
    model = DDP(Given(parameters), bucket_cap_mb=1e3 if one_bucket else BUCKET_CAP_MB)
    rival = make_rival(name, **values)
    rival.register(model)
    return rival, model


def backward(model: DDP, step: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    model.zero_grad()
    rank = dist.get_rank()
    model({name: gradient(rank, step, name).to(dtype) for name in SHAPES}).backward()
    return {name: torch.as_tensor(p.grad).clone() for name, p in model.module.named_parameters()}


def equal_the_oracle(rank: int, world_size: int, name: str, num_steps: int) -> str:
    """Hold what comes back to the equations, at each step; return a digest of it all, the same on all ranks."""
    del rank
    values, oracle = ORACLES[name]
    rival, model = start(name, values)
    memories: dict[str, Memory] = {each: defaultdict(float) for each in SHAPES}
    seen = []
    for step in range(num_steps):
        found = backward(model, step)
        for each in SHAPES:
            grads = [gradient(k, step, each) for k in range(world_size)]
            expected = oracle(step, each, grads, memories[each])
            torch.testing.assert_close(found[each], expected, rtol=1e-4, atol=1e-6)
            seen.append(found[each].flatten())
    rival.close()
    return str(hash(tuple(torch.cat(seen).tolist())))


def count_bytes(rank: int, world_size: int, name: str, values: dict[str, float], num_steps: int) -> None:
    """Hold counted bytes to the formula, with the buckets as DDP makes them."""
    rival, model = start(name, values)
    assert isinstance(rival, HookRival)
    layouts: list[list[list[tuple[int, ...]]]] = []
    combine = rival.combine

    def spy(pieces: Any, link: Any) -> None:
        if rival.step == len(layouts):
            layouts.append([])
        layouts[-1].append([tuple(piece.gradient.shape) for piece in pieces])
        combine(pieces, link)

    rival.combine = spy  # type: ignore[method-assign]
    for step in range(num_steps):
        backward(model, step)
    expected = ExchangeBytes()
    for step, buckets in enumerate(layouts):
        for shapes in buckets:
            found = rival.bucket_bytes(shapes, rank, world_size, step)
            assert found is not None
            expected += found
    assert len(layouts) == num_steps and len(layouts[-1]) > 1, "else nothing is shown"
    assert rival.traffic(num_steps) == expected
    rival.close()


def count_drawn_bytes(rank: int, world_size: int, num_steps: int) -> None:
    """Hold QSGD's counted bytes to the codes of what it has drawn, and the lengths that ranks tell each other."""
    rival, model = start("qsgd", {"chunk": 100})
    assert isinstance(rival, QSGD)
    encode, mine, num_tensors = rival.encode, 0, 0

    def spy(name: str, grad: Tensor) -> Tensor:
        nonlocal mine, num_tensors
        payload, num_chunks = encode(name, grad), -(-grad.numel() // 100)
        mine += qsgd_bytes(read_levels(payload[4 * num_chunks :].numpy(), grad.numel()), num_chunks)
        num_tensors += 1
        return payload

    rival.encode = spy  # type: ignore[method-assign]
    for step in range(num_steps):
        backward(model, step)
    assert num_tensors == num_steps * len(SHAPES)
    everyones = [torch.zeros((), dtype=torch.int64) for _ in range(world_size)]
    dist.all_gather(everyones, torch.tensor(mine))
    sent = [int(each) + 8 * num_tensors for each in everyones]
    received = sum(sent) - sent[rank]
    assert rival.traffic(num_steps) == ExchangeBytes((world_size - 1) * sent[rank], received)
    rival.close()


def mean_of_draws(
    rank: int, world_size: int, name: str, values: dict[str, float], num_steps: int
) -> dict[str, tuple[float, float]]:
    """Return, for each parameter, how far the mean of many steps is from the mean gradient, and how far one step is."""
    del rank
    rival, model = start(name, values)
    totals = {each: torch.zeros(shape) for each, shape in SHAPES.items()}
    for _ in range(num_steps):
        for each, found in backward(model, 0).items():
            totals[each] += found / num_steps
    last = backward(model, 0)
    expected = {each: torch.stack([gradient(k, 0, each) for k in range(world_size)]).mean(0) for each in SHAPES}
    rival.close()
    return {
        each: ((totals[each] - expected[each]).norm().item(), (last[each] - expected[each]).norm().item())
        for each in SHAPES
    }


def power_sgd(rank: int, world_size: int, num_steps: int) -> None:
    """Two plain steps, then the factors' bytes; what comes back has the rank that was asked for."""
    try:
        start("power-sgd", {}, one_bucket=True)
    except ValueError as error:
        assert "takes no scalars, and gain is one" in str(error)
    else:
        raise AssertionError("torch cannot take a scalar")
    shapes = {each: shape for each, shape in SHAPES.items() if shape}
    rival, model = start("power-sgd", {"rank": 2}, one_bucket=True, parameters=shapes)
    for step in range(num_steps):
        found = backward(model, step)
        expected = {each: torch.stack([gradient(k, step, each) for k in range(world_size)]).mean(0) for each in shapes}
        if step < 2:
            torch.testing.assert_close(found["last"], expected["last"], rtol=1e-4, atol=1e-5)
        else:
            assert torch.linalg.matrix_rank(found["last"]) == 2
            torch.testing.assert_close(found["bias"], expected["bias"], rtol=1e-4, atol=1e-5)
    num_elements = sum(math.prod(shape) for shape in shapes.values())
    both = 2 * ring_all_reduce_bytes(num_elements, 4, world_size)
    factors = sum(power_sgd_elements(list(shapes.values()), 2))
    both += (num_steps - 2) * ring_all_reduce_bytes(factors, 4, world_size)
    assert both < num_steps * ring_all_reduce_bytes(num_elements, 4, world_size)
    counted = rival.traffic(num_steps)
    assert counted.sent_bytes + counted.received_bytes == both


def half(rank: int, world_size: int, name: str) -> None:
    """The mean, as near as the format has it, and half the bytes."""
    rival, model = start(name, {})
    found = backward(model, 0)
    for each in SHAPES:
        expected = torch.stack([gradient(k, 0, each) for k in range(world_size)]).mean(0)
        torch.testing.assert_close(found[each], expected, rtol=2e-2, atol=2e-2)
    assert any((found[each] != gradient(0, 0, each)).any() for each in SHAPES)
    num_elements = sum(math.prod(shape) for shape in SHAPES.values())
    counted = rival.traffic(1)
    assert counted.sent_bytes + counted.received_bytes == ring_all_reduce_bytes(num_elements, 2, world_size)


def resume(rank: int, world_size: int, name: str, values: dict[str, float]) -> None:
    """Stop after two steps, go on in a new object: the same numbers and bytes as without a stop."""
    del rank, world_size
    whole, model = start(name, values, one_bucket=True)
    expected = [backward(model, step) for step in range(5)]
    first, model = start(name, values, one_bucket=True)
    for step in range(2):
        backward(model, step)
    state = copy.deepcopy(first.state_dict())
    backward(model, 7)  # what happens after a checkpoint is not in it
    second, model = start(name, values, one_bucket=True)
    second.load_state_dict(state)
    for step in range(2, 5):
        for each, found in backward(model, step).items():
            assert torch.equal(found, expected[step][each]), (each, step)
    assert second.traffic(5) == whole.traffic(5)


def break_one(rank: int, world_size: int, name: str) -> None:
    """What goes wrong on the thread is an error of backward, on that rank, that says what was done."""
    del rank, world_size
    rival, model = start(name, {})

    def fail(pieces: Any, link: Any) -> None:
        raise OSError("the cable")

    rival.combine = fail
    try:
        backward(model, 0)
    except RuntimeError as error:
        assert "could not combine a bucket" in str(error) and "OSError: the cable" in str(error), error
    else:
        raise AssertionError("backward went well")
