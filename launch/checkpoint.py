"""One file that holds all a run needs to go on: what all ranks share, and what each keeps for itself."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.options import UsageError
from launch.runtime import Ranks

FORMAT = 1
_OF_A_WORLD_SIZE = ("batch_size", "steps", "epochs")


def save(path: str, shared: dict[str, Any], own: dict[str, Any], ranks: Ranks) -> None:
    """Write a checkpoint on rank 0's machine; a file of that name is replaced at once, whole, or not at all.

    All ranks must call it.

    Args:
        path: the file; its folder is made where it is missing, but none above it.
        shared: what is the same on all ranks; rank 0's is kept.
        own: what this rank keeps for itself, such as carries.
        ranks: this process's place.
    """
    everyones: list[Any] | None = [None] * ranks.world_size if ranks.is_first else None
    dist.gather_object(own, everyones)
    if not ranks.is_first:
        return
    target = Path(path)
    target.parent.mkdir(exist_ok=True)
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            torch.save({"format": FORMAT, "shared": shared, "ranks": everyones}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
        _sync_folder(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def load(path: str, trajectory: dict[str, Any], ranks: Ranks) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """Read a checkpoint on rank 0's machine and hand it to every rank.

    All ranks must call it.

    Args:
        path: the file.
        trajectory: this run's options that decide the numbers; the checkpoint's must be the same.
        ranks: this process's place. With another number of ranks than the checkpoint's the batch of a rank may be
            another too, and the length may be given in another way.

    Returns:
        What all ranks share, and what each of those that wrote it had kept; None where there is no such file.

    Raises:
        UsageError: on all ranks alike, where the file is damaged, or of another run.
    """
    message: list[Any] = [None]
    if ranks.is_first:
        message[0] = _read(path, trajectory, ranks.world_size)
    dist.broadcast_object_list(message, src=0)
    if isinstance(message[0], str):
        raise UsageError(message[0])
    return None if message[0] is None else (message[0]["shared"], message[0]["ranks"])


def _read(path: str, trajectory: dict[str, Any], world_size: int) -> dict[str, Any] | str | None:
    """Return the checkpoint, None where there is none, or what is wrong with it in words."""
    if not Path(path).exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        return f"--checkpoint {path} cannot be read: {error.strerror}; make it readable, or take another"
    except Exception:  # noqa: BLE001  (torch raises whatever the damaged bytes lead to, in words that help nobody)
        return (
            f"--checkpoint {path} is damaged: its {Path(path).stat().st_size:,} bytes are no whole checkpoint. Put a "
            "copy in its place, or remove it and leave out --resume to start anew"
        )
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return f"--checkpoint {path} is no checkpoint of format {FORMAT}: remove it or take another"
    misfit = _misfit(content, trajectory, world_size)
    return content if misfit is None else f"--checkpoint {path} {misfit}"


def _misfit(content: dict[str, Any], trajectory: dict[str, Any], world_size: int) -> str | None:
    """Return why a run cannot go on from a checkpoint, None where it can."""
    kept, old_size = content["shared"]["options"], len(content["ranks"])
    if old_size != world_size and kept.get("num_steps") != trajectory["num_steps"]:
        return (
            f"was written by {old_size} ranks, for {kept.get('num_steps')} steps; for {world_size} ranks this would be "
            f"{trajectory['num_steps']}: give --steps {kept.get('num_steps')}, or start as many ranks"
        )
    free = _OF_A_WORLD_SIZE if old_size != world_size else ()
    differing = [name for name in trajectory if name not in free and kept.get(name) != trajectory[name]]
    if differing:
        name = differing[0]
        return (
            f"belongs to another run: --{name.replace('_', '-')} was {kept.get(name)}, "
            f"is {trajectory[name]}; give the same options, or another --checkpoint"
        )
    return None


def _sync_folder(folder: Path) -> None:
    # The rename itself must reach the disk; some network file systems know no fsync of a folder.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
