"""The schemes whose whole steps are timed: hooks and optimizers, most of them named as `launch.train` names them."""

# Annotations are evaluated in this file: DDP compares those of a hook with the classes themselves.
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from distsign.rivals.all_reduce import AllReduce
from distsign.simulator.step_probe import no_exchange
from launch.hooks import Combiner, RivalCombiner, SignVote, bucket_cap_mb, register_hook
from launch.models import ByteGPT, LeNet
from launch.options import parse_options
from launch.schemes import make_optimizer

NO_OP, FP32, BF16, POWER_SGD = "no-op hook", "fp32 DDP", "bf16 hook", "PowerSGD"
BUCKET_MB = 4.0
NUM_UNCOUNTED_STEPS = 2
"""PowerSGD begins with so many plain all-reduces."""

SGD = ("--optimizer", "sgd", "--lr", "1e-3")
VOTE = ("--optimizer", "sign-adam-pp", "--lr", "1e-4", "--hook", "sign-vote")
RMS = (*VOTE, "--momentum", "0", "--confidence", "rms")


@dataclass(frozen=True)
class Scheme:
    """A way to combine gradients and to step.

    Args:
        name: in the table.
        arguments: optimizer and hook, as on the command line of `launch.train`.
        communicates: False for the hook that does nothing.
    """

    name: str
    arguments: tuple[str, ...]
    communicates: bool = True

    @property
    def is_vote(self) -> bool:
        """Whether it is one of ours."""
        return "sign-vote" in self.arguments


SCHEMES = (
    Scheme(NO_OP, SGD, communicates=False),
    Scheme(FP32, SGD),
    Scheme(BF16, (*SGD, "--hook", "bf16")),
    Scheme("fp16 hook", (*SGD, "--hook", "fp16")),
    *(Scheme(f"{POWER_SGD} rank {k}, one bucket", (*SGD, "--hook", f"power-sgd:rank={k}")) for k in (1, 2, 4)),
    Scheme("vote, adaptive, planes", (*VOTE, "--confidence", "adaptive")),
    Scheme("vote, RMS carry, planes", (*RMS, "--wire", "planes")),
    Scheme("vote, RMS, 0.1 bit", (*RMS, "--bits-per-param", "0.1")),
    Scheme("vote, RMS, 0.05 bit", (*RMS, "--bits-per-param", "0.05")),
    Scheme("vote, RMS, 0.1 bit, bf16 carry", (*RMS, "--bits-per-param", "0.1", "--carry", "bf16")),
)


MORE_SCHEMES = (
    Scheme("top-k 0.1 %", (*SGD, "--hook", "top-k:density=0.001")),
    Scheme("vote, RMS, 0.1 bit, hierarchical", (*RMS, "--bits-per-param", "0.1", "--exchange", "hierarchical")),
)
"""What `benchmarks.simulator` has beside them."""


def scheme(name: str) -> Scheme:
    """Return a scheme by its name."""
    return next(each for each in (*SCHEMES, *MORE_SCHEMES) if each.name == name)


@dataclass(frozen=True)
class Workload:
    """A model and its batches.

    Args:
        make: the model.
        batch: inputs and targets, from a generator.
        loss: of outputs and targets.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]


def linear_layers(num_layers: int, width: int, batch_size: int) -> Workload:
    """Return linear layers without anything between them, on normal numbers."""

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        inputs, wanted = (torch.randn(batch_size, width, generator=generator) for _ in range(2))
        return inputs, wanted

    def make() -> nn.Module:
        return nn.Sequential(*(nn.Linear(width, width) for _ in range(num_layers)))

    return Workload(make, batch, nn.functional.mse_loss)


def lenet(width: int, batch_size: int) -> Workload:
    """Return the LeNet of the tasks, on noise."""

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        images = torch.randn(batch_size, 28, 28, generator=generator)
        return images, torch.randint(10, (batch_size,), generator=generator)

    return Workload(lambda: LeNet(width), batch, nn.functional.cross_entropy)


def byte_gpt(width: int, batch_size: int) -> Workload:
    """Return the byte-level GPT of the tasks, on noise."""

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(256, (batch_size, 65), generator=generator)
        return tokens[:, :-1], tokens[:, 1:]

    def loss(logits: Tensor, wanted: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())

    return Workload(lambda: ByteGPT(64, width), batch, loss)


class Trainer:
    """A model under one scheme, ready to step on this rank.

    Args:
        scheme: see `SCHEMES`.
        workload: what is trained.
    """

    def __init__(self, scheme: Scheme, workload: Workload) -> None:
        torch.manual_seed(0)
        net = workload.make()
        options = parse_options([*scheme.arguments, f"--bucket-cap-mb={BUCKET_MB:g}"])
        bucket_mb = bucket_cap_mb(options, torch.device("cpu"))
        # Alike on all ranks as it is; to send the parameters over a slow link would take longer than to measure.
        self.model = DistributedDataParallel(net, bucket_cap_mb=bucket_mb, init_sync=False)
        self.combiner: Combiner
        if not scheme.communicates:
            self.model.register_comm_hook(None, no_exchange)
            self.combiner = RivalCombiner(AllReduce(), 0)
        else:
            self.combiner = register_hook(self.model, options)
        vote_state = self.combiner.state if isinstance(self.combiner, SignVote) else None
        self.optimizer: Optimizer = make_optimizer(self.model, options, vote_state)
        self.num_steps = 0
        self._uncounted_bytes = 0.0
        self._random = torch.Generator().manual_seed(1 + dist.get_rank())
        self._workload = workload

    def compute(self) -> None:
        """Go forward and backward on new data."""
        inputs, wanted = self._workload.batch(self._random)
        self.optimizer.zero_grad()
        self._workload.loss(self.model(inputs), wanted).backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """Take a step on new data."""
        self.compute()
        self.optimizer.step()
        self.num_steps += 1
        if self.num_steps == NUM_UNCOUNTED_STEPS:
            self._uncounted_bytes = self._all_bytes()

    def counted_bytes(self) -> float:
        """Return what this rank sends and receives a step, counted or by the ring's formula."""
        return (self._all_bytes() - self._uncounted_bytes) / (self.num_steps - NUM_UNCOUNTED_STEPS)

    def _all_bytes(self) -> float:
        traffic = self.combiner.traffic(self.num_steps)
        return traffic.sent_bytes + traffic.received_bytes


def settings_of(num_layers: int, width: int, batch_size: int) -> dict[str, Any]:
    """Return a trainer's arguments as JSON can hold them."""
    return {"num_layers": num_layers, "width": width, "batch_size": batch_size}
