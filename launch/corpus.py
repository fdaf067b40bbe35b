"""The Python standard library's own source files as bytes: text that every machine has, split by a rule."""

from __future__ import annotations

import platform
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from launch.data import DataError

EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"})


@dataclass(frozen=True)
class Corpus:
    """Bytes for training and for validation.

    Attributes:
        train: uint8, one dimension: all training files, a zero byte after each.
        valid: uint8, likewise.
        source: where it came from, for people to read.
    """

    train: Tensor
    valid: Tensor
    source: str


def is_held_out(relative_path: str) -> bool:
    """Say whether a file is for validation: where the CRC-32 of its path (with `/`) is a multiple of ten."""
    return zlib.crc32(relative_path.encode()) % 10 == 0


def stdlib_files(root: Path) -> list[str]:
    """List the .py files below `root`, relative and sorted, without tests, IDLE and installed packages."""
    files = (path.relative_to(root) for path in root.rglob("*.py") if path.is_file())
    return sorted(path.as_posix() for path in files if EXCLUDED_FOLDERS.isdisjoint(path.parts[:-1]))


def load_stdlib(root: Path | None = None) -> Corpus:
    """Read the standard library's sources.

    Args:
        root: the folder; by default that of the Python that runs.

    Returns:
        The corpus. It differs between Python versions, which `source` names.

    Raises:
        DataError: there are no such files, as in an embedded Python that ships them compiled or zipped.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    parts: dict[bool, list[bytes]] = {False: [], True: []}
    for name in stdlib_files(root):
        parts[is_held_out(name)] += [(root / name).read_bytes(), b"\0"]
    if not parts[False] or not parts[True]:
        raise DataError(
            f"{root} has no Python source files to train and validate on; "
            "run a Python whose standard library is installed as .py files"
        )
    train, valid = (
        torch.from_numpy(np.frombuffer(b"".join(parts[held_out]), dtype=np.uint8).copy()) for held_out in (False, True)
    )
    return Corpus(train, valid, f"the standard library of Python {platform.python_version()}")
