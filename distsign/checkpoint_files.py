"""The files of a checkpoint's folder: their digests, and reading them without running any code they might hold."""

from __future__ import annotations

import contextlib
import enum
import hashlib
import io
import json
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

__all__ = [
    "DIGESTS",
    "CheckpointError",
    "Planner",
    "Reader",
    "digest_of",
    "entry_of",
    "newest",
    "sync_folder",
    "verify_or_offer",
    "write_digests",
]

DIGESTS = "digests.json"
"""Written last, with the digest of every other file: a folder without it is no whole checkpoint."""
_METADATA = ".metadata"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or loaded; the message names the file and the reason."""


def entry_of(rank: int, ranks_per_node: int = 1) -> str:
    """Return the name under which a rank keeps what it has for itself, of which it may have a node's share."""
    return f"rank {rank}" if ranks_per_node == 1 else f"rank {rank}, {ranks_per_node} a node"


# ------------------------------------------------------------------------------------------------- digests and damage


def digest_of(path: Path) -> list[Any]:
    """Return size and digest of a file."""
    try:
        with path.open("rb") as file:
            return [path.stat().st_size, hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def write_digests(folder: Path, files: dict[str, list[Any]]) -> None:
    """Write the digests of all files, and of the index: from now on the folder is a whole checkpoint."""
    files = {**files, _METADATA: digest_of(folder / _METADATA)}
    partial = folder / f"{DIGESTS}.partial"
    try:
        with partial.open("w", encoding="utf-8") as file:
            json.dump({"files": files}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / DIGESTS)
        sync_folder(folder)
        sync_folder(folder.parent)  # where the folder itself is new
    except OSError as error:
        raise CheckpointError(f"{folder / DIGESTS} cannot be written: {error.strerror}") from error


def sync_folder(folder: Path) -> None:
    """Let renames in a folder reach the disk; some network file systems know no fsync of a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _verify(folder: Path, part: int = 0, num_parts: int = 1) -> None:
    """Hold files to their digests: every `num_parts`-th, from `part` on, and of all others their sizes."""
    index = folder / DIGESTS
    try:
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in _files_in(index).items()}
    except FileNotFoundError:
        reason = f"has no {DIGESTS}, which distsign.checkpoint.save writes last: it was broken off, or did not write it"
        raise CheckpointError(f"{folder} {reason if folder.is_dir() else 'is not there'}") from None
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged: it is no list of files and digests") from error
    for number, (name, (size, digest)) in enumerate(sorted(files.items())):
        path = folder / name
        try:
            found = path.stat().st_size
        except OSError as error:
            whose = f", which rank {name[2:].split('_')[0]} wrote," if name.startswith("__") else ""
            gone = isinstance(error, FileNotFoundError)
            reason = "is missing" if gone else f"cannot be read: {error.strerror}"
            raise CheckpointError(f"{path}{whose} {reason}") from error
        if found != size:
            raise CheckpointError(f"{path} is damaged: it has {found:,} bytes, {size:,} were written")
        if number % num_parts == part and digest_of(path)[1] != digest:
            raise CheckpointError(f"{path} is damaged: its bytes are not those that were written, by their digest")


def _files_in(index: Path) -> dict[str, list[Any]]:
    files: dict[str, list[Any]] = json.loads(index.read_text(encoding="utf-8"))["files"]
    return files


def verify_or_offer(folder: Path, part: int, num_parts: int) -> None:
    """Do what `_verify` does; an error also names the newest whole checkpoint beside it, where there is one."""
    try:
        _verify(folder, part, num_parts)
    except CheckpointError as error:
        found = newest(folder.parent)
        other = "another checkpoint" if found is None else f"{found}, the newest whole checkpoint beside it"
        raise CheckpointError(f"{error}; restore it, or load {other}") from error


def newest(folder: str | os.PathLike[str]) -> Path | None:
    """Return the checkpoint that was finished last of those in a folder and that is whole; None where there is none.

    Reads every file of it. Ranks may see it differently while one is written, or where folders are copied: let one rank
    ask, and tell the others.

    Args:
        folder: that the folders of checkpoints lie in.
    """
    parent = Path(folder)
    beside = parent.glob(f"*/{DIGESTS}") if parent.is_dir() else iter(())
    for index in sorted(beside, key=_when_written, reverse=True):
        with contextlib.suppress(CheckpointError):
            _verify(index.parent)
            return index.parent
    return None


def _when_written(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:  # another program may remove old checkpoints meanwhile
        return 0


# ----------------------------------------------------------------------------------- reading, without running any code


class _IndexUnpickler(pickle.Unpickler):
    """Unpickles the index of `torch.distributed.checkpoint`, which consists of these classes and of words."""

    _NAMES = frozenset(
        {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("pathlib", "PosixPath"),
            ("pathlib", "WindowsPath"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        known = (module, name) in self._NAMES
        if "." not in name and (known or module in {"torch", "torch.distributed.checkpoint.metadata"}):
            found = super().find_class(module, name)
            if known or isinstance(found, torch.dtype) or getattr(found, "__module__", None) == module != "torch":
                return found
        raise pickle.UnpicklingError(f"{_METADATA} wants to use {module}.{name}, which no checkpoint does")


def _member(kind: object, name: str) -> enum.Enum:
    """Return a member of an enumeration, which Python 3.11.0 to 3.11.3 pickle as a call of `getattr`."""
    if isinstance(kind, enum.EnumMeta) and name in kind.__members__:
        return kind.__members__[name]
    raise pickle.UnpicklingError(f"{_METADATA} wants {name!r} of {kind!r}, which no checkpoint does")


class Reader(FileSystemReader):
    """Reads files as `torch.distributed.checkpoint` does, and its index with the classes alone that belong there."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the index."""
        with (Path(self.path) / _METADATA).open("rb") as file:
            metadata: Metadata = _IndexUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class Planner(DefaultLoadPlanner):
    """Reads what there is under the names that are wanted, of whatever shape it is.

    Args:
        wanted: the names.
        votes: for those of them that each rank keeps for itself, this rank's entry.
        world_size: number of ranks; where as many have written in the same nodes, each reads its own alone.

    Attributes:
        names: that there are.
        own: those of `votes` of which this rank's own entry alone is read.
    """

    def __init__(self, wanted: set[str], votes: Mapping[str, str], world_size: int) -> None:
        super().__init__(flatten_state_dict=False)
        self._wanted, self._votes, self._world_size = wanted, votes, world_size
        self.names: set[str] = set()
        self.own: set[str] = set()
        self._paths: dict[str, Sequence[str | int]] = {}

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Make room for what is wanted."""
        assert metadata is not None
        paths: dict[str, Sequence[str | int]] = metadata.planner_data
        self.names = {str(path[0]) for path in paths.values()}
        for name, mine in self._votes.items():
            entries = {path[1] for path in paths.values() if path[0] == name and len(path) > 1}
            if mine in entries and len(entries) == self._world_size:
                self.own.add(name)
        for full_name, path in paths.items():
            is_anothers = path[0] in self.own and path[1] != self._votes[str(path[0])]
            if path[0] in self._wanted and not is_anothers:
                entry = metadata.state_dict_metadata[full_name]
                self._paths[full_name] = path
                state_dict[full_name] = None
                if isinstance(entry, TensorStorageMetadata):
                    state_dict[full_name] = torch.empty(entry.size, dtype=entry.properties.dtype)
        super().set_up_planner(state_dict, metadata, is_coordinator)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Take a value that is no tensor."""
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, map_location="cpu", weights_only=True)

    def nested(self) -> dict[str, Any]:
        """Return what was read as it was saved, in dicts and lists; dicts that were empty are not there."""
        root: dict[str | int, Any] = {}
        for full_name, path in self._paths.items():
            node = root
            for part in path[:-1]:
                node = node.setdefault(part, {})
            node[path[-1]] = self.state_dict[full_name]
        return {str(key): _with_lists(value) for key, value in root.items()}


def _with_lists(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    inside = {key: _with_lists(value) for key, value in node.items()}
    if inside and all(isinstance(key, int) for key in inside):
        return [inside[key] for key in sorted(inside)]
    return inside
