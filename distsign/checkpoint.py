"""Checkpoints of all ranks in one folder, through `torch.distributed.checkpoint`.

Each rank writes a file of its own: its share of what all ranks have alike, the model and the optimizer, and all of what
it keeps for itself, the memory of its votes. `torch.distributed.checkpoint` alone would take a `SignVoteState` for one
of the things that are alike and keep that of one rank, drop an optimizer's state on load, and run code from the files.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.checkpoint.stateful import Stateful
from torch.nn.parameter import is_lazy

from distsign.checkpoint_files import (
    DIGESTS,
    CheckpointError,
    Planner,
    Reader,
    digest_of,
    entry_of,
    newest,
    verify_or_offer,
    write_digests,
)
from distsign.collectives import gather_values, rank_in, world_size_of
from distsign.hook import SignVoteState
from distsign.resharding import reshard

__all__ = ["CheckpointError", "load", "newest", "save"]

T = TypeVar("T")


def save(
    state_dict: dict[str, Any], checkpoint_id: str | os.PathLike[str], *, process_group: dist.ProcessGroup | None = None
) -> None:
    """Write a checkpoint into a folder that all ranks see. All ranks must call it.

    What is written are `torch.distributed.checkpoint`'s own files, so that its tools can read the model, and their
    digests (XXH3 of 128 bits), last. A folder whose writing was broken off can be written again.

    Args:
        state_dict: by any names, what to keep: `SignVoteState`, of which each rank keeps its own; and what is the same
            on all ranks: models, optimizers and all else that has a `state_dict`, tensors, numbers, words, and dicts
            and lists of those.
        checkpoint_id: the folder; each checkpoint needs one of its own, such as `runs/step-1000`.
        process_group: the ranks that write; None is the default group.

    Raises:
        ValueError: on all ranks alike, if the folder has a checkpoint already.
        CheckpointError: on all ranks alike, if something cannot be written.

    Example:
        >>> import tempfile
        >>> net, step = torch.nn.Linear(2, 2), 7
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save({"model": net, "step": step}, f"{folder}/step-7")
        ...     loaded = {"model": torch.nn.Linear(2, 2), "step": 0}
        ...     load(loaded, f"{folder}/step-7")
        >>> loaded["step"], bool((loaded["model"].weight == net.weight).all())
        (7, True)
    """
    folder = Path(checkpoint_id)
    if any(gather_values((folder / DIGESTS).exists(), process_group)):
        raise ValueError(f"{folder} holds a checkpoint already: give each checkpoint a folder of its own")
    rank = rank_in(process_group)
    content = {
        key: {entry_of(rank, value.ranks_per_node): _packed(value.state_dict())}
        if isinstance(value, SignVoteState)
        else value
        for key, value in state_dict.items()
    }
    with _in_one_line(folder, "written"):
        save_distributed(content, checkpoint_id=folder, process_group=process_group, no_dist=not _is_distributed())
    mine = _alike(lambda: {path.name: digest_of(path) for path in folder.glob(f"__{rank}_*")}, process_group)
    files = {name: digest for each in gather_values(mine, process_group) for name, digest in each.items()}

    def finish() -> None:
        if rank == 0:
            write_digests(folder, files)

    _alike(finish, process_group)


def load(
    state_dict: dict[str, Any], checkpoint_id: str | os.PathLike[str], *, process_group: dist.ProcessGroup | None = None
) -> None:
    """Load a checkpoint that `save` has written, on as many ranks or on others. All ranks must call it.

    Every file is held to its digest before anything is taken from it. No code is run that the files might hold: tensors
    and values are read with `weights_only`, and the index of `torch.distributed.checkpoint`, a pickle, with its own
    classes alone. With another number of ranks the states of the votes are made by `distsign.reshard`, which conserves
    the sum of what the carries hold, but for standing ballots (`owner_carry="standing"`), which are dropped.

    Args:
        state_dict: what to load, by the names it was saved under. What has a `load_state_dict` is loaded in place,
            models last, when all else did fit; what has none is replaced in the dict. Names that are not in the dict
            are not loaded.
        checkpoint_id: the folder.
        process_group: the ranks that load; None is the default group.

    Raises:
        CheckpointError: on all ranks alike, if a file is missing or damaged, if writing was broken off, or if something
            in `state_dict` was not saved or does not fit. Names the file or folder, the reason, and for what is damaged
            the newest whole checkpoint beside it.
    """
    folder, rank, world_size = Path(checkpoint_id), rank_in(process_group), world_size_of(process_group)
    _alike(lambda: verify_or_offer(folder, rank, world_size), process_group)
    votes = {key: value.ranks_per_node for key, value in state_dict.items() if isinstance(value, SignVoteState)}
    planner = Planner(set(state_dict), {key: entry_of(rank, each) for key, each in votes.items()}, world_size)
    found: dict[str, Any] = {}
    with _in_one_line(folder, "loaded"):
        load_distributed(
            found,
            storage_reader=Reader(folder),
            planner=planner,
            process_group=process_group,
            no_dist=not _is_distributed(),
        )
    loaded = planner.nested()
    missing = sorted(state_dict.keys() - loaded.keys())
    if missing:
        raise CheckpointError(f"{folder} has no {missing[0]!r}: it has {', '.join(sorted(planner.names))}")
    models = [key for key, value in state_dict.items() if isinstance(value, nn.Module)]
    others = [key for key in state_dict if key not in votes and key not in models]
    _alike(lambda: _require_shapes(folder, models, state_dict, loaded), process_group)

    def choose(key: str) -> None:
        states = _states(folder, key, loaded[key])
        loaded[key] = states[0] if key in planner.own else reshard(states, world_size, votes[key])[rank]

    # In the order of the dict: a part's own `load_state_dict` may be a collective. Models last, so that a part that
    # does not fit is found before they are changed.
    for do, keys in ((choose, votes), (partial(_take, state_dict, loaded), [*votes, *others, *models])):
        for key in keys:
            _alike(partial(_fitting, folder, key, do), process_group)


def _fitting(folder: Path, key: str, do: Callable[[str], None]) -> None:
    """Do something with a part; whatever its own code raises is an error that names the part."""
    try:
        do(key)
    except CheckpointError:
        raise
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"{folder}: {key!r} does not fit what was saved: {text}") from error


def _take(state_dict: dict[str, Any], loaded: Mapping[str, Any], key: str) -> None:
    """Let a part take up what was loaded for it."""
    value = state_dict[key]
    if isinstance(value, torch.optim.Optimizer):
        value.load_state_dict(_with_numbers(loaded[key]))
    elif isinstance(value, (Stateful, SignVoteState)):
        value.load_state_dict(loaded[key])
    else:
        state_dict[key] = loaded[key]


def _require_shapes(
    folder: Path, keys: Iterable[str], state_dict: Mapping[str, Any], loaded: Mapping[str, Any]
) -> None:
    """Demand that the tensors of models have the shapes that they had; of missing ones `load_state_dict` speaks."""
    for key in keys:
        for name, value in state_dict[key].state_dict().items():
            saved = loaded[key].get(name) if isinstance(loaded[key], Mapping) else None
            if not isinstance(value, Tensor) or is_lazy(value):  # the latter takes any shape
                continue
            if isinstance(saved, Tensor) and value.shape != saved.shape:
                raise CheckpointError(
                    f"{folder}: {key!r} is of another model: {name} was {tuple(saved.shape)} when it was saved, and is "
                    f"{tuple(value.shape)} here; load the checkpoint of this model"
                )


# ------------------------------------------------------------------------------------------------ what each rank keeps


def _packed(state: dict[str, Any]) -> Tensor:
    """Return a state as uint8 `[n]`: its keys are no names, and its parts are of other shapes on other ranks."""
    data = io.BytesIO()
    torch.save(state, data)
    return torch.frombuffer(data.getbuffer(), dtype=torch.uint8)


def _states(folder: Path, key: str, entries: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Return the states of votes that were read, in order of the ranks that wrote them."""
    if not all(name.startswith("rank ") for name in entries):
        raise CheckpointError(f"{folder}: {key!r} was not a SignVoteState when it was saved")
    in_order = sorted(entries, key=lambda name: int(name.removeprefix("rank ").partition(",")[0]))
    return [
        torch.load(io.BytesIO(entries[name].numpy().tobytes()), map_location="cpu", weights_only=True)
        for name in in_order
    ]


def _with_numbers(state: dict[str, Any]) -> dict[str, Any]:
    # torch.distributed.checkpoint makes words of keys, and knows nothing of empty dicts.
    return {**state, "state": {int(key): value for key, value in state.get("state", {}).items()}}


# ---------------------------------------------------------------------------------------------------------- all ranks


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _alike(action: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Do something that may fail on some ranks, and raise the first one's error on all."""
    result, trouble = None, None
    try:
        result = action()
    except CheckpointError as error:
        trouble = str(error)
    for rank, words in enumerate(gather_values(trouble, group)):
        if words is not None:
            raise CheckpointError(f"{words} (seen by rank {rank})")
    return result  # type: ignore[return-value]


@contextlib.contextmanager
def _in_one_line(folder: Path, done: str) -> Iterator[None]:
    """Turn the tracebacks of all ranks, which torch.distributed.checkpoint collects, into the first one's error."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled|Detected an existing checkpoint")
            yield
    except CheckpointException as error:
        rank, (cause, _) = sorted(error.failures.items())[0]
        text = " ".join(f"{type(cause).__name__}: {cause}".split())
        raise CheckpointError(f"{folder} cannot be {done}: on rank {rank} {text}") from error
