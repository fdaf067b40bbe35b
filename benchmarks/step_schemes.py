"""The schemes whose whole steps are timed: hooks and optimizers, most of them named as `launch.train` names them."""

# Annotations are evaluated in this file: DDP compares those of a hook with the classes themselves.
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as power_sgd
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from launch.options import parse_options
from launch.schemes import HOOKS, AllReduce, Combiner, make_optimizer

NO_OP, FP32, BF16, POWER_SGD = "no-op hook", "fp32 DDP", "bf16 hook", "PowerSGD"
BUCKET_MB = 4.0
ONE_BUCKET_MB = 1e4

SGD = ("--optimizer", "sgd", "--lr", "1e-3")
VOTE = ("--optimizer", "sign-adam-pp", "--lr", "1e-4", "--hook", "sign-vote")
RMS = (*VOTE, "--momentum", "0", "--confidence", "rms")


@dataclass(frozen=True)
class Scheme:
    """A way to combine gradients and to step.

    Args:
        name: in the table.
        arguments: optimizer and hook, as on the command line of `launch.train`.
        power_rank: of PowerSGD's matrices, in place of that hook; None for another scheme.
        communicates: False for the hook that does nothing.
    """

    name: str
    arguments: tuple[str, ...]
    power_rank: int | None = None
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
    *(Scheme(f"{POWER_SGD} rank {k}, one bucket", SGD, power_rank=k) for k in (1, 2, 4)),
    Scheme("vote, adaptive, planes", (*VOTE, "--confidence", "adaptive")),
    Scheme("vote, RMS carry, planes", (*RMS, "--wire", "planes")),
    Scheme("vote, RMS, 0.1 bit", (*RMS, "--bits-per-param", "0.1")),
    Scheme("vote, RMS, 0.05 bit", (*RMS, "--bits-per-param", "0.05")),
)


def scheme(name: str) -> Scheme:
    """Return a scheme by its name."""
    return next(each for each in SCHEMES if each.name == name)


class Trainer:
    """A model under one scheme, ready to step on this rank.

    Args:
        scheme: see `SCHEMES`.
        num_layers: linear layers without anything between them.
        width: their inputs and outputs.
        batch_size: rows of a batch.
    """

    def __init__(self, scheme: Scheme, *, num_layers: int, width: int, batch_size: int) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.Linear(width, width) for _ in range(num_layers)))
        # PowerSGD's hook with several buckets starts collectives in a callback, and hangs on Gloo.
        bucket_mb = BUCKET_MB if scheme.power_rank is None else ONE_BUCKET_MB
        # Alike on all ranks as it is; to send the parameters over a slow link would take longer than to measure.
        self.model = DistributedDataParallel(net, bucket_cap_mb=bucket_mb, init_sync=False)
        options = parse_options(list(scheme.arguments))
        self.combiner: Combiner
        if scheme.power_rank is not None:
            self.combiner = _register_power_sgd(self.model, scheme.power_rank)
        elif not scheme.communicates:
            self.model.register_comm_hook(None, _no_op_hook)
            self.combiner = AllReduce(0, 4, dist.get_world_size())
        else:
            self.combiner = HOOKS[options.hook](self.model, options)
        self.optimizer: Optimizer = make_optimizer(self.model, options, self.combiner)
        self.num_steps = 0
        self._random = torch.Generator().manual_seed(1 + dist.get_rank())
        self._batch_shape = (batch_size, width)

    def step(self) -> None:
        """Take a step on new data."""
        inputs, wanted = (torch.randn(self._batch_shape, generator=self._random) for _ in range(2))
        self.optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.model(inputs), wanted)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.num_steps += 1

    def counted_bytes(self) -> float:
        """Return what this rank has sent and received a step, counted or by the ring's formula."""
        traffic = self.combiner.traffic(self.num_steps)
        return (traffic.sent_bytes + traffic.received_bytes) / self.num_steps


def _no_op_hook(state: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Leave each rank its own gradient: what a step takes where links are endless and codecs free."""
    del state
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def _register_power_sgd(model: DistributedDataParallel, rank: int) -> Combiner:
    state = power_sgd.PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=2)
    # From the first step on: the fp32 all-reduces that it would begin with are measured as what they are elsewhere.
    state.iter = 2
    model.register_comm_hook(state, power_sgd.powerSGD_hook)
    shapes = [p.shape for p in model.parameters()]
    return AllReduce(_power_sgd_elements(shapes, rank), 4, dist.get_world_size())


def _power_sgd_elements(shapes: Sequence[torch.Size], rank: int) -> int:
    """Return how many float32 the hook reduces in a step: P and Q of each matrix, vectors as they are."""
    return sum(rank * sum(shape) if len(shape) == 2 else shape.numel() for shape in shapes)


def settings_of(num_layers: int, width: int, batch_size: int) -> dict[str, Any]:
    """Return a trainer's arguments as JSON can hold them."""
    return {"num_layers": num_layers, "width": width, "batch_size": batch_size}
