"""The way of a bucket on CUDA, on tensors that have shapes, dtypes and devices but no data; no GPU is needed.

What is held: that all operations fit together there, and that after the first step the host waits for the device
nowhere. Kernels are not run (`kernels_cuda_cases` holds them to the reference); nothing travels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from distsign import AdaptiveConfidence, Confidence, FixedConfidence, RMSConfidence, TargetDensity, pipeline
from distsign.collectives import Link
from distsign.exchange import VoteExchange
from distsign.kernels import kernels_for
from distsign.options import VoteOptions
from distsign.pipeline import VotePipeline
from distsign.registry import ParameterRegistry
from distsign.rivals import RIVALS, make_rival
from distsign.rivals.base import HookRival, Piece
from distsign.statistics import VoteCounts
from tests.optim_cases import VARIANTS, build

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

DEVICE = torch.device("cuda", 0)
SHAPES = ((70, 300), (300,), (40_000,), (), (513,))
READS_A_VALUE = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
}
RMS = RMSConfidence(k=8)
CASES: dict[str, tuple[Confidence, dict[str, Any]]] = {
    "planes": (AdaptiveConfidence(), {}),
    "fixed": (FixedConfidence(1e-3), {}),
    "density": (TargetDensity(0.05), {}),
    "RMS in planes": (RMS, {"wire": "planes"}),
    "RMS": (RMS, {}),
    "RMS in bfloat16": (RMS, {"carry": torch.bfloat16}),
    "budget": (RMS, {"bits_per_param": 0.2, "owner_carry": True}),
    "steered budget": (FixedConfidence(1e-3), {"bits_per_param": 0.2, "owner_carry": True}),
    "standing": (RMS, {"wire": "planes", "owner_carry": "standing", "margin": 2}),
    "all-gather": (RMS, {"exchange": "all_gather", "owner_carry": True}),
    "averaged": (RMS, {"exclude": ["p1", "p3"]}),
    "checks": (RMS, {"checksum": True, "max_density": 0.5, "max_poison_streak": 3}),
    "checks, planes": (AdaptiveConfidence(), {"checksum": True, "max_density": 0.5, "max_poison_streak": 3}),
    "nodes": (RMS, {"exchange": "hierarchical", "ranks_per_node": 2, "checksum": True, "max_poison_streak": 3}),
    "nodes, budget": (RMS, {"exchange": "hierarchical", "ranks_per_node": 2, "bits_per_param": 0.3}),
}


class Silent(Link):
    """A link from which come tensors of the right shape, whatever is sent."""

    def __init__(self, world_size: int) -> None:
        super().__init__(None)
        self.world_size = world_size

    def part(self, parts: list[list[int]]) -> Link:
        return Silent(len(parts[0]))

    def all_to_all(self, source: Tensor, send: list[int], receive: list[int], what: str = "") -> Tensor:
        assert source.dim() == 2 or source.numel() == sum(send)
        return source.new_empty(sum(receive))

    def all_gather(self, source: Tensor, what: str = "") -> Tensor:
        return source.new_empty(self.world_size, source.numel())


class Bucket:
    """As much of a `GradBucket` as the pipeline asks for."""

    def __init__(self, parameters: Sequence[Tensor], index: int, *, is_last: bool) -> None:
        self._parameters, self._index, self._is_last = list(parameters), index, is_last
        self._buffer = torch.empty(sum(p.numel() for p in parameters), device=DEVICE)

    def buffer(self) -> Tensor:
        return self._buffer

    def parameters(self) -> list[Tensor]:
        return self._parameters

    def index(self) -> int:
        return self._index

    def is_last(self) -> bool:
        return self._is_last


class WithoutCUDA(TorchFunctionMode):
    """Does by operations below them what `[]`, `to` and others do, which torch without CUDA refuses itself."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.to:
            return self.to(*args, **kwargs)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].device.type == "cuda":
            return self.index(func, *args)
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if "not linked with support for cuda" not in str(error):
                raise
            name = {"__invert__": "bitwise_not"}.get(func.__name__, func.__name__)
            return getattr(torch.ops.aten, name)(*args, **kwargs)

    @staticmethod
    def to(tensor: Tensor, *wanted: Any, non_blocking: bool = False, **named: Any) -> Tensor:
        device, dtype = named.get("device", tensor.device), named.get("dtype", tensor.dtype)
        for each in wanted:
            if isinstance(each, Tensor):
                device, dtype = each.device, each.dtype
            elif isinstance(each, torch.dtype):
                dtype = each
            else:
                device = each
        device = torch.device(device)
        if device == tensor.device and dtype == tensor.dtype:
            return tensor
        copied: Tensor = torch.ops.aten._to_copy(tensor, dtype=dtype, device=device, non_blocking=non_blocking)
        return copied

    @staticmethod
    def index(func: Any, *args: Any) -> Any:
        tensor, index = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
        chosen: list[Tensor | None] = []
        for each in index:
            at = len(chosen)
            if each is ...:
                chosen += [None] * (tensor.dim() - at - (len(index) - 1 - index.index(...)))
            elif each is None:
                tensor = tensor.unsqueeze(at)
                chosen.append(None)
            elif isinstance(each, int):
                tensor = tensor.select(at, each)
            elif isinstance(each, slice):
                start, stop, step = each.indices(tensor.shape[at])
                tensor = torch.ops.aten.slice.Tensor(tensor, at, start, max(start, stop), step)
                chosen.append(None)
            else:
                chosen.append(each if isinstance(each, Tensor) else torch.tensor(each, device="cpu").to(tensor.device))
        indices = chosen if any(each is not None for each in chosen) else None
        if func is Tensor.__getitem__:
            return tensor if indices is None else torch.ops.aten.index.Tensor(tensor, indices)
        if indices is not None:
            return tensor.index_put_(indices, torch.as_tensor(args[2], dtype=tensor.dtype))
        return torch.ops.aten.copy_(tensor, args[2]) if isinstance(args[2], Tensor) else tensor.fill_(args[2])


