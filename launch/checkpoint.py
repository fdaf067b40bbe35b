"""The file that holds all a run needs to go on, what ranks share and what each keeps for itself, and the one before.

A file begins with its format, its length and a digest, so that damage of any kind is found before anything is taken
from it. `FILE.previous` is the checkpoint before `FILE`: it is there should `FILE` be damaged afterwards, or should the
run have died between the two renames that put a new one in place.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor

from distsign.checkpoint_files import sync_folder
from distsign.nest import put_tensors, take_tensors
from launch.options import RESUME_IF_THERE, RESUME_PREVIOUS, UsageError
from launch.runtime import Ranks

FORMAT = 2
_MAGIC = b"distsign checkpoint "
_HEADER = struct.Struct(f"<{len(_MAGIC)}sBQ16s")  # magic, format, bytes that follow, their XXH3 of 128 bits
_OF_A_WORLD_SIZE = ("batch_size", "steps", "epochs")


class UnusableError(Exception):
    """A file that no run can go on from; the message says why, and reads on from the file's name."""


@dataclass(frozen=True)
class Checkpoint:
    """What a run goes on from.

    Attributes:
        shared: what was the same on all ranks.
        ranks: what each of those that wrote it had kept for itself; empty on a rank that has its `own`.
        path: the file it is from.
        warning: why that is not the file that was asked for, in words; None where it is.
        own: what this rank had kept for itself; None where another number of ranks wrote it, which have it in `ranks`.
    """

    shared: dict[str, Any]
    ranks: list[dict[str, Any]]
    path: str
    warning: str | None = None
    own: dict[str, Any] | None = None


def previous_of(path: str) -> str:
    """Return where the checkpoint before the one at `path` lies."""
    return f"{path}.previous"


def save(path: str, shared: dict[str, Any], own: dict[str, Any], ranks: Ranks) -> None:
    """Write a checkpoint on rank 0's machine; a whole one of that name becomes the previous one.

    Wherever the process is killed, `path` or `previous_of(path)` is whole afterwards, if there was one. All ranks must
    call it.

    Args:
        path: the file; its folder is made where it is missing, but none above it.
        shared: what is the same on all ranks; rank 0's is kept.
        own: what this rank keeps for itself, such as carries.
        ranks: this process's place.

    Raises:
        UsageError: on all ranks alike, where the file cannot be written, as on a full disk.
    """
    everyones: list[Any] | None = [None] * ranks.world_size if ranks.is_first else None
    tensors: list[Tensor] = []
    nest = take_tensors(own, tensors)
    # Pickled on a device they would come to life again on that of the same number in rank 0's process.
    dist.gather_object(put_tensors(nest, [tensor.cpu() for tensor in tensors]), everyones)
    trouble: list[str | None] = [None]
    if ranks.is_first:
        try:
            write(path, {"shared": shared, "ranks": everyones})
        except OSError as error:
            trouble[0] = (
                f"--checkpoint {path} of step {shared['step']} cannot be written: {error.strerror or error}; what was "
                "written before is whole. Make room, then go on from it with --resume"
            )
    dist.broadcast_object_list(trouble, src=0)
    if trouble[0] is not None:
        raise UsageError(trouble[0])


