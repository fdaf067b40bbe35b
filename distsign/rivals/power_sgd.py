"""PowerSGD, as torch has it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from distsign.collectives import world_size_of
from distsign.rivals.base import Rival, require_range
from distsign.traffic import ExchangeBytes, power_sgd_elements, ring_all_reduce_bytes

__all__ = ["PowerSGD"]


class PowerSGD(Rival):
    """PowerSGD (Vogels, Karimireddy, Jaggi, arXiv 1905.13727, Alg. 1): torch's own hook, wrapped.

        M ~ P Qᵀ       P = orthogonal basis of the mean of (g + e) Q       Q = mean of (g + e)ᵀ P       e = g + e - P Qᵀ

    Sent: all-reduces of P, of Q, and of what does not become smaller (vectors) as it is, in float32. Bytes are those of
    ring all-reduces. The first `start` steps are plain all-reduces.

    On Gloo all parameters must be in one bucket: torch's hook starts collectives in a `Future` callback, which with
    several buckets hangs or aborts there (facts in DESIGN.md). Errors are torch's, which keeps them by bucket: they are
    not saved, and a resumed run begins anew with `start` plain steps.

    Args:
        rank: of the approximation.
        start: steps before it; two at least, since DDP changes its buckets after the first.
    """

    counts = "formula"
    one_bucket = True

    def __init__(self, rank: int = 1, start: int = 2) -> None:
        self.rank = int(require_range("rank", rank, 1, 2**20))
        self.start = int(require_range("start", start, 2, 2**31))
        self._shapes: list[tuple[int, ...]] = []
        self._world_size = 1
        self._steps_before = self._plain_before = 0
        self._state: powerSGD_hook.PowerSGDState | None = None

    def register(self, model: DistributedDataParallel) -> None:
        """See `Rival`.

        Raises:
            ValueError: a parameter is a scalar, which torch's hook cannot take.
        """
        scalars = [name for name, p in model.module.named_parameters() if p.requires_grad and p.ndim == 0]
        if scalars:
            raise ValueError(
                f"torch's PowerSGD hook takes no scalars, and {scalars[0]} is one: give it the shape (1,), or take "
                "another hook"
            )
        self._shapes = [tuple(p.shape) for p in model.parameters() if p.requires_grad]
        self._world_size = world_size_of(model.process_group)
        self._state = powerSGD_hook.PowerSGDState(
            model.process_group, matrix_approximation_rank=self.rank, start_powerSGD_iter=self.start
        )
        model.register_comm_hook(self._state, powerSGD_hook.powerSGD_hook)

    def traffic(self, num_steps: int) -> ExchangeBytes:
        """See `Rival`."""
        plain = self._plain_before + min(self.start, num_steps - self._steps_before)
        # Three all-reduces: of what stays whole, of P and of Q.
        rings = [ring_all_reduce_bytes(n, 4, self._world_size) for n in power_sgd_elements(self._shapes, self.rank)]
        both = ring_all_reduce_bytes(sum(map(math.prod, self._shapes)), 4, self._world_size) * plain
        both += sum(rings) * (num_steps - plain)
        return ExchangeBytes(both // 2, both - both // 2)

    def state_dict(self) -> dict[str, Any]:
        """See `Rival`; torch's own state stays behind."""
        steps = 0 if self._state is None else self._state.iter
        return {
            "scheme": "PowerSGD",
            "steps": self._steps_before + steps,
            "plain_steps": self._plain_before + min(self.start, steps),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Rival`."""
        if state.get("scheme") != "PowerSGD":
            raise ValueError("the checkpoint is not of a run with PowerSGD: use the hook that it was written with")
        self._steps_before, self._plain_before = state["steps"], state["plain_steps"]
