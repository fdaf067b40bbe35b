"""What all rivals have in common: DDP's hook, memory by parameter, bytes counted where the collective is called."""

# Annotations are evaluated in this file: DDP compares those of a hook with the classes themselves.
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from distsign.collectives import Link
from distsign.exchange_thread import ExchangeThread
from distsign.traffic import ExchangeBytes, all_gather_bytes

__all__ = ["GatheringRival", "HookRival", "Piece", "Rival", "RivalError", "require_range"]


class RivalError(RuntimeError):
    """Gradients could not be combined."""


class Rival(ABC):
    """A scheme that combines the gradients of DDP's ranks.

    Attributes:
        gives: what `p.grad` is afterwards: `"gradient"`, an estimate of the mean gradient, and `"signs"`, -1 or +1, for
            any optimizer; `"direction"`, what to step along: for SGD without momentum.
        counts: whether bytes are `"counted"` where the collective is called, or follow by `"formula"` from shapes, as
            those of a ring all-reduce inside torch do.
        one_bucket: whether it must have all parameters in one bucket on Gloo.
    """

    gives: str = "gradient"
    counts: str = "counted"
    one_bucket: bool = False

    @abstractmethod
    def register(self, model: DistributedDataParallel) -> None:
        """Become the model's communication hook, once, before the first backward."""

    @abstractmethod
    def traffic(self, num_steps: int) -> ExchangeBytes:
        """Return what this rank has sent and received in `num_steps` steps, those before a restart included."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return what this rank keeps between steps; each rank has its own."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()` of the same rank.

        Raises:
            ValueError: it is of another scheme.
        """

    def close(self) -> None:  # noqa: B027  (some hold nothing)
        """Give back what it holds of the process group; it must not be used afterwards."""


@dataclass(frozen=True)
class Piece:
    """One parameter's gradient in a bucket.

    Attributes:
        name: of the parameter.
        gradient: float32, in the parameter's shape; overwritten with what all ranks combined it to.
    """

    name: str
    gradient: Tensor