def write(path: str, content: dict[str, Any]) -> None:
    """Put a file in place at once, whole, or not at all, and keep the whole one that it replaces as the previous."""
    target = Path(path)
    target.parent.mkdir(exist_ok=True)
    body = io.BytesIO()
    torch.save(content, body)
    data = body.getbuffer()
    # What a killed process has left; one that is still writing to the same name would be a mistake, and fails.
    for leftover in target.parent.iterdir():
        if leftover.name.startswith(f"{target.name}.partial-"):
            leftover.unlink(missing_ok=True)
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(_HEADER.pack(_MAGIC, FORMAT, len(data), xxhash.xxh3_128_digest(data)))
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # A damaged file must not take the place of a good previous one.
        with contextlib.suppress(UnusableError, FileNotFoundError):
            _body_of(target)
            target.replace(previous_of(path))
            sync_folder(target.parent)
        partial.replace(target)
        sync_folder(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def read(path: str) -> dict[str, Any]:
    """Return what `write` has put into a file; no code in it is run (`weights_only`).

    Raises:
        UnusableError: the file is damaged, or no checkpoint.
        FileNotFoundError: there is none.
    """
    try:
        content = torch.load(io.BytesIO(_body_of(Path(path))), map_location="cpu", weights_only=True)
    except (UnusableError, FileNotFoundError):
        raise
    except Exception as error:  # torch raises whatever the bytes lead to, in words that help nobody
        raise UnusableError("holds something else than numbers, words and tensors, which is not loaded") from error
    if not isinstance(content, dict) or content.keys() != {"shared", "ranks"}:
        raise UnusableError("is no checkpoint of launch.train")
    return content


def load(path: str, resume: str, trajectory: dict[str, Any], ranks: Ranks) -> Checkpoint | None:
    """Read a checkpoint on rank 0's machine and hand every rank what is its own, or all where ranks have changed.

    All ranks must call it.

    Args:
        path: the file.
        resume: the value of `--resume`. `"must"` takes the file; `"previous"` the one before it; `"if-there"` the file,
            or the one before it where the file cannot be used, or none where there is none of both.
        trajectory: this run's options that decide the numbers; the checkpoint's must be the same.
        ranks: this process's place. With another number of ranks than the checkpoint's the batch of a rank may be
            another too, and the length may be given in another way.

    Returns:
        The checkpoint; None where there is none and `resume` is `"if-there"`.

    Raises:
        UsageError: on all ranks alike, where there is no file, or it is damaged, foreign, or of another run.
    """
    message: list[Any] = [None]
    if ranks.is_first:
        try:
            message[0] = choose(path, resume, trajectory, ranks.world_size)
        except UsageError as error:
            message[0] = str(error)
    owns: list[dict[str, Any] | None] = [None] * ranks.world_size
    if isinstance(message[0], Checkpoint) and _are_as_they_were(message[0].ranks, trajectory, ranks):
        owns = [*message[0].ranks]
        message[0] = replace(message[0], ranks=[])
    dist.broadcast_object_list(message, src=0)
    if isinstance(message[0], str):
        raise UsageError(message[0])
    found: Checkpoint | None = message[0]
    if found is None or found.ranks:
        return found
    own: list[dict[str, Any] | None] = [None]
    dist.scatter_object_list(own, owns if ranks.is_first else None, src=0)
    return replace(found, own=own[0])


def _are_as_they_were(owns: list[dict[str, Any]], trajectory: dict[str, Any], ranks: Ranks) -> bool:
    """Return whether each rank can have its own again: there are as many, and in the same nodes where these matter."""
    per_node = owns[0]["hook"].get("ranks_per_node") if trajectory.get("exchange") == "hierarchical" else None
    return len(owns) == ranks.world_size and per_node in (None, ranks.local_world_size)


def choose(path: str, resume: str, trajectory: dict[str, Any], world_size: int) -> Checkpoint | None:
    """Do what `load` does, on one rank alone."""
    before = previous_of(path)
    if resume == RESUME_PREVIOUS:
        try:
            return _open(before, trajectory, world_size)
        except (FileNotFoundError, UnusableError) as error:
            raise UsageError(f"--resume previous: {_said(before, error)}") from error
    try:
        return _open(path, trajectory, world_size)
    except (FileNotFoundError, UnusableError) as error:
        trouble, is_missing = f"--checkpoint {_said(path, error)}", isinstance(error, FileNotFoundError)
    try:
        previous = _open(before, trajectory, world_size)
    except FileNotFoundError:
        if is_missing and resume == RESUME_IF_THERE:
            return None
        advice = "" if is_missing else "put a copy in its place, or remove it; "
        raise UsageError(f"{trouble}, and there is none before it: {advice}leave out --resume to start anew") from None
    except UnusableError as error:
        raise UsageError(
            f"{trouble}, and the one before it cannot be used either: {_said(before, error)}; put a copy in its place, "
            "or remove both and leave out --resume to start anew"
        ) from error
    step = previous.shared["step"]
    if resume == RESUME_IF_THERE:
        return Checkpoint(previous.shared, previous.ranks, before, f"{trouble}: going on from {before}, of step {step}")
    raise UsageError(f"{trouble}. The one before it, {before}, of step {step}, is whole: --resume previous takes it")


def _said(path: str, error: Exception) -> str:
    return f"{path} is not there" if isinstance(error, FileNotFoundError) else f"{path} {error}"


def _open(path: str, trajectory: dict[str, Any], world_size: int) -> Checkpoint:
    """Read a file and hold it to this run; a whole one of another run is the user's mistake, not damage."""
    content = read(path)
    misfit = _misfit(content, trajectory, world_size)
    if misfit is not None:
        raise UsageError(f"--checkpoint {path} {misfit}")
    return Checkpoint(content["shared"], content["ranks"], path)


def _body_of(path: Path) -> memoryview:
    """Return the bytes of a file's body, which are those that were written; raises what `read` does."""
    try:
        data = memoryview(path.read_bytes())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnusableError(f"cannot be read: {error.strerror}") from error
    start = bytes(data[: len(_MAGIC)])
    if start != _MAGIC[: len(start)]:
        raise UnusableError("is no checkpoint of launch.train: it begins with other bytes")
    if len(data) < _HEADER.size:
        raise UnusableError(f"is damaged: it ends after {len(data)} bytes, within its header")
    _, version, num_bytes, digest = _HEADER.unpack(data[: _HEADER.size])
    if version != FORMAT:
        raise UnusableError(f"is a checkpoint of format {version}, this is launch.train of format {FORMAT}")
    body = data[_HEADER.size :]
    if len(body) != num_bytes:
        raise UnusableError(f"is damaged: it has {len(body):,} bytes after its header, which says {num_bytes:,}")
    if xxhash.xxh3_128_digest(body) != digest:
        raise UnusableError("is damaged: its bytes are not those that were written, by their digest")
    return body


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
