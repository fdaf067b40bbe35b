"""What a checkpoint holds of a run: taken from it, and given to another, of as many ranks or of another number."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from launch.checkpoint import Checkpoint
from launch.hooks import Combiner
from launch.options import UsageError
from launch.runtime import Ranks


@dataclass
class Progress:
    """How far this rank is; a checkpoint holds all but the times.

    Attributes:
        step: number of steps done.
        loss_sum: of this rank's losses since the last test, float64 scalar on the device.
        num_losses: how many those are.
        step_times_s: of this process, its first steps included.
    """

    step: int
    loss_sum: Tensor
    num_losses: int = 0
    step_times_s: list[float] = field(default_factory=list)


class RunState:
    """All of a run that outlives a step.

    Args:
        net: the model, alike on all ranks.
        optimizer: likewise.
        combiner: of gradients; each rank has its own.
        progress: of this rank.
        ranks: this process's place.
        device: where the model is.
    """

    def __init__(
        self,
        *,
        net: nn.Module,
        optimizer: Optimizer,
        combiner: Combiner,
        progress: Progress,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self._net, self._optimizer, self._combiner, self._progress = net, optimizer, combiner, progress
        self._ranks, self._device = ranks, device

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what all ranks have alike, and what is this rank's own."""
        progress, device = self._progress, self._device
        shared = {
            "step": progress.step,
            "model": self._net.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }
        own = {
            "hook": self._combiner.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "loss_sum": progress.loss_sum.item(),
            "num_losses": progress.num_losses,
        }
        return shared, own

    def restore(self, found: Checkpoint, hook: str) -> None:
        """Go on from a checkpoint.

        Args:
            found: of a run with the same options.
            hook: what the combiner is called on the command line, for errors.

        Raises:
            UsageError: it does not fit the model, or another number of ranks.
        """
        try:
            self._take_over(found.shared, found.own or self._inherited(found.ranks, hook))
        except UsageError:
            raise
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            # The options are the same, so the code was another: the model's layers, or what a hook keeps.
            raise UsageError(
                f"--checkpoint {found.path} does not fit this model: {' '.join(str(error).split())}; go on with the "
                "code that wrote it, or take another --checkpoint"
            ) from error

    def _take_over(self, shared: dict[str, Any], own: dict[str, Any]) -> None:
        self._net.load_state_dict(shared["model"])
        self._optimizer.load_state_dict(shared["optimizer"])
        self._combiner.load_state_dict(own["hook"])
        torch.set_rng_state(own["rng"])
        if own["cuda_rng"] is not None and self._device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda_rng"], self._device)
        self._progress.step = shared["step"]
        self._progress.loss_sum.fill_(own["loss_sum"])
        self._progress.num_losses = own["num_losses"]

    def _inherited(self, owns: list[dict[str, Any]], name: str) -> dict[str, Any]:
        """Return what this rank takes over from another number of ranks."""
        rank, world_size = self._ranks.rank, self._ranks.world_size
        try:
            hook = self._combiner.reshard([own["hook"] for own in owns], world_size)[rank]
        except ValueError as error:
            raise UsageError(f"what --hook {name} keeps cannot be cut anew: {error}") from error
        heirs = owns[rank::world_size]
        return {
            **owns[rank % len(owns)],
            "hook": hook,
            "loss_sum": sum(own["loss_sum"] for own in heirs),
            "num_losses": sum(own["num_losses"] for own in heirs),
        }
