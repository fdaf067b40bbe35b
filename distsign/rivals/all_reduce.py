"""All-reduces in half precision, as torch has them."""

# Annotations are evaluated in this file: DDP compares those of a hook with the classes themselves.
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import GradBucket, ProcessGroup  # type: ignore[attr-defined]
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from distsign.collectives import world_size_of
from distsign.rivals.base import Rival
from distsign.traffic import ExchangeBytes, ring_all_reduce_bytes

__all__ = ["AllReduce"]


class AllReduce(Rival):
    """The mean of all gradients by a ring all-reduce: DDP's own in float32, torch's hooks in half precision.

    Bytes are those of the ring, `2 (W - 1) / W` elements each way.

    Args:
        dtype: on the wire: float32, bfloat16 or float16.
    """

    counts = "formula"

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self._num_elements = 0
        self._world_size = 1

    def register(self, model: DistributedDataParallel) -> None:
        """See `Rival`; in float32 DDP is left as it is."""
        self._num_elements = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self._world_size = world_size_of(model.process_group)
        if self.dtype == torch.bfloat16:
            model.register_comm_hook(model.process_group, _bf16_hook)
        elif self.dtype == torch.float16:
            model.register_comm_hook(model.process_group, default_hooks.fp16_compress_hook)

    def traffic(self, num_steps: int) -> ExchangeBytes:
        """See `Rival`."""
        both = num_steps * ring_all_reduce_bytes(self._num_elements, self.dtype.itemsize, self._world_size)
        return ExchangeBytes(both // 2, both - both // 2)

    def state_dict(self) -> dict[str, Any]:
        """See `Rival`; there is none."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Rival`."""
        if state:
            raise ValueError(f"an all-reduce keeps nothing between steps, got state {sorted(state)}")


def _bf16_hook(group: ProcessGroup, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    # DDP refuses torch's bf16 hook by its name where there is no NCCL, although Gloo reduces bf16 as well.
    return default_hooks.bf16_compress_hook(group, bucket)
