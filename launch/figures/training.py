"""Train a model in this process for a figure, by the same trainer that `launch.train` runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from launch.options import parse_options
from launch.runtime import Ranks, start
from launch.tasks import Shard
from launch.train import Trainer

ALONE = Ranks(0, 1, 0, 1)
Batch = tuple[torch.Tensor, torch.Tensor]


@contextmanager
def alone() -> Iterator[None]:
    """Be one rank of one: DDP and its hooks need a process group."""
    if dist.is_initialized():
        yield
        return
    start(ALONE, torch.device("cpu"), timeout_s=60.0)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def trained(
    arguments: Sequence[str], before_step: Callable[[Trainer], None] | None = None, num_samples: int = 1
) -> Iterator[Trainer]:
    """Train one rank on the CPU to the end, without writing anything.

    Args:
        arguments: options of `launch.train`.
        before_step: called before each step of the optimizer, when the gradients are there.
        num_samples: that will be asked for; said now, since the training may take long.

    Raises:
        ValueError: the data have fewer samples.
        UsageError: the options are wrong.
        DataError: there are no data where they should be.
    """
    options = parse_options(["--device", "cpu", *arguments])
    with alone():
        trainer = Trainer(options, ALONE, torch.device("cpu"))
        if trainer.task.steps_per_epoch(_shard(trainer, num_samples)) == 0:
            trainer.close()
            raise ValueError(f"--samples must be at most the training data's number, got {num_samples}")
        if before_step is not None:
            trainer.optimizer.register_step_pre_hook(lambda *_: before_step(trainer))
        trainer.run()
        trainer.net.eval()
        try:
            yield trainer
        finally:
            trainer.close()


def samples(trainer: Trainer, num_samples: int) -> Batch:
    """Return training samples in an order that the seed decides; the same for each run with that seed."""
    return trainer.task.batch(0, _shard(trainer, num_samples))


def _shard(trainer: Trainer, num_samples: int) -> Shard:
    return Shard(0, 1, num_samples, trainer.options.seed)