class Waits(TorchDispatchMode):
    """Takes note of whatever lets the host wait: values that are read, and copies between devices that block."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READS_A_VALUE and args[0].device == DEVICE:
            self.found.append(str(func))
        elif func is torch.ops.aten._to_copy.default:
            devices = {args[0].device.type, torch.device(kwargs.get("device") or args[0].device).type}
            if len(devices) == 2 and not kwargs.get("non_blocking"):
                self.found.append(f"{func} {args[0].shape} {devices}")
        elif func is torch.ops.aten.copy_.default and args[0].device.type != args[1].device.type:
            self.found += [f"{func} {args[1].shape}"] * (not (len(args) > 2 and args[2]))
        return func(*args, **kwargs)


class Event:
    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class Stream:
    def __init__(self, *_: object) -> None: ...

    def wait_stream(self, other: object) -> None: ...


class Result:
    def __init__(self, devices: object = None) -> None:
        self.error: Exception | None = None

    def set_result(self, value: Tensor) -> None:
        assert value.device == DEVICE and value.dtype == torch.float32

    def set_exception(self, error: Exception) -> None:
        self.error = error


@contextmanager
def _stream(stream: object) -> Iterator[None]:
    yield


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let all that needs a GPU's driver do nothing."""
    kernels = kernels_for(DEVICE)
    monkeypatch.setattr(kernels, "_launch", lambda kernel, num_programs, *args, **constants: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", _stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(pipeline, "Future", Result)
    # To watch a parameter's gradient is autograd's affair, which a tensor without data has no part in.
    monkeypatch.setattr(ParameterRegistry, "see", ParameterRegistry._row)
    with FakeTensorMode(allow_non_fake_inputs=True), WithoutCUDA():
        yield


def start(confidence: Confidence, given: dict[str, Any]) -> tuple[VotePipeline, list[Tensor]]:
    options = VoteOptions.check(confidence=confidence, **given)
    registry = ParameterRegistry()
    parameters = [torch.nn.Parameter(torch.empty(shape, device=DEVICE)) for shape in SHAPES]
    registry.track((f"p{k}", parameter) for k, parameter in enumerate(parameters))
    votes = VotePipeline(options, registry, VoteCounts())
    votes.meet(2, column=0)
    exchange = VoteExchange(
        Silent(2 * options.ranks_per_node),
        options.exchange,
        options.ranks_per_node,
        checksum=options.checksum,
        admission=votes.memory.admission,
    )
    votes.start(exchange)
    return votes, parameters


def step(votes: VotePipeline, parameters: list[Tensor]) -> None:
    scale = torch.full((), 1.0, dtype=torch.float64, device=DEVICE)
    futures = []
    for index, part in enumerate((parameters[3:], parameters[:3])):
        futures.append(votes.on_bucket(Bucket(part, index, is_last=index == 1), scale))  # type: ignore[arg-type]
    votes.raise_if_broken()
    # Their counts would have come to the host by now, and have no values.
    votes.memory.admission._news = None
    if votes.memory.ladder is not None:
        votes.memory.ladder._seen = None


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("name", CASES)
def test_a_step_fits_together_and_waits_for_nothing(name: str) -> None:
    votes, parameters = start(*CASES[name])
    step(votes, parameters)  # tables that stay are uploaded
    with Waits() as waits:
        step(votes, parameters)
        step(votes, parameters)
    assert waits.found == []
    assert votes._poisoned.dtype == votes._unfit.dtype == torch.bool
    mismatch = votes.exchange and votes.exchange.inspection._mismatch
    assert isinstance(mismatch, Tensor) and mismatch.dtype == torch.bool


@pytest.mark.usefixtures("fakes")
def test_what_waits_is_noticed() -> None:
    with Waits() as waits:
        torch.ones(3).to(DEVICE)
        torch.ones(3).to(DEVICE, non_blocking=True)
        torch.empty(3, device=DEVICE).copy_(torch.ones(3))
    assert len(waits.found) == 2


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize("name", VARIANTS)
def test_the_optimizers_wait_for_nothing(name: str) -> None:
    parameters = [torch.nn.Parameter(torch.empty(shape, device=DEVICE)) for shape in SHAPES]
    optimizer = build(name, parameters)

    def one_step() -> None:
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()

    one_step()
    with Waits() as waits:
        one_step()
        one_step()
    assert waits.found == []


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize(
    "name", [name for name in RIVALS if isinstance(make_rival(name), HookRival) and name != "qsgd"]
)
def test_the_rivals_fit_together(name: str) -> None:
    """QSGD codes on the CPU what it has drawn, and cannot be followed without data."""
    rival = make_rival(name)
    assert isinstance(rival, HookRival)
    for _ in range(3):
        pieces = [Piece(f"p{k}", torch.empty(shape, device=DEVICE)) for k, shape in enumerate(SHAPES)]
        rival.combine(pieces, Silent(4))
        assert all(piece.gradient.device == DEVICE for piece in pieces)
        rival.step += 1