class HookRival(Rival):
    """A scheme with a hook of our own: buckets are combined on a thread, one after the other, while backward goes on.

    On CUDA they are combined where DDP calls the hook. What is kept belongs to a parameter's name, never to a bucket,
    whose layout changes after the first step.

    Not for `Join`: a rank without data would compress zeros.
    """

    def __init__(self) -> None:
        self.memory: dict[str, dict[str, Tensor]] = {}
        self.step = 0
        self._link = Link(None)
        self._before = ExchangeBytes()
        self._names: dict[int, str] = {}
        self._thread = ExchangeThread("distsign-rival")
        self._error: RivalError | None = None

    @abstractmethod
    def combine(self, pieces: Sequence[Piece], link: Link) -> None:
        """Overwrite the gradients of one bucket with what all ranks make of them.

        `step` counts from 0 and is the current one.
        """

    @abstractmethod
    def bucket_bytes(
        self, shapes: Sequence[Sequence[int]], rank: int, world_size: int, step: int
    ) -> ExchangeBytes | None:
        """Return what a rank sends and receives for one bucket: the formula, which the count is held to.

        Args:
            shapes: of the bucket's parameters.
            rank: the one in question.
            world_size: number of ranks.
            step: counts from 0; schemes may begin with less compression.

        Returns:
            None where it depends on the numbers.
        """

    def kept(self, name: str, what: str, like: Tensor) -> Tensor:
        """Return what is kept for a parameter under a name, zeros the first time; the caller changes it in place."""
        mine = self.memory.setdefault(name, {})
        if what not in mine:
            mine[what] = torch.zeros_like(like, dtype=torch.float32, memory_format=torch.contiguous_format)
        return mine[what]

    def register(self, model: DistributedDataParallel) -> None:
        """See `Rival`; all ranks must call it."""
        self._names = {id(p): name for name, p in model.module.named_parameters()}
        self._link = Link.twin(model.process_group)
        model.register_comm_hook(self, _hook)

    def traffic(self, num_steps: int) -> ExchangeBytes:
        """See `Rival`; what was counted does not depend on the number of steps."""
        del num_steps
        return self._before + self.counted

    @property
    def counted(self) -> ExchangeBytes:
        """Bytes since this process began."""
        return ExchangeBytes(self._link.sent_bytes, self._link.received_bytes)

    def state_dict(self) -> dict[str, Any]:
        """See `Rival`."""
        total = self.traffic(0)
        return {
            "scheme": type(self).__name__,
            "step": self.step,
            "memory": {name: dict(kept) for name, kept in self.memory.items()},
            "bytes": (total.sent_bytes, total.received_bytes),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Rival`."""
        if state.get("scheme") != type(self).__name__:
            raise ValueError(
                f"the checkpoint's hook is {state.get('scheme') or 'another'}, this run's is {type(self).__name__}: "
                "use the hook that the checkpoint was written with, or start anew"
            )
        self.step = state["step"]
        self.memory = {
            name: {what: kept.clone() for what, kept in mine.items()} for name, mine in state["memory"].items()
        }
        self._before = ExchangeBytes(*state["bytes"])
        self._link.forget_counts()

    def close(self) -> None:
        """See `Rival`."""
        self._thread.close()
        if self._link.is_whole_world:
            self._link.close()

    def on_bucket(self, bucket: GradBucket) -> Future[Tensor]:
        """Combine a bucket; its future holds the flat gradient."""
        self._raise_if_broken()
        flat = bucket.buffer()
        names = [self._names[id(p)] for p in bucket.parameters()]
        shapes = [p.shape for p in bucket.parameters()]
        on_cpu = flat.device.type == "cpu"
        future: Future[Tensor] = Future() if on_cpu else Future(devices=[flat.device])
        job = partial(self._run, flat, names, shapes, future, bucket.is_last())
        if not on_cpu:
            job()
            return future
        if bucket.index() == 0:
            # An error set on a Future reaches the user as "Unable to cast ... to Tensor".
            torch.autograd.Variable._execution_engine.queue_callback(self._await_step)
        self._thread.submit(job)
        return future

    def _await_step(self) -> None:
        self._thread.wait()
        self._raise_if_broken()

    def _raise_if_broken(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(
        self, flat: Tensor, names: list[str], shapes: list[torch.Size], future: Future[Tensor], is_last: bool
    ) -> None:
        try:
            if self._error is None:
                wide = flat.float()
                parts = torch.split(wide, [math.prod(shape) for shape in shapes])
                pieces = [Piece(*each) for each in zip(names, map(Tensor.view, parts, shapes), strict=True)]
                self.combine(pieces, self._link)
                if wide is not flat:
                    flat.copy_(wide)
                self.step += is_last
        except BaseException as error:  # noqa: BLE001  (it is raised again where the user can see it)
            self._error = RivalError(
                f"{type(self).__name__} could not combine a bucket of {flat.numel():,} elements on "
                f"{self._link.describe()}: {type(error).__name__}: {error}"
            )
            self._error.__cause__ = error
        if self._error is not None:
            flat.fill_(math.nan)  # nothing may be trained on it
        future.set_result(flat)


class GatheringRival(HookRival):
    """A scheme in which every rank gets every payload and decodes them all: one all-gather a bucket.

    The bytes per rank grow with the number of ranks. Where a paper has a server, this is it on every rank.
    """

    @abstractmethod
    def encode(self, name: str, gradient: Tensor) -> Tensor:
        """Return this rank's payload for a parameter, uint8 `[payload_bytes(gradient.shape)]`, and keep the rest."""

    @abstractmethod
    def accumulate(self, payload: Tensor, total: Tensor) -> None:
        """Add what a payload stands for to `total`, float32 in the parameter's shape, in place."""

    @abstractmethod
    def payload_bytes(self, shape: Sequence[int], step: int) -> int:
        """Return the length of a payload for a parameter of this shape."""

    def combine(self, pieces: Sequence[Piece], link: Link) -> None:
        """See `HookRival`: the mean of what the payloads stand for."""
        payloads = [self.encode(piece.name, piece.gradient) for piece in pieces]
        rows = link.all_gather(torch.cat(payloads))
        columns = torch.split(rows, [payload.numel() for payload in payloads], dim=1)
        for piece, column in zip(pieces, columns, strict=True):
            piece.gradient.zero_()
            for row in column:
                self.accumulate(row.clone(), piece.gradient)  # a copy is aligned for views of wider types
            piece.gradient.div_(link.world_size)

    def bucket_bytes(self, shapes: Sequence[Sequence[int]], rank: int, world_size: int, step: int) -> ExchangeBytes:
        """See `HookRival`."""
        del rank
        return all_gather_bytes(sum(self.payload_bytes(shape, step) for shape in shapes), world_size)


def _hook(state: HookRival, bucket: GradBucket) -> Future[Tensor]:
    return state.on_bucket(bucket)


def require_range(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> float:
    """Return a number in `[low, high]`, or `(low, high]`.

    Raises:
        ValueError: it lies outside.
    """
    if not low <= value <= high or (low_open and value == low):
        raise ValueError(f"{name} must be in {'(' if low_open else '['}{low:g}, {high:g}], got {value:g}")
    return value
